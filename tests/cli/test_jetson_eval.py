"""run_jetson_eval.sh: one cluster over ssh, one benchmark on it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts/run_jetson_eval.sh"
# Stands in for Python with flowspec: notes what it was called with; the rest is the real one's.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m flowspec" ] || exec REAL "$@"
shift 2
echo "$*" >> "$NOTES"
case "$1" in
  serve) [ -z "$REFUSES" ] || exit 2
         touch "$NOTES.serving"; trap 'rm "$NOTES.serving"; exit 0' TERM
         while :; do sleep 0.05; done ;;
  status) [ "$LATE" != away ] || { echo "error: head: no answer" >&2; exit 3; }
          [ "$LATE" != gathering ] || { echo '{"healthy": false, "why": "bob loads"}'; exit 1; }
          [ -e "$NOTES.serving" ] && echo '{"healthy": true}' ;;
  bench) exit "$CODE" ;;
esac
"""


@pytest.fixture
def jetson(tmp_path: Path) -> Callable[..., "subprocess.CompletedProcess[str]"]:
    """The script, with a stand-in for the cluster."""
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("REAL", sys.executable))
    python.chmod(0o755)
    (tmp_path / "hosts.yaml").write_text("head: 10.0.0.9\nport: 7321\nhosts: [a, b]\n")

    def run(
        *words: str, code: int = 0, refuses: str = "", script: Path = SCRIPT, **more: str
    ) -> "subprocess.CompletedProcess[str]":
        environment = {"FLOWSPEC_PYTHON": str(python), "NOTES": str(tmp_path / "notes"), **more}
        inputs = [str(tmp_path / name) for name in ("hosts.yaml", "out")]
        return subprocess.run(
            ["bash", str(script), *inputs, *words],
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


@pytest.mark.slow
@pytest.mark.parametrize("late", ["away", "gathering"])
def test_a_cluster_that_does_not_come_is_not_waited_for_without_end(jetson, tmp_path, late):
    """Meanwhile it is said why; the head is ended."""
    project = tmp_path / "project"
    (project / "scripts").mkdir(parents=True)
    often = SCRIPT.read_text().replace("say_s=30", "say_s=1")
    (project / "scripts/often.sh").write_text(often)
    for name in ("run_jetson.sh", "scripts/find_python.sh"):
        (project / name).write_text((ROOT / name).read_text())
    (project / "flowspec").symlink_to(ROOT / "flowspec")
    script = project / "scripts/often.sh"
    done = jetson("MODEL", script=script, LATE=late, FLOWSPEC_START_S="3")
    assert done.returncode == 3, done.stderr
    why = {"away": "error: head: no answer", "gathering": "bob loads"}[late]
    lines = done.stderr.splitlines()
    assert f"waiting for the cluster: {why}" in lines
    assert lines[-1] == f"error: the cluster is not healthy after 3 s: {why}"
    assert "bench" not in (tmp_path / "notes").read_text()
    assert not (tmp_path / "notes.serving").exists()
    assert jetson("MODEL", FLOWSPEC_START_S="soon").returncode == 2


@pytest.mark.parametrize(
    ("flags", "asked"),
    [
        (["--host", "10.0.0.9"], "10.0.0.9"),
        (["--host=10.0.0.8"], "10.0.0.8"),
        (["--host", "0.0.0.0"], "127.0.0.1"),
        (["--host", "::"], "127.0.0.1"),
        (["--host", "fd00::9"], "[fd00::9]"),
    ],
)
def test_the_head_is_asked_where_it_listens(jetson, tmp_path, flags, asked):
    """On this machine, unless the options of serve name an address."""
    assert jetson("MODEL", *flags).returncode == 0
    notes = (tmp_path / "notes").read_text().splitlines()
    assert notes[-1].startswith(f"bench --real --head {asked}:7321 ")
    assert any(line.startswith(f"status {asked}:7321 ") for line in notes)
