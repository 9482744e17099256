"""Signals for a command that serves and has a prompt: what ends an answer, what ends it all."""

import select
import signal
import sys
import threading
from types import FrameType

import typer

POLL_S = 0.2


class Signals:
    """The first of SIGINT, SIGTERM and SIGHUP sets `stop`; another one ends the process at once.

    But Ctrl-C while an answer is given at the prompt ends that answer.
    """

    def __init__(self) -> None:
        self.stop = threading.Event()
        self._is_answering = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._take)

    def read(self, prompt: str) -> str:
        """A line of the terminal, which an answer follows. Raises EOFError once `stop` is set."""
        self._is_answering = False
        typer.echo(prompt, nl=False)
        sys.stdout.flush()
        # input() would go on waiting for the Enter key whatever the signal
        while not self.stop.is_set():
            if select.select([sys.stdin], [], [], POLL_S)[0]:
                if not (line := sys.stdin.readline()):
                    break
                self._is_answering = True
                return line
        raise EOFError

    def ask_to_stop(self) -> None:
        """As the first signal does: nothing is answered at the prompt any more."""
        self._is_answering = False
        self.stop.set()

    def _take(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self._is_answering and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.stop.is_set():
            raise SystemExit(128 + number)
        self.stop.set()
