"""A benchmark's table: one row per strategy and set, and one for the mean over the sets.

Speed: all tokens after each answer's first, by all the time they took. Speed-up: that of the
strategy by that of plain decoding (ar) on the same questions and seeds, with a bootstrap interval
over questions (statistics.py). The mean over sets weighs every set alike.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean

from flowspec.eval.records import Sample
from flowspec.eval.statistics import Interval, Pairs, Speed, speed_ratio

BASELINE = "ar"
MEAN = "mean"


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
    tokens_per_s: float
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
    rows = []
    for (_, _, temperature), sets in lines.items():
        base = [s for s in samples if (s.strategy, s.temperature) == (BASELINE, temperature)]
        pairs = {dataset: _pairs(own, base) for dataset, own in sets.items()}
        found = [_row(own, dataset, [pairs[dataset]]) for dataset, own in sets.items()]
        rows += found
        everything = [sample for own in sets.values() for sample in own]
        rows.append(_mean(found, everything, list(pairs.values())))
    return rows


def _row(samples: Sequence[Sample], dataset: str, pairs: Sequence[Pairs]) -> Row:
    tokens, seconds = _totals(samples)
    ratio = _ratio(pairs)
    bounds = [s for s in samples if s.bound_tokens_per_s]
    bound_s = sum((s.tokens - 1) / s.bound_tokens_per_s for s in bounds if s.bound_tokens_per_s)
    measured_s = sum(s.decode_s for s in bounds)
    verdicts = sum((s.tokens - 1) / s.tau for s in samples if s.tau)
    first = samples[0]
    return Row(
        cluster=first.cluster,
        model=first.model,
        drafter=first.drafter,
        strategy=first.strategy,
        dataset=dataset,
        temperature=first.temperature,
        stages=first.stages,
        prompts=len(samples),
        tokens=sum(s.tokens for s in samples),
        tokens_per_s=tokens / seconds if seconds else 0.0,
        speedup_over_ar=ratio.value if ratio else None,
        ci_low=ratio.low if ratio else None,
        ci_high=ratio.high if ratio else None,
        tau=tokens / verdicts if verdicts else 0.0,
        mismatches=sum(s.mismatch for s in samples),
        bound_share=bound_s / measured_s if measured_s and len(bounds) == len(samples) else None,
        emulated=first.emulated,
    )


def _mean(rows: Sequence[Row], samples: Sequence[Sample], pairs: Sequence[Pairs]) -> Row:
    whole = _row(samples, MEAN, pairs)
    shares = [row.bound_share for row in rows if row.bound_share is not None]
    values = asdict(whole) | {
        "tokens_per_s": fmean(row.tokens_per_s for row in rows),
        "tau": fmean(row.tau for row in rows),
        "bound_share": fmean(shares) if len(shares) == len(rows) else None,
    }
    return Row(**values)


def _totals(samples: Iterable[Sample]) -> tuple[int, float]:
    """Tokens after each answer's first, and the seconds they took."""
    own = list(samples)
    return sum(s.tokens - 1 for s in own), sum(s.decode_s for s in own)


def _pairs(own: Iterable[Sample], base: Iterable[Sample]) -> Pairs:
    """Per question that both have in full: all its turns and seeds together."""
    sides: tuple[dict[str, list[Sample]], dict[str, list[Sample]]] = ({}, {})
    dataset = ""
    for sample in own:
        sides[0].setdefault(sample.question, []).append(sample)
        dataset = sample.dataset
    for sample in base:
        if sample.dataset == dataset:
            sides[1].setdefault(sample.question, []).append(sample)
    found = []
    for question, mine in sides[0].items():
        theirs = {(s.turn, s.seed): s for s in sides[1].get(question, ())}
        both = [(s, theirs[s.turn, s.seed]) for s in mine if (s.turn, s.seed) in theirs]
        if both:
            speeds = [Speed(*_totals(side)) for side in zip(*both, strict=True)]
            found.append((speeds[0], speeds[1]))
    return found


def _ratio(pairs: Sequence[Pairs]) -> Interval | None:
    try:
        ratio = speed_ratio(pairs)
    except ValueError:  # ar was not run on these
        return None
    # one question says nothing of how questions differ
    return ratio if min(map(len, pairs)) > 1 else Interval(ratio.value)


def time_shares(samples: Sequence[Sample]) -> TimeShares:
    """Where the stages' decode time went, weighed by each sample's decode time."""
    whole = sum(s.decode_s for s in samples)
    num_stages = len(samples[0].stage_busy)
    by_stage = [0.0] * num_stages
    idle: Counter[str] = Counter()
    drafter = 0.0
    for sample in samples:
        weight = sample.decode_s / whole if whole else 0.0
        drafter += weight * sample.drafter_busy
        for stage in range(num_stages):
            by_stage[stage] += weight * sample.stage_busy[stage]
            for cause, share in sample.stage_idle[stage].items():
                idle[cause] += weight * share / num_stages  # type: ignore[assignment]
    return TimeShares(
        busy=fmean(by_stage), by_stage=tuple(by_stage), idle=dict(idle), drafter_busy=drafter
    )
