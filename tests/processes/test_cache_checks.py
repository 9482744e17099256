"""`doctor` and `join` check the cache folder in the same way, for many kinds of folders."""

import ctypes
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flowspec.transport.secure.token import new_token
from tests.support.spawned import CONTEXT, run_command

pytestmark = pytest.mark.slow

START_S = 120.0  # far more than it takes: this machine may be busy
NEW_MOUNTS, CAPABILITIES_V3 = 0x00020000, 0x20080522
OVERRIDES = 0b1110  # root's CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH and CAP_FOWNER
SOMEBODY_ELSE = 12345
as_root = pytest.mark.skipif(
    not sys.platform.startswith("linux") or os.geteuid() != 0,
    reason="mounts and folders of other users need Linux and root",
)


def _obey_permissions() -> None:
    """Drop the capabilities with which root ignores permissions."""
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 of them
    libc = ctypes.CDLL(None, use_errno=True)
    for call in (libc.capget, libc.capset):
        assert call(header, sets) == 0, os.strerror(ctypes.get_errno())
        sets[0] &= ~OVERRIDES


def _run(arguments: list[str], log: str, folder: str, mounts: list[list[str]]) -> None:
    """Run `flowspec *arguments` with its own mounts and without root's capabilities."""
    from flowspec.cluster.device import report as device

    device._BENCH_S, device._BENCH_BYTES = 0.01, 1 << 20
    if mounts:
        assert ctypes.CDLL(None).unshare(NEW_MOUNTS) == 0
        subprocess.run(["mount", "--make-rprivate", "/"], check=True)
        for words in mounts:
            subprocess.run(["mount", *words], check=True)
    if os.geteuid() == 0:
        _obey_permissions()
    run_command(arguments, log, folder, {"FLOWSPEC_TOKEN": str(new_token())})


def said_by(
    words: list[str], folder: Path, mounts: list[list[str]], until: str = ""
) -> tuple[int | None, str]:
    """Return a command's exit code and output; the code is None if it logs `until` and stays."""
    log = folder / f"{words[0]}.log"
    process = CONTEXT.Process(target=_run, args=(words, str(log), str(folder), mounts), daemon=True)
    process.start()
    try:
        end = time.monotonic() + START_S
        while process.is_alive() and time.monotonic() < end:
            if until and until in (log.read_text() if log.exists() else ""):
                return None, log.read_text()
            process.join(0.1)
        return process.exitcode, log.read_text()
    finally:
        process.kill()
        process.join()


def _nothing(cache: Path) -> None:
    """Prepare nothing: the cache is made when it is needed."""


def _below_a_file(cache: Path) -> None:
    cache.parent.write_text("a file")


def _read_only(cache: Path) -> None:
    cache.mkdir(parents=True)
    cache.chmod(0o555)


def _hidden(cache: Path) -> None:
    cache.parent.mkdir()
    os.chown(cache.parent, SOMEBODY_ELSE, SOMEBODY_ELSE)
    cache.parent.chmod(0o700)


def _foreign(cache: Path) -> None:
    cache.mkdir(parents=True)
    os.chown(cache, SOMEBODY_ELSE, SOMEBODY_ELSE)


def _foreign_lock(cache: Path) -> None:
    """Leave a lock file as `sudo flowspec join` does."""
    lock = cache / "models" / ".lock"
    lock.parent.mkdir(parents=True)
    lock.touch(0o644)
    os.chown(lock, SOMEBODY_ELSE, SOMEBODY_ELSE)


def _foreign_models(cache: Path) -> None:
    (cache / "models").mkdir(parents=True)
    os.chown(cache / "models", SOMEBODY_ELSE, SOMEBODY_ELSE)


def _made(cache: Path) -> None:
    cache.mkdir(parents=True)


FULL, READ_ONLY = ["-t", "tmpfs", "-o", "size=1m", "none"], ["-t", "tmpfs", "-o", "ro", "none"]


@pytest.mark.parametrize(
    ("prepare", "mount", "words"),
    [
        (_nothing, None, ""),
        (_below_a_file, None, "making folders fails: FOLDER/some is a file"),
        (_read_only, None, "making folders fails: Permission denied, FOLDER/some/cache belongs"),
        pytest.param(_foreign, None, "belongs to user 12345", marks=as_root),
        pytest.param(_foreign_lock, None, "FOLDER/some/cache/models/.lock belongs", marks=as_root),
        pytest.param(_foreign_models, None, "FOLDER/some/cache/models belongs", marks=as_root),
        pytest.param(_hidden, None, "FOLDER/some belongs to user 12345", marks=as_root),
        pytest.param(_made, READ_ONLY, "Read-only file system", marks=as_root),
        pytest.param(_made, FULL, "is full: free 1 MB, needed 67 MB and", marks=as_root),
    ],
)
def test_doctor_finds_what_join_would_refuse(
    tmp_path: Path,
    prepare: Callable[[Path], None],
    mount: list[str] | None,
    words: str,
) -> None:
    """Both print the same sentence, with a fix and their exit codes; without problems, none."""
    cache = tmp_path / "some" / "cache"
    prepare(cache)
    mounts = [[*mount, str(cache)]] if mount else []
    options = ["--cache", str(cache)]
    code, said = said_by(["doctor", "--json", *options], tmp_path, mounts)
    found = {one["what"]: one for one in json.loads(said[said.index("[{") :].splitlines()[0])}
    joined, refusal = said_by(["join", "127.0.0.1:1", *options], tmp_path, mounts, "trying again")
    try:
        if not words:
            assert "cache" not in found
            assert (code, joined) == (0, None), said + refusal
            assert not list(cache.glob("*/.check-*"))
            return
        assert found["cache"]["level"] == "error"
        assert words.replace("FOLDER", str(tmp_path)) in found["cache"]["found"]
        assert "XDG_CACHE_HOME" in found["cache"]["fix"]
        assert (code, joined) == (1, 2), refusal
        assert f"error: {found['cache']['found']}; {found['cache']['fix']}" in refusal
        assert "Traceback" not in said + refusal
    finally:
        if cache.parent.is_dir():  # so that pytest can remove it
            cache.parent.chmod(0o700)
