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
from pathlib import Path

import psutil
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
            except signals.EndedBySignal as ended:
                print("undone", file=sys.stderr)
                raise
    """
    assert ended(code, signal.SIGHUP) == (129, "undone\n")  # the line is for who catches it


def test_a_second_signal_ends_the_process_at_once() -> None:
    """Whatever is still to be undone."""
    code = f"with signals.undoing():\n  {READY}  time.sleep(30)"
    assert ended(code, signal.SIGINT, signal.SIGTERM) == (143, "error: ended by SIGTERM\n")


def full_pipe() -> tuple[int, int]:
    """Both ends of a pipe that takes nothing more and that nobody reads."""
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(write_end, b"x")
    os.set_blocking(write_end, True)
    return read_end, write_end


AT_ONCE = (signal.SIGTERM,)
BLOCKED = {  # code, and the signals after which it ends
    "nothing held": (f"{READY}time.sleep(60)", AT_ONCE),
    "writing": (f"{READY}print('x', file=sys.stderr)", AT_ONCE),
    "held": (f"with signals.undoing():\n  {READY}  time.sleep(60)", 2 * AT_ONCE),
    "held, writing": (
        f"with signals.undoing():\n  {READY}  print(1, file=sys.stderr)",
        2 * AT_ONCE,
    ),
    "farewell": (f"with signals.farewell(lambda: 'kept'):\n  {READY}  time.sleep(60)", AT_ONCE),
    "importing": (
        "from flowspec import __main__ as start\nsignals.signal.set_wakeup_fd(-1)\n"
        f"signals.signal.signal(15, start._end)\n{READY}time.sleep(60)",
        AT_ONCE,
    ),
    "undone": (  # what was printed waits for standard output, which is full as well
        "from flowspec.cli import main as module\n"
        "def app():\n"
        "  with signals.undoing():\n"
        f"    {READY}    print('x' * 10)\n    os.dup2(2, 1)\n"
        "    while True:\n      signals.check()\n"
        "module.app = app\nmodule.main()",
        AT_ONCE,
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BLOCKED)
def test_a_signal_ends_a_process_that_cannot_write(case: str) -> None:
    """Standard error is a full pipe: its last line is lost, and holds nobody."""
    code, numbers = BLOCKED[case]
    program = (
        f"import os, sys, time\nfrom flowspec.system import signals\nsignals.install()\n{code}"
    )
    read_end, write_end = full_pipe()
    child = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=write_end,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": ""},
    )
    try:
        assert child.stdout is not None
        assert child.stdout.readline() == "ready\n"
        for number in numbers:
            time.sleep(0.2)  # or two become one
            child.send_signal(number)
        assert child.wait(SOON_S) == 143
    finally:
        child.kill()
        child.communicate()
        os.close(read_end)
        os.close(write_end)


def test_a_signal_ends_a_process_whose_terminal_is_stopped() -> None:
    """By Ctrl-S: nothing is shown until Ctrl-Q."""
    program = f"import time\nfrom flowspec.system import signals\nsignals.install()\n{READY}"
    code = f"{program}time.sleep(60)"
    keyboard, screen = os.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=screen, stdout=screen, stderr=screen
    )
    try:
        assert os.read(keyboard, 100).startswith(b"ready")
        termios.tcflow(screen, termios.TCOOFF)
        child.send_signal(signal.SIGTERM)
        assert child.wait(SOON_S) == 143
    finally:
        child.kill()
        termios.tcflow(screen, termios.TCOON)
        os.close(keyboard)
        os.close(screen)


def test_a_second_signal_undoes_what_must_not_be_left(tmp_path: Path) -> None:
    """The folder goes, and the child process, while the main thread is busy with something else."""
    code = f"""if True:
        import subprocess
        from flowspec.system.files import temporary_folder
        child = subprocess.Popen(["sleep", "60"], stdout=subprocess.DEVNULL)
        with temporary_folder("one-") as folder, signals.undoing(child.kill):
            (folder / "file").touch()
            print(child.pid, file=sys.stderr, flush=True)
            {READY}
            time.sleep(60)
    """
    options = ("env", f"TMPDIR={tmp_path}")
    exit_code, errors = ended(code, signal.SIGINT, signal.SIGINT, options=options)
    assert exit_code == 130
    assert errors.endswith("error: ended by SIGINT\n")
    assert not list(tmp_path.iterdir())
    pid = int(errors.split()[0])
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


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

    with signals.installed(), pytest.raises(signals.EndedBySignal) as caught:
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
