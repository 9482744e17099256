"""`flowspec verify`: is every strategy's text exactly the target's own?"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from flowspec.cli.common import BUNDLED, draft_folder, split_folder
from flowspec.cluster.base import Cluster
from flowspec.cluster.local import LocalCluster
from flowspec.config import RunConfig
from flowspec.engine import HeadParts, build_head, build_stage, load_head_parts
from flowspec.eval.prompts import Prompt, load_prompts
from flowspec.eval.verify import Combination, Verifier
from flowspec.model.load import load_whole
from flowspec.request import Request, SamplingParams
from flowspec.simulate.cluster import SimulatedCluster
from flowspec.strategies import STRATEGIES, find_strategy
from flowspec.targets.local import LocalTarget
from flowspec.text import render_chat

DRIVERS = ("simulated", "zmq")
_REQUEST_IDS = count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """What to verify."""

    config: RunConfig
    strategies: tuple[str, ...]
    stages: tuple[int, ...]
    temperatures: tuple[float, ...]
    driver: str
    prompts: Sequence[Prompt]
    max_tokens: int


def verify(
    model: Annotated[str | None, typer.Argument(help="Folder or HF id [bundled model].")] = None,
    draft: Annotated[str | None, typer.Option(help="Folder of the draft model [bundled].")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="question.jsonl, JSON lines, text, or a folder of them.")
    ] = None,
    strategies: Annotated[str, typer.Option(help="all, or names with commas.")] = "all",
    stages: Annotated[str, typer.Option(help="Stage counts, as in 1,2,4.")] = "1,2,4",
    temperatures: Annotated[str, typer.Option(help="As in 0,1.")] = "0,1",
    driver: Annotated[str, typer.Option(help=f"One of {', '.join(DRIVERS)}.")] = "simulated",
    limit: Annotated[int | None, typer.Option(help="Prompts per file.")] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    device: Annotated[str, typer.Option(help="cpu or cuda[:n].")] = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16.")] = "float32",
    shape_stable: Annotated[bool, typer.Option(help="Fixed kernel shapes (slow).")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Run every combination against the target alone with the same seed; exit 1 on a mismatch.

    In float32 any difference is a mismatch. In 16 bits a difference where the two tokens' logits
    lie within rounding is counted as a near-tie; --shape-stable removes those too.
    """
    if driver not in DRIVERS:
        raise ValueError(f"unknown driver {driver!r}; known: {', '.join(DRIVERS)}")
    names = tuple(STRATEGIES) if strategies == "all" else tuple(strategies.split(","))
    for name in names:
        find_strategy(name)
    config = RunConfig(
        model=model or RunConfig().model,
        draft=draft or "",
        dtype=dtype,
        device=device,
        shape_stable=shape_stable,
        # the strategy decides only whether a drafter is loaded; ar needs none
        strategy=next((name for name in names if STRATEGIES[name].drafts), names[0]),
    )
    plan = _Plan(
        config=replace(config, draft=draft_folder(config)),
        strategies=names,
        stages=_numbers(stages, int, "--stages"),
        temperatures=_numbers(temperatures, float, "--temperatures"),
        driver=driver,
        prompts=load_prompts(prompts or BUNDLED / "prompts.jsonl", limit=limit),
        max_tokens=max_tokens,
    )
    if not plan.prompts:
        raise ValueError("no prompts to verify with; give --limit 1 or more and a file with some")
    rows = _run(plan)
    _report(rows)
    if json_file:
        json_file.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    if any(row.mismatches for row in rows):
        raise typer.Exit(1)


def _numbers(text: str, kind: type, name: str) -> tuple:  # type: ignore[type-arg]
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} takes numbers with commas, not {text!r}") from None


