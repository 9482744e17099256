"""Standard input, output and error, also if they are closed or cannot be written."""

import contextlib
import errno
import io
import os
import sys
from collections.abc import Iterator
from typing import Any, TextIO

SIGPIPE_CODE = 128 + 13  # of a program that SIGPIPE ends, which Python ignores


class OutputClosed(SystemExit):
    """The reader of standard output has gone, as `head` does; the command ends silently."""

    def __init__(self) -> None:
        super().__init__(SIGPIPE_CODE)


class OutputError(OSError):
    """Standard output cannot be written; the text says why."""


class _Output(io.FileIO):
    """Standard output whose errors are no OSError, which typer or rich would handle."""

    failure: "OutputClosed | OutputError | None" = None

    def write(self, data: Any) -> int:
        """Write; raise OutputClosed or OutputError once, so that cleaning up does not fail."""
        try:
            return super().write(data) if memoryview(data).nbytes else 0
        except OSError as error:
            _discard(self.fileno())
            what = f"standard output cannot be written: {error.strerror}"
            self.failure = OutputClosed() if error.errno == errno.EPIPE else OutputError(what)
            raise self.failure from None

    def settle(self) -> None:
        """Write what is buffered; raise the error of `write` again if a library has caught it."""
        sys.stdout.flush()
        if self.failure is not None:
            raise self.failure


class _Errors(io.FileIO):
    """Standard error that ignores what it cannot write."""

    def write(self, data: Any) -> int:
        """Write, and ignore every error."""
        try:
            return super().write(data)
        except OSError:
            _discard(self.fileno())
            return memoryview(data).nbytes


@contextlib.contextmanager
def guarded() -> Iterator[_Output]:
    """Give this process three open streams; output and error handle their own errors.

    A stream that was replaced before, as in a test, stays as it is.
    """
    closed = [number for number in range(3) if not _is_open(number)]
    for number in closed:
        _discard(number)
    before = sys.stdin, sys.stdout, sys.stderr
    if sys.stdin is None:
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 - it lasts as long as the process
    output = _Output(1, "wb", closefd=False)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _text(output, sys.stdout)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _text(_Errors(2, "wb", closefd=False), sys.stderr)
    if 1 in closed:
        print("standard output is closed: what this command prints there is lost", file=sys.stderr)
    try:
        yield output
    finally:
        sys.stdin, sys.stdout, sys.stderr = before


def _text(raw: io.FileIO, old: TextIO | None) -> TextIO:
    """Return a text stream over `raw` with the settings of `old` that escapes bad characters."""
    if not isinstance(old, io.TextIOWrapper):  # it was closed
        return io.TextIOWrapper(io.BufferedWriter(raw), "utf-8", "backslashreplace")
    return io.TextIOWrapper(
        raw if old.write_through else io.BufferedWriter(raw),  # type: ignore[type-var]
        old.encoding,
        "backslashreplace" if old.errors == "strict" else old.errors,
        line_buffering=old.line_buffering,
        write_through=old.write_through,
    )


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _discard(number: int) -> None:
    """Point this descriptor at the null device, so that no later file gets its number."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    if nowhere == number:
        os.set_inheritable(number, True)
        return
    os.dup2(nowhere, number)
    os.close(nowhere)
