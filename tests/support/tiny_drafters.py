"""Every drafter that is a model, small and untrained, for the tiny target."""

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from flowspec.model.stage_model import StageModel
from flowspec.speculation.drafters.cached import IncrementalDrafter
from flowspec.speculation.drafters.draft_model import DraftModelDrafter
from flowspec.speculation.drafters.eagle.drafter import EagleDrafter
from flowspec.speculation.drafters.eagle.network import EagleNet
from flowspec.speculation.drafters.eagle3.drafter import Eagle3Drafter
from flowspec.speculation.drafters.eagle3.network import Eagle3Layout, Eagle3Net
from tests.support.tiny import CONFIG, VOCAB, randomize, whole_model

# the head's vocabulary: some tokens of the target, unordered
DRAFT_TO_TARGET = tuple((7 * i + 3) % VOCAB for i in range(VOCAB - 6))


@lru_cache(maxsize=1)
def eagle_drafter() -> EagleDrafter:
    """Return an untrained EAGLE head, which is sometimes right by chance."""
    net = EagleNet(replace(CONFIG, num_layers=1), fc_bias=True)
    randomize(net, seed=2)
    lm_head = whole_model().lm_head
    assert lm_head is not None
    return EagleDrafter(net, lm_head.weight)


@lru_cache(maxsize=1)
def eagle3_drafter() -> Eagle3Drafter:
    """Return an untrained EAGLE-3 head, narrower than the target, with its own vocabulary."""
    config = replace(CONFIG, num_layers=1, hidden_size=24, num_heads=3, num_kv_heads=1)
    layout = Eagle3Layout(aux_hidden_state_layers=(1, 4, 6), target_hidden_size=CONFIG.hidden_size)
    net = Eagle3Net(config, layout, draft_to_target=torch.tensor(DRAFT_TO_TARGET))
    randomize(net, seed=4)
    return Eagle3Drafter(net)


@lru_cache(maxsize=8)
def draft_model(*, vocab_size: int = VOCAB + 5, max_positions: int = 256) -> DraftModelDrafter:
    """The target's first layers: often right. Its embedding is padded beyond the target's."""
    config = replace(
        CONFIG, num_layers=3, vocab_size=vocab_size, max_position_embeddings=max_positions
    )
    model = StageModel(config, first_layer=0, last_layer=3, with_embedding=True, with_head=True)
    randomize(model, seed=6)
    target = whole_model().state_dict()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            rows = min(len(weight), len(target[name]))
            weight[:rows] = target[name][:rows]
    return DraftModelDrafter(model, vocab_size=VOCAB)


def causal_attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each row sees itself and all rows before it."""
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, dim=1), v.repeat_interleave(share, dim=1)
    scores = torch.einsum("nhd,mhd->hnm", q, k) / q.shape[-1] ** 0.5
    mask = torch.ones(len(q), len(q), dtype=torch.bool).tril()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weights, v)


MODEL_DRAFTERS = ("eagle", "eagle3", "draft_model")


def model_drafter(name: str) -> IncrementalDrafter:
    """One of MODEL_DRAFTERS."""
    return {"eagle": eagle_drafter, "eagle3": eagle3_drafter, "draft_model": draft_model}[name]()
