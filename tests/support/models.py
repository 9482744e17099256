"""Shared tiny models: random weights that matter, fp32, seconds on one core.

A test that needs other sizes calls these functions; the fixtures of conftest.py use them too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from flowspec.model.architecture import ModelConfig
from flowspec.model.attention_metadata import run_rows
from flowspec.model.stage_model import StageModel
from flowspec.speculation.drafters.eagle.drafter import EagleDrafter
from flowspec.speculation.drafters.eagle.network import EagleNet

TINY = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
    max_position_embeddings=512,
)
TINY_MHA = replace(TINY, num_kv_heads=4)
TINY_MQA = replace(TINY, num_kv_heads=1)


def randomize(net: nn.Module, seed: int, *, scale: float = 1.5) -> None:
    """Set weights so large that every layer and every context token changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if name.endswith("norm.weight"):
                weight.copy_(1.0 + 0.1 * noise)
            elif "embed" in name:
                weight.copy_(noise)
            else:
                weight.copy_(noise * scale / weight.shape[-1] ** 0.5)
    net.requires_grad_(False)


def make_model(
    config: ModelConfig = TINY, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> StageModel:
    """Return the whole target: every layer, embedding and lm_head."""
    model = StageModel(
        config, first_layer=0, last_layer=config.num_layers, with_embedding=True, with_head=True
    )
    randomize(model, seed)
    return model.to(dtype)


def split_model(whole: StageModel, counts: Sequence[int]) -> list[StageModel]:
    """Split the model into stages of `counts` layers that share its weights."""
    assert sum(counts) == whole.config.num_layers
    weights = whole.state_dict()
    stages, first = [], 0
    for count in counts:
        last = first + count
        with torch.device("meta"):
            stage = StageModel(
                whole.config,
                first_layer=first,
                last_layer=last,
                with_embedding=first == 0,
                with_head=last == whole.config.num_layers,
            )
        own = {name: weights[name] for name in stage.state_dict()}
        stage.load_state_dict(own, assign=True)
        stages.append(stage.requires_grad_(False))
        first = last
    return stages


def make_drafter(model: StageModel, *, seed: int = 1) -> EagleDrafter:
    """Return a random EAGLE head with `model`'s lm_head; its guesses are poor but reproducible."""
    net = EagleNet(replace(model.config, num_layers=1), fc_bias=True)
    randomize(net, seed, scale=0.6)  # it reads its own output, which must not grow
    assert model.lm_head is not None
    return EagleDrafter(net.to(model.dtype), model.lm_head.weight)


def full_forward(
    model: StageModel, tokens: Sequence[int], *, hidden_states: Sequence[int] = ()
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Return hidden states [n, H] of a text in one forward, and those of the given layers."""
    cache = model.new_cache(len(tokens))
    where = range(len(tokens))
    return run_rows(
        model,
        cache,
        torch.tensor(tokens),
        where,
        parents=None,
        aux_hidden_state_layers=tuple(hidden_states),
    )


def cut(rows: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Cut `rows` into runs of `sizes`, repeated until all rows are used."""
    runs, start, turn = [], 0, 0
    while start < len(rows):
        size = sizes[turn % len(sizes)]
        runs.append(list(rows[start : start + size]))
        start, turn = start + size, turn + 1
    return runs
