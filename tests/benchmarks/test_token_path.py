"""The probe of benchmarks/token_path.py records the lines of every process, and counts right."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import token_path
from benchmarks.token_path import between, describe, measure, medians, read, tick

# What one token of streaming, EAGLE and ZeroMQ may pass through, of the package.
MODULES, EXECUTED_LINES = 48, 1550
INNER = """\
import threading
def work(n):
    if n:
        return n
    return -1
def start():
    thread = threading.Thread(target=work, args=(1,))
    thread.start()
    thread.join()
"""


def test_the_probe_notes_lines_of_threads_and_of_their_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It records only lines of the package that were executed."""
    package = tmp_path / "inner"
    package.mkdir()
    (package / "__init__.py").write_text(INNER)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(token_path.PROBE), str(tmp_path))),
        "LINE_PROBE_PACKAGE": str(package),
        "LINE_PROBE_OUT": str(tmp_path),
    }
    command = [sys.executable, "-c", "import inner, json; json.dumps(1); inner.start()", "run"]
    before = tick()
    subprocess.run(command, env=environment, check=True, timeout=60)
    (process,) = read(tmp_path).items()
    assert process[0] == "run"
    assert {path for path, _ in process[1]} == {"__init__.py"}
    executed = between(process[1], before, tick())
    assert {line for _, line in executed} == {1, 2, 6, 3, 4, 7, 8, 9}
    assert between(process[1], before - 1000, before - 1) == set()
    monkeypatch.setattr(token_path, "PACKAGE", package)
    assert describe(executed) == {"modules": 1, "executed": 8, "module_lines": 9}
    few = {("__init__.py", 3)}
    assert medians([executed, few, few])["executed"] == 1


@pytest.mark.slow
def test_a_token_s_way_stays_short() -> None:
    """Head and stages together execute few modules and lines for a token."""
    way = medians(measure(stages=2, tokens=64)["all"])
    assert way["modules"] <= MODULES
    assert way["executed"] <= EXECUTED_LINES
