"""`flowspec chat`: a conversation with a running head."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import typer

from flowspec.engine.client import HeadClient
from flowspec.protocol.control import Done, Note, Piece
from flowspec.request import SamplingParams
from flowspec.system import signals
from flowspec.system.address import parse_address
from flowspec.tokenizer import check_text
from flowspec.transport.secure.token import derive_keys, read_token

DEFAULT_PORT = 7000
HELP = "Ctrl-C ends an answer, Ctrl-D or /quit the conversation, /new begins another."


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How answers are chosen."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises ValueError for what no head takes, before one is asked."""
        names = {field.name for field in fields(SamplingParams)}
        own = {field.name for field in fields(self)}
        SamplingParams(**{name: getattr(self, name) for name in names & own})


def chat(
    head: Annotated[str, typer.Argument(help="HOST:PORT of the head.")],
    token: Annotated[
        str | None, typer.Option(help="Safer in --token-file or FLOWSPEC_TOKEN.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1: off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", "--max-tokens", help="Limit of an answer.", min=1, max=1_000_000
        ),
    ] = 200,
) -> None:
    """Talk to the model that HEAD serves."""
    keys = derive_keys(token or read_token(token_file))
    host, port = parse_address(head, default_port=DEFAULT_PORT)
    options = ChatOptions(
        temperature=temperature, top_p=top_p, seed=seed, max_new_tokens=max_new_tokens
    )
    with HeadClient(host, port, keys) as client:
        chat_loop(client, options)


def chat_loop(
    client: HeadClient,
    options: ChatOptions,
    *,
    about: str = HELP,
    read: Callable[[str], str] = input,
) -> None:
    """Read a line, stream its answer, until the input ends. `about` says which keys do what."""
    typer.echo(about, err=True)
    if isinstance(sys.stdin, io.TextIOWrapper):  # a line that is not UTF-8 ends no conversation
        with contextlib.suppress(io.UnsupportedOperation):  # something was read already
            sys.stdin.reconfigure(errors="surrogateescape")
    turns: list[dict[str, str]] = []
    while True:
        signals.check()  # one may have come just when the answer had ended
        try:
            line = read("> ").strip()
        except EOFError:
            typer.echo("", err=True)
            return
        if line == "/quit":
            return
        if line == "/new":
            turns = []
        elif line.startswith("/"):
            typer.echo(about, err=True)
        if not line or line.startswith("/"):
            continue
        _take_turn(client, options, turns, line)


def _take_turn(
    client: HeadClient, options: ChatOptions, turns: list[dict[str, str]], line: str
) -> None:
    """Ask `line`; where it is answered, both are part of the conversation from now on."""
    asked = [*turns, {"role": "user", "content": line}]
    try:
        with signals.cutting():
            check_text(line, "this line")
            text, done = show_answer(client, options, asked)
    except ValueError as error:  # this line cannot be sent; another one can
        typer.echo(f"error: {error}", err=True)
    except KeyboardInterrupt:
        typer.echo(" ... (cut off)")
    else:
        if done.error:
            typer.echo(f"error: {done.error}", err=True)
        else:
            turns[:] = [*asked, {"role": "assistant", "content": text}]


def show_answer(
    client: HeadClient, options: ChatOptions, turns: list[dict[str, str]]
) -> tuple[str, Done]:
    """Stream one answer to stdout, its figures to stderr.

    Why there is no answer is the caller's to tell.
    """
    ask = client.new_ask(
        turns=turns,
        **{name: getattr(options, name) for name in ChatOptions.__slots__},
    )
    text = ""
    for event in client.ask(ask):
        match event:
            case Piece():
                text += event.text
                typer.echo(event.text, nl=False)
                sys.stdout.flush()
            case Note():
                typer.echo(f"[{event.text}]", err=True)
            case Done():
                if text or not event.error:
                    typer.echo("")
                show_end(event)
                return text, event
    raise AssertionError("an answer without an end")


def show_end(done: Done) -> None:
    """An answer's figures, where there is one."""
    if done.error:
        return
    resumed = f", went on after {done.resumed} interruptions" if done.resumed else ""
    typer.echo(
        f"[{done.reason}, {done.num_tokens} tokens, {done.tokens_per_s:.1f} tokens/s, first after "
        f"{done.time_to_first_token_s:.2f} s, {done.tau:.2f} tokens per verdict{resumed}]",
        err=True,
    )
