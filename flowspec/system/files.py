"""Atomic file writes, and a lock for processes that share a folder."""

import os
import re
import secrets
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from flowspec.system import signals

STALE_S = 3600.0  # an unfinished file unchanged for this long belongs to a dead process
STUCK_S = 1800.0  # the lock's holder may check files for this long without visible progress
_POLL_S = 0.2
_PARTIAL = ".partial"
_PARTIAL_NAME = re.compile(rf"(?P<whole>.+?)(?P<process>\.\d+-[0-9a-f]{{8}})?\{_PARTIAL}")


def partial_path(path: Path) -> Path:
    """Return a name beside `path` for its unfinished content that no other process uses."""
    return path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}{_PARTIAL}")


def whole_name(name: str) -> str:
    """Return the final name of an unfinished file; other names are returned as given."""
    match = _PARTIAL_NAME.fullmatch(name)
    return match["whole"] if match else name


@contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """Make a folder for this user alone; it is removed afterwards, even after a second signal."""
    made: list[str] = []

    def remove() -> None:
        for folder in made:
            shutil.rmtree(folder, ignore_errors=True)

    with signals.undoing(remove):
        try:
            made.append(tempfile.mkdtemp(prefix=prefix))
            yield Path(made[0])
        finally:
            remove()


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield the path of a new file that becomes `path` at the end; an error removes it.

    After a kill, the unfinished file stays; `whole_name` recognizes its name.
    """
    partial = partial_path(path)
    try:
        yield partial
        partial.replace(path)
    except BaseException:  # also on Ctrl-C
        with suppress(OSError):
            partial.unlink()
        raise


def write_whole(path: Path, content: str) -> None:
    """Write a text file atomically: after a power cut it is either complete or unchanged."""
    with replacing(path) as partial, partial.open("x", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def remove_stale(folder: Path) -> None:
    """Remove the unfinished files directly in `folder` whose process was killed."""
    for path in folder.glob(f"*{_PARTIAL}"):
        match = _PARTIAL_NAME.fullmatch(path.name)
        with suppress(OSError):  # another process may be removing them too
            if match and match["process"] and time.time() - path.stat().st_mtime > STALE_S:
                path.unlink()


@contextmanager
def locked(
    path: Path,
    *,
    doing: str,
    say: Callable[[str], None] = lambda _: None,
    progress: Callable[[], object] = lambda: None,
    stuck_s: float = STUCK_S,
) -> Iterator[None]:
    """Hold the lock file `path`; the operating system releases the lock of a dead process.

    If another process holds the lock, `say` is called once with the words of `doing`, and the wait
    lasts as long as `progress` changes. The lock file itself stays. Raises TimeoutError when
    `progress` has not changed for `stuck_s` seconds.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say(f"another process is {doing}: waiting for it")
        _await(lock, path, doing, progress, stuck_s)
    try:
        yield
    finally:
        lock.release()


def _await(
    lock: FileLock, path: Path, doing: str, progress: Callable[[], object], stuck_s: float
) -> None:
    seen, moved_at = progress(), time.monotonic()
    while True:
        try:
            lock.acquire(timeout=_POLL_S)
            return
        except Timeout:
            signals.check()
            now, last = time.monotonic(), seen
            seen = progress()
            if seen != last:
                moved_at = now
            elif now - moved_at > stuck_s:
                raise TimeoutError(
                    f"another process holds {path} ({doing}) and has done nothing for "
                    f"{stuck_s:.0f} s; end that process (`fuser {path}` names it), then try again"
                ) from None
