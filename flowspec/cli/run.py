"""`flowspec run`: prompts through a pipeline of local processes."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flowspec.bench.verify import find_divergence
from flowspec.cli.common import (
    count_stages,
    draft_folder,
    effective_config,
    split_folder,
    with_engine_settings,
)
from flowspec.cli.settings import NUMERICS, with_settings
from flowspec.cli.ui.show import show_answers, show_summary
from flowspec.cli.ui.texts import check_texts
from flowspec.config import EngineConfig, as_yaml, new_name, override, parse_yaml
from flowspec.engine.build import HeadParts, check_run, load_head_parts
from flowspec.engine.launch import find_launch
from flowspec.engine.local import LocalEngine, check_files_for
from flowspec.engine.reference import LocalTarget
from flowspec.engine.torchrun import TorchrunEngine, fit_to_launch, serve_rank
from flowspec.request import Request, RequestOutput
from flowspec.speculation.drafters import DRAFTERS
from flowspec.speculation.strategies import STRATEGIES, strategy_config
from flowspec.system.process_title import name_process
from flowspec.tracing.chrome_trace import check_trace_path, tracing
from flowspec.transport.by_name import TRUSTED_ONLY
from flowspec.weights.load import load_whole

DEFAULT_PROMPT = (
    "Anna has 3 boxes with 12 apples in each box. She gives 7 apples to her brother. "
    "How many apples does Anna have left?"
)


@with_settings(
    *("model", "tokenizer", "draft", "stages", "layers", "strategy", "drafter"),
    *("max_new_tokens", "context"),
    *("max_num_seqs", *NUMERICS, "device", "threads", "kv_memory_mb", "max_restarts"),
    *("transport", "emulate", "trace"),
    strategy=f"One of {', '.join(STRATEGIES)}.",
    drafter=f"One of {', '.join(DRAFTERS)}.",
    transport="zmq, gloo or nccl. gloo and nccl (torch.distributed) neither encrypt nor "
    "authenticate: for trusted networks only. Both also run under torchrun: torchrun "
    "--nproc_per_node 5 -m flowspec run --transport gloo (head and 4 stages; on several machines "
    "the split model must lie at the same path on each).",
)
def run(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="The prompt; give it several times to ask all at once."),
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy. [default: 0]")] = None,
    top_k: Annotated[
        int | None, typer.Option(help="Keep the k likeliest tokens; 0: all. [default: 0]")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Keep the likeliest tokens that make up this probability. [default: 1]"),
    ] = None,
    min_p: Annotated[
        float | None,
        typer.Option(
            help="Keep tokens with this share of the likeliest one's probability. [default: 0]"
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. [default: 0]")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a decode setting: key=value.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; flags override it.")] = None,
    run_config: Annotated[  # commands.py reads it first
        Path | None, typer.Option(help="File of plain assignments, such as config/run_config.py.")
    ] = None,
    show_config: Annotated[bool, typer.Option(help="Print the effective config, stop.")] = False,
    check: Annotated[bool, typer.Option(help="Compare with the target alone.")] = True,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Split the model if needed, start head and stages here, and stream the answers."""
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
    }
    check_texts({"--prompt": prompt, "--stop": stop, "--set": set_})
    effective = effective_config(config, {**settings, **sampling})
    if set_:
        effective = override(effective, {"decode": _settings(effective, set_)}, where="--set")
        effective = with_engine_settings(effective, where="--set")
        strategy_config(effective.strategy, effective.decode, where="--set")
    if show_config:
        decode = strategy_config(effective.strategy, effective.decode, where="decode")
        typer.echo(as_yaml(effective.changed(decode=decode.model_dump())), nl=False)
        return
    _generate(effective, prompt or [DEFAULT_PROMPT], tuple(stop or ()), check=check)


def _settings(config: EngineConfig, pairs: list[str]) -> Mapping[str, Any]:
    settings = dict(config.decode)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, not {pair!a}")
        settings[new_name(key)] = parse_yaml(value, where=f"--set {key}")
    return settings


def _generate(
    config: EngineConfig, prompts: Sequence[str], stop: tuple[str, ...], *, check: bool
) -> None:
    launch = find_launch()
    if launch is not None:
        if launch.rank > 0:
            name_process(f"stage {launch.rank}")
            raise typer.Exit(serve_rank(config, launch))
        config = fit_to_launch(config, launch)
    _check_before_loading(config, is_local=launch is None)
    config = override(config, {"draft": draft_folder(config)}, where="draft")
    folder = split_folder(config)
    parts = load_head_parts(config, folder)
    torch.set_num_threads(config.local.threads)
    requests = [
        Request(
            id=number,
            prompt=parts.prompt_of([{"role": "user", "content": prompt}]),
            sampling=config.sampling,
            max_new_tokens=config.max_new_tokens,
            stop=stop,
            eos_token_ids=parts.eos_token_ids,
        )
        for number, prompt in enumerate(prompts, start=1)
    ]
    num_stages = len(parts.manifest.layers)
    notice = f"{parts.manifest.model_id}, {config.strategy}, head + {num_stages} stages"
    typer.echo(f"starting {notice} ...", err=True)
    name_process("head")
    if config.transport != "zmq":
        typer.echo(f"{config.transport}: {TRUSTED_ONLY}", err=True)
    new_engine = partial(TorchrunEngine, launch=launch) if launch else LocalEngine
    with (
        tracing(config.trace) as trace_folder,
        new_engine(config, parts, trace_folder) as engine,
    ):
        outputs, elapsed_s = show_answers(engine, requests)
        stages = engine.status().stages
    if any(output.tokens for output in outputs):
        show_summary(outputs, stages, elapsed_s)
    if config.trace:
        typer.echo(f"trace written to {config.trace}", err=True)
    for output in outputs:
        if output.error is not None:
            raise output.error.exception()
    if check:
        _check(config, parts, list(zip(requests, outputs, strict=True)))


def _check_before_loading(config: EngineConfig, *, is_local: bool) -> None:
    """Raise ValueError or OSError; `is_local` says that this command starts the stages."""
    check_run(config)
    if config.trace:
        check_trace_path(config.trace)
    if is_local:
        check_files_for(count_stages(config))


def _check(
    config: EngineConfig, parts: HeadParts, answers: Sequence[tuple[Request, RequestOutput]]
) -> None:
    whole = load_whole(parts.folder, device=config.local.device, dtype=config.numerics.dtype)
    alone = LocalTarget(whole, parts.max_context, batch_invariant=config.numerics.batch_invariant)
    wrong = False
    for request, output in answers:
        tokens, _, _ = alone.generate(request, parts.new_text)
        divergence = find_divergence(alone, request, tokens, output.tokens)
        which = f"[{request.id}] " if len(answers) > 1 else ""
        verdict = "yes" if divergence is None else f"NO, {divergence}"
        typer.echo(f"{which}identical to the target alone: {verdict}")
        wrong |= divergence is not None and not divergence.is_near_tie
    if wrong:
        raise typer.Exit(1)
