"""`flowspec reliability`: are the drafter's forecasts right as often as they say?"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from flowspec.bench.prompts import PROMPTS_HELP, Prompt, first_turn, load_prompts
from flowspec.bench.reliability import Reliability, before_and_after, settled
from flowspec.cli.common import BUNDLED, check_file, draft_folder, split_folder, write_whole
from flowspec.cli.ui.progress import shown
from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts, build_head, build_stage, check_run, load_head_parts
from flowspec.engine.engine import generate
from flowspec.engine.simulated import SimulatedEngine
from flowspec.head.calibration import PathForecast, SettledForecast
from flowspec.request import Request, SamplingParams
from flowspec.speculation.drafters import DRAFTERS
from flowspec.speculation.strategies import STRATEGIES, find_strategy
from flowspec.system import signals

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PLOTS = (".png", ".svg", ".pdf")


@dataclass(slots=True)
class _Settled:
    """All forecasts of a run with their outcomes."""

    children: list[SettledForecast]
    paths: list[SettledForecast]

    def report(self) -> dict[str, dict[str, Reliability]]:
        """Return the reliability by kind of forecast, before and after calibration."""
        named = {"child, its parent true": self.children, "path from the root": self.paths}
        return {
            what: dict(zip(("before", "after"), before_and_after(outcomes), strict=True))
            for what, outcomes in named.items()
        }


def reliability(
    model: Annotated[
        str | None, typer.Argument(help="Folder or HF id. [default: bundled model]")
    ] = None,
    draft: Annotated[
        str | None, typer.Option(help="Folder of the draft model. [default: bundled]")
    ] = None,
    drafter: Annotated[str, typer.Option(help=f"One of {', '.join(DRAFTERS)}.")] = "eagle",
    merge: Annotated[bool, typer.Option(help="Merge n-gram branches into the tree.")] = False,
    strategy: Annotated[
        str, typer.Option(help=f"One of {', '.join(STRATEGIES)}, but ar.")
    ] = "streaming",
    prompts: Annotated[Path | None, typer.Option(help=PROMPTS_HELP)] = None,
    limit: Annotated[int | None, typer.Option(help="Prompts per file.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    stages: Annotated[int, typer.Option(help="Stages of the simulated cluster.", min=1)] = 4,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.", min=1)] = 64,
    out: Annotated[
        Path | None, typer.Option(help="A plot (.png, .svg, .pdf) or the figures (.json).")
    ] = None,
) -> None:
    """Run prompts on a simulated cluster and compare the forecasts with the outcomes.

    A calibrated forecast has learnt only from the verdicts before it.
    """
    if out and out.suffix not in (*PLOTS, ".json"):
        raise ValueError(f"--out {out} must end in one of {', '.join(PLOTS)}, .json")
    if out:
        check_file("--out", out)
    config = EngineConfig(
        model=model or EngineConfig().model,
        draft=draft or "",
        drafter=drafter,
        strategy=strategy,
        stages=stages,
        sampling=SamplingParams(temperature=temperature),
        decode={"merge": merge, "calibrate": True},
        max_new_tokens=max_tokens,
    )
    check_run(config)
    if not find_strategy(strategy).drafts:
        raise ValueError(f"strategy {strategy} drafts nothing; choose another")
    config = config.changed(draft=draft_folder(config))
    asked = load_prompts(prompts or BUNDLED / "prompts.jsonl", limit=limit)
    found = _run(config, asked)
    if not found.children:
        raise ValueError("nothing was forecast; give more prompts or --max-tokens")
    report = found.report()
    _show(report)
    if out:
        _write(report, out, f"{drafter}{', merged' if merge else ''}, T = {temperature:g}")


def _run(config: EngineConfig, prompts: list[Prompt]) -> _Settled:
    torch.set_num_threads(1)  # more threads would not speed up such small forwards
    folder = split_folder(config)
    parts = load_head_parts(config, folder)
    head = build_head(config, parts)
    found = _Settled([], [])
    paths: list[PathForecast] = []
    calibration = head.calibration_of(head.resolve(None))
    assert calibration is not None, "this strategy calibrates"
    calibration.outcomes, calibration.paths = found.children, paths
    stages = [
        build_stage(folder, rank, device=config.local.device, numerics=config.numerics)[0]
        for rank in range(1, len(parts.manifest.layers) + 1)
    ]
    cluster = SimulatedEngine(head, stages)
    requests = _requests(config, parts, prompts)
    with shown(Console(stderr=True), "prompts", what="running") as tell:
        for done, request in enumerate(requests):
            tell(done, len(requests))
            completion = generate(cluster, request)
            found.paths += settled(paths, (*request.prompt_tokens, *completion.tokens))
            paths.clear()
    return found


def _requests(config: EngineConfig, parts: HeadParts, prompts: list[Prompt]) -> list[Request]:
    ids = count(1)
    requests = []
    for prompt in prompts:
        tokens = first_turn(parts.prompt_of, prompt)
        if len(tokens) < parts.max_context:
            number = next(ids)
            requests.append(
                Request(
                    id=number,
                    prompt=tokens,
                    sampling=replace(config.sampling, seed=number),
                    max_new_tokens=config.max_new_tokens,
                    eos_token_ids=parts.eos_token_ids,
                )
            )
    return requests


def _show(report: Mapping[str, Mapping[str, Reliability]]) -> None:
    table = Table("forecasts of a", "", "count", "expected calibration error", "Brier score")
    for what, kinds in report.items():
        for when, found in kinds.items():
            table.add_row(what, when, str(found.count), f"{found.error:.4f}", f"{found.brier:.4f}")
    Console(width=100).print(table)


def _write(report: Mapping[str, Mapping[str, Reliability]], out: Path, title: str) -> None:
    if out.suffix == ".json":
        data = {
            what: {when: found.as_json() for when, found in kinds.items()}
            for what, kinds in report.items()
        }
        write_whole(out, json.dumps(data, indent=1) + "\n")
        return
    figure = _figure(report, title)
    with signals.undoing():
        figure.savefig(out)


def _figure(report: Mapping[str, Mapping[str, Reliability]], title: str) -> "Figure":
    from matplotlib.figure import Figure  # takes a second to import, and only plots need it

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    for axes, (what, kinds) in zip(figure.subplots(1, 2), report.items(), strict=True):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        for (when, found), style in zip(kinds.items(), ("o--", "s-"), strict=True):
            said, true = [b.predicted for b in found.bins], [b.happened for b in found.bins]
            axes.plot(said, true, style, label=f"{when}, error {found.error:.3f}", markersize=4)
        axes.set(xlabel="forecast probability", ylabel="share that came true")
        axes.set_title(what, pad=28)  # the legend stands between, away from the lines
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    figure.suptitle(title)
    return figure
