"""The commands by name. Adding one: one file here, one row in the table."""

import os
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

# A row's module and the function (or Typer app) in it are named as the command. The line is what
# `flowspec --help` says of it, in full at 80 columns; a command without one is not listed.
COMMANDS: dict[str, str] = {
    "run": "Answer prompts on this machine, one process per stage.",
    "serve": "Be the head of a cluster of devices; print the line to join.",
    "join": "Give this device to the cluster of a head, until stopped.",
    "chat": "Talk to the model that a head serves.",
    "generate": "Print what a head answers, for scripts.",
    "status": "Show a head's devices, layers, links and requests.",
    "plan": "Which device would get which layers, and how fast it would be.",
    "doctor": "Would joining work from here? Every finding with its fix.",
    "split": "Split a model into stage folders that the workers load.",
    "verify": "Compare every strategy's text with the target's alone.",
    "bench": "Measure every strategy over the evaluation sets.",
    "check-head": "Does a draft checkpoint fit a model, and how good is it?",
    "trace": "Where the time of a traced run went.",
    "reliability": "Do guesses come true as often as the drafter says?",
    "simulate": "What if a cluster's links, stages, drafter or tree were others?",
    "report": "Tables of a benchmark's records.",
    "plot": "Pictures of a benchmark's records, or of one traced request.",
    "stage": "",
}


class Commands(TyperGroup):
    """Imports a command when it is called: most of them need torch, which takes seconds."""

    # typer may carry a click of its own: its classes of contexts and commands have no public name

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**{**attrs, "commands": dict.fromkeys(COMMANDS)})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The command, imported now; None where there is none of this name.

        Raises FileNotFoundError in a folder that was deleted, where torch would end the process.
        """
        if cmd_name not in COMMANDS:
            return None
        os.getcwd()
        name = cmd_name.replace("-", "_")
        found = getattr(import_module(f"flowspec.cli.{name}"), name)
        if not isinstance(found, typer.Typer):
            own = typer.Typer(add_completion=False, rich_markup_mode=None)
            own.command(cmd_name)(found)
            found = own
        return typer.main.get_command(found)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list in `flowspec --help`, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, about in COMMANDS.items() if about])
