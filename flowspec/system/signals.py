"""SIGINT, SIGTERM and SIGHUP, handled alike in every command; imports only the standard library.

No signal handler raises: an exception raised there is lost in an import, in C code or in `__del__`.
The handlers do nothing. A thread reads the numbers of the signals that have come:

- Where nothing must be undone, it ends the process at once, with one line and exit code 128 + n.
- Within `undoing()`, where child processes, folders or half-written files must be removed, it sets
  a flag. Loops call `check()` at short intervals, which raises EndedBySignal in ordinary code.
- A second signal always ends the process at once, after each Hold's `at_once` has killed child
  processes and removed folders.

The end of the process has time limits: writing blocks when Ctrl-S has stopped the terminal, or when
nobody reads the pipe.
"""

import contextlib
import os
import signal
import sys
from _thread import allocate_lock, get_ident, start_new_thread
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_SHOW_CURSOR = b"\x1b[?25h"
_LAST_S = 1.0  # seconds for each step at the end of the process, which may block


class EndedBySignal(SystemExit):
    """A signal came while something had to be undone; the line is printed after that."""

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class _State:
    """State of this process; `lock` guards `received`, `num_holds` and the end of the process."""

    def __init__(self) -> None:
        self.lock = allocate_lock()
        self.main: int | None = None  # the main thread, once the handlers are installed
        self.write_end = -1  # the write end of the pipe that receives the signal numbers
        self.received = 0
        self.num_holds = 0
        self.num_orderly = 0  # blocks of the main thread that end by themselves
        self.num_cutting = 0  # blocks in which Ctrl-C ends an answer, not the process
        self.cut = False
        self.is_silent = False
        self.terminal: list[Any] | None = None
        self.farewells: list[Callable[[], str]] = []
        self.at_once: list[Callable[[], object]] = []


_state = _State()


def install() -> None:
    """Handle the signals from now on.

    A signal that is ignored when the process starts stays ignored, as `nohup` needs.
    """
    if _state.main is not None:
        return
    try:
        _start_thread()
    except ValueError:  # not in the main thread: the embedding program handles its signals
        return
    _state.main = get_ident()
    _state.terminal = _terminal_settings()
    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _do_nothing)


@contextlib.contextmanager
def installed() -> Iterator[None]:
    """Handle the signals inside the block; restore the earlier handlers afterwards."""
    if _state.main is not None:
        yield
        return
    before = {number: signal.getsignal(number) for number in ENDING}
    install()
    try:
        yield
    finally:
        let_end()
        if _state.main is not None:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(-1)
            os.close(_state.write_end)  # this ends the thread
            _state.__init__()  # type: ignore[misc]


def silence() -> None:
    """Print no line at the end: another process of this command prints it."""
    _state.is_silent = True


class Hold:
    """Marks the time until `release` as holding something that must be undone.

    Only the main thread holds signals back. If a second signal ends the process meanwhile, another
    thread calls `at_once`, which has one second to remove what must not be left behind.
    """

    def __init__(self, at_once: Callable[[], object] | None = None) -> None:
        self._at_once = at_once
        if at_once is not None:
            _state.at_once.append(at_once)
        self._is_held = _state.main == get_ident()
        if self._is_held:
            with _state.lock:
                _state.num_holds += 1

    def release(self) -> None:
        """End the hold: all is undone. Safe to call twice."""
        if self._is_held:
            self._is_held = False
            with _state.lock:
                _state.num_holds -= 1
        if self._at_once in _state.at_once:  # after a fork it is no longer in the list
            _state.at_once.remove(self._at_once)
        self._at_once = None


