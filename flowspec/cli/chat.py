"""`flowspec chat`: a conversation with a running head."""

import contextlib
import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from flowspec.engine.engine import Engine
from flowspec.engine.remote import RemoteEngine
from flowspec.engine.stream import Notice
from flowspec.request import FinishReason, Request, RequestOutput, SamplingParams, TokensOut
from flowspec.system import signals
from flowspec.system.address import parse_address
from flowspec.tokenizer import check_text
from flowspec.transport.secure.token import derive_keys, read_token

DEFAULT_PORT = 7000
HELP = "Ctrl-C ends an answer, Ctrl-D or /quit the conversation, /new begins another."


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """Sampling parameters and limits of the answers."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    max_new_tokens: int = 200
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raise ValueError for a parameter that is out of range."""
        self.request([{"role": "user", "content": "?"}])

    def request(self, turns: list[dict[str, str]]) -> Request:
        """Make the request for the next answer of a conversation."""
        return Request(
            prompt=turns,
            sampling=SamplingParams(
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                min_p=self.min_p,
                seed=self.seed,
            ),
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
        )


def chat(
    head: Annotated[str, typer.Argument(help="HOST:PORT of the head.")],
    token: Annotated[
        str | None, typer.Option(help="Safer in --token-file or FLOWSPEC_TOKEN.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1: off.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
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
    with RemoteEngine(host, port, keys) as engine:
        chat_loop(engine, options)


def chat_loop(
    engine: Engine,
    options: ChatOptions,
    *,
    about: str = HELP,
    read: Callable[[str], str] = input,
) -> None:
    """Read lines and stream their answers until the input ends. `about` explains the keys."""
    typer.echo(about, err=True)
    if isinstance(sys.stdin, io.TextIOWrapper):  # accept lines that are not UTF-8
        with contextlib.suppress(io.UnsupportedOperation):  # some input was read before
            sys.stdin.reconfigure(errors="surrogateescape")
    turns: list[dict[str, str]] = []
    while True:
        signals.check()  # a signal may have come after the answer
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
        _take_turn(engine, options, turns, line)


def _take_turn(
    engine: Engine, options: ChatOptions, turns: list[dict[str, str]], line: str
) -> None:
    """Ask `line`; add it and its answer to the conversation if there is an answer."""
    asked = [*turns, {"role": "user", "content": line}]
    try:
        with signals.cutting():
            check_text(line, "this line")
            output = show_answer(engine, options, asked)
    except ValueError as error:  # this line cannot be sent; another one can
        typer.echo(f"error: {error}", err=True)
    except KeyboardInterrupt:
        typer.echo(" ... (cut off)")
    else:
        if output.error is not None:
            typer.echo(f"error: {output.error}", err=True)
        else:
            turns[:] = [*asked, {"role": "assistant", "content": output.text}]


def show_answer(engine: Engine, options: ChatOptions, turns: list[dict[str, str]]) -> RequestOutput:
    """Stream one answer to stdout and print its figures on stderr.

    The caller prints the error of an output that has one.
    """
    has_text = False
    with signals.undoing(), engine.submit(options.request(turns)) as stream:
        for event in stream:
            match event:
                case TokensOut():
                    has_text = has_text or bool(event.text)
                    typer.echo(event.text, nl=False)
                    sys.stdout.flush()
                case Notice():
                    typer.echo(f"[{event.text}]", err=True)
    output = stream.result()
    if has_text or output.error is None:
        typer.echo("")
    show_end(output)
    return output


def show_end(output: RequestOutput) -> None:
    """Print the figures of an answer; a request that failed has none."""
    if output.reason is FinishReason.ERROR:
        return
    stats = output.stats
    resumed = f", went on after {stats.num_resumes} interruptions" if stats.num_resumes else ""
    typer.echo(
        f"[{output.reason.value}, {stats.num_tokens} tokens, {stats.tokens_per_s:.1f} tokens/s, "
        f"first after {stats.time_to_first_token_s:.2f} s, {stats.mean_accepted_length:.2f} tokens "
        f"per verdict{resumed}]",
        err=True,
    )
