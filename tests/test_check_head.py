"""`flowspec check-head`: the family, all that is wrong at once, and tau of what runs."""

import re
from pathlib import Path

import pytest
import torch
from checkpoints import save_checkpoint
from heads import save_eagle3
from typer.testing import CliRunner, Result

from flowspec.cli.check_head import _score
from flowspec.cli.main import app
from flowspec.model.config import ModelConfig, read_config
from flowspec.request import DecodeStats


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target/` of eight layers, `eagle/`, and a file of two prompts."""
    folder = save_checkpoint(tmp_path_factory.mktemp("heads") / "tiny", num_layers=8)
    (folder / "prompts.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "my box"}\n')
    return folder


@pytest.fixture
def target(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModelConfig:
    """The target's config; the command writes its split to ./out, which is a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return read_config(tiny / "target")


def check(tiny: Path, head: Path | str, *more: str) -> Result:
    """Run the command on `head`."""
    words = ["check-head", str(tiny / "target"), str(head), "--prompts"]
    return CliRunner().invoke(
        app, [*words, str(tiny / "prompts.jsonl"), "--max-tokens", "6", *more]
    )


def words_of(result: Result) -> str:
    """The output on one line, out of its boxes."""
    return " ".join(result.output.replace("│", " ").split())


def has_tau(result: Result) -> bool:
    """Whether both shapes of draft were measured."""
    return {"tree", "chain"} == set(re.findall(r"^(\w+): tau \d", result.output, re.MULTILINE))


def test_a_head_that_fits_is_named_and_measured(tiny, target) -> None:
    save_eagle3(Path("head"), target, "speculators", layers=(0, 4, 7))
    result = check(tiny, "head")
    assert result.exit_code == 0, result.output
    assert has_tau(result)
    for words in ("EAGLE-3 head", "recognised by", "speculators form", "outputs of layers 0, 4, 7",
                  f"13 of {target.vocab_size} tokens"):  # fmt: skip
        assert words in result.output


def test_an_eagle1_head_is_measured_as_one(tiny, target) -> None:
    result = check(tiny, tiny / "eagle", "--limit", "1")
    assert result.exit_code == 0, result.output
    assert "EAGLE-1/2 head" in result.output
    assert has_tau(result)
    assert "every tensor and every config key fits" in result.output


def test_everything_wrong_is_listed_at_once(tiny, target) -> None:
    """One run tells all there is to repair; nothing is measured."""
    save_eagle3(
        Path("head"),
        target,
        layers=(1, 3, 9),
        hf={"vocab_size": 61, "num_attention_heads": 3, "draft_vocab_size": 99, "fc_norm": True},
        drop=("norm.weight", "midlayer.mlp.up_proj.weight"),
        add={
            "extra.weight": torch.ones(2),
            "other.bias": torch.ones(3),
            "midlayer.hidden_norm.weight": torch.ones(5),
            "d2t": torch.full((13,), 400),
        },
    )
    result = check(tiny, "head")
    assert result.exit_code == 1, result.output
    assert not has_tau(result)
    output = words_of(result)
    for words in ("norm.weight [32]", "midlayer.mlp.up_proj.weight", "extra.weight [2]",
                  "other.bias [3]", "hidden_norm.weight is [5], needed [32]", "vocab_size is 61",
                  "no 3 heads", "draft_vocab_size is 99", "[1, 3, 9] do not all lie", "fc_norm is",
                  "d2t leads 13 of 13"):  # fmt: skip
        assert words in output, words


def test_a_contradiction_is_reported_and_the_tensors_are_believed(tiny, target) -> None:
    save_eagle3(Path("head"), target, hf={"draft_vocab_size": 99})
    result = check(tiny, "head", "--limit", "1")
    assert result.exit_code == 1, result.output
    assert "contradiction" in result.output
    assert has_tau(result)


@pytest.mark.parametrize(("origin", "ids"), [("speculators", (0, 2, 3)), ("specforge", (2, 4, 5))])
def test_layer_ids_of_the_other_convention_are_suspected(tiny, target, origin, ids) -> None:
    """Here [1, 3, 4] counted by input, or [2, 4, 5] by output: the usual layers, off by one."""
    save_eagle3(Path("head"), target, origin, layers=ids)
    result = check(tiny, "head", "--limit", "1")
    assert result.exit_code == 1, result.output
    assert "counted layers the other way" in words_of(result)


def test_a_family_without_a_drafter_is_named(tiny, target) -> None:
    save_eagle3(Path("head"), target, add={"mask_hidden": torch.ones(1, 1, 96)})
    result = check(tiny, "head")
    assert result.exit_code == 1, result.output
    assert "no drafter runs a P-EAGLE head" in words_of(result)
    assert not has_tau(result)


def test_a_damaged_config_is_one_finding_among_others(tiny, target) -> None:
    save_eagle3(Path("head"), target, drop=("norm.weight",))
    Path("head/config.json").write_text("{")
    output = words_of(check(tiny, "head"))
    assert "cannot be read as JSON" in output
    assert "norm.weight [32]" in output


def test_acceptance_by_depth_counts_what_was_reached() -> None:
    """Runs of 0, 2 and 3 drafts ended by a miss, one of 2 by the end of the text."""
    stats = DecodeStats(num_tokens=11, num_verdicts=4, runs=[0, 2, 3], run_length=2)
    score = _score("chain", [stats], levels=4)
    assert score.by_depth == (3 / 4, 1.0, 1 / 2, 0.0)
    assert score.tau == 10 / 4
