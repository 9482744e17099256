"""`flowspec generate`: answers from a running head, for scripts."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from flowspec.bench.prompts import PROMPTS_HELP, load_prompts
from flowspec.cli.chat import DEFAULT_PORT, ChatOptions, show_answer
from flowspec.cli.ui.texts import check_texts, read_input
from flowspec.engine.engine import Engine
from flowspec.engine.remote import RemoteEngine
from flowspec.engine.stream import Notice
from flowspec.request import ClusterError, FailureKind, RequestOutput
from flowspec.system import signals
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
    min_p: Annotated[
        float,
        typer.Option(
            help="Drop tokens below this share of the likeliest one's probability; 0: off."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 0,
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
    """Print the answers of the head; notes and figures go to stderr."""
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
    with RemoteEngine(host, port, keys) as engine:
        for text, where in asked:
            turns = [{"role": "user", "content": text}]
            answer = _as_json if json_ else show_answer
            output = answer(engine, options, turns)
            if output.error is None:
                continue
            error = output.error
            cause = f"{where}: {error.cause}" if where else error.cause
            if error.kind is not FailureKind.FAILED:
                raise ValueError(cause)
            raise ClusterError(error.place or "head", cause, rank=error.rank)


def _as_json(engine: Engine, options: ChatOptions, turns: list[dict[str, str]]) -> RequestOutput:
    with signals.undoing(), engine.submit(options.request(turns)) as stream:
        for event in stream:
            if isinstance(event, Notice):
                typer.echo(f"[{event.text}]", err=True)
    output = stream.result()
    asked = {"prompt": turns[-1]["content"], **asdict(options)}
    typer.echo(json.dumps({**asked, **output_fields(output)}))
    sys.stdout.flush()
    return output


def output_fields(output: RequestOutput) -> dict[str, Any]:
    """Return an answer and its figures as --json prints them."""
    stats, error = output.stats, output.error
    kind = error.kind if error is not None else None
    return {
        "text": output.text,
        "tokens": list(output.tokens),
        "reason": output.reason.value,
        "error": "" if error is None else str(error),
        "num_tokens": len(output.tokens),
        "tokens_per_s": stats.tokens_per_s,
        "time_to_first_token_s": stats.time_to_first_token_s,
        "tau": stats.mean_accepted_length,
        "resumed": stats.num_resumes,
        "prompt_tokens": output.num_prompt_tokens,
        "refused": kind in (FailureKind.REFUSED, FailureKind.BAD_PROMPT, FailureKind.TOO_LARGE),
        "bad_prompt": kind is FailureKind.BAD_PROMPT,
        "too_large": kind is FailureKind.TOO_LARGE,
    }
