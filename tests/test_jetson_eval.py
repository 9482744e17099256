"""run_jetson_eval.sh: one cluster over ssh, one benchmark on it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Stands in for Python with flowspec: notes what it was called with; the rest is the real one's.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m flowspec" ] || exec REAL "$@"
shift 2
echo "$*" >> "$NOTES"
case "$1" in
  serve) [ -z "$REFUSES" ] || exit 2
         touch "$NOTES.serving"; trap 'rm "$NOTES.serving"; exit 0' TERM
         while :; do sleep 0.05; done ;;
  status) [ -e "$NOTES.serving" ] && echo '{"healthy": true}' ;;
  bench) exit "$CODE" ;;
esac
"""


@pytest.fixture
def jetson(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The script, with a stand-in for the cluster."""
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("REAL", sys.executable))
    python.chmod(0o755)
    (tmp_path / "hosts.yaml").write_text("head: 127.0.0.1\nport: 7321\nhosts: [a, b]\n")

    def run(*words: str, code: int = 0, refuses: str = "") -> "subprocess.CompletedProcess[str]":
        environment = {"FLOWSPEC_PYTHON": str(python), "NOTES": str(tmp_path / "notes")}
        inputs = [str(tmp_path / name) for name in ("hosts.yaml", "out")]
        return subprocess.run(
            ["bash", str(ROOT / "scripts/run_jetson_eval.sh"), *inputs, *words],
            env={**os.environ, **environment, "CODE": str(code), "REFUSES": refuses},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


@pytest.mark.parametrize("code", [0, 1])
def test_the_cluster_is_started_once_and_ended(jetson, tmp_path, code):
    """The benchmark's exit code is the script's; no head is left."""
    flags = ["--draft", "HEAD", "--", "--strategies", "ar,streaming", "--temperatures", "1"]
    done = jetson("MODEL", *flags, code=code)
    assert done.returncode == code, done.stderr
    notes = (tmp_path / "notes").read_text().splitlines()
    token = f"--token-file {tmp_path / 'out/token'}"
    served = f"--hosts {tmp_path / 'hosts.yaml'} MODEL --draft HEAD {token} --no-prompt --no-mdns"
    assert [line for line in notes if line.startswith("serve")] == [f"serve {served}"]
    assert notes[-1] == (
        f"bench --real --head 127.0.0.1:7321 {token} --out {tmp_path / 'out'} "
        "--strategies ar,streaming --temperatures 1"
    )
    assert not (tmp_path / "notes.serving").exists()
    assert (tmp_path / "out/status.json").read_text() == '{"healthy": true}\n'


def test_what_cannot_be_served_is_not_measured(jetson, tmp_path):
    """Nor are hosts that no file names."""
    assert jetson("MODEL", refuses="yes").returncode == 2
    assert "bench" not in (tmp_path / "notes").read_text()
    (tmp_path / "hosts.yaml").write_text("head: 127.0.0.1\n")
    done = jetson("MODEL")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "hosts" in done.stderr