def _run(plan: _Plan) -> list[Combination]:
    torch.set_num_threads(1)  # small forwards; more threads only wait for one another
    rows: list[Combination] = []
    verifier: Verifier | None = None
    console = Console(stderr=True)
    with Progress(console=console, transient=True) as progress:
        runs = len(plan.strategies) * len(plan.temperatures) * len(plan.prompts) * len(plan.stages)
        task = progress.add_task("verifying", total=runs)
        for num_stages in plan.stages:
            config = replace(plan.config, stages=num_stages)
            folder = split_folder(config)
            parts = load_head_parts(config, folder)
            if verifier is None:
                _say_left_out(plan, parts, console)
                whole = load_whole(folder, device=config.device, dtype=config.dtype)
                alone = LocalTarget(whole, parts.max_context, shape_stable=config.shape_stable)
                verifier = Verifier(alone)
            with _cluster(plan.driver, config, parts) as cluster:
                for row in _rows(plan, num_stages):
                    spec = STRATEGIES[row.strategy]
                    cluster.configure(spec, spec.defaults)
                    requests = _requests(plan, parts, row.temperature)
                    for divergence in verifier.check(cluster, requests, row):
                        progress.advance(task)
                        if divergence is not None:
                            console.print(f"{row.strategy}, {num_stages} stages: {divergence}")
                    rows.append(row)
    return rows


def _say_left_out(plan: _Plan, parts: HeadParts, console: Console) -> None:
    """A prompt that fills the model's context has no answer to compare."""
    left_out = len(plan.prompts) - len(_requests(plan, parts, 0.0))
    if left_out == len(plan.prompts):
        raise ValueError(f"every prompt is longer than the context of {parts.max_context} tokens")
    if left_out:
        console.print(f"{left_out} prompts left out: longer than {parts.max_context} tokens")


def _rows(plan: _Plan, num_stages: int) -> Iterator[Combination]:
    for strategy in plan.strategies:
        drafter = plan.config.drafter if STRATEGIES[strategy].drafts else "none"
        for temperature in plan.temperatures:
            yield Combination(strategy, drafter, plan.driver, num_stages, temperature)


def _requests(plan: _Plan, parts: HeadParts, temperature: float) -> list[Request]:
    """Seeds follow from the prompt's place, so that every strategy gets the same; ids are new."""
    requests = []
    for seed, prompt in enumerate(plan.prompts, start=1):
        ids = render_chat(parts.tokenizer, [{"role": "user", "content": prompt.turns[0]}])
        if len(ids) >= parts.max_context:
            continue  # said once, by _say_left_out
        requests.append(
            Request(
                id=next(_REQUEST_IDS),
                prompt=ids,
                sampling=SamplingParams(temperature=temperature, seed=seed),
                max_new_tokens=plan.max_tokens,
                eos_token_ids=parts.eos_token_ids,
            )
        )
    return requests


@contextmanager
def _cluster(driver: str, config: RunConfig, parts: HeadParts) -> Iterator[Cluster]:
    if driver == "zmq":
        with LocalCluster(config, parts) as cluster:
            yield cluster
        return
    stages = [
        build_stage(
            parts.folder,
            rank,
            device=config.device,
            dtype=config.dtype,
            shape_stable=config.shape_stable,
        )[0]
        for rank in range(1, len(parts.manifest.layers) + 1)
    ]
    yield SimulatedCluster(build_head(config, parts), stages)


def _report(rows: Sequence[Combination]) -> None:
    table = Table("strategy", "drafter", "driver", "stages", "T", "runs", "mismatches", "near-ties")
    table.add_column("tau")
    for row in rows:
        table.add_row(
            *(row.strategy, row.drafter, row.driver, str(row.stages), f"{row.temperature:g}"),
            *(str(row.runs), str(row.mismatches), str(row.near_ties), f"{row.tau:.2f}"),
        )
    Console(width=100).print(table)
    total = sum(row.runs for row in rows)
    wrong = sum(row.mismatches for row in rows)
    typer.echo(f"{total} runs, {wrong} mismatches, {sum(r.near_ties for r in rows)} near-ties")
