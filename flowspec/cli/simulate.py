"""`flowspec simulate`: what a cluster would give if it, the model or the tree were another."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from flowspec.bench.answering import Workbench
from flowspec.bench.experiment import Plan, make_cases, parse_settings, read_table
from flowspec.bench.records import Sample
from flowspec.bench.sweeps import AXES
from flowspec.bench.what_if import Values, emulate, parse_variations, settings_of, what_if_table
from flowspec.cli.bench import CLUSTER, MODEL, TABLES
from flowspec.cli.bench_plan import (
    assemble,
    check_sampling,
    load_sets,
    models_of,
    run_shown,
    strategies_in,
)
from flowspec.cli.common import BUNDLED
from flowspec.cli.report import MAX_WIDTH, show_table
from flowspec.cli.ui.texts import check_texts
from flowspec.speculation.drafters import DRAFTERS
from flowspec.speculation.strategies import STRATEGIES, find_strategy
from flowspec.system import signals
from flowspec.tracing.chrome_trace import check_trace_path, write_trace


def simulate(
    vary: Annotated[
        list[str] | None,
        typer.Option(help=f"NAME=VALUE,VALUE of {', '.join(AXES)}; several: every combination."),
    ] = None,
    cluster: Annotated[str, typer.Option(help="Emulated cluster: a name or file.")] = CLUSTER,
    emulated_model: Annotated[
        str | None, typer.Option(help=f"Emulated model: a name or file. [default: {MODEL}]")
    ] = None,
    strategies: Annotated[
        str, typer.Option(help=f"Some of {', '.join(STRATEGIES)}, with commas.")
    ] = "ar,flowspec,streaming",
    drafter: Annotated[
        str, typer.Option(help=f"One of {', '.join(DRAFTERS)}; +merge and +calibrate switch on.")
    ] = "eagle",
    datasets: Annotated[
        str | None, typer.Option(help="Sets, with commas, or files. [default: bundled prompts]")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Folder with SET/question.jsonl. [default: the hub]")
    ] = None,
    questions: Annotated[str, typer.Option(help="Places in each set's file, as in 30:50.")] = "",
    limit: Annotated[int | None, typer.Option(help="Questions per set.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Random seed.")] = 1,
    max_tokens: Annotated[int, typer.Option(help="New tokens per turn.", min=2)] = 64,
    table: Annotated[str, typer.Option(help="Set of parameters: main or all.")] = "main",
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="strategy.key=value, or key=value for all.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model that writes the text: folder or HF id. [default: bundled]"),
    ] = None,
    draft: Annotated[
        list[str] | None, typer.Option(help="Folder of the draft model. [default: bundled]")
    ] = None,
    jobs: Annotated[
        int | None, typer.Option(help="Processes. [default: one per core]", min=1)
    ] = None,
    out: Annotated[
        Path, typer.Option(help="Folder of the records; an earlier run is continued.")
    ] = Path("out/simulate"),
    trace: Annotated[
        str | None,
        typer.Option(help="Only trace the first question under the last strategy, into this file."),
    ] = None,
) -> None:
    """Ask the same questions on emulated clusters in which one or more things vary.

    Records go to --out, for `flowspec report` and `flowspec plot bandwidth|stages|sweep`. All
    figures are emulated. Each text is compared with that of the target alone; the exit code is 1 if
    one differs.
    """
    if not vary and not trace:
        raise ValueError(f"--vary NAME=VALUE,VALUE is needed, of {', '.join(AXES)}")
    check_texts({"--set": settings})
    model, emulated_model = models_of(model, emulated_model)
    emulated = emulated_model or MODEL
    check_sampling((temperature,), (seed,))
    combinations = parse_variations(vary or [])
    chosen = strategies_in(strategies)
    parameters = read_table(TABLES, table)
    fixed = parse_settings(settings or [], chosen)
    for name in settings_of(combinations[0]):
        if not any(name in find_strategy(one).parameters for one in chosen):
            raise ValueError(f"--vary {name} changes nothing for {strategies}")
    loaded = load_sets(datasets or str(BUNDLED / "prompts.jsonl"), data_dir, questions, limit)
    if trace:
        check_trace_path(trace)
        if len(combinations) > 1:
            raise ValueError("--trace takes one value of each --vary")

    def plan_of(values: Values) -> Plan:
        varied = settings_of(values)
        own = {
            name: {
                **fixed[name],
                **{k: v for k, v in varied.items() if k in find_strategy(name).parameters},
            }
            for name in chosen
        }
        cases = make_cases(chosen, (drafter,), parameters, own, options="--vary or --set")
        drafters = sorted({case.drafter_name for case in cases} | {"none"})
        emulations = {name: emulate(cluster, emulated, values, drafter=name) for name in drafters}
        return assemble(
            cases,
            emulations,
            datasets=loaded,
            temperatures=(temperature,),
            seeds=(seed,),
            max_tokens=max_tokens,
            table=table,
            stages=emulations["none"].cluster.num_stages,
            target=model,
            draft=draft or [],
        )

    plans = [
        (values, plan_of(values)) for values in combinations
    ]  # a wrong one is refused before anything runs
    if trace:
        _trace(plans[0][1], trace)
        return
    _show(list(_run(plans, out, jobs)), chosen, out)


def _run(
    plans: Sequence[tuple[Values, Plan]], out: Path, jobs: int | None
) -> Iterator[tuple[Values, list[Sample]]]:
    for place, (values, plan) in enumerate(plans, start=1):
        words = " ".join(f"{name}={value:g}" for name, value in values.items())
        outcome = run_shown(plan, out, jobs, what=f"{place} of {len(plans)} {words}".strip())
        if not outcome.samples:
            raise ValueError("every question is longer than the context; give shorter ones")
        yield values, outcome.samples


def _show(
    found: Sequence[tuple[Values, list[Sample]]], strategies: Sequence[str], out: Path
) -> None:
    show_table(Console(width=MAX_WIDTH, highlight=False), what_if_table(found, strategies))
    samples = [sample for _, own in found for sample in own]
    wrong = sum(sample.mismatch for sample in samples)
    typer.echo(f"{len(samples)} samples in {out}; {wrong} differ from the target alone")
    if wrong:
        raise typer.Exit(1)


def _trace(plan: Plan, out: str) -> None:
    group = next(plan.groups())
    timeline = Workbench(plan).trace(plan.cases[-1], group)
    with signals.undoing():
        write_trace(timeline, Path(out))
    typer.echo(
        f"trace of {group.dataset}, question {group.prompts[0].id}, {plan.cases[-1].strategy} "
        f"(emulated) written to {out}",
        err=True,
    )
