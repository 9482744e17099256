"""A benchmark's table: one row per strategy and set, and one for the mean over the sets.

Speed: all tokens after each answer's first, divided by all the time that they took. Speed-up: that
of the strategy divided by that of plain decoding (ar) on the same questions and seeds, with a
bootstrap interval over questions (statistics.py). In the mean, every set has the same weight.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from flowspec.bench.aggregate import Row, add_up, mean_idle, mean_of
from flowspec.bench.records import Sample

BASELINE = "ar"


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeShares:
    """Shares of all stages' decode time: work, and idle time by cause, as far as known."""

    busy: float | None
    by_stage: tuple[float, ...]
    idle: Mapping[str, float]
    drafter_busy: float | None


Line = tuple[str, str, float]  # strategy, drafter, temperature


def line_of(found: Row | Sample) -> Line:
    """Return the line of the table that a figure belongs to, for any set."""
    setting = found.setting if isinstance(found, Row) else found
    return found.strategy, setting.drafter, setting.temperature


def rows_of_run(samples: Sequence[Sample]) -> list[Row]:
    """Return rows in the order of the samples, each mean after its sets. All are of one plan."""
    lines: dict[Line, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        lines[line_of(sample)][sample.dataset].append(sample)
    plain = {line[2]: sets for line, sets in lines.items() if line[0] == BASELINE}
    rows = []
    for (_, _, temperature), sets in lines.items():
        base = plain.get(temperature, {})
        found = [add_up(own, base.get(name, ())) for name, own in sets.items()]
        rows += [*found, mean_of(found)]
    return rows


def as_json(row: Row) -> dict[str, object]:
    """Return what `--json` writes; `samples` counts turns, once per seed and repeat."""
    ratio, setting = row.speedup, row.setting
    speeds = list(row.by_repeat.values()) or [row.tokens_per_s]
    return {
        "cluster": setting.cluster,
        "model": setting.model,
        "drafter": setting.drafter,
        "strategy": row.strategy,
        "dataset": row.dataset,
        "temperature": setting.temperature,
        "stages": setting.stages,
        "prompts": row.prompts,
        "samples": row.samples,
        "tokens": row.tokens,
        "tokens_per_s": row.tokens_per_s,
        "repeats": len(speeds),
        "lowest": min(speeds),
        "highest": max(speeds),
        "speedup_over_ar": ratio.value if ratio else None,  # None if ar was not run
        "ci_low": ratio.low if ratio else None,
        "ci_high": ratio.high if ratio else None,
        "tau": row.tau,
        "mismatches": row.mismatches,
        "bound_share": row.bound_share,
        "emulated": setting.emulated,
    }


def time_shares(row: Row) -> TimeShares:
    """Return where the stages' decode time went; in a set, each answer is weighted by its time."""
    causes = sorted({cause for idle in row.stage_idle for cause in idle})
    return TimeShares(
        busy=fmean(row.stage_busy) if row.stage_busy else None,
        by_stage=row.stage_busy,
        idle={cause: mean_idle(row, cause) for cause in causes},
        drafter_busy=row.drafter_busy,
    )
