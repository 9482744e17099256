"""The list of commands: quick to print, whole on a narrow terminal, each row a real command."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from flowspec import __version__
from flowspec.cli.commands import COMMANDS
from flowspec.cli.main import app

SLOW = {"torch", "transformers"}  # seconds to import
NARROW = 80


def imported(*arguments: str) -> set[str]:
    """Packages that `flowspec *arguments` imports."""
    command = [sys.executable, "-X", "importtime", "-m", "flowspec", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}


@pytest.mark.parametrize(
    "arguments",
    ["--help", "--version", "chat --help", "generate --help", "status --help"],
)
def test_what_computes_nothing_does_not_wait_for_torch(arguments: str) -> None:
    """Looking up a command, or talking to a head, is done before torch would be there."""
    found = imported(*arguments.split())
    assert "typer" in found
    assert not found & SLOW


@pytest.mark.slow
def test_the_measure_sees_torch() -> None:
    """A command that computes needs it; if this one did not, the test above would see nothing."""
    assert "torch" in imported("run", "--show-config")


@pytest.mark.parametrize("arguments", ["--help", "trace --help"])
def test_no_line_of_help_is_cut(arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever looks for a command reads these lines and no more."""
    monkeypatch.setenv("COLUMNS", str(NARROW))
    shown = CliRunner().invoke(app, arguments.split())
    assert shown.exit_code == 0
    assert "..." not in shown.output.partition("Commands:")[2]
    lines = shown.output.splitlines()
    assert max(map(len, lines)) <= NARROW
    if arguments == "--help":
        listed = [(name, about) for name, about in COMMANDS.items() if about]
        ours = lines[lines.index("Commands:") + 1 :]
        assert [tuple(line.split(maxsplit=1)) for line in ours] == listed


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "said", "shown"),
    [
        (["--max-requests", "3"], "--max-requests is now called --max-num-seqs", "max_num_seqs: 3"),
        (["--max-requests=3"], "--max-requests is now called --max-num-seqs", "max_num_seqs: 3"),
        (["--shape-stable"], "is now called --batch-invariant", "  batch_invariant: true"),
        (["--no-shape-stable"], "--no-shape-stable is now called --no-batch-invariant", ": false"),
        (["--set", "tree_size=7"], "tree_size is now called num_draft_tokens", "_tokens: 7"),
        (["--max-num-seqs", "3", "--prompt", "--shape-stable"], "", "max_num_seqs: 3"),
    ],
)
def test_old_names_of_options_are_understood(words: list[str], said: str, shown: str) -> None:
    """For this version, with one line on stderr; a value that looks like one stays what it is."""
    command = [sys.executable, "-m", "flowspec", "run", "--show-config", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.count("\n") == bool(said)
    assert said in done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_every_row_is_a_command(name: str) -> None:
    """The table names modules by their commands; a row that leads nowhere fails here."""
    shown = CliRunner().invoke(app, [name, "--help"], prog_name="flowspec")
    assert shown.exit_code == 0, shown.output
    assert f"Usage: flowspec {name} " in shown.output


def test_an_unknown_command_is_refused() -> None:
    """As bad input is everywhere."""
    shown = CliRunner().invoke(app, ["chta"])
    assert shown.exit_code == 2
    assert "No such command 'chta'" in shown.output


def test_the_version_is_the_package_s() -> None:
    """What a report of a fault should begin with."""
    assert CliRunner().invoke(app, ["--version"]).output == f"flowspec {__version__}\n"
