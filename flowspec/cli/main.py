"""The `flowspec` command: its start, its end, one place for errors."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import typer

from flowspec import __version__
from flowspec.cli.commands import Commands
from flowspec.cli.ui.faults import describe
from flowspec.cli.ui.streams import guarded
from flowspec.engine.launch import find_launch
from flowspec.request import ClusterError, RefusedError
from flowspec.system import signals

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


def main() -> None:
    """Run a command; an error is one sentence, exit code 2 for the user's, 3 for others."""
    with guarded() as output, signals.installed(), _only_rank_0_prints():
        try:
            try:
                app()
            except signals.EndedBySignal as ended:  # everything is cleaned up
                signals.end(ended.number)
            finally:
                output.settle()
        except (ValueError, RefusedError) as error:
            _fail(str(error), 2)
        except ClusterError as error:
            _fail(str(error), 3)
        except OSError as error:
            _fail(*describe(error))


def _fail(text: str, code: int) -> None:
    signals.let_end()
    typer.echo(f"error: {text}", err=True)
    sys.exit(code)


@contextlib.contextmanager
def _only_rank_0_prints() -> Iterator[None]:
    """Silence all ranks of torchrun but rank 0, because all would print the same."""
    launch = find_launch()
    if launch is None or launch.rank == 0:
        yield
        return
    signals.silence()
    with Path(os.devnull).open("w") as nowhere:
        sys.stdout = sys.stderr = nowhere
        yield
