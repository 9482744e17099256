"""`flowspec check-head`: does this draft checkpoint fit this model, and how good is it?"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from flowspec.bench.prompts import PROMPTS_HELP, Prompt, first_turn, load_prompts
from flowspec.cli.common import BUNDLED, bundled, effective_config, split_folder
from flowspec.cli.settings import NUMERICS, with_settings
from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts, build_head, build_stage, load_head_parts
from flowspec.engine.engine import generate
from flowspec.engine.simulated import SimulatedEngine
from flowspec.model.architecture import read_config
from flowspec.request import DecodeStats, Decoding, Request, SamplingParams
from flowspec.speculation.drafters.checkpoint.config import CONTRADICTION, ERROR
from flowspec.speculation.drafters.checkpoint.inspect import HeadReport, inspect_head
from flowspec.speculation.drafters.checkpoint.kind import FAMILIES
from flowspec.speculation.strategy import RoundConfig
from flowspec.weights.manifest import HEAD_FOLDER

# The shapes of draft: the usual tree, and a chain, which has one draft step per level.
_SHAPES = {
    "tree": RoundConfig(),
    "chain": RoundConfig(num_draft_tokens=8, num_draft_steps=7, draft_topk=1),
}


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one shape of draft over all prompts: tau, and acceptance at depth 1, 2, ..."""

    shape: str
    tau: float
    by_depth: tuple[float, ...]


@with_settings(*NUMERICS, "device")
def check_head(
    model: Annotated[str, typer.Argument(help="The target: folder or HF id.")],
    head: Annotated[Path, typer.Argument(help="Folder of the draft checkpoint.")],
    prompts: Annotated[Path | None, typer.Option(help=f"{PROMPTS_HELP} [default: bundled]")] = None,
    limit: Annotated[int, typer.Option(help="Prompts per file.", min=1)] = 4,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.", min=1)] = 64,
    *,
    settings: Mapping[str, Any],
) -> None:
    """Name the family of a draft checkpoint, list all that does not fit, and measure its tau.

    tau is the mean number of tokens per verdict, greedy, round by round (serial_pp, simulated);
    acceptance by depth is the share of drafts at that depth that the target confirms, of those
    whose parent it confirmed. Exit code 1 when the checkpoint does not fit or its config
    contradicts its tensors.
    """
    torch.set_num_threads(1)  # more threads would not speed up such small forwards
    console = Console(width=100, soft_wrap=True)
    config = effective_config(None, {"model": model, "strategy": "serial_pp", **settings})
    folder = split_folder(config)
    report = inspect_head(Path(bundled(str(head))), read_config(folder / HEAD_FOLDER))
    _show(report, console)
    if report.loads:
        asked = load_prompts(prompts or BUNDLED / "prompts.jsonl", limit=limit)
        drafter = FAMILIES[report.kind.family].drafter
        config = config.changed(draft=str(report.path.parent), drafter=drafter)
        for score in _measure(config, folder, asked, max_tokens):
            depths = " ".join(f"{share:.2f}" for share in score.by_depth)
            console.print(f"{score.shape}: tau {score.tau:.2f}, acceptance by depth {depths}")
    if any(finding.severity in (ERROR, CONTRADICTION) for finding in report.findings):
        raise typer.Exit(1)


def _show(report: HeadReport, console: Console) -> None:
    console.print(f"{report.path}: {report.kind.title}", markup=False, highlight=False)
    for line in (f"recognised by {', '.join(report.kind.evidence)}", report.about):
        console.print(f"  {line}", markup=False, highlight=False)
    if not report.findings:
        console.print("every tensor and every config key fits")
        return
    table = Table("", "what", "found")
    for finding in report.findings:
        table.add_row(finding.severity, finding.what, finding.detail.replace("[", r"\["))
    console.print(table)


def _measure(
    config: EngineConfig, folder: Path, prompts: Sequence[Prompt], max_tokens: int
) -> list[Score]:
    """Yield the score of each shape of draft, from greedy answers to all prompts."""
    parts = load_head_parts(config, folder)
    stages = [
        build_stage(parts.folder, rank, device=config.local.device, numerics=config.numerics)[0]
        for rank in range(1, len(parts.manifest.layers) + 1)
    ]  # fmt: skip
    engine = SimulatedEngine(build_head(config, parts), stages)
    scores = []
    for shape, decode in _SHAPES.items():
        decoding = Decoding(
            strategy=config.strategy, parameters=decode.model_dump(), drafter=config.drafter
        )
        stats = []
        for request in _requests(parts, prompts, max_tokens):
            output = generate(engine, replace(request, decoding=decoding))
            if output.error is not None:
                raise output.error.exception()
            stats.append(output.stats)
        scores.append(_score(shape, stats, levels=decode.num_draft_steps + 1))
    return scores


def _requests(parts: HeadParts, prompts: Sequence[Prompt], max_tokens: int) -> list[Request]:
    """Make requests of the prompts that leave room for an answer; ValueError if none does."""
    rendered = [first_turn(parts.prompt_of, prompt) for prompt in prompts]
    fitting = [ids for ids in rendered if len(ids) < parts.max_context]
    if not fitting:
        raise ValueError(
            f"no prompt shorter than the model's context of {parts.max_context} tokens; give "
            "--limit 1 or more and a file with some"
        )
    return [
        Request(
            prompt=ids,
            sampling=SamplingParams(temperature=0.0),
            max_new_tokens=max_tokens,
            eos_token_ids=parts.eos_token_ids,
        )
        for ids in fitting
    ]


def _score(shape: str, stats: Sequence[DecodeStats], *, levels: int) -> Score:
    """Return tau and acceptance over all answers; a run that the end cut off counts partly."""
    ended = [run for own in stats for run in own.runs]
    cut = [own.run_length for own in stats]
    shares = []
    for depth in range(1, levels + 1):
        hits = sum(run >= depth for run in (*ended, *cut))
        tried = hits + sum(run == depth - 1 for run in ended)
        if tried:
            shares.append(hits / tried)
    tokens = sum(own.num_tokens - 1 for own in stats)
    verdicts = sum(own.num_verdicts for own in stats)
    return Score(shape, tokens / verdicts if verdicts else 0.0, tuple(shares))
