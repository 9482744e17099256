"""The commands by name. Adding one: one file here, one row in the table."""

import os
from collections.abc import Collection, Mapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup

from flowspec.cli.run_config import FLAG, expanded
from flowspec.config import RENAMED, tell_renamed

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


# Flags that have another name now, besides those of renamed settings: command -> old -> new. Where
# one is used that no flag is called any more, all of the command's have their old meaning.
_MODELS = {"--target": "--model", "--model": "--emulated-model"}
OLD_FLAGS: dict[str, dict[str, str]] = {"bench": _MODELS, "simulate": _MODELS}


class _Command(TyperCommand):
    """A command that understands the old names of its flags, and says the new ones."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """The words of the command line, with the names that flags have now."""
        known = {flag for one in self.params for flag in (*one.opts, *one.secondary_opts)}
        switches = {
            flag for one in self.params if getattr(one, "is_flag", False) for flag in one.opts
        }
        old = OLD_FLAGS.get(str(self.name), {})
        if not {word.partition("=")[0] for word in args} & (old.keys() - known):
            old = {}
        words: list[str] = []
        is_value = False  # of the word before
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
    """A word of the command line; `old` has flags of another meaning, `known` all of today."""
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
            own.command(cmd_name, cls=_Command)(found)
            found = own
        return typer.main.get_command(found)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """The list in `flowspec --help`, from the table alone."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, about in COMMANDS.items() if about])
