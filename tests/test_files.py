"""Atomic files, and locks between processes: leftovers of kills, and bounded waits."""

import os
import threading
import time
from pathlib import Path

import pytest
from filelock import FileLock

from flowspec.system.files import (
    locked,
    partial_path,
    remove_stale,
    replacing,
    whole_name,
    write_whole,
)
from flowspec.transport.secure.token import new_token, read_token, write_token


def test_an_unfinished_file_is_known_by_its_name() -> None:
    """It knows names of this version and of earlier ones, of any process, and no others."""
    made = partial_path(Path("out/manifest.json"))
    assert made.parent == Path("out")
    assert whole_name(made.name) == "manifest.json"
    assert whole_name("head/model.safetensors.partial") == "head/model.safetensors"
    for name in ("manifest.json", "thesis.partial.tex", ".partial", "a.12-xyz"):
        assert whole_name(name) == name


def test_names_of_unfinished_files_differ() -> None:
    """They differ between threads of a process, and between machines with equal process ids."""
    assert len({partial_path(Path("a")) for _ in range(100)}) == 100


def test_an_error_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    """A reader sees the old content until the new one is complete."""
    path = tmp_path / "journal.json"
    write_whole(path, "old")

    def interrupted() -> None:
        with replacing(path) as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("journal.json", "old")]
    write_whole(path, "new")
    assert [(one.name, one.read_text()) for one in tmp_path.iterdir()] == [("journal.json", "new")]


def test_only_old_unfinished_files_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """Files that another process writes stay, and so does a download that will continue."""
    live, dead = partial_path(tmp_path / "a"), partial_path(tmp_path / "b")
    download, other = tmp_path / "c.partial", tmp_path / "d"
    for path in (live, dead, download, other):
        path.write_text("")
    for path in (dead, download, other):
        os.utime(path, (time.time() - 86400,) * 2)
    remove_stale(tmp_path)
    assert set(tmp_path.iterdir()) == {live, download, other}


def test_a_free_lock_is_taken_in_silence(tmp_path: Path) -> None:
    """It is free again afterwards, even after an error."""
    said: list[str] = []
    for _ in range(2):
        with (
            pytest.raises(RuntimeError),
            locked(tmp_path / "lock", doing="x", say=said.append),
        ):
            raise RuntimeError
    assert not said


def test_whoever_waits_for_a_lock_says_so_and_gets_it(tmp_path: Path) -> None:
    """There is one sentence before the wait."""
    said: list[str] = []
    holder = FileLock(tmp_path / "lock", thread_local=False)
    holder.acquire()

    def say(text: str) -> None:
        said.append(text)
        threading.Timer(0.3, holder.release).start()

    with locked(tmp_path / "lock", doing="baking", say=say, stuck_s=60):
        assert said == ["another process is baking: waiting for it"]


def test_a_holder_that_does_nothing_is_not_awaited_for_ever(tmp_path: Path) -> None:
    """The error names the lock; a holder that works is waited for beyond the limit."""
    steps = iter(range(4))
    with FileLock(tmp_path / "lock"):
        began = time.monotonic()
        with (
            pytest.raises(TimeoutError, match=r"holds .*lock \(baking\) and has done nothing for"),
            locked(
                tmp_path / "lock", doing="baking", progress=lambda: next(steps, None), stuck_s=0.1
            ),
        ):
            pass
        assert time.monotonic() - began > 4 * 0.2  # each step bought it another look


def test_two_heads_that_start_together_have_one_token(tmp_path: Path) -> None:
    """Both find no token; the first one's stays, and the second one reads it."""
    path = tmp_path / "state" / "token"
    first, second = new_token(), new_token()
    write_token(path, first)
    write_token(path, second)
    assert read_token(path) == first
    assert [one.name for one in path.parent.iterdir()] == ["token"]
    assert path.stat().st_mode & 0o777 == 0o600
