"""A prompt that a signal ends at once, without the Enter key."""

import select
import sys

import typer

from flowspec.system import signals

POLL_S = 0.2


def read_line(prompt: str) -> str:
    """Read a line of standard input. Raises EOFError at its end and after a signal."""
    typer.echo(prompt, nl=False)
    sys.stdout.flush()
    while not signals.received():
        if select.select([sys.stdin], [], [], POLL_S)[0]:
            if not (line := sys.stdin.readline()):
                break
            return line
    raise EOFError
