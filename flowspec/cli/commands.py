"""The commands by name. Adding one: one file here, one row in the table."""

import os
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from flowspec.cli.run_config import FLAG, expanded
from flowspec.config import RENAMED, tell_renamed

# The module of a row and the function (or Typer app) in it have the command's name. `flowspec
# --help` prints the line, which fits 80 columns; a command without a line is not listed.
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


# Renamed flags, besides those of renamed settings: command -> old -> new. If a command line has a
# flag that exists no more, all its flags have their old meaning.
_MODELS = {"--target": "--model", "--model": "--emulated-model"}
OLD_FLAGS: dict[str, dict[str, str]] = {"bench": _MODELS, "simulate": _MODELS}


class _Command(TyperCommand):
    """A command that understands the old names of its flags and prints the new ones."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the command line after old flags have got their new names."""
        known = {flag for one in self.params for flag in (*one.opts, *one.secondary_opts)}
        switches = {
            flag for one in self.params if getattr(one, "is_flag", False) for flag in one.opts
        }
        old = OLD_FLAGS.get(str(self.name), {})
        if not {word.partition("=")[0] for word in args} & (old.keys() - known):
            old = {}
        words: list[str] = []
        is_value = False  # the next word is a value of the one before
        for place, word in enumerate(args):
            if word == "--":
                words += args[place:]
                break
            words.append(word if is_value else _with_new_flag(word, old, known))
            is_value = not is_value and words[-1] in known and words[-1] not in switches
        if FLAG in known:
            same = {flag: one.opts[0] for one in self.params for flag in one.opts}
            words = expanded(str(self.name), words, same)
        return super().parse_args(ctx, words)


def _with_new_flag(word: str, old: Mapping[str, str], known: Collection[str]) -> str:
    """Return a word with its flag's new name.

    `old` maps flags whose meaning has changed; `known` holds all flags of today.
    """
    flag, equals, value = word.partition("=")
    if not flag.startswith("--") or (flag in known and flag not in old):
        return word
    no = "--no-" if flag.startswith("--no-") else "--"
    name = flag.removeprefix(no).replace("-", "_")
    new = old.get(flag, f"{no}{RENAMED.get(name, name).replace('_', '-')}")
    if new not in known:
        return word
    tell_renamed(flag, new)
    return f"{new}{equals}{value}"


class Commands(TyperGroup):
    """Imports a command when it is called, because torch takes seconds to import."""

    # click's classes have no type here: typer may have a copy of click of its own

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**{**attrs, "commands": dict.fromkeys(COMMANDS)})

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Import and return the command; None if there is none of this name.

        Raises FileNotFoundError in a deleted folder, where torch would end the process.
        """
        if cmd_name not in COMMANDS:
            return None
        os.getcwd()
        name = cmd_name.replace("-", "_")
        found = getattr(import_module(f"flowspec.cli.{name}"), name)
        if not isinstance(found, typer.Typer):
            own = typer.Typer(add_completion=False, rich_markup_mode=None)
            own.command(cmd_name, cls=_Command)(found)
            found = own
        return typer.main.get_command(found)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """Write the list of `flowspec --help` from the table, without importing the commands."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, about in COMMANDS.items() if about])
