"""`flowspec run`: one prompt through a pipeline of local processes."""

import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flowspec.cli.common import draft_folder, effective_config, split_folder
from flowspec.cluster.local import LocalCluster
from flowspec.cluster.torchrun import TorchrunCluster, find_launch, fit_to_launch, serve_rank
from flowspec.config import RunConfig, as_yaml, override
from flowspec.drafters import DRAFTERS
from flowspec.engine import HeadParts, check_run, decode_config, load_head_parts
from flowspec.eval.tracing import tracing
from flowspec.eval.verify import find_divergence
from flowspec.model.load import load_whole
from flowspec.plain_yaml import parse_yaml
from flowspec.request import Completion, DecodeStats, Request
from flowspec.strategies import STRATEGIES
from flowspec.targets.local import LocalTarget
from flowspec.text import render_chat
from flowspec.transport.local import TRUSTED_ONLY
from flowspec.wire import Status, Tokens

DEFAULT_PROMPT = (
    "Anna has 3 boxes with 12 apples in each box. She gives 7 apples to her brother. "
    "How many apples does Anna have left?"
)
PLAIN_INTERVAL_S = 2.0  # between live lines where stderr is no terminal


def run(
    prompt: Annotated[str, typer.Option(help="What to ask.")] = DEFAULT_PROMPT,
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
    max_new_tokens: Annotated[int | None, typer.Option(help="Length limit [200].")] = None,
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
    shape_stable: Annotated[bool | None, typer.Option(help="Bit-equal in 16 bits, slow.")] = None,
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
    effective = effective_config(config, flags)
    if set_:
        effective = override(effective, {"decode": _settings(effective, set_)}, where="--set")
    if show_config:
        decode = asdict(decode_config(effective)[1])
        typer.echo(as_yaml(replace(effective, decode=decode)), nl=False)
        return
    _generate(effective, prompt, tuple(stop or ()), check=check)


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
        "shape_stable",
    ),
    *("temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens", "trace"),
)


def _settings(config: RunConfig, pairs: list[str]) -> Mapping[str, Any]:
    settings = dict(config.decode)
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set takes key=value, not {pair!r}")
        settings[key] = parse_yaml(value, where=f"--set {key}")
    return settings


def _generate(config: RunConfig, prompt: str, stop: tuple[str, ...], *, check: bool) -> None:
    launch = find_launch()
    if launch is not None:
        if launch.rank > 0:
            raise typer.Exit(serve_rank(config, launch))
        config = fit_to_launch(config, launch)
    check_run(config)
    config = override(config, {"draft": draft_folder(config)}, where="draft")
    folder = split_folder(config)
    parts = load_head_parts(config, folder)
    torch.set_num_threads(config.threads_per_process)
    request = Request(
        id=1,
        prompt=render_chat(parts.tokenizer, [{"role": "user", "content": prompt}]),
        sampling=config.sampling,
        max_new_tokens=config.max_new_tokens,
        stop=stop,
        eos_token_ids=parts.eos_token_ids,
    )
    num_stages = len(parts.manifest.layers)
    notice = f"{parts.manifest.model_id}, {config.strategy}, head + {num_stages} stages"
    typer.echo(f"starting {notice} ...", err=True)
    if config.transport != "zmq":
        typer.echo(f"{config.transport}: {TRUSTED_ONLY}", err=True)
    new_cluster = partial(TorchrunCluster, launch=launch) if launch else LocalCluster
    with (
        tracing(config.trace) as trace_folder,
        new_cluster(config, parts, trace_folder) as cluster,
    ):
        completion, elapsed_s = _show_stream(cluster, request)
        statuses = cluster.statuses()
    _summary(completion, statuses, elapsed_s)
    if config.trace:
        typer.echo(f"trace written to {config.trace}", err=True)
    if completion.error:
        raise ValueError(completion.error)
    if check:
        _check(config, parts, request, completion)


