"""`--run-config`: a file of plain assignments stands for options, and options win over it."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from flowspec.cli.main import app
from flowspec.cli.run_config import RunFile, expanded, options_of, read_run_file
from flowspec.config import EngineConfig

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "config" / "run_config.py"
SAME = {"--max-tokens": "--max-new-tokens"}


def write(tmp_path: Path, text: str) -> Path:
    """A file with this content."""
    path = tmp_path / "run_config.py"
    path.write_text(text)
    return path


def effective(*words: str) -> EngineConfig:
    """What `flowspec run *words --show-config` says."""
    shown = CliRunner().invoke(app, ["run", *words, "--show-config"])
    assert shown.exit_code == 0, (shown.output, shown.exception)
    return EngineConfig(**yaml.safe_load(shown.stdout))


def test_the_bundled_file_changes_nothing_of_a_run() -> None:
    """run_pipe.sh runs what it ran before there was such a file."""
    assert effective("--run-config", str(BUNDLED)) == effective()


def test_the_names_of_the_published_layout(tmp_path: Path) -> None:
    """Model, paths, method, quant, temperatures, lengths and questions, for run and for bench."""
    file = read_run_file(
        write(
            tmp_path,
            "base_model_dir = 'big'\nEAGLE_model_path: str = 'head'\nnum_stage = 5\n"
            "pipeline_type = 'continuous'\npipeline_types = ['serial', 'naive', 'streaming']\n"
            "temperature = 1\ntemperatures = [0.0, 1.0]\nmax_new_tokens = 256\n"
            "your_message = 'who?'\ndataset_names = ['gsm8k', 'qa']\n"
            "question_begin = 30\nquestion_end = 50\nquant = False\ndevice = 'cuda'\n",
        )
    )
    both = {"--model": "big", "--draft": "head", "--stages": "4"}
    assert options_of("run", file) == {
        **both,
        "--strategy": "flowspec",
        "--temperature": "1",
        "--max-new-tokens": "256",
        "--prompt": "who?",
        "--device": "cuda",
    }
    assert options_of("bench", file) == {
        **both,
        "--strategies": "serial_pp,naive_pp,streaming",
        "--temperatures": "0,1",
        "--max-tokens": "256",
        "--datasets": "gsm8k,qa",
        "--questions": "30:50",
    }
    some = RunFile(question_begin=3)
    assert options_of("bench", some)["--questions"] == "3:"


def test_options_win_over_the_file(tmp_path: Path) -> None:
    """Also one that may be given several times, and one by another of its flags."""
    text = "your_message = 'who?'\nmax_new_tokens = 9\nbase_model_dir = 'big'\n"
    path = str(write(tmp_path, text))
    words = expanded("run", ["--run-config", path, "--prompt", "what?", "--max-tokens=3"], SAME)
    assert words[-3:] == ["--prompt", "what?", "--max-tokens=3"]
    assert "--model=big" in words
    assert not any(word.startswith(("--prompt=who", "--max-new-tokens")) for word in words)
    assert effective("--run-config", path, "--max-tokens", "3").max_new_tokens == 3
    assert effective(f"--run-config={path}").max_new_tokens == 9
    assert expanded("run", ["--prompt", "x"], SAME) == ["--prompt", "x"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import os", ["run_config.py, line 1", "plain assignments alone"]),
        ("base_model_dir = 3", ["run_config.py", "base_model_dir: needed: a text, not 3"]),
        ("pipelines = []", ["unknown key pipelines; known: base_model_dir"]),
        ("quant = True", ["run_config.py: quant", "quantization must be none, not 'fp4'"]),
        ("num_stage = 1", ["num_stage counts the head too"]),
        ("pipeline_type = 'galaxy'", ["unknown strategy 'galaxy'"]),
        ("temperature = -1", ["temperature", "-1"]),
    ],
)
def test_what_is_wrong_in_the_file_is_named(tmp_path: Path, text: str, words: list[str]) -> None:
    """The command ends before anything is loaded, with one sentence."""
    path = write(tmp_path, text)
    command = [sys.executable, "-m", "flowspec", "run", "--run-config", str(path), "--show-config"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "words", "shown"),
    [
        ("run_pipe.sh", ["--show-config", "--stages", "3"], "stages: 3"),
        ("run_pipe_eval.sh", ["--help"], "--emulated-model"),
        ("run_pipe_eval.sh", ["--emulate", "--help"], "--emulated-model"),
        ("run_eval.sh", ["--help"], "--emulated-model"),
        ("run_eval.sh", ["--emulate", "--help"], "EXPERIMENT"),
    ],
)
def test_the_scripts_start_their_command(script: str, words: list[str], shown: str) -> None:
    """From any folder, by an interpreter that is there."""
    done = subprocess.run(
        ["bash", str(ROOT / script), *words],
        env={"PATH": "/usr/bin:/bin", "FLOWSPEC_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
