"""`flowspec bench`: all strategies over the evaluation sets, on an emulated cluster or for real."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from flowspec.bench.answering_remote import RemoteBench
from flowspec.bench.datasets import DATASETS
from flowspec.bench.experiment import Case, Plan, make_cases, parse_settings, read_table
from flowspec.bench.runner import RunOutcome
from flowspec.bench.summary import as_json, rows_of_run
from flowspec.cli.bench_plan import (
    assemble,
    check_sampling,
    load_sets,
    models_of,
    names_in,
    numbers_in,
    run_shown,
    strategies_in,
)
from flowspec.cli.bench_remote import (
    assemble_remote,
    cluster_drafters,
    connected,
    disturbances,
    other_code,
)
from flowspec.cli.common import CONTEXT_HELP, check_file, write_whole
from flowspec.cli.ui.bench_table import show
from flowspec.cli.ui.texts import check_texts
from flowspec.cost_model.emulation import Emulation, load_emulation
from flowspec.speculation.drafters import DRAFTERS
from flowspec.speculation.strategies import STRATEGIES, check_runs_for_real

TABLES = Path("config/eval.yaml")
CLUSTER, MODEL = "jetson-5", "vicuna-7b"
DRAFTER = "eagle"
FEW = 5  # questions per known set by default, so that a run takes minutes


def bench(
    cluster: Annotated[
        str | None, typer.Option(help=f"Emulated cluster: a name or file. [default: {CLUSTER}]")
    ] = None,
    emulated_model: Annotated[
        str | None, typer.Option(help=f"Emulated model: a name or file. [default: {MODEL}]")
    ] = None,
    strategies: Annotated[
        str, typer.Option(help=f"all, or some of {', '.join(STRATEGIES)}, with commas.")
    ] = "all",
    drafter: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(DRAFTERS)}; +merge and +calibrate switch on. [default: "
            f"{DRAFTER}; with --head: the cluster's]"
        ),
    ] = None,
    datasets: Annotated[
        str,
        typer.Option(help=f"all (with --data-dir), or some of {', '.join(DATASETS)}, or files."),
    ] = "all",
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with SET/question.jsonl. [default: the hub]")
    ] = None,
    questions: Annotated[str, typer.Option(help="Places in each set's file, as in 30:50.")] = "",
    limit: Annotated[
        int | None,
        typer.Option(help=f"Questions per set. [default: {FEW} of the known sets]", min=1),
    ] = None,
    temperatures: Annotated[str, typer.Option(help="As in 0,1.")] = "0",
    seeds: Annotated[str, typer.Option(help="As in 1,2,3; one is enough at 0.")] = "1",
    max_tokens: Annotated[int, typer.Option(help="New tokens per turn.", min=2)] = 128,
    context: Annotated[int | None, typer.Option(help=CONTEXT_HELP, min=0)] = None,
    stages: Annotated[
        int | None, typer.Option(help="Another number of stages than the cluster's.", min=1)
    ] = None,
    table: Annotated[
        str, typer.Option(help="Set of parameters in --config: main or all.")
    ] = "main",
    config: Annotated[Path, typer.Option(help="File with the tables of parameters.")] = TABLES,
    run_config: Annotated[  # commands.py reads it first
        Path | None, typer.Option(help="File of plain assignments, such as config/run_config.py.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="strategy.key=value, or key=value for all.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Model that writes the text: folder or HF id. With --head: a copy of the "
            "cluster's model, which computes here the answers to compare with. [default: bundled; "
            "with --head: the cluster's own plain decoding]"
        ),
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(help="Draft model: FOLDER, or DRAFTER=FOLDER. [default: bundled]"),
    ] = None,
    warm: Annotated[
        bool, typer.Option(help="One cluster answers a whole set and keeps what it learns.")
    ] = False,
    real: Annotated[
        bool,
        typer.Option(help="Run on real processes of this machine, or on the cluster of --head."),
    ] = False,
    head: Annotated[
        str | None, typer.Option(help="With --real: HOST:PORT of the head of a running cluster.")
    ] = None,
    token_file: Annotated[
        Path | None,
        typer.Option(help="With --head: file with the token. [default: FLOWSPEC_TOKEN]"),
    ] = None,
    repeats: Annotated[
        int, typer.Option(help="With --real: number of runs, of which the median counts.", min=1)
    ] = 1,
    jobs: Annotated[
        int | None, typer.Option(help="Processes. [default: one per core]", min=1)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the samples; an earlier run is continued.")
    ] = Path("out/bench"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
) -> None:
    """Measure every strategy on the evaluation sets: speed, speed-up over ar, use of the time.

    On the emulated cluster the bundled (or named) model really computes every forward, which is
    charged the emulated model's time; every run gives the same figures. Each text is compared with
    that of the target alone; the exit code is 1 if one differs. Samples that are in --out already
    are not run again. With --real --head HOST:PORT a running cluster answers the questions.
    """
    check_texts({"--set": settings})
    if repeats > 1 and not real:
        raise ValueError("--repeats needs --real: an emulated run gives the same figures each time")
    model, emulated_model = models_of(model, emulated_model)
    emulated = {"--cluster": cluster, "--emulated-model": emulated_model}
    others = {**emulated, "--draft": draft, "--stages": stages, "--context": context}
    others["--jobs"] = jobs
    _check_head(head, token_file, real=real, given=[name for name in others if others[name]])
    if json_file:
        check_file("--json", json_file)
    chosen = tuple(STRATEGIES) if strategies == "all" else strategies_in(strategies)
    sampled = numbers_in(temperatures, float, "--temperatures"), numbers_in(seeds, int, "--seeds")
    check_sampling(*sampled)
    for strategy in chosen if real else ():
        check_runs_for_real(strategy)
    own_settings = parse_settings(settings or [], chosen)
    given = names_in(drafter, "--drafter") if drafter is not None else ()
    with connected(head, token_file) as remote:
        drafters = cluster_drafters(given, chosen, remote) if remote else given or (DRAFTER,)
        cases = make_cases(chosen, drafters, read_table(config, table), own_settings)
        emulations: Mapping[str, Emulation] = {}
        if not real:
            emulations = _emulations(cases, cluster or CLUSTER, emulated_model or MODEL, stages)
            stages = emulations["none"].cluster.num_stages
        asked: dict[str, Any] = {
            "datasets": load_sets(datasets, data_dir, questions, limit, few=FEW),
            "temperatures": sampled[0],
            "seeds": sampled[1],
            "max_tokens": max_tokens,
            "table": table,
            "target": model,
        }
        if remote is not None:
            plan = assemble_remote(cases, remote, head=str(head), **asked)
        else:
            asked |= {"stages": stages, "draft": draft or [], "context": context or 0}
            plan = assemble(cases, emulations, **asked)
        plan = replace(plan, warm=warm or real, repeats=repeats)
        if not (limit or questions) and any(name in DATASETS for name in plan.datasets):
            typer.echo(f"at most {FEW} questions of each set; --questions 0: takes all", err=True)
        if sentence := other_code(plan):
            typer.echo(sentence, err=True)
        bench_there = RemoteBench(plan, remote) if remote is not None else None
        outcome = run_shown(plan, out, jobs, bench=bench_there)
    _report(plan, outcome, out, json_file)


def _check_head(
    head: str | None, token_file: Path | None, *, real: bool, given: Sequence[str]
) -> None:
    """Raise ValueError for options that exclude one another; `given` lists those in use."""
    if head is None and token_file is not None:
        raise ValueError("--token-file needs --head HOST:PORT, the cluster that it is the token of")
    emulated = [option for option in given if option in ("--cluster", "--emulated-model")]
    if head is None:
        if real and emulated:
            raise ValueError("--real runs on this machine: it has no --cluster or --emulated-model")
        return
    if not real:
        raise ValueError("--head needs --real: an emulated run needs no cluster")
    if emulated:
        raise ValueError(f"--head names the cluster that answers, {emulated[0]} an emulated one")
    if "--jobs" in given:
        raise ValueError("--jobs are processes of this machine: the cluster of --head has its own")
    if given:
        raise ValueError(
            f"{given[0]} is the cluster's own: `flowspec serve` of --head decides on it"
        )


def _emulations(
    cases: Sequence[Case], cluster: str, model: str, stages: int | None
) -> Mapping[str, Emulation]:
    """Return an emulation per drafter, because each drafter has its own cost."""
    names = sorted({case.drafter_name for case in cases} | {"none"})
    return {name: load_emulation(cluster, model, drafter=name, stages=stages) for name in names}


def _report(plan: Plan, outcome: RunOutcome, out: Path, json_file: Path | None) -> None:
    for left in outcome.too_long:
        why = f"{left.prompt_tokens} prompt tokens and {plan.max_tokens} more exceed the context"
        typer.echo(
            f"left out: {left.dataset}, question {left.question}, turn {left.turn + 1}: "
            f"{left.reason or why}",
            err=True,
        )
    if not outcome.samples:
        limit = "context, or the devices' memory" if plan.remote is not None else "context"
        more = "" if plan.remote is not None else ", or raise --context"
        raise ValueError(
            f"every question is longer than the {limit}; give others, or --max-tokens{more}"
        )
    rows = rows_of_run(outcome.samples)
    show(rows, plan)
    if json_file:
        write_whole(json_file, json.dumps([as_json(row) for row in rows], indent=1) + "\n")
    wrong = sum(sample.mismatch for sample in outcome.samples)
    for sentence in disturbances(outcome):
        typer.echo(sentence, err=True)
    truth = "the target alone" if plan.target is not None else "plain decoding on the cluster"
    typer.echo(
        f"{len(outcome.samples)} samples ({outcome.num_run} run now) in {out}; {wrong} differ from "
        f"{truth}; {sum(one.num_turns for one in outcome.too_long)} turns left out"
    )
    if wrong:
        raise typer.Exit(1)
