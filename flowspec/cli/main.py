"""The `flowspec` command: its start, its end, one place for errors."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import typer

from flowspec import __version__
from flowspec.cli.commands import Commands
from flowspec.cluster.launch import find_launch
from flowspec.request import ClusterError, RefusedError

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Run one large language model on several weak machines, fast and lossless.",
)


@app.callback(invoke_without_command=True)
def root(
    version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    """Run one large language model on several weak machines, fast and lossless."""
    if version:
        typer.echo(f"flowspec {__version__}")
        raise typer.Exit


class _Ended(SystemExit):
    """A signal came; told once everything is unwound, for until then others use the screen."""


def main() -> None:
    """Entry point: errors that name their fix in one line, exit code 2 for the user's, 3 else."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _end)
    with _one_voice():
        _run()


def _run() -> None:
    try:
        app()
    except _Ended as ended:
        with contextlib.suppress(OSError):  # the terminal may be gone
            name = signal.Signals(int(ended.code or 0) - 128).name
            typer.echo(f"\nerror: ended by {name}", err=True)
        raise
    except (ValueError, RefusedError, FileNotFoundError, PermissionError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(2)
    except (ClusterError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        sys.exit(3)


@contextlib.contextmanager
def _one_voice() -> Iterator[None]:
    """Of torchrun's processes, which all have the same to say, rank 0 alone says it."""
    launch = find_launch()
    if launch is None or launch.rank == 0:
        yield
        return
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        yield


def _end(number: int, frame: FrameType | None) -> None:
    """Ctrl-C, SIGTERM and a closed terminal unwind everything, so that no process is left."""
    del frame
    raise _Ended(128 + number)
