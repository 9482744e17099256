"""The Python example of the README runs as it is written."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

README = Path(__file__).resolve().parent.parent / "README.md"


def python_blocks() -> list[str]:
    """Return the README's blocks of Python code."""
    return re.findall(r"^```python\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.slow
def test_python_example_runs_as_written(tmp_path: Path) -> None:
    """A reader can paste the block into a file of an empty folder and gets texts."""
    (block,) = python_blocks()
    assert "from flowspec import LLM, SamplingParams" in block
    example = tmp_path / "example.py"
    example.write_text(block)
    done = subprocess.run(
        [sys.executable, str(example)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    assert len(lines) >= 3, done.stdout  # two whole answers and a streamed one
