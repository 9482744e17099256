"""The prompt of `serve`: Ctrl-C ends an answer, other signals end all, and none waits for Enter."""

import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest

from flowspec.cli.chat import ChatOptions, chat_loop
from flowspec.cli.signals import Signals

SOON_S = 5.0
NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Standard input is a terminal; what is written to this descriptor is typed there."""
    before = [signal.getsignal(number) for number in NUMBERS]
    keyboard, screen = os.openpty()
    with os.fdopen(screen) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        yield keyboard
    os.close(keyboard)
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


def send(number: int) -> None:
    """A signal to this process, handled before this returns."""
    os.kill(os.getpid(), number)
    time.sleep(0.05)  # the handler runs between two steps of the main thread


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_ends_the_wait_for_a_line(terminal: int, number: int) -> None:
    """Nobody has to press Enter first."""
    signals = Signals()
    threading.Timer(0.1, os.kill, (os.getpid(), number)).start()
    start = time.monotonic()
    with pytest.raises(EOFError):
        signals.read("> ")
    assert time.monotonic() - start < SOON_S
    assert signals.stop.is_set()
    with pytest.raises(EOFError):
        signals.read("> ")
    with pytest.raises(SystemExit):
        send(number)


def test_ctrl_c_ends_an_answer_and_nothing_else(terminal: int) -> None:
    """Devices and other clients have nothing to do with it; SIGTERM is no such key."""
    signals = Signals()
    os.write(terminal, b"a question\nanother\n")
    assert signals.read("> ") == "a question\n"
    with pytest.raises(KeyboardInterrupt):
        send(signal.SIGINT)
    assert not signals.stop.is_set()
    assert signals.read("> ") == "another\n"
    send(signal.SIGTERM)
    assert signals.stop.is_set()


def test_without_a_prompt_a_signal_asks_for_the_end(terminal: int) -> None:
    """Before the first line, and when the prompt is over."""
    signals = Signals()
    os.write(terminal, b"/quit\n")
    signals.read("> ")
    signals.ask_to_stop()
    with pytest.raises(SystemExit):
        send(signal.SIGINT)


def test_the_end_of_input_ends_the_conversation(
    terminal: int, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-D, with what the keys do said once, and again where a word is not known."""
    os.write(terminal, b"/what\n\x04")
    chat_loop(None, ChatOptions(), about="keys", read=Signals().read)  # asks the client nothing
    assert capsys.readouterr().err.split() == ["keys", "keys"]
