"""A cluster over ssh: the commands per host; the token only goes through standard input."""

import os
import stat
import subprocess
from pathlib import Path

import pytest

from flowspec.cluster.hosts import read_hosts, start, stop

ROOT = Path(__file__).resolve().parents[2]
FILE = """
head: 10.0.0.1
port: 7100
user: nvidia
folder: FOLDER
hosts:
  - a.local
  - eve@[fd00::5]:2222
  - fd00::6
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
    """Write a script to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_each_host_joins_and_the_token_is_in_no_command_line(tmp_path: Path, monkeypatch):
    """A stand-in for ssh runs the command here."""
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
        "fd00::5": f"{join} fd00::5 --device auto --threads 0\n",
        "fd00::6": f"{join} fd00::6 --device auto --threads 0\n",
        "b.local": f"{join} b.local --device cpu --threads 4\n",
    }
    notes = (tmp_path / "notes").read_text()
    assert "s3cret" not in notes
    assert "BatchMode=yes" in notes
    assert "nvidia@a.local" in notes
    assert "pi@b.local" in notes
    assert "-p 2222 eve@fd00::5 " in notes
    assert "nvidia@fd00::6 " in notes


def test_a_head_by_ipv6_is_joined_in_brackets(tmp_path: Path):
    """The file may write it in any form."""
    for head in ("fd00::1", "[fd00::1]"):
        file = tmp_path / "hosts.yaml"
        file.write_text(f"head: '{head}'\nhosts: [a]")
        hosts = read_hosts(file)
        assert "join '[fd00::1]:7000' --once" in hosts.command(hosts.hosts[0])[-1]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("head: h\nhosts: [a]\nuser: 'x; rm -rf /'", "user"),
        ("head: h\nhosts: [a]\npassword: x", "password"),
        ("head: h\nhosts: []", "hosts"),
        ("head: h:7000\nhosts: [a]", "head: .*without a port"),
        ("head: -F/tmp/x\nhosts: [a]", "head"),
        ("head: h\nhosts: ['-F']", "hosts.0"),
        ("head: h\nhosts: ['-F@a']", "hosts.0"),
        ("head: h\nuser: -F\nhosts: [a]", "user"),
        ("head: h\nhosts: ['a:x']", "hosts.0: 'a:x' is not an address"),
        ("head: h\nhosts: ['fd00::1:22', '[fd00::1]:0']", "hosts.1"),
        ("head: h\nhosts: ['fe80::1']", "link-local"),
        ("head: h\nhosts: [{address: a, folder: '$(boom)'}]", "folder"),
        ("- a", "must hold head"),
    ],
)
def test_bad_files_are_refused_by_key(tmp_path: Path, text, words):
    """This includes shell metacharacters and passwords."""
    file = tmp_path / "hosts.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=words):
        read_hosts(file)


def test_the_example_is_good():
    """People copy it, so it must work."""
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
