"""A prompt that a signal ends: the Enter key is not waited for."""

import select
import sys

import typer

from flowspec.system import signals

POLL_S = 0.2


def read_line(prompt: str) -> str:
    """A line of standard input. Raises EOFError at its end, and where a signal has come."""
    typer.echo(prompt, nl=False)
    sys.stdout.flush()
    while not signals.received():
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            if not (line := sys.stdin.readline()):
                break
            return line
    raise EOFError
