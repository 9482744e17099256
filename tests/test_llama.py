"""The block against transformers: every family, whole and cut into every number of stages."""

import families
import pytest
import torch
from conftest import full_forward
from torch import Tensor

from flowspec.model.load import load_stage, load_whole
from flowspec.model.rows import run_rows
from flowspec.model.source import open_checkpoint
from flowspec.model.split import run_split
from flowspec.model.split_plan import even_layers, plan_split

TOLERANCE = 1e-4
TOKENS = [1, *((7 * i * i + 3) % families.VOCAB for i in range(99))]


def split_logits(folder, num_stages: int) -> Tensor:
    """Logits [n, V] of TOKENS, run through the stages of a split model one after another."""
    x, where = torch.tensor(TOKENS), range(len(TOKENS))
    for number in range(1, num_stages + 1):
        stage = load_stage(folder, number)
        x, _ = run_rows(stage, stage.new_cache(len(TOKENS)), x, where, parents=None)
    return stage.logits(x)


@pytest.fixture(scope="module", params=families.FAMILIES)
def checkpoint(request, tmp_path_factory):
    """(folder, reference logits [n, V]) of one family."""
    folder = tmp_path_factory.mktemp(request.param)
    model = families.save(folder, request.param)
    with torch.inference_mode():
        return folder, model(torch.tensor([TOKENS])).logits[0]


def test_whole_model_gives_the_logits_of_transformers(checkpoint):
    folder, expected = checkpoint
    model = load_whole(folder)
    hidden, _ = full_forward(model, TOKENS)
    logits = model.logits(hidden)
    assert expected.std() > 0.1, "a reference of near-equal logits would show nothing"
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("num_stages", range(1, families.NUM_LAYERS + 1))
def test_split_model_gives_the_logits_of_transformers(checkpoint, tmp_path, num_stages):
    folder, expected = checkpoint
    opened = open_checkpoint(folder)
    plan = plan_split(opened, layers=even_layers(families.NUM_LAYERS, num_stages))
    run_split(plan, tmp_path / "out", model_id="tiny")
    logits = split_logits(tmp_path / "out", num_stages)
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", ["llama2", "llama3", "qwen2"])
def test_configs_of_transformers_4_mean_the_same(tmp_path, family):
    model = families.save(tmp_path, family)
    families.old_style(tmp_path)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0]
    ours = load_whole(tmp_path)
    logits = ours.logits(full_forward(ours, TOKENS)[0])
    torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=0)


def test_llama3_rope_scaling_is_not_a_bystander(tmp_path):
    """Without this the llama3 case could pass with the scaling left out."""
    families.save(tmp_path, "llama3")
    scaled = load_whole(tmp_path)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace('"factor": 8.0', '"factor": 1.0'))
    plain = load_whole(tmp_path)
    gap = full_forward(scaled, TOKENS)[0] - full_forward(plain, TOKENS)[0]
    assert gap.abs().max() > 100 * TOLERANCE