@contextlib.contextmanager
def undoing(at_once: Callable[[], object] | None = None) -> Iterator[None]:
    """Run a block that undoes its own work.

    After a signal, `check` raises EndedBySignal inside it, or its end does. `at_once` is that of
    Hold.
    """
    hold = Hold(at_once)
    try:
        yield
    finally:
        hold.release()
    if not _state.num_holds:
        check()


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Run a block that looks at `received` and ends by itself; `check` raises nothing inside it."""
    hold = Hold()
    _state.num_orderly += hold._is_held
    try:
        yield
    finally:
        _state.num_orderly -= hold._is_held
        hold.release()


@contextlib.contextmanager
def cutting() -> Iterator[None]:
    """Run a block in which Ctrl-C ends only an answer: `check` raises KeyboardInterrupt."""
    _state.cut = False
    _state.num_cutting += 1
    try:
        yield
    finally:
        _state.num_cutting -= 1


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Block SIGINT for processes started in this block: only this process handles Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def farewell(say: Callable[[], str]) -> Iterator[None]:
    """Print what `say` returns if a signal ends the process inside the block."""
    _state.farewells.append(say)
    try:
        yield
    finally:
        _state.farewells.remove(say)


def received() -> str:
    """Return the name of the signal that has come, such as SIGTERM; empty if none has."""
    return signal.Signals(_state.received).name if _state.received else ""


def check() -> None:
    """Raise EndedBySignal if a signal has come. Loops within `undoing` call this."""
    if _state.main != get_ident():
        return
    if _state.cut and _state.num_cutting:
        _state.cut = False
        raise KeyboardInterrupt
    if _state.received and not _state.num_orderly:
        raise EndedBySignal(_state.received)


def let_end() -> None:
    """Wait if a signal is ending the process now, so that nothing more is printed."""
    with _state.lock:
        pass


def end(number: int) -> None:
    """End the process now, with one line on standard error."""
    _attempt(lambda: sys.stdout.flush())  # a reader may be gone, or read nothing
    with _state.lock:
        _exit(number)


def _do_nothing(number: int, frame: FrameType | None) -> None:
    """Do nothing: the thread does the work, because C code may keep the main thread for long."""


def _start_thread() -> None:
    """Start the listening thread. Raises ValueError outside the main thread."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    try:
        signal.set_wakeup_fd(write_end, warn_on_full_buffer=False)
    except ValueError:
        os.close(read_end)
        os.close(write_end)
        raise
    _state.write_end = write_end
    start_new_thread(_listen, (read_end,))


def _listen(read_end: int) -> None:
    while numbers := os.read(read_end, 64):
        for number in numbers:
            if number in ENDING:
                _take(number)
    os.close(read_end)


def _take(number: int) -> None:
    if number == signal.SIGINT and _state.num_cutting:
        _state.cut = True
        return
    with _state.lock:
        if _state.received or not _state.num_holds:
            _exit(number)
        _state.received = number


def _exit(number: int) -> None:
    """End the process. The caller holds the lock, so that no new Hold begins meanwhile."""
    try:
        for undo in reversed(_state.at_once):
            _attempt(undo)
        _attempt(_restore_terminal)
        if not _state.is_silent:
            _attempt(lambda: _say_last(f"error: ended by {signal.Signals(number).name}\n"))
    finally:
        os._exit(128 + number)


def _attempt(work: Callable[[], object]) -> None:
    """Run `work` in a thread that ends with the process, and wait at most one second for it."""
    done = allocate_lock()
    done.acquire()

    def run() -> None:
        with contextlib.suppress(BaseException):
            work()
        done.release()

    with contextlib.suppress(RuntimeError):  # the process can have no more threads
        start_new_thread(run, ())
        done.acquire(timeout=_LAST_S)


def _say_last(line: str) -> None:
    """Write to file descriptor 2: the main thread may hold the locks of Python's streams."""
    words = "".join(f"{text}\n" for say in _state.farewells if (text := say()))
    newline = "\n" if os.isatty(2) else ""  # after ^C, or after an incomplete line
    os.write(2, f"{newline}{words}{line}".encode(errors="replace"))


def _terminal_settings() -> list[Any] | None:
    try:
        import termios

        return termios.tcgetattr(0)
    except (ImportError, OSError, termios.error):
        return None


def _restore_terminal() -> None:
    """Undo a password prompt's switched-off echo and a progress bar's hidden cursor."""
    if _state.terminal is not None:
        import termios

        if termios.tcgetattr(0) != _state.terminal:
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTTOU])  # even in the background
            termios.tcsetattr(0, termios.TCSANOW, _state.terminal)
    for number in (1, 2):
        if os.isatty(number):
            os.write(number, _SHOW_CURSOR)
            break


def _after_fork() -> None:
    """Give a forked process its own thread and pipe; it inherits only the handlers."""
    _state.at_once = []  # only the parent undoes these
    if _state.main is not None:
        _state.lock = allocate_lock()
        _state.main = get_ident()
        _state.received, _state.cut = 0, False
        os.close(_state.write_end)
        _start_thread()


os.register_at_fork(after_in_child=_after_fork)
