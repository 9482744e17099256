"""A cluster over ssh: what is run where, the token through standard input alone."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from flowspec.cluster.hosts import read_hosts, start, stop

ROOT = Path(__file__).resolve().parent.parent
FILE = """
head: 10.0.0.1
port: 7100
user: nvidia
folder: FOLDER
hosts:
  - a.local
  - {address: b.local, device: cpu, threads: 4, user: pi}
"""
# Stands in for ssh: notes what it was called with, and runs the remote command here.
SSH = """#!/bin/sh
printf '%s\\n' "$*" >> "$NOTES"
for last; do :; done
exec sh -c "$last"
"""
REMOTE = """#!/bin/sh
echo "$FLOWSPEC_TOKEN: $*"
"""


def executable(path: Path, text: str) -> None:
    """A script at `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_each_host_joins_and_the_token_is_in_no_command_line(tmp_path: Path, monkeypatch):
    """With a stand-in for ssh that runs the command here."""
    executable(tmp_path / "bin/ssh", SSH)
    executable(tmp_path / "there/.venv/bin/flowspec", REMOTE)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NOTES", str(tmp_path / "notes"))
    file = tmp_path / "hosts.yaml"
    file.write_text(FILE.replace("FOLDER", str(tmp_path / "there")))
    stop(start(read_hosts(file), "s3cret", tmp_path / "logs"), timeout_s=20.0)
    said = {log.stem: log.read_text() for log in (tmp_path / "logs").iterdir()}
    join = "s3cret: join 10.0.0.1:7100 --once --name"
    assert said == {
        "a.local": f"{join} a.local --device auto --threads 0\n",
        "b.local": f"{join} b.local --device cpu --threads 4\n",
    }
    notes = (tmp_path / "notes").read_text()
    assert "s3cret" not in notes
    assert "BatchMode=yes" in notes
    assert "nvidia@a.local" in notes
    assert "pi@b.local" in notes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head: h\nhosts: [a]\nuser: 'x; rm -rf /'", "user"),
        ("head: h\nhosts: [a]\npassword: x", "password"),
        ("head: h\nhosts: []", "hosts"),
        ("head: h\nhosts: [{address: a, folder: '$(boom)'}]", "folder"),
        ("- a", "must hold head"),
    ],
)
def test_bad_files_are_refused_by_key(tmp_path: Path, text, words):
    """Also what a shell would take for more than a word, and passwords."""
    file = tmp_path / "hosts.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_hosts(file)


def test_the_example_is_good():
    """What people copy must work."""
    hosts = read_hosts(ROOT / "config/hosts.example.yaml")
    assert len(hosts.hosts) == 4


def test_the_wrapper_serves_with_the_hosts(tmp_path: Path):
    """run_jetson.sh FILE OPTIONS is `flowspec serve --hosts FILE OPTIONS`."""
    executable(tmp_path / "python", '#!/bin/sh\necho "$@"\n')
    done = subprocess.run(
        ["bash", str(ROOT / "run_jetson.sh"), "my.yaml", "--spares", "1"],
        env={**os.environ, "FLOWSPEC_PYTHON": str(tmp_path / "python")},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout == "-m flowspec serve --hosts my.yaml --spares 1\n"
    missing = subprocess.run(
        ["bash", str(ROOT / "run_jetson.sh")], capture_output=True, text=True, timeout=60
    )
    assert missing.returncode == 2
    assert missing.stderr.startswith("usage: run_jetson.sh HOSTS.yaml")
