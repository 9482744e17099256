"""`flowspec bench`: all strategies over the evaluation sets, on an emulated cluster or for real."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from flowspec.cli.bench_table import show
from flowspec.cli.common import BUNDLED, draft_folder, split_folder
from flowspec.config import RunConfig
from flowspec.drafters import DRAFTERS
from flowspec.eval.datasets import DATASETS, load_dataset, parse_range
from flowspec.eval.plan import Case, Plan, make_cases, parse_settings, read_table
from flowspec.eval.prompts import Prompt
from flowspec.eval.provenance import code_hash, folder_hash, revision
from flowspec.eval.records import SampleFile
from flowspec.eval.runner import Outcome, run_plan
from flowspec.eval.runner import Progress as Step
from flowspec.eval.summary import summarize
from flowspec.model.manifest import read_manifest
from flowspec.simulate.emulation import Emulation, load_emulation
from flowspec.strategies import STRATEGIES

TABLES = BUNDLED.parent.parent / "config" / "eval.yaml"
CLUSTER, MODEL = "jetson-5", "vicuna-7b"
LOCAL = "local"  # the cluster's name where real processes of this machine are it


def bench(
    cluster: Annotated[
        str | None, typer.Option(help=f"Emulated cluster: a name or file [{CLUSTER}].")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help=f"Emulated model: a name or file [{MODEL}].")
    ] = None,
    strategies: Annotated[
        str, typer.Option(help=f"all, or some of {', '.join(STRATEGIES)}, with commas.")
    ] = "all",
    drafter: Annotated[
        str, typer.Option(help=f"Of {', '.join(DRAFTERS)}; +graft and +calibrate switch on.")
    ] = "eagle",
    datasets: Annotated[
        str,
        typer.Option(help=f"all (with --data-dir), or some of {', '.join(DATASETS)}, or files."),
    ] = "all",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with SET/question.jsonl [the hub].")
    ] = None,
    questions: Annotated[str, typer.Option(help="Places in each set's file, as in 30:50.")] = "",
    limit: Annotated[int | None, typer.Option(help="Questions per set.", min=1)] = None,
    temperatures: Annotated[str, typer.Option(help="As in 0,1.")] = "0",
    seeds: Annotated[str, typer.Option(help="As in 1,2,3; one is enough at 0.")] = "1",
    max_tokens: Annotated[int, typer.Option(help="New tokens per turn.", min=2)] = 128,
    stages: Annotated[
        int | None, typer.Option(help="Another number of stages than the cluster's.", min=1)
    ] = None,
    table: Annotated[
        str, typer.Option(help="Set of parameters in --config: main or all.")
    ] = "main",
    config: Annotated[Path, typer.Option(help="File with the tables of parameters.")] = TABLES,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="strategy.key=value, or key=value for all.")
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="Model that computes: folder or HF id [bundled].")
    ] = None,
    draft: Annotated[
        list[str] | None, typer.Option(help="Draft model: FOLDER, or DRAFTER=FOLDER [bundled].")
    ] = None,
    bound: Annotated[
        bool, typer.Option(help="Also run each with a free drafter, host and no latency.")
    ] = False,
    warm: Annotated[
        bool, typer.Option(help="One cluster answers a whole set: what it learns stays.")
    ] = False,
    real: Annotated[bool, typer.Option(help="On real processes of this machine.")] = False,
    jobs: Annotated[int | None, typer.Option(help="Processes [one per core].", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder of the samples; resumed.")] = Path("out/bench"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Every strategy over the evaluation sets: speed, speed-up over ar, where the time goes.

    On the emulated cluster every forward is really computed by the bundled (or named) model and
    charged the emulated model's time; the same figures come on every run. Each text is compared
    with the target's alone; exit code 1 if one differs. What is in --out is not run again.
    """
    if real and (bound or cluster or model):
        raise ValueError("--real runs on this machine: it has no --cluster, --model or --bound")
    if json_file and not json_file.parent.is_dir():
        raise ValueError(f"--json {json_file} cannot be written: {json_file.parent} is no folder")
    chosen = tuple(STRATEGIES) if strategies == "all" else _names(strategies, "--strategies")
    cases = make_cases(
        chosen,
        _names(drafter, "--drafter"),
        read_table(config, table),
        parse_settings(settings or [], chosen),
    )
    drafters = {case.drafter_name for case in cases} | {"none"}
    emulations: dict[str, Emulation] = {}
    if not real:
        names = (cluster or CLUSTER, model or MODEL)
        emulations = {
            name: load_emulation(*names, drafter=name, stages=stages) for name in sorted(drafters)
        }
        stages = emulations["none"].cluster.num_stages
    loaded = _load(datasets, data_dir, questions, limit)
    run_config = RunConfig(model=target or RunConfig().model, stages=stages)
    folder = split_folder(run_config)
    drafts = _draft_folders(run_config, cases, draft or [])
    manifest = read_manifest(folder)
    plan = Plan(
        cluster=LOCAL if real else emulations["none"].cluster.name,
        model=manifest.model_id if real else emulations["none"].model.name,
        table=table,
        stages=len(manifest.layers),
        cases=cases,
        datasets=loaded,
        temperatures=_numbers(temperatures, float, "--temperatures"),
        seeds=_numbers(seeds, int, "--seeds"),
        max_tokens=max_tokens,
        target=folder,
        drafts=drafts,
        emulations=emulations,
        bound=bound,
        real=real,
        warm=warm or real,
        sources={
            "code": code_hash(),
            "target": manifest.model_hash,
            "revision": revision(),
            **{name: folder_hash(Path(where)) for name, where in drafts.items() if where},
        },
    )
    outcome = _run(plan, out, jobs or len(os.sched_getaffinity(0)))
    _report(plan, outcome, out, json_file)


