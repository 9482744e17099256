"""`flowspec bench`: all strategies over the evaluation sets, on an emulated cluster or for real."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from flowspec.cli.bench_plan import (
    assemble,
    check_sampling,
    load_sets,
    names_in,
    numbers_in,
    run_shown,
)
from flowspec.cli.bench_table import show
from flowspec.cli.common import BUNDLED, check_file
from flowspec.drafters import DRAFTERS
from flowspec.eval.datasets import DATASETS
from flowspec.eval.plan import Plan, make_cases, parse_settings, read_table
from flowspec.eval.runner import Outcome
from flowspec.eval.summary import as_json, rows_of_run
from flowspec.simulate.emulation import Emulation, load_emulation
from flowspec.strategies import STRATEGIES, check_runs_for_real

TABLES = BUNDLED.parent.parent / "config" / "eval.yaml"
CLUSTER, MODEL = "jetson-5", "vicuna-7b"
FEW = 5  # questions of each of the six sets, unless more are asked for: minutes, not hours


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
    limit: Annotated[
        int | None,
        typer.Option(help=f"Questions per set [of the six {FEW}, without --questions].", min=1),
    ] = None,
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
    warm: Annotated[
        bool, typer.Option(help="One cluster answers a whole set: what it learns stays.")
    ] = False,
    real: Annotated[bool, typer.Option(help="On real processes of this machine.")] = False,
    repeats: Annotated[
        int, typer.Option(help="--real: run all so often; the median counts.", min=1)
    ] = 1,
    jobs: Annotated[int | None, typer.Option(help="Processes [one per core].", min=1)] = None,
    out: Annotated[Path, typer.Option(help="Folder of the samples; resumed.")] = Path("out/bench"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Every strategy over the evaluation sets: speed, speed-up over ar, where the time goes.

    On the emulated cluster every forward is really computed by the bundled (or named) model and
    charged the emulated model's time; the same figures come on every run. Each text is compared
    with the target's alone; exit code 1 if one differs. What is in --out is not run again.
    """
    if real and (cluster or model):
        raise ValueError("--real runs on this machine: it has no --cluster or --model")
    if repeats > 1 and not real:
        raise ValueError("--repeats needs --real: an emulated run gives the same figures each time")
    if json_file:
        check_file("--json", json_file)
    chosen = tuple(STRATEGIES) if strategies == "all" else names_in(strategies, "--strategies")
    sampled = numbers_in(temperatures, float, "--temperatures"), numbers_in(seeds, int, "--seeds")
    check_sampling(*sampled)
    cases = make_cases(
        chosen,
        names_in(drafter, "--drafter"),
        read_table(config, table),
        parse_settings(settings or [], chosen),
    )
    for case in cases if real else ():
        check_runs_for_real(case.strategy)
    drafters = {case.drafter_name for case in cases} | {"none"}
    emulations: dict[str, Emulation] = {}
    if not real:
        names = (cluster or CLUSTER, model or MODEL)
        emulations = {
            name: load_emulation(*names, drafter=name, stages=stages) for name in sorted(drafters)
        }
        stages = emulations["none"].cluster.num_stages
    plan = assemble(
        cases,
        emulations,
        datasets=load_sets(datasets, data_dir, questions, limit, few=FEW),
        temperatures=sampled[0],
        seeds=sampled[1],
        max_tokens=max_tokens,
        table=table,
        stages=stages,
        target=target,
        draft=draft or [],
    )
    plan = replace(plan, warm=warm or real, repeats=repeats)
    if not (limit or questions) and any(name in DATASETS for name in plan.datasets):
        typer.echo(f"at most {FEW} questions of each set; --questions 0: takes all", err=True)
    outcome = run_shown(plan, out, jobs)
    _report(plan, outcome, out, json_file)


def _report(plan: Plan, outcome: Outcome, out: Path, json_file: Path | None) -> None:
    for left in outcome.too_long:
        typer.echo(
            f"left out: {left.dataset}, question {left.question}, turn {left.turn + 1}: "
            f"{left.prompt_tokens} prompt tokens and {plan.max_tokens} more exceed the context",
            err=True,
        )
    if not outcome.samples:
        raise ValueError("every question is longer than the context; give others, or --max-tokens")
    rows = rows_of_run(outcome.samples)
    show(rows, plan)
    if json_file:
        json_file.write_text(json.dumps([as_json(row) for row in rows], indent=1) + "\n")
    wrong = sum(sample.mismatch for sample in outcome.samples)
    typer.echo(
        f"{len(outcome.samples)} samples ({outcome.num_run} run now) in {out}; {wrong} differ from "
        f"the target alone; {sum(one.num_turns for one in outcome.too_long)} turns left out"
    )
    if wrong:
        raise typer.Exit(1)
