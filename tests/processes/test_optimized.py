"""`python -O` removes asserts, and -OO also docstrings: nothing else may change.

Compiling torch again with such an option takes a minute, so only the package is compiled.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flowspec
from flowspec.config import EngineConfig

pytestmark = pytest.mark.slow

RUN_S = 120.0  # far more than it takes: this machine may be busy
SITE = f"""
from importlib.machinery import SourceFileLoader
usual = SourceFileLoader.get_code
def get_code(self, name):
    path = self.get_filename(name)
    if not path.startswith({str(Path(flowspec.__file__).parent)!r}):
        return usual(self, name)
    return compile(self.get_data(path), path, "exec", dont_inherit=True, optimize=2)
SourceFileLoader.get_code = get_code
"""


def optimized(folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run `flowspec *arguments`, and all its children, as under -OO."""
    (folder / "sitecustomize.py").write_text(SITE)
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "flowspec", *arguments]
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=RUN_S
    )


def test_a_run_without_asserts_gives_the_same_text(
    config: EngineConfig, whole_split: Path, tmp_path: Path
) -> None:
    """Of several requests, of which some wait: each step of the head and of a stage is done."""
    options = ["--model", str(whole_split), "--draft", config.draft, "--max-num-seqs", "2"]
    asked = [word for prompt in ("one", "two", "three") for word in ("--prompt", prompt)]
    done = optimized(tmp_path, "run", *options, *asked, "--max-new-tokens", "8")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("identical to the target alone: yes") == 3
    assert "restarting" not in done.stderr


@pytest.mark.parametrize("arguments", ["--help", "status --help"])
def test_help_without_docstrings_is_no_error(arguments: str, tmp_path: Path) -> None:
    """The command's description is missing then, but its options are shown."""
    done = optimized(tmp_path, *arguments.split())
    assert done.returncode == 0, done.stderr
    assert "--help" in done.stdout
    assert "Show devices, layers, memory" not in done.stdout
