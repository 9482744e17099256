"""Splits may be killed at any moment, and several may start together in one folder."""

import os
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from flowspec.cli.split import split as split_command
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.manifest import Manifest
from flowspec.weights.split import LOCK_NAME, run_split
from flowspec.weights.split_plan import SplitPlan, plan_split
from tests.support import families

AUDITED = ("open", "os.rename", "os.remove", "os.mkdir", "os.link", "os.symlink", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
LIMIT_S = 60


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a small model."""
    folder = tmp_path_factory.mktemp("killed") / "hf"
    families.save(folder)
    return folder


@pytest.fixture(scope="module")
def plan(checkpoint: Path) -> SplitPlan:
    """Return the split into one stage, as the command plans it."""
    return plan_split(open_checkpoint(checkpoint), layers=(4,))


def run(plan: SplitPlan, out: Path, on_bytes=lambda _: None, on_wait=lambda _: None) -> Manifest:
    """Run the split as `flowspec split` does."""
    return run_split(plan, out, model_id="hf", on_bytes=on_bytes, on_wait=on_wait)


def contents(out: Path) -> dict[str, bytes]:
    """Return all files of a split, except its lock."""
    files = [path for path in out.rglob("*") if path.is_file()]
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files} | {
        LOCK_NAME: b""
    }


def in_child(work: Callable[[], object]) -> int:
    """Start `work` in a child process that exits with 0, or 1 on an error; return its number."""
    sys.stdout.flush()
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return pid


def exit_code(pid: int) -> int:
    """Wait for a child; return its exit code."""
    end = time.monotonic() + LIMIT_S
    while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > end:
            os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(found[1])


def keep_each_step(out: Path, steps: Path) -> Callable[..., None]:
    """Copy `out` to a folder in `steps` before every change that this process makes to it.

    A kill at that moment would leave that copy. The changes are opening a file to write, mkdir,
    rename, remove, fsync, and, by the function returned, each piece of a file.
    """
    steps.mkdir()
    copying: list[bool] = []

    def keep(*_: object) -> None:
        copying.append(True)
        if out.exists():
            shutil.copytree(out, steps / str(len(copying)))
        copying[-1] = False

    def audit(event: str, arguments: tuple[object, ...]) -> None:
        if event not in AUDITED or any(copying) or isinstance(arguments[0], int):
            return
        path, flags = os.fsdecode(str(arguments[0])), arguments[2] if event == "open" else WRITES
        if path.startswith(str(out)) and isinstance(flags, int) and flags & WRITES:
            keep()

    sys.addaudithook(audit)
    os.fsync = keep  # type: ignore[assignment]
    return keep


def test_a_split_killed_at_any_step_is_finished_by_the_same_command(
    checkpoint, plan, tmp_path, monkeypatch
):
    """Its folder is never refused, and nothing of the dead run is left in it."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # a killed process loses nothing by it
    out, steps = tmp_path / "out", tmp_path / "steps"
    assert exit_code(in_child(lambda: run(plan, out, keep_each_step(out, steps)))) == 0
    whole = contents(out)
    left = sorted(steps.iterdir(), key=lambda step: int(step.name))
    assert len(left) > 50  # each file is opened, written, synced and renamed, and so is the journal
    for step in left:
        run(plan, step)
        assert contents(step) == whole, step.name
    split_command(str(checkpoint), stages=1, out=tmp_path / "by command")
    assert contents(tmp_path / "by command") == whole
    split_command(str(checkpoint), stages=1, out=left[0])


def test_a_folder_of_only_the_unfinished_journal_is_taken(checkpoint, tmp_path):
    """Earlier versions, with a fixed name for it, left such folders."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "split.partial.json.partial").write_text('{"sou')
    split_command(str(checkpoint), stages=1, out=tmp_path / "out")
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_somebody_elses_unfinished_file_is_not_taken_for_ours(plan, tmp_path):
    """Only names of the split's own files count as ours."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "film.mkv.partial").write_text("half a film")
    with pytest.raises(ValueError, match=r"is not empty \(it has film.mkv.partial\)"):
        run(plan, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["film.mkv.partial"]


class Two:
    """A split that stops half way until it is released, and a second one of the same folder."""

    def __init__(self, plan: SplitPlan, out: Path) -> None:
        events, self._tell = os.pipe()
        self._events = os.fdopen(events, "rb", buffering=0)
        go, self._go = os.pipe()
        paused: list[bool] = []

        def pause(count: int) -> None:
            if count and not paused:
                paused.append(True)
                os.write(self._tell, b"half way\n")
                os.read(go, 1)

        self.first = in_child(lambda: run(plan, out, pause))
        assert self.read() == "half way"
        self.second = in_child(
            lambda: run(plan, out, on_wait=lambda text: os.write(self._tell, f"{text}\n".encode()))
        )

    def read(self) -> str:
        """Return the next line of one of them."""
        assert select.select([self._events], [], [], LIMIT_S)[0], "neither says anything"
        line = b""
        while not line.endswith(b"\n"):
            line += os.read(self._events.fileno(), 1)
        return line.decode().strip()

    def let_go(self) -> None:
        """Let the first one continue."""
        os.write(self._go, b"x")


@pytest.mark.parametrize("end", ["finishes", "is killed"])
def test_a_second_split_of_the_folder_waits_for_the_first(plan, tmp_path, end):
    """It reports the wait; both end well, or it takes over from a dead one: there is one split."""
    out = tmp_path / "out"
    two = Two(plan, out)
    assert two.read() == f"another process is splitting a model into {out}: waiting for it"
    if end == "finishes":
        two.let_go()
    else:
        os.kill(two.first, signal.SIGKILL)
    assert exit_code(two.first) == (0 if end == "finishes" else -signal.SIGKILL)
    assert exit_code(two.second) == 0
    run(plan, tmp_path / "whole")
    assert contents(out) == contents(tmp_path / "whole")


def test_a_whole_split_can_be_used_where_nothing_can_be_written(checkpoint, plan, tmp_path):
    """Checking that it is complete needs no lock; a split of another plan is refused by name."""
    out = tmp_path / "out"
    run(plan, out)
    (out / LOCK_NAME).unlink()
    run(plan, out)
    assert not (out / LOCK_NAME).exists()
    other = plan_split(open_checkpoint(checkpoint), layers=(3, 1))
    with pytest.raises(ValueError, match="another checkpoint, layer plan or dtype"):
        run_split(other, out, model_id="hf")


def test_a_split_into_more_stages_is_refused_as_another_plan(checkpoint, plan, tmp_path):
    """The error does not name the first file that this plan lacks."""
    many = plan_split(open_checkpoint(checkpoint), layers=(1, 1, 1, 1))
    run_split(many, tmp_path / "out", model_id="hf")
    with pytest.raises(ValueError, match="another checkpoint, layer plan or dtype"):
        run(plan, tmp_path / "out")
