"""`flowspec run`: prompts through a pipeline of local processes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flowspec.bench.verify import find_divergence
from flowspec.cli.common import (
    CONTEXT_HELP,
    count_stages,
    draft_folder,
    effective_config,
    split_folder,
)
from flowspec.cli.ui.show import show_answers, show_summary
from flowspec.cli.ui.texts import check_texts
from flowspec.config import RunConfig, as_yaml, override, parse_yaml
from flowspec.engine.build import HeadParts, check_run, decode_config, load_head_parts
from flowspec.engine.cores import segments_at_once
from flowspec.engine.launch import find_launch
from flowspec.engine.local import LocalCluster, check_files_for
from flowspec.engine.reference import LocalTarget
from flowspec.engine.torchrun import TorchrunCluster, fit_to_launch, serve_rank
from flowspec.request import Completion, Request, error_of
from flowspec.speculation.drafters import DRAFTERS
from flowspec.speculation.strategies import STRATEGIES, check_taken
from flowspec.system.process_title import name_process
from flowspec.tracing.chrome_trace import check_trace_path, tracing
from flowspec.transport.by_name import TRUSTED_ONLY
from flowspec.weights.load import load_whole

DEFAULT_PROMPT = (
    "Anna has 3 boxes with 12 apples in each box. She gives 7 apples to her brother. "
    "How many apples does Anna have left?"
)


def run(
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to ask; give it several times to ask all at once."),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Split folder, model folder or HF id [bundled model].")
    ] = None,
    draft: Annotated[str | None, typer.Option(help="Folder of the draft model [bundled].")] = None,
    stages: Annotated[int | None, typer.Option(help="Number of stage processes [4].")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers per stage, as in 3+3+2.")] = None,
    strategy: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(STRATEGIES)} [streaming].")
    ] = None,
    drafter: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(DRAFTERS)} [eagle].")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy [0].")] = None,
    top_k: Annotated[int | None, typer.Option(help="Keep the k likeliest tokens [0: off].")] = None,
    top_p: Annotated[float | None, typer.Option(help="Nucleus sampling [1: off].")] = None,
    min_p: Annotated[float | None, typer.Option(help="Of the likeliest token's p [0].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling noise [0].")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option("--max-new-tokens", "--max-tokens", help="Length limit of an answer [200]."),
    ] = None,
    context: Annotated[int | None, typer.Option(help=CONTEXT_HELP, min=0)] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(help="Served at once, at most 16 [8].")
    ] = None,
    kv_memory_mb: Annotated[
        int | None, typer.Option(help="KV cache of each stage [half of what is free, shared].")
    ] = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(help="Of stage processes that die, so that answers go on; zmq alone [3]."),
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the answer.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, float16.")] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda[:n].")] = None,
    transport: Annotated[
        str | None,
        typer.Option(
            help="zmq, gloo or nccl [zmq]. gloo and nccl (torch.distributed) neither encrypt nor "
            "authenticate: for trusted networks only. Both also run under torchrun: torchrun "
            "--nproc_per_node 5 -m flowspec run --transport gloo (head and 4 stages; on several "
            "machines the split model must lie at the same path on each)."
        ),
    ] = None,
    batch_invariant: Annotated[
        bool | None, typer.Option(help="Bit-equal in 16 bits, slow.")
    ] = None,
    emulate: Annotated[
        str | None,
        typer.Option(
            help="CLUSTER:MODEL, such as jetson-5:vicuna-7b: keep the pace of that cluster running "
            "that model (profiles in config/)."
        ),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a decode setting: key=value.")
    ] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file; flags override it.")] = None,
    show_config: Annotated[bool, typer.Option(help="Print the effective config, stop.")] = False,
    trace: Annotated[
        str | None, typer.Option(help="Write a trace of the run there, for Perfetto.")
    ] = None,
    check: Annotated[bool, typer.Option(help="Compare with the target alone.")] = True,
) -> None:
    """Split the model if need be, start head and stages here, stream the answer."""
    flags = {name: value for name, value in locals().items() if name in _CONFIG_FLAGS}
    check_texts({"--prompt": prompt, "--stop": stop, "--set": set_})
    effective = effective_config(config, flags)
    if set_:
        spec, _ = decode_config(effective)  # what is wrong now is the file's
        effective = override(effective, {"decode": _settings(effective, set_)}, where="--set")
        override(spec.defaults, effective.decode, where="--set")
        check_taken(effective.strategy, effective.decode, where="--set")
    if show_config:
        decode = asdict(decode_config(effective)[1])
        typer.echo(as_yaml(replace(effective, decode=decode)), nl=False)
        return
    _generate(effective, prompt or [DEFAULT_PROMPT], tuple(stop or ()), check=check)


_CONFIG_FLAGS = (
    *(
        "drafter",
        "model",
        "draft",
        "stages",
        "layers",
        "strategy",
        "dtype",
        "device",
        "transport",
        "batch_invariant",
    ),
    *("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens"),
    *("context", "max_num_seqs", "kv_memory_mb", "max_restarts", "trace", "emulate"),
)


def _settings(config: RunConfig, pairs: list[str]) -> Mapping[str, Any]:
    settings = dict(config.decode)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, not {pair!a}")
        settings[key] = parse_yaml(value, where=f"--set {key}")
    return settings


def _generate(
    config: RunConfig, prompts: Sequence[str], stop: tuple[str, ...], *, check: bool
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
    torch.set_num_threads(config.threads_per_process)
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
    shares_cores = not launch and not config.emulate and config.device == "cpu"
    spec, decode = decode_config(config)
    if shares_cores and not decode.max_in_flight and "max_in_flight" not in spec.ignores:
        in_flight = segments_at_once(num_stages, threads=config.threads_per_process)
        config = replace(config, decode={**config.decode, "max_in_flight": in_flight})
    notice = f"{parts.manifest.model_id}, {config.strategy}, head + {num_stages} stages"
    typer.echo(f"starting {notice} ...", err=True)
    name_process("head")
    if config.transport != "zmq":
        typer.echo(f"{config.transport}: {TRUSTED_ONLY}", err=True)
    new_cluster = partial(TorchrunCluster, launch=launch) if launch else LocalCluster
    with (
        tracing(config.trace) as trace_folder,
        new_cluster(config, parts, trace_folder) as cluster,
    ):
        completions, elapsed_s = show_answers(cluster, requests)
        statuses = cluster.statuses()
    if any(completion.tokens for completion in completions):
        show_summary(completions, statuses, elapsed_s)
    if config.trace:
        typer.echo(f"trace written to {config.trace}", err=True)
    if failed := next((c for c in completions if c.error), None):
        raise error_of(failed.error)
    if check:
        _check(config, parts, list(zip(requests, completions, strict=True)))


def _check_before_loading(config: RunConfig, *, is_local: bool) -> None:
    """Raises ValueError or OSError. `is_local`: the stages are processes of this command."""
    check_run(config)
    if config.trace:
        check_trace_path(config.trace)
    if is_local:
        check_files_for(count_stages(config))


def _check(
    config: RunConfig, parts: HeadParts, answers: Sequence[tuple[Request, Completion]]
) -> None:
    whole = load_whole(parts.folder, device=config.device, dtype=config.dtype)
    alone = LocalTarget(whole, parts.max_context, batch_invariant=config.batch_invariant)
    wrong = False
    for request, completion in answers:
        tokens, _, _ = alone.generate(request, parts.new_text)
        divergence = find_divergence(alone, request, tokens, completion.tokens)
        which = f"[{request.id}] " if len(answers) > 1 else ""
        verdict = "yes" if divergence is None else f"NO, {divergence}"
        typer.echo(f"{which}identical to the target alone: {verdict}")
        wrong |= divergence is not None and not divergence.is_near_tie
    if wrong:
        raise typer.Exit(1)
