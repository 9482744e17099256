"""The block against transformers: every family, RoPE and window; whole, split and as a tree."""

import pytest
import torch
from torch import Tensor

from flowspec.model.attention_metadata import run_rows
from flowspec.model.kv_cache import COMMITTED
from flowspec.model.stage_model import StageModel
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.load import load_stage, load_whole
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import even_layers, plan_split
from tests.support import families
from tests.support.models import full_forward
from tests.support.tiny import CONFIG

TOLERANCE = 1e-4
TOKENS = [1, *((7 * i * i + 3) % families.VOCAB for i in range(99))]


def test_a_model_that_moves_takes_its_frequencies_along():
    """Between two forwards, as a stage that finds its GPU later would."""
    model = StageModel(CONFIG, first_layer=0, last_layer=1, with_embedding=False, with_head=False)
    for device in ("cpu", "meta"):
        model.to(device)
        hidden = torch.zeros(2, CONFIG.hidden_size, device=device)
        window = model.new_cache(4).append_tree((COMMITTED, 0))
        out, _ = model(hidden, torch.arange(2, device=device), window)
        assert out.device.type == device


def split_logits(folder, num_stages: int) -> Tensor:
    """Logits [n, V] of TOKENS, run through the stages of a split model one after another."""
    x, where = torch.tensor(TOKENS), range(len(TOKENS))
    for number in range(1, num_stages + 1):
        stage = load_stage(folder, number)
        x, _ = run_rows(stage, stage.new_cache(len(TOKENS)), x, where, parents=None)
    return stage.logits(x)


def split(folder, out, num_stages: int) -> None:
    """Write the model in `folder` to `out`, cut evenly."""
    plan = plan_split(open_checkpoint(folder), layers=even_layers(families.NUM_LAYERS, num_stages))
    run_split(plan, out, model_id="tiny")


def whole_logits(folder) -> Tensor:
    """Logits [n, V] of TOKENS from our whole model."""
    model = load_whole(folder)
    return model.logits(full_forward(model, TOKENS)[0])


def their_logits(model, tokens) -> Tensor:
    """Logits [n, V] of transformers."""
    with torch.inference_mode():
        return model(torch.tensor([tokens])).logits[0]


@pytest.fixture(scope="module", params=families.FAMILIES)
def checkpoint(request, tmp_path_factory):
    """(folder, reference logits [n, V]) of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    model = families.save(folder, request.param)
    return folder, their_logits(model, TOKENS)


def test_whole_model_gives_the_logits_of_transformers(checkpoint):
    folder, expected = checkpoint
    assert expected.std() > 0.1, "a reference of near-equal logits would show nothing"
    torch.testing.assert_close(whole_logits(folder), expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_stages", range(1, families.NUM_LAYERS + 1))
def test_split_model_gives_the_logits_of_transformers(checkpoint, tmp_path, num_stages):
    folder, expected = checkpoint
    split(folder, tmp_path / "out", num_stages)
    logits = split_logits(tmp_path / "out", num_stages)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("case", families.MATRIX)
def test_every_rope_and_window_whole_split_and_as_tree(case, tmp_path):
    """TOKENS is longer than the windows and than the contexts before scaling."""
    reference = families.save(tmp_path, case)
    expected = their_logits(reference, TOKENS)
    torch.testing.assert_close(whole_logits(tmp_path), expected, atol=TOLERANCE, rtol=0)
    for num_stages in (2, 3):
        out = tmp_path / f"{num_stages}"
        split(tmp_path, out, num_stages)
        logits = split_logits(out, num_stages)
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)
    for stable_context in (None, 96):
        check_tree(reference, load_whole(tmp_path), stable_context)
    families.old_style(tmp_path)
    torch.testing.assert_close(whole_logits(tmp_path), expected, atol=TOLERANCE, rtol=0)


def check_tree(reference, model, stable_context: int | None) -> None:
    """A branching tree across the window's border, re-rooted halfway: each row as its own path."""
    cache = model.new_cache(160, stable_context=stable_context)
    texts: list[list[int]] = []  # by tree row
    prefix = TOKENS[: families.WINDOW - 3]
    run_rows(model, cache, torch.tensor(prefix), range(len(prefix)), parents=None)

    def grow(parents) -> None:
        for row, parent in enumerate(parents):
            above = prefix if parent == COMMITTED else texts[parent]
            texts.append([*above, (11 * row + len(texts)) % families.VOCAB])
        own = texts[-len(parents) :]
        tokens = torch.tensor([text[-1] for text in own])
        where = [len(text) - 1 for text in own]
        logits = model.logits(run_rows(model, cache, tokens, where, parents=parents)[0])
        expected = torch.stack([their_logits(reference, text)[-1] for text in own])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)

    grow([COMMITTED, 0, 1, 1, COMMITTED, 2, 5, 3, 6])
    grow([8, 7, 8, 9])
    cache.reroot([0, 1, 2], [5, 6, 8, 9, 11])
    prefix, texts = texts[2], [texts[row] for row in (5, 6, 8, 9, 11)]
    grow([3, 4, COMMITTED])
    cache.reroot([0], [1, 2, 3, 4, 5, 6])
    prefix, texts = texts[0], texts[1:7]
    grow([4])


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2"])
def test_configs_of_transformers_4_mean_the_same(tmp_path, family):
    model = families.save(tmp_path, family)
    families.old_style(tmp_path)
    expected = their_logits(model, TOKENS)
    torch.testing.assert_close(whole_logits(tmp_path), expected, atol=TOLERANCE, rtol=0)


def test_llama3_rope_scaling_is_not_a_bystander(tmp_path):
    """Without this the llama3 case could pass with the scaling left out."""
    families.save(tmp_path, "llama3")
    scaled = load_whole(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"factor": 8.0', '"factor": 1.0'))
    plain = load_whole(tmp_path)
    gap = full_forward(scaled, TOKENS)[0] - full_forward(plain, TOKENS)[0]
    assert gap.abs().max() > 100 * TOLERANCE
