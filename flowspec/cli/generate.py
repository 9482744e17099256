"""`flowspec generate`: one answer from a running head, for scripts."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from flowspec.cli.chat import DEFAULT_PORT, ChatOptions, show_end
from flowspec.cluster.client import HeadClient
from flowspec.cluster.messages import Done, Note, Piece
from flowspec.cluster.token import derive_keys, read_token
from flowspec.request import ClusterError
from flowspec.transport.control import parse_address


def generate(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads standard input.")],
    head: Annotated[str, typer.Option(help="HOST:PORT of the head.")],
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
        int, typer.Option("--max-new-tokens", "--max-tokens", help="Limit of the answer.")
    ] = 200,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    json_: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text, token ids, figures.")
    ] = False,
) -> None:
    """Print the answer of the cluster of --head to PROMPT; notes and figures go to stderr."""
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
    text = sys.stdin.read() if prompt == "-" else prompt
    with HeadClient(host, port, keys) as client:
        ask = client.new_ask(turns=[{"role": "user", "content": text}], **asdict(options))
        answer, tokens = "", []
        for event in client.ask(ask):
            match event:
                case Piece():
                    answer += event.text
                    tokens += event.tokens
                    if not json_:
                        typer.echo(event.text, nl=False)
                        sys.stdout.flush()
                case Note():
                    typer.echo(f"[{event.text}]", err=True)
                case Done():
                    done = event
    if json_:
        typer.echo(
            json.dumps(
                {"text": answer, "tokens": tokens, **done.model_dump(exclude={"kind", "id"})}
            )
        )
    else:
        typer.echo("")
        show_end(done)
    if done.error:
        raise ClusterError("head", done.error)
