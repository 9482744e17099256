"""A benchmark's table: one row per strategy and set, and one for the mean over the sets.

Speed: all tokens after each answer's first, by all the time they took. Speed-up: that of the
strategy by that of plain decoding (ar) on the same questions and seeds, with a bootstrap interval
over questions (statistics.py). The mean over sets weighs every set alike.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from flowspec.eval import aggregate
from flowspec.eval.aggregate import add_up, mean_idle, mean_of
from flowspec.eval.records import Sample

BASELINE = "ar"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What `--json` writes. `tokens` and `prompts` (turns, once per seed) are of all runs."""

    cluster: str
    model: str
    drafter: str
    strategy: str
    dataset: str
    temperature: float
    stages: int
    prompts: int
    tokens: int
    tokens_per_s: float  # median of the repeats, as many as are whole
    repeats: int
    lowest: float
    highest: float
    speedup_over_ar: float | None  # None where ar was not run
    ci_low: float | None
    ci_high: float | None
    tau: float
    mismatches: int
    bound_share: float | None
    emulated: bool

    def as_json(self) -> dict[str, object]:
        """Its keys and values."""
        return asdict(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeShares:
    """Of all stages' decode time: at work, and idle by cause."""

    busy: float
    by_stage: tuple[float, ...]
    idle: Mapping[str, float]
    drafter_busy: float


Line = tuple[str, str, float]  # strategy, drafter, temperature


def summarize(samples: Sequence[Sample]) -> list[Row]:
    """Rows in the order of the samples, the mean after its sets. All of one cluster and model."""
    lines: dict[Line, dict[str, list[Sample]]] = defaultdict(lambda: defaultdict(list))
    for sample in samples:
        line = (sample.strategy, sample.drafter, sample.temperature)
        lines[line][sample.dataset].append(sample)
    plain: dict[tuple[float, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        if sample.strategy == BASELINE:
            plain[sample.temperature, sample.dataset].append(sample)
    rows = []
    for (_, _, temperature), sets in lines.items():
        found = [add_up(own, plain[temperature, name]) for name, own in sets.items()]
        rows += [_row(one) for one in (*found, mean_of(found))]
    return rows


def _row(found: aggregate.Row) -> Row:
    ratio, setting = found.speedup, found.setting
    speeds = list(found.by_repeat.values()) or [found.tokens_per_s]
    return Row(
        cluster=setting.cluster,
        model=setting.model,
        drafter=setting.drafter,
        strategy=found.strategy,
        dataset=found.dataset,
        temperature=setting.temperature,
        stages=setting.stages,
        prompts=found.samples,
        tokens=found.tokens,
        tokens_per_s=found.tokens_per_s,
        repeats=len(speeds),
        lowest=min(speeds),
        highest=max(speeds),
        speedup_over_ar=ratio.value if ratio else None,
        ci_low=ratio.low if ratio else None,
        ci_high=ratio.high if ratio else None,
        tau=found.tau,
        mismatches=found.mismatches,
        bound_share=found.bound_share,
        emulated=setting.emulated,
    )


def time_shares(samples: Sequence[Sample]) -> TimeShares:
    """Where the stages' decode time went, weighed by each sample's decode time."""
    found = add_up(samples, ())
    causes = sorted({cause for idle in found.stage_idle for cause in idle})
    return TimeShares(
        busy=fmean(found.stage_busy),
        by_stage=found.stage_busy,
        idle={cause: mean_idle(found, cause) for cause in causes},
        drafter_busy=found.drafter_busy,
    )
