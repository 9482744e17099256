"""`flowspec verify`: is every strategy's text exactly the target's own?"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from flowspec.bench.prompts import PROMPTS_HELP, Prompt, first_turn, load_prompts
from flowspec.bench.verify import Combination, Divergence, LosslessChecker
from flowspec.cli.bench_plan import check_sampling
from flowspec.cli.common import (
    BUNDLED,
    draft_folder,
    effective_config,
    split_folder,
    write_whole,
)
from flowspec.cli.settings import NUMERICS, with_settings
from flowspec.cli.ui.progress import shown
from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts, build_head, build_stage, load_head_parts
from flowspec.engine.engine import Engine
from flowspec.engine.local import LocalEngine, check_files_for
from flowspec.engine.reference import LocalTarget
from flowspec.engine.simulated import SimulatedEngine
from flowspec.request import Decoding, Request, SamplingParams
from flowspec.speculation.drafters import DRAFTERS, current_drafter, parse_drafter
from flowspec.speculation.strategies import STRATEGIES, check_runs_for_real, find_strategy
from flowspec.weights.load import load_whole

DRIVERS = ("simulated", "zmq", "gloo")  # zmq and gloo: real processes
_REQUEST_IDS = count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Plan:
    """The combinations to verify, and the prompts."""

    config: EngineConfig
    strategies: tuple[str, ...]
    drafters: Mapping[str, str]  # folder of the draft model by drafter, as parse_drafter takes it
    stages: tuple[int, ...]
    temperatures: tuple[float, ...]
    requests: tuple[int, ...]
    driver: str
    prompts: Sequence[Prompt]
    max_tokens: int

    def rows(self, drafter: str, num_stages: int) -> list[Combination]:
        """Return the combinations of one drafter on one cluster."""
        return [
            Combination(name, drafter, self.driver, num_stages, temperature, at_once)
            for name in self.strategies
            if find_strategy(name).drafts == (drafter != "none")
            for temperature in self.temperatures
            for at_once in self.requests
        ]

    @property
    def clusters(self) -> list[tuple[int, str]]:
        """Return number of stages and drafter of each cluster that is needed."""
        drafters = [*self.drafters, "none"]
        return [(n, name) for n in self.stages for name in drafters if self.rows(name, n)]


@with_settings("tokenizer", "context", *NUMERICS, "device")
def verify(
    model: Annotated[
        str | None, typer.Argument(help="Folder, GGUF file or HF id. [default: bundled model]")
    ] = None,
    draft: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder of the draft model, or DRAFTER=FOLDER for each. [default: bundled]"
        ),
    ] = None,
    prompts: Annotated[Path | None, typer.Option(help=PROMPTS_HELP)] = None,
    strategies: Annotated[str, typer.Option(help="all, or names with commas.")] = "all",
    drafters: Annotated[
        str, typer.Option(help="all, or names with commas, as in eagle,eagle+merge,ngram.")
    ] = "eagle",
    stages: Annotated[str, typer.Option(help="Stage counts, as in 1,2,4.")] = "1,2,4",
    temperatures: Annotated[str, typer.Option(help="As in 0,1.")] = "0,1",
    requests: Annotated[
        str, typer.Option(help="Numbers of requests decoded at the same time, as in 1,4.")
    ] = "1",
    driver: Annotated[str, typer.Option(help=f"One of {', '.join(DRIVERS)}.")] = "simulated",
    limit: Annotated[int | None, typer.Option(help="Prompts per file.", min=1)] = None,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.", min=1)] = 64,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows here.")] = None,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Compare every combination's text with that of the target alone; exit 1 on a mismatch.

    Both use the same seeds. In float32 any difference is a mismatch. In 16 bits a difference where
    the two tokens' logits lie within rounding is a near-tie; --batch-invariant removes those too.
    The JSON rows hold a hash of all tokens, to compare machines.
    """
    if driver not in DRIVERS:
        raise ValueError(f"unknown driver {driver!r}; known: {', '.join(DRIVERS)}")
    names = _names(strategies, tuple(STRATEGIES))
    for name in names:
        check_runs_for_real(name)  # an ablation of the pipeline itself does not
    at_once = _numbers(requests, int, "--requests")
    warmth = _numbers(temperatures, float, "--temperatures")
    check_sampling(warmth, ())
    counts = _numbers(stages, int, "--stages")
    if min(counts) < 1:
        raise ValueError(f"--stages takes counts of 1 or more, not {min(counts)}")
    values = {"max_num_seqs": max(at_once), "kept_prefixes": 0, **settings}
    config = effective_config(None, {**values, "model": model})
    drafting = any(find_strategy(name).drafts for name in names)
    plan = _Plan(
        config=config,
        strategies=names,
        drafters=_draft_folders(config, drafters, draft or []) if drafting else {},
        stages=counts,
        temperatures=warmth,
        requests=at_once,
        driver=driver,
        prompts=load_prompts(prompts or BUNDLED / "prompts.jsonl", limit=limit),
        max_tokens=max_tokens,
    )
    if not plan.prompts:
        raise ValueError("no prompts to verify with; give --limit 1 or more and a file with some")
    rows = _run(plan)
    _report(rows)
    if json_file:
        write_whole(json_file, json.dumps([row.as_json() for row in rows], indent=1) + "\n")
    if any(row.mismatches for row in rows):
        raise typer.Exit(1)


