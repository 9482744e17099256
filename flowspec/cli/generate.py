"""`flowspec generate`: answers from a running head, for scripts."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flowspec.bench.prompts import PROMPTS_HELP, load_prompts
from flowspec.cli.chat import DEFAULT_PORT, ChatOptions, show_answer
from flowspec.cli.ui.texts import check_texts, read_input
from flowspec.engine.client import HeadClient
from flowspec.protocol.control import Done, Note, Piece
from flowspec.request import ClusterError, error_of
from flowspec.system.address import parse_address
from flowspec.transport.secure.token import derive_keys, read_token


def generate(
    head: Annotated[str, typer.Option(help="HOST:PORT of the head.")],
    prompt: Annotated[
        str | None, typer.Argument(help="What to ask; - reads standard input.")
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help=PROMPTS_HELP)] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts per file.", min=1)] = None,
    token: Annotated[
        str | None, typer.Option(help="Safer in --token-file or FLOWSPEC_TOKEN.")
    ] = None,
    token_file: Annotated[Path | None, typer.Option(help="File with the token.")] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the k likeliest tokens; 0: off.")] = 0,
    top_p: Annotated[float, typer.Option(help="Nucleus sampling; 1: off.")] = 1.0,
    min_p: Annotated[float, typer.Option(help="Of the likeliest token's probability.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling noise.")] = 0,
    max_new_tokens: Annotated[
        int,
        typer.Option(
            "--max-new-tokens", "--max-tokens", help="Limit of the answer.", min=1, max=1_000_000
        ),
    ] = 200,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    json_: Annotated[
        bool,
        typer.Option(
            "--json", help="One JSON object per answer: what was asked, text, tokens, figures."
        ),
    ] = False,
) -> None:
    """Print what the cluster of --head answers; notes and figures go to stderr."""
    if (prompt is None) == (prompts is None):
        raise ValueError("give either a prompt or --prompts FILE")
    check_texts({"the prompt": [prompt or ""], "--stop": stop})
    options = ChatOptions(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        max_new_tokens=max_new_tokens,
        stop=tuple(stop or ()),
    )
    keys = derive_keys(token or read_token(token_file))
    host, port = parse_address(head, default_port=DEFAULT_PORT)
    if prompts is not None:
        asked = [(one.turns[0], one.where) for one in load_prompts(prompts, limit=limit)]
    else:
        asked = [(read_input() if prompt == "-" else str(prompt), "")]
    with HeadClient(host, port, keys) as client:
        for text, where in asked:
            turns = [{"role": "user", "content": text}]
            done = (
                _as_json(client, options, turns)
                if json_
                else show_answer(client, options, turns)[1]
            )
            if done.refused:
                raise ValueError(done.error)
            if done.error:
                raise _failure(done.error, where)


def _failure(text: str, where: str) -> ClusterError:
    """What the head says of an answer: the device that failed, or the head; and what was asked."""
    error = error_of(text)
    failed, cause = (
        (error.where, error.cause) if isinstance(error, ClusterError) else ("head", text)
    )
    return ClusterError(failed, f"{where}: {cause}" if where else cause)


def _as_json(client: HeadClient, options: ChatOptions, turns: list[dict[str, str]]) -> Done:
    answer = ""
    tokens: list[int] = []
    for event in client.ask(client.new_ask(turns=turns, **asdict(options))):
        match event:
            case Piece():
                answer += event.text
                tokens += event.tokens
            case Note():
                typer.echo(f"[{event.text}]", err=True)
            case Done():
                done = event
    figures = done.model_dump(exclude={"kind", "id", "figures"})
    asked = {"prompt": turns[-1]["content"], **asdict(options)}
    typer.echo(json.dumps({**asked, "text": answer, "tokens": tokens, **figures}))
    sys.stdout.flush()
    return done