def _show_stream(cluster: LocalCluster, request: Request) -> tuple[Completion, float]:
    """The text on stdout as it comes, with a live line under it (or, piped, on stderr)."""
    start = time.monotonic()
    rich = sys.stdout.isatty()
    live = Live(console=Console(), refresh_per_second=8, transient=False) if rich else None
    text, shown = "", start
    activity = _Activity()
    if live:
        live.start()
    try:
        for event in cluster.serve([request]):
            if isinstance(event, Completion):
                if live:
                    live.update(Text(event.text))
                else:
                    typer.echo("")
                return event, time.monotonic() - start
            text = _show(event, text, live)
            line = _live_line(cluster, start, activity)
            if live:
                live.update(Group(Text(text), Text(line, style="dim")))
            elif time.monotonic() - shown > PLAIN_INTERVAL_S:
                shown = time.monotonic()
                typer.echo(f"[{line}]", err=True)
    finally:
        if live:
            live.stop()
    raise AssertionError("a stream ends with its Completion")


def _show(event: Tokens, text: str, live: Live | None) -> str:
    if live is None:
        typer.echo(event.text, nl=False)
        sys.stdout.flush()
    return text + event.text


class _Activity:
    """What share of the time between its last two reports each stage computed."""

    def __init__(self) -> None:
        self._seen: dict[int, tuple[float, float]] = {}  # (when, busy seconds) per stage
        self.shares: dict[int, float] = {}

    def update(self, statuses: Mapping[int, Status], now: float) -> None:
        """Take in the newest reports."""
        for rank, status in sorted(statuses.items()):
            when, busy_s = self._seen.get(rank, (now, status.busy_s))
            if status.busy_s != busy_s and now > when:
                self.shares[rank] = min(1.0, (status.busy_s - busy_s) / (now - when))
            if status.busy_s != busy_s or rank not in self._seen:
                self._seen[rank] = (now, status.busy_s)


def _live_line(cluster: LocalCluster, start: float, activity: _Activity) -> str:
    stats = cluster.head.stats()
    if stats is None:
        return "starting"
    elapsed = max(time.monotonic() - max(stats.first_token_at, start), 1e-9)
    activity.update(cluster.statuses(), time.monotonic())
    stages = " ".join(f"{rank}:{share:.0%}" for rank, share in sorted(activity.shares.items()))
    return (
        f"{(stats.num_tokens - 1) / elapsed:.1f} tokens/s, "
        f"{stats.mean_accepted_length:.2f} tokens per verdict, stages busy {stages or '-'}"
    )


def _busy_shares(statuses: Mapping[int, Status], elapsed_s: float) -> dict[int, float]:
    return {
        rank: min(1.0, status.busy_s / max(elapsed_s, 1e-9))
        for rank, status in sorted(statuses.items())
    }


def _summary(completion: Completion, statuses: Mapping[int, Status], elapsed_s: float) -> None:
    stats = completion.stats
    alphas = " ".join(f"{alpha:.2f}" for alpha in stats.acceptance_by_depth()[:8])
    shares = _busy_shares(statuses, elapsed_s)
    pruned = sum(status.num_rows_pruned for status in statuses.values())
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("finished", f"{completion.reason.value}, {stats.num_tokens} tokens")
    table.add_row("speed", f"{stats.tokens_per_s:.1f} tokens/s after the first token")
    table.add_row("first token", f"{_ttft_ms(stats):.0f} ms")
    table.add_row("tau", f"{stats.mean_accepted_length:.2f} tokens per verdict")
    table.add_row("alpha per depth", alphas or "-")
    busy = " ".join(f"{rank}:{share:.0%}" for rank, share in shares.items())
    table.add_row("stages busy", busy)
    sent = f"{stats.num_rows_sent} rows in {stats.num_segments} segments"
    table.add_row("sent", f"{sent}, {stats.num_draft_forwards} drafter forwards")
    table.add_row("pruned in flight", f"{pruned} rows")
    Console(width=100).print(table)


def _ttft_ms(stats: DecodeStats) -> float:
    return max(0.0, stats.first_token_at - stats.submitted_at) * 1e3


def _check(config: RunConfig, parts: HeadParts, request: Request, completion: Completion) -> None:
    whole = load_whole(parts.folder, device=config.device, dtype=config.dtype)
    alone = LocalTarget(whole, parts.max_context, shape_stable=config.shape_stable)
    tokens, _, _ = alone.generate(request, parts.new_text)
    divergence = find_divergence(alone, request, tokens, completion.tokens)
    if divergence is None:
        typer.echo("identical to the target alone: yes")
        return
    typer.echo(f"identical to the target alone: NO, {divergence}")
    if not divergence.is_near_tie:
        raise typer.Exit(1)
