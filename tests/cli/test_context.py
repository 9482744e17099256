"""The context: that of the stretched model, more with a warning, less as one likes."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flowspec.cli.main import app
from tests.support.checkpoints import save_checkpoint

LONG = "a fox in a box " * 16  # over 64 tokens, with the answer under 256
SCALINGS: dict[str, tuple[int, dict[str, Any]]] = {  # each with what was the limit before
    "linear": (64, {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    "vicuna": (
        64,
        {"rope_scaling": {"type": "linear", "factor": 4.0}, "max_sequence_length": 256},
    ),
    "yarn": (
        64,
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
                "rope_theta": 10000.0,
            }
        },
    ),
    "yarn, its length raised": (
        256,
        {
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 64,
            }
        },
    ),
}
Command = Callable[..., Result]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target/` of two layers."""
    return save_checkpoint(tmp_path_factory.mktemp("context") / "tiny", num_layers=2)


@pytest.fixture
def command(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`flowspec NAME --context N` on the model with a changed config, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    target = tmp_path / "target"
    target.mkdir()
    for file in (tiny / "target").iterdir():
        (target / file.name).symlink_to(file)

    def run(
        name: str, length: int, config: dict[str, Any], *words: str, text: str = LONG
    ) -> Result:
        content = json.loads((tiny / "target/config.json").read_text())
        (target / "config.json").unlink()
        content |= {"max_position_embeddings": length, **config}
        (target / "config.json").write_text(json.dumps(content))
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text(json.dumps({"prompt": text}) + "\n")
        given = {
            "verify": ["verify", str(target), "--prompts", str(prompts), "--stages", "1"],
            "bench": ["bench", "--model", str(target), "--datasets", str(prompts), "--jobs", "1",
                      "--cluster", "agx-5", "--stages", "2"],
        }[name]  # fmt: skip
        given += ["--strategies", "ar", "--temperatures", "0", "--max-tokens", "4"]
        return CliRunner().invoke(app, [*given, *words])

    return run


@pytest.mark.parametrize("scaling", SCALINGS)
def test_the_context_is_that_of_the_stretched_model(command: Command, scaling: str) -> None:
    """A prompt beyond the context before scaling is answered; one beyond the other is not."""
    length, config = SCALINGS[scaling]
    result = command("verify", length, config)
    assert result.exit_code == 0, result.output
    assert "1 runs, 0 mismatches" in result.output
    too_long = command("verify", length, config, text=LONG * 3)
    assert "longer than the context of 256 tokens; give shorter ones, or raise --context" in str(
        too_long.exception
    )


@pytest.mark.parametrize("name", ["verify", "bench"])
def test_the_context_may_be_lowered(command: Command, name: str) -> None:
    refused = command(name, 512, {}, "--context", "80")
    assert "longer than the context" in str(refused.exception)
    assert "raise --context" in str(refused.exception)
    assert command(name, 512, {}, "--context", "200").exit_code == 0


@pytest.mark.parametrize("name", ["verify", "bench"])
def test_the_context_may_be_raised_with_a_warning(
    command: Command, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What was left out before is asked then, though all of it has been run."""
    length = {"verify": 60, "bench": 61}[name]  # warnings are told once per process
    assert "longer than the context" in str(command(name, length, {}).exception)
    assert not caplog.records
    result = command(name, length, {}, "--context", "300")
    assert result.exit_code == 0, result.output
    said = [record.getMessage() for record in caplog.records]
    assert said == [
        f"--context 300 is more than the {length} tokens that the model was made for; what it "
        "says beyond them may make no sense"
    ]


def test_the_context_of_a_cluster_is_its_own(command: Command) -> None:
    words = ("--real", "--head", "localhost:1", "--context", "300")
    plain = ["bench", *words]
    result = CliRunner().invoke(app, plain)
    assert "--context is the cluster's own: `flowspec serve`" in str(result.exception)