def _names(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    return known if text == "all" else tuple(text.split(","))


def _numbers(text: str, kind: type, name: str) -> tuple:  # type: ignore[type-arg]
    try:
        return tuple(kind(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{name} takes numbers with commas, not {text!r}") from None


def _draft_folders(config: EngineConfig, drafters: str, given: Sequence[str]) -> dict[str, str]:
    """Return the folder of each drafter's model, as given or as bundled."""
    asked = _names(drafters, tuple(name for name in DRAFTERS if name != "none"))
    names = {current_drafter(text): parse_drafter(text)[0] for text in asked}
    folders = dict.fromkeys(names.values(), "")
    for text in given:
        name, equals, folder = text.partition("=")
        if not equals and len(folders) == 1:
            folders[next(iter(folders))] = text
        elif name in folders:
            folders[name] = folder
        else:
            raise ValueError(f"--draft {text!r}: give DRAFTER=FOLDER, of {', '.join(folders)}")
    return {
        text: draft_folder(config.changed(drafter=name, draft=folders[name]))
        for text, name in names.items()
    }


def _run(plan: _Plan) -> list[Combination]:
    torch.set_num_threads(1)  # more threads would not speed up such small forwards
    rows: list[Combination] = []
    verifier: LosslessChecker | None = None
    console = Console(stderr=True)
    if plan.driver != "simulated":
        check_files_for(max(plan.stages))
    total = sum(len(plan.rows(drafter, n)) for n, drafter in plan.clusters) * len(plan.prompts)
    done = count(1)
    with shown(console, "runs", what="verifying") as tell:

        def say(where: str, divergence: Divergence | None) -> None:
            tell(next(done), total, where)
            if divergence is not None:
                console.print(f"{where}: {divergence}")

        for num_stages, drafter in plan.clusters:
            own = plan.rows(drafter, num_stages)
            config = plan.config.changed(
                stages=num_stages,
                strategy=own[0].strategy,
                drafter=parse_drafter(drafter)[0],
                transport="zmq" if plan.driver == "simulated" else plan.driver,
                draft=plan.drafters.get(drafter, ""),
            )
            folder = split_folder(config)
            parts = load_head_parts(config, folder)
            if verifier is None:
                _say_left_out(plan, parts, console)
                whole = load_whole(folder, device=config.local.device, dtype=config.numerics.dtype)
                alone = LocalTarget(
                    whole, parts.max_context, batch_invariant=config.numerics.batch_invariant
                )
                verifier = LosslessChecker(alone)
                tell(0, total)
            with _engine(plan.driver, config, parts) as engine:
                for row in own:
                    _check_row(plan, row, engine, verifier, parts, say)
            rows += own
    return rows


def _check_row(
    plan: _Plan,
    row: Combination,
    engine: Engine,
    verifier: LosslessChecker,
    parts: HeadParts,
    say: Callable[[str, Divergence | None], None],
) -> None:
    where = f"{row.strategy}, {row.drafter}, {row.stages} stages, {row.requests} at once"
    engine.forget()
    requests = [
        replace(request, decoding=_decoding(row))
        for request in _requests(plan, parts, row.temperature)
    ]
    for divergence in verifier.check(engine, requests, row):
        say(where, divergence)


def _decoding(row: Combination) -> Decoding:
    """Return the row's strategy with its defaults, and its drafter with its switches."""
    drafter, switches = parse_drafter(row.drafter)
    if not find_strategy(row.strategy).drafts:
        return Decoding(strategy=row.strategy)
    return Decoding(strategy=row.strategy, parameters=switches, drafter=drafter)


def _say_left_out(plan: _Plan, parts: HeadParts, console: Console) -> None:
    """Report prompts that fill the context, so that there is no answer to compare."""
    left_out = len(plan.prompts) - len(_requests(plan, parts, 0.0))
    if left_out == len(plan.prompts):
        raise ValueError(
            f"every prompt is longer than the context of {parts.max_context} tokens; give shorter "
            "ones, or raise --context"
        )
    if left_out:
        console.print(f"{left_out} prompts left out: longer than {parts.max_context} tokens")


def _requests(plan: _Plan, parts: HeadParts, temperature: float) -> list[Request]:
    """Make the requests; the seed is the prompt's place, so all strategies get the same."""
    requests = []
    for seed, prompt in enumerate(plan.prompts, start=1):
        ids = first_turn(parts.prompt_of, prompt)
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
def _engine(driver: str, config: EngineConfig, parts: HeadParts) -> Iterator[Engine]:
    if driver != "simulated":
        with LocalEngine(config, parts) as engine:
            yield engine
        return
    stages = [
        build_stage(
            parts.folder,
            rank,
            device=config.local.device,
            numerics=config.numerics,
        )[0]
        for rank in range(1, len(parts.manifest.layers) + 1)
    ]
    yield SimulatedEngine(build_head(config, parts), stages)


def _report(rows: Sequence[Combination]) -> None:
    table = Table(box=None, pad_edge=False)
    for name in ("strategy", "drafter", "driver", "stages", "T", "at once", "runs", "mismatches"):
        table.add_column(name, no_wrap=True)
    table.add_column("near-ties")
    table.add_column("tau")
    for row in rows:
        table.add_row(
            *(row.strategy, row.drafter, row.driver, str(row.stages), f"{row.temperature:g}"),
            *(str(row.requests), str(row.runs), str(row.mismatches), str(row.near_ties)),
            f"{row.tau:.2f}",
        )
    Console(width=100).print(table)
    total = sum(row.runs for row in rows)
    wrong = sum(row.mismatches for row in rows)
    typer.echo(f"{total} runs, {wrong} mismatches, {sum(r.near_ties for r in rows)} near-ties")
