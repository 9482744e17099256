"""Processes have names that say what they serve."""

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

CODE = """
import sys
from flowspec.system.process_title import name_process
name_process(sys.argv[1])
print("named", flush=True)
sys.stdin.read()
"""
linux_only = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux, for /proc")


@linux_only
@pytest.mark.parametrize(
    ("role", "shown"),
    [
        ("stage 2", "flowspec stage 2"),
        ("join küche\x1b[2J", "flowspec join küche?[2J"),
        ("join " + "x" * 200, "flowspec join " + "x" * 55),
    ],
)
def test_ps_shows_the_role(role: str, shown: str) -> None:
    """In place of the command line; the environment stays to be read."""
    with subprocess.Popen(
        [sys.executable, "-c", CODE, role],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "FLOWSPEC_TEST_MARK": "still here"},
        cwd=Path(__file__).resolve().parents[2],
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"named\n"
        there = psutil.Process(process.pid)
        title = " ".join(word for word in there.cmdline() if word).strip()
        mark = there.environ().get("FLOWSPEC_TEST_MARK")
        process.communicate(b"", timeout=20)
    assert (title, mark) == (shown, "still here")