def _names(text: str, option: str) -> tuple[str, ...]:
    names = tuple(part.strip() for part in text.split(","))
    if not all(names) or len(set(names)) < len(names):
        raise ValueError(f"{option} takes different names with commas, not {text!r}")
    return names


def _numbers(text: str, kind: type, option: str) -> tuple:  # type: ignore[type-arg]
    try:
        numbers = tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{option} takes numbers with commas, not {text!r}") from None
    if len(set(numbers)) < len(numbers):
        raise ValueError(f"{option} names a number twice: {text}")
    return numbers


def _load(
    datasets: str, data_dir: Path | None, questions: str, limit: int | None
) -> Mapping[str, Sequence[Prompt]]:
    names = DATASETS if datasets == "all" else _names(datasets, "--datasets")
    chosen = parse_range(questions)
    loaded: dict[str, Sequence[Prompt]] = {}
    for name in names:
        prompts = load_dataset(name, data_dir=data_dir, chosen=chosen, limit=limit)
        source = prompts[0].source
        if source in loaded:
            raise ValueError(f"--datasets: two sets are called {source}; rename a file")
        loaded[source] = prompts
    return loaded


def _draft_folders(
    config: RunConfig, cases: Sequence[Case], given: Sequence[str]
) -> dict[str, str]:
    """Where each drafter's model lies, as named or as bundled."""
    names = sorted({case.drafter_name for case in cases} - {"none"})
    folders = dict.fromkeys(names, "")
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals and len(folders) == 1:
            folders[names[0]] = text
        elif equals and name in folders:
            folders[name] = folder
        else:
            raise ValueError(f"--draft {text!r}: give DRAFTER=FOLDER, of {', '.join(folders)}")
    return {
        name: draft_folder(replace(config, drafter=name, draft=folder))
        for name, folder in folders.items()
    }


def _run(plan: Plan, out: Path, jobs: int) -> Outcome:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    console = Console(stderr=True)
    with (
        SampleFile(out) as file,
        Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar,
    ):
        task = bar.add_task("starting")

        def tell(step: Step) -> None:
            bar.update(task, description=step.now, total=step.total, completed=step.done)

        return run_plan(plan, file, jobs=jobs, tell=tell)


def _report(plan: Plan, outcome: Outcome, out: Path, json_file: Path | None) -> None:
    for left in outcome.too_long:
        typer.echo(
            f"left out: {left.dataset}, question {left.question}, turn {left.turn + 1}: "
            f"{left.prompt_tokens} prompt tokens and {plan.max_tokens} more exceed the context",
            err=True,
        )
    if not outcome.samples:
        raise ValueError("every question is longer than the context; give others, or --max-tokens")
    rows = summarize(outcome.samples)
    show(rows, outcome.samples, plan)
    if json_file:
        json_file.write_text(json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    wrong = sum(sample.mismatch for sample in outcome.samples)
    typer.echo(
        f"{len(outcome.samples)} samples ({outcome.num_run} run now) in {out}; {wrong} differ from "
        f"the target alone; {sum(one.num_turns for one in outcome.too_long)} turns left out"
    )
    if wrong:
        raise typer.Exit(1)
