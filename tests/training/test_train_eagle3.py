"""Training of the EAGLE-3 head exports what is served, and the head learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from flowspec.model.architecture import ModelConfig
from flowspec.model.kv_cache import TreeKVCache
from flowspec.model.llama import rope_angles, rope_frequencies
from flowspec.speculation.drafters.eagle3.load import load_eagle3
from flowspec.speculation.drafters.eagle3.network import Eagle3Layout
from flowspec.training import (
    eagle3_from_eagle,
    fast_eagle,
    fast_eagle3,
    train_drafters,
    train_eagle3,
)
from flowspec.training.fast_llama import FastLlama, Shape, block_forward, document_bias, rope_table
from flowspec.weights.load import load_whole

ROOT = Path(__file__).resolve().parents[2]


SHAPE = Shape(vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=5, num_heads=2,
              num_kv_heads=1)  # fmt: skip
LAYERS = (1, 2, 4)
STEPS = 4
PLAN = train_eagle3.Eagle3TrainingPlan(
    layers=LAYERS, draft_vocab=40, minutes=1.0, checkpoint=Path("eagle3.pt"), steps=STEPS
)


@pytest.fixture(scope="module")
def target() -> FastLlama:
    """Return a random target whose layers change the output, without compilation."""
    model = FastLlama(SHAPE)
    model.block = block_forward
    with torch.no_grad():
        for layer in model.layers:
            for weight in list(layer)[:4]:
                weight.copy_(torch.randn_like(weight.float()) * 0.2)
    return model.requires_grad_(False)


def samples(count: int) -> list[tuple[np.ndarray, int]]:
    """Return sentences of a pattern: each token is its predecessor plus five."""
    rng = np.random.default_rng(0)
    return [
        (np.array([1, 4, *((int(first) + 5 * np.arange(20)) % 58 + 6)], dtype=np.uint16), 6)
        for first in rng.integers(0, 58, count)
    ]


def make_head(target: FastLlama, ids: torch.Tensor) -> fast_eagle3.FastEagle3:
    """Return a head that is not compiled, with weights that change the output."""
    head = fast_eagle3.FastEagle3(target, ids, (2, 2, 16), train_eagle3.INTERMEDIATE)
    head.step = fast_eagle3.draft_step
    return head


def test_the_draft_vocabulary_is_what_the_answers_say():
    """Prompts do not count; ids ascend, so that offsets are never negative."""
    pieces = [(np.array([9, 9, 9, 3, 5, 5, 7], dtype=np.uint16), 3)]
    assert fast_eagle3.draft_vocabulary(pieces, 12, 2).tolist() == [3, 5]


def test_features_come_low_to_high_before_the_last(target):
    tokens = torch.randint(6, 64, (1, 9))
    wide = target.features(tokens, document_bias(tokens), LAYERS)
    assert wide.shape == (1, 9, 4 * 32)
    assert torch.equal(wide[..., 96:], target.features(tokens, document_bias(tokens)))
    deeper = target.features(tokens, document_bias(tokens), (4,))
    assert torch.equal(wide[..., 64:96], deeper[..., :32])


def test_starts_are_answers_with_room_below():
    tokens = torch.tensor([[1, 8, 8, 8, 8, 8, 8, 8, 8, 1, 8, 8, 8]])
    answer = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0, 1]]).bool()
    starts, counts = train_drafters.choose_starts(tokens, answer, 5, 3)
    assert set(starts[0].tolist()) < {1, 2, 3, 4, 5, 6}
    # What a later step of a start near the end guesses is of another sample, and does not count.
    for step, row in enumerate(counts):
        for start, counted in zip(starts[0].tolist(), row[0].tolist(), strict=True):
            assert counted == (3 <= start + 2 + step <= 8)


def test_unrolled_training_is_what_the_served_head_computes(target, tmp_path):
    """Step k of a chain equals k rows of Eagle3Net over its tree cache, each on the one before."""
    torch.manual_seed(3)
    ids = fast_eagle3.draft_vocabulary(samples(30), 64, 40)
    head = make_head(target, ids)
    with torch.no_grad():
        for weight in [head.fc, head.norm, *head.layer]:
            weight.add_(torch.randn_like(weight.float()) * 0.1)
    train_eagle3.export(head, target, PLAN, tmp_path)
    config = ModelConfig.from_hf(target.hf_config())
    net = load_eagle3(
        tmp_path, target_config=config, embedding=target.embed.detach(), dtype="float32"
    )
    assert net.aux_hidden_state_layers == LAYERS
    assert net.draft_to_target.tolist() == ids.tolist()

    tokens, start = torch.randint(6, 64, (1, 13)), 6
    wide = target.features(tokens[:, :-1], document_bias(tokens[:, :-1]), LAYERS)
    sees = torch.ones(1, 12, 12, dtype=torch.bool).tril()
    with torch.no_grad():
        first, chains = head.unroll(
            tokens[:, 1:], wide[..., :96], rope_table(SHAPE, 12), sees, torch.tensor([[start]]),
            STEPS,
        )  # fmt: skip
    cache = TreeKVCache(num_layers=1, num_kv_heads=2, head_dim=16, capacity=32)
    fused, frequencies = net.fuse(wide[0, :, :96].float()), rope_frequencies(net.config)
    rope = rope_angles(frequencies, torch.arange(start + 1), torch.float32)
    window = cache.append_prefix(start + 1)
    states = net(tokens[0, 1 : start + 2], fused[: start + 1], rope, window.attend(0))
    outputs, state = [first[0, start]], states[-1:]
    outputs += [out[0, 0] for out in chains]
    for k, trained in enumerate(outputs):
        difference = (state[0] - trained.float()).norm() / trained.float().norm()
        assert difference < 0.03, f"step {k + 1}"
        logits = head.states(trained) @ head.lm_head.T
        assert torch.allclose(net.logits(state)[0], logits.float(), atol=0.1)
        rope = rope_angles(frequencies, torch.tensor([start + k + 1]), torch.float32)
        window = cache.append_tree([k - 1])
        state = net(tokens[0, start + k + 2][None], state, rope, window.attend(0))


def test_a_head_begins_as_an_eagle_1_head_of_the_target(target):
    """It predicts the same, step by step, except for what the norms remove."""
    torch.manual_seed(5)
    heads = (2, 2, 16)
    old = fast_eagle.FastEagle(target.embed.detach(), heads, train_eagle3.INTERMEDIATE)
    old.step = fast_eagle.draft_step
    fc, _, qkv, o, *_, down, _ = list(old.weights)
    with torch.no_grad():
        parts = ((fc[:, :32], 1.0), (fc[:, 32:], 0.1), (qkv, 0.2), (o, 0.1), (down, 0.01))
        for weight, scale in parts:
            weight.add_(torch.randn_like(weight.float()) * scale)
    doubled = eagle3_from_eagle.doubled(heads)
    head = fast_eagle3.FastEagle3(target, torch.arange(64), doubled, train_eagle3.INTERMEDIATE)
    head.step = fast_eagle3.draft_step
    eagle3_from_eagle.begin_as(head, old, target, torch.randint(6, 64, (32, 41)))

    tokens = torch.randint(6, 64, (4, 41))
    wide = target.features(tokens[:, :-1], document_bias(tokens[:, :-1]), LAYERS)
    sees = torch.ones(4, 40, 40, dtype=torch.bool).tril()
    starts = torch.arange(5, 35).repeat(4, 1)

    def said(head) -> list[torch.Tensor]:
        features = wide[..., 96:] if head is old else wide[..., :96]
        first, (second,) = head.unroll(
            tokens[:, 1:], features, rope_table(SHAPE, 40), sees, starts, 2
        )
        return [first, second] if head is old else [head.states(first), head.states(second)]

    def likeness(head) -> list[float]:
        pairs = zip(said(old), said(head), strict=True)
        return [float(torch.cosine_similarity(a, b, dim=-1).mean()) for a, b in pairs]

    with torch.no_grad():
        assert min(likeness(head)) > 0.85
        assert max(likeness(make_head(target, torch.arange(64)))) < 0.8


def test_an_exported_head_is_taken_up_whole(target):
    """Training continues from the export, only with the same draft vocabulary."""
    ids = fast_eagle3.draft_vocabulary(samples(30), 64, 40)
    head, again = make_head(target, ids), make_head(target, ids)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.randn_like(weight.float()))
    again.load(head.tensors(64))
    saved = again.tensors(64)
    assert all(torch.equal(saved[name], value) for name, value in head.tensors(64).items())
    with pytest.raises(AssertionError, match="vocabulary"):
        make_head(target, torch.arange(40)).load(saved)


@pytest.mark.slow
def test_a_few_steps_of_training_lower_the_loss_at_every_depth(target):
    """All parts of the head are trained, and the smaller vocabulary does not prevent it."""
    ids = fast_eagle3.draft_vocabulary(samples(60), 64, 56)
    head = make_head(target, ids)
    (block, _) = train_drafters.make_blocks(samples(60), 0, LAYERS, {48: 4, 96: 1})
    optimizer = train_eagle3.make_optimizer(head)
    history = []
    for _ in range(12):
        loss, kl, states, truths = train_eagle3.eagle3_loss(
            head, target, block.batch(target, 0), STEPS
        )
        loss.backward()
        optimizer.step(1.0)
        history.append(kl)
    assert all(len(s) == len(t) > 0 for s, t in zip(states, truths, strict=True))
    assert (history[-1] < 0.7 * history[0]).all(), (history[0], history[-1])


def test_the_shipped_head_is_official_and_complete():
    """It contains offsets, mask and layer ids; the embedding is the target's."""
    shipped = ROOT / "models" / "demo"
    whole = load_whole(shipped / "target", dtype="float32")
    net = load_eagle3(
        shipped / "eagle3",
        target_config=whole.config,
        embedding=whole.get_parameter("model.embed_tokens.weight"),
        dtype="float32",
    )
    config = json.loads((shipped / "eagle3" / "config.json").read_text())
    named = config["eagle_config"]["eagle_aux_hidden_state_layer_ids"]
    assert net.aux_hidden_state_layers == tuple(named)
    assert config["draft_vocab_size"] == len(net.draft_to_target) < whole.config.vocab_size
    size = whole.config.hidden_size
    assert net.layout == Eagle3Layout(
        aux_hidden_state_layers=net.aux_hidden_state_layers, target_hidden_size=size
    )
