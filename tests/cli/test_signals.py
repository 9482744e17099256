"""Signals: a line and an exit code at once, an orderly end where something must be undone."""

import contextlib
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from flowspec.cli.chat import ChatOptions, chat_loop
from flowspec.cli.ui.prompt import read_line
from flowspec.system import signals

SOON_S = 10.0  # far more than it takes: this machine may be busy
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def installed() -> Iterator[None]:
    """This process takes signals as a command does, and something must always be undone."""
    with signals.installed(), signals.ending_in_order():
        yield


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input is a terminal; what is written to this descriptor is typed there."""
    keyboard, screen = os.openpty()
    with os.fdopen(screen) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield keyboard
    os.close(keyboard)


def wait_for(is_so: Callable[[], object]) -> None:
    """Until the thread that takes signals has done it."""
    end = time.monotonic() + SOON_S
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.005)


def ended(code: str, *numbers: int, options: tuple[str, ...] = ()) -> tuple[int, str]:
    """Exit code and standard error of a process that says `ready` and then gets the signals."""
    program = f"import sys, time\nfrom flowspec.system import signals\nsignals.install()\n{code}"
    child = subprocess.Popen(
        [*options, sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for number in numbers:
            child.send_signal(number)
            time.sleep(0.2)  # or two become one
        _, errors = child.communicate(timeout=SOON_S)
        return child.returncode, errors
    finally:
        child.kill()


READY = "print('ready', flush=True)\n"


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_the_process_at_once_where_nothing_must_be_undone(number: int) -> None:
    """Also while C code keeps the main thread, which then runs no handler."""
    name = signal.Signals(number).name
    code = f"import hashlib\n{READY}hashlib.pbkdf2_hmac('sha256', b'', b'', 10**9)"
    assert ended(code, number) == (128 + number, f"error: ended by {name}\n")


def test_what_is_kept_is_said_first() -> None:
    """Before the process ends at once."""
    code = f"with signals.farewell(lambda: '3 samples are kept'):\n  {READY}  time.sleep(30)"
    assert ended(code, signal.SIGTERM) == (143, "3 samples are kept\nerror: ended by SIGTERM\n")


def test_what_must_be_undone_is_undone() -> None:
    """In ordinary code of the main thread, at the next look."""
    code = f"""if True:
        with signals.undoing():
            try:
                {READY}
                while True:
                    signals.check()
                    time.sleep(0.01)
            except signals.Ended as ended:
                print("undone", file=sys.stderr)
                raise
    """
    assert ended(code, signal.SIGHUP) == (129, "undone\n")  # the line is for who catches it


def test_a_second_signal_ends_the_process_at_once() -> None:
    """Whatever is still to be undone."""
    code = f"with signals.undoing():\n  {READY}  time.sleep(30)"
    assert ended(code, signal.SIGINT, signal.SIGTERM) == (143, "error: ended by SIGTERM\n")


def test_a_destructor_does_not_eat_a_signal() -> None:
    """An exception raised there is printed and forgotten, and the command would go on."""
    code = f"""if True:
        import os, time
        from flowspec.cli import main as module
        class Dropped:
            def __del__(self):
                {READY}
                while True:
                    time.sleep(0.01)
        module.app = Dropped
        module.main()
    """
    assert ended(code, signal.SIGTERM) == (143, "error: ended by SIGTERM\n")


def test_an_ignored_signal_stays_ignored() -> None:
    """As `nohup` wants it for SIGHUP."""
    code = f"{READY}time.sleep(0.5)"
    assert ended(code, signal.SIGHUP, options=("nohup",))[0] == 0


def test_a_terminal_is_left_as_it_was() -> None:
    """A password prompt had switched its echo off."""
    code = f"""if True:
        from flowspec.system import signals
        import termios, time
        signals.install()
        now = termios.tcgetattr(0)
        now[3] &= ~termios.ECHO
        termios.tcsetattr(0, termios.TCSANOW, now)
        {READY}
        time.sleep(30)
    """
    child, keyboard = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", code])
    with os.fdopen(keyboard, "rb", buffering=0) as screen:
        assert b"ready" in screen.read(100)
        assert not termios.tcgetattr(screen)[3] & termios.ECHO
        os.kill(child, signal.SIGINT)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
        assert termios.tcgetattr(screen)[3] & termios.ECHO
        shown = b""
        with contextlib.suppress(OSError):  # the other end is closed
            while data := screen.read(100):
                shown += data
    assert shown.endswith(b"\nerror: ended by SIGINT\r\n")


def test_the_last_thing_to_undo_raises_what_came_meanwhile() -> None:
    """A short part, such as writing a file, needs no look of its own."""

    def write() -> None:
        with signals.undoing():
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(signals.received)

    with signals.installed(), pytest.raises(signals.Ended) as caught:
        write()
    assert caught.value.code == 143


def test_other_threads_are_not_ended(installed: None) -> None:
    """What is undone is the main thread's."""
    raised: list[BaseException] = []

    def look() -> None:
        try:
            signals.check()
        except BaseException as error:
            raised.append(error)

    os.kill(os.getpid(), signal.SIGTERM)
    wait_for(signals.received)
    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert not raised


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_the_wait_for_a_line(installed: None, terminal: int, number: int) -> None:
    """Nobody has to press Enter first."""
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    start = time.monotonic()
    with pytest.raises(EOFError):
        read_line("> ")
    assert time.monotonic() - start < SOON_S
    assert signals.received() == signal.Signals(number).name
    with pytest.raises(EOFError):
        read_line("> ")


def test_ctrl_c_ends_an_answer_and_nothing_else(installed: None) -> None:
    """However often the key is pressed; SIGTERM is no such key."""
    with signals.cutting():
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: signals._state.cut)
        with pytest.raises(KeyboardInterrupt):
            signals.check()
        assert not signals.received()
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(signals.received)
        signals.check()  # it ends in order: the answer goes on


def test_the_end_of_input_ends_the_conversation(
    terminal: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-D, with what the keys do said once, and again where a word is not known."""
    os.write(terminal, b"/what\n\x04")
    chat_loop(None, ChatOptions(), about="keys", read=read_line)  # type: ignore[arg-type]
    assert capsys.readouterr().err.split() == ["keys", "keys"]
