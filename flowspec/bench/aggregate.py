"""Aggregates sample records: one row per strategy and set, and their mean over the sets.

Within a set, a speed is all tokens after the first divided by all the seconds that they took; tau
is all tokens divided by all verdicts; alpha covers all accepted runs; shares of time are weighted
by that time. In a mean, all sets have the same weight.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from operator import attrgetter
from statistics import fmean, median
from typing import Any, Generic, TypeVar

import numpy as np

from flowspec.bench.records import Sample
from flowspec.bench.settings import Setting, by_setting, sets_of, strategies_of
from flowspec.bench.statistics import Interval, Pairs, Speed, speed_ratio

MEAN = "mean"
AVERAGED = (
    *("end_to_end_tokens_per_s", "tau", "mu", "mu_not_drafted"),
    *("mu_not_in_flight", "rows_sent", "tree_size"),
)

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One strategy on one set, or the mean of its sets; None if no sample has the value."""

    setting: Setting
    strategy: str
    dataset: str
    num_sets: int  # 1, except in a mean
    prompts: int
    samples: int
    tokens: int
    mismatches: int
    tokens_per_s: float  # the median of several repeats
    by_repeat: Mapping[int, float]  # tokens/s of complete repeats
    end_to_end_tokens_per_s: float
    speedup: Interval | None  # None: no question in common with the baseline
    pairs: Sequence[Pairs]  # per set: questions in common with the baseline, with both speeds
    tau: float
    # per depth: runs that reached it and that tried, as shares of all runs
    depths: Sequence[tuple[float, float]]
    mu: float
    mu_not_drafted: float
    mu_not_in_flight: float
    rows_sent: float  # per token, as are the next two
    rows_pruned: float | None
    rows_wasted: float | None
    drafter_busy: float | None
    stage_busy: tuple[float, ...]
    stage_idle: tuple[Mapping[str, float], ...]  # cause -> share, by stage
    ttft_s: float | None  # of answers that did not wait for devices
    inter_token_ms: Mapping[str, float]
    tree_size: float
    bound_share: float | None

    @property
    def alpha(self) -> tuple[float, ...]:
        """Return, by depth, the share of runs that reached it among those that tried."""
        return tuple(hits / tried for hits, tried in self.depths if hits)

    @property
    def paired(self) -> int:
        """Return the number of questions that are compared."""
        return sum(map(len, self.pairs))


def summarize(samples: Sequence[Sample], *, baseline: str = "ar") -> dict[Setting, list[Row]]:
    """Return the rows of each setting: strategies in their order, sets in order, then their mean.

    Raises ValueError when there is no sample, or a setting lacks the baseline.
    """
    if not samples:
        raise ValueError("there are no records")
    return {setting: _rows(setting, own, baseline) for setting, own in by_setting(samples).items()}


def _rows(setting: Setting, samples: Sequence[Sample], baseline: str) -> list[Row]:
    strategies = strategies_of(samples)
    if baseline not in strategies:
        raise ValueError(
            f"no record of the baseline {baseline} on {setting.cluster}, {setting.model}, "
            f"{setting.stages} stages, temperature {setting.temperature:g}; there are: "
            f"{', '.join(strategies)}; run it too, or name one of these with --baseline"
        )
    cells: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        cells[sample.strategy, sample.dataset].append(sample)
    rows: list[Row] = []
    for strategy in strategies:
        own = [
            add_up(cells[strategy, name], cells[baseline, name])
            for name in sets_of(samples)
            if (strategy, name) in cells
        ]
        rows += [replace(row, setting=setting) for row in (*own, mean_of(own))]
    return rows


def pair_up(own: Iterable[Sample], base: Iterable[Sample]) -> Pairs:
    """Sum up each question that both ran: the same turns with the same seeds, per side."""
    sides = [_speeds(own), _speeds(base)]
    found: dict[str, list[tuple[Speed, Speed]]] = defaultdict(list)
    for key in sorted(sides[0].keys() & sides[1].keys()):
        found[key[0]].append((sides[0][key], sides[1][key]))
    return [
        (_added(mine for mine, _ in both), _added(theirs for _, theirs in both))
        for both in found.values()
    ]


def _speeds(samples: Iterable[Sample]) -> dict[tuple[str, int, int], Speed]:
    """Return speeds by (question, turn, seed); repeats count once, by their median time."""
    repeats: dict[tuple[str, int, int], list[Speed]] = defaultdict(list)
    for s in samples:
        speed = Speed(max(s.tokens - 1, 0), s.decode_s)
        repeats[str(s.question), s.turn, s.seed].append(speed)
    medians = {}
    for key, speeds in repeats.items():
        medians[key] = Speed(
            median(speed.tokens for speed in speeds), median(speed.seconds for speed in speeds)
        )
    return medians


def _added(speeds: Iterable[Speed]) -> Speed:
    listed = list(speeds)
    return Speed(sum(s.tokens for s in listed), sum(s.seconds for s in listed))


def _ratio(sets: Sequence[Pairs]) -> Interval | None:
    try:
        return speed_ratio([pairs for pairs in sets if pairs])
    except ValueError:  # nothing in common
        return None


def add_up(own: Sequence[Sample], base: Iterable[Sample]) -> Row:
    """Return the row of one strategy's samples of one set, compared with the baseline's."""
    pairs = pair_up(own, base)
    tokens = sum(s.tokens for s in own)
    repeats = _repeats(own)
    by_time = _Weights(own, lambda s: s.decode_s)
    by_token = _Weights(own, lambda s: s.tokens)
    alike = _Weights(own, lambda s: 1.0)
    timed = [s for s in own if s.decode_s > 0]  # an answer of one token has neither speed nor bound
    verdicts = sum((s.tokens - 1) / s.tau for s in own if s.tau)
    seconds = sum(s.tokens / s.end_to_end_tokens_per_s for s in own if s.end_to_end_tokens_per_s)
    return Row(
        setting=Setting.of(own[0]),
        strategy=own[0].strategy,
        dataset=own[0].dataset,
        num_sets=1,
        prompts=len({str(s.question) for s in own}),
        samples=len(own),
        tokens=tokens,
        mismatches=sum(s.mismatch for s in own),
        tokens_per_s=median(repeats.values()),
        by_repeat=repeats,
        end_to_end_tokens_per_s=tokens / seconds if seconds else 0.0,
        speedup=_ratio([pairs]),
        pairs=(pairs,),
        tau=sum(s.tokens - 1 for s in own if s.tau) / verdicts if verdicts else 0.0,
        depths=_depths(own),
        mu=by_token.mean(lambda s: s.mu),
        mu_not_drafted=by_token.mean(lambda s: s.mu_not_drafted),
        mu_not_in_flight=by_token.mean(lambda s: s.mu_not_in_flight),
        rows_sent=_per_token(own, lambda s: s.rows_sent),
        rows_pruned=_per_token_known(own, lambda s: s.rows_pruned),
        rows_wasted=_per_token_known(own, lambda s: s.rows_wasted),
        drafter_busy=_mean_known(own, lambda s: s.drafter_busy, lambda s: s.decode_s),
        stage_busy=by_time.lists(lambda s: s.stage_busy),
        stage_idle=by_time.mappings(lambda s: s.stage_idle),
        ttft_s=_mean_known(own, _clean_ttft, lambda s: 1.0),
        inter_token_ms=alike.mapping(lambda s: s.inter_token_ms),
        tree_size=alike.mean(lambda s: s.tree_size),
        bound_share=_if_all((s.bound_share for s in timed), [s.decode_s for s in timed]),
    )


def _repeats(samples: Iterable[Sample]) -> dict[int, float]:
    """Return the speed by repeat, without incomplete repeats."""
    found: dict[int, list[Sample]] = defaultdict(list)
    for sample in samples:
        found[sample.repeat].append(sample)
    answers = {repeat: _speeds(own) for repeat, own in sorted(found.items())}
    most = max(map(len, answers.values()))
    whole = {repeat: _added(own.values()) for repeat, own in answers.items() if len(own) == most}
    return {
        repeat: speed.tokens / speed.seconds if speed.seconds else 0.0
        for repeat, speed in whole.items()
    }


def mean_of(rows: Sequence[Row]) -> Row:
    """Return the mean over sets; counts are sums."""
    pairs = [of_set for row in rows for of_set in row.pairs]

    alike = _Weights(rows, lambda row: 1.0)
    averages: dict[str, Any] = {name: alike.mean(attrgetter(name)) for name in AVERAGED}
    timed = [row for row in rows if row.tokens_per_s > 0]
    common = set[int].intersection(*(set(row.by_repeat) for row in rows))
    repeats = {n: fmean(row.by_repeat[n] for row in rows) for n in sorted(common)}
    return replace(
        rows[0],
        dataset=MEAN,
        num_sets=len(rows),
        prompts=sum(row.prompts for row in rows),
        samples=sum(row.samples for row in rows),
        tokens=sum(row.tokens for row in rows),
        mismatches=sum(row.mismatches for row in rows),
        tokens_per_s=median(repeats.values()) if repeats else alike.mean(lambda r: r.tokens_per_s),
        by_repeat=repeats,
        speedup=_ratio(pairs),
        pairs=pairs,
        depths=_mean_depths([row.depths for row in rows if row.depths]),
        stage_busy=alike.lists(lambda row: row.stage_busy),
        stage_idle=alike.mappings(lambda row: row.stage_idle),
        inter_token_ms=alike.mapping(lambda row: row.inter_token_ms),
        bound_share=_if_all((row.bound_share for row in timed), [1.0] * len(timed)),
        drafter_busy=_if_all((row.drafter_busy for row in rows), [1.0] * len(rows)),
        ttft_s=_if_all((row.ttft_s for row in rows), [1.0] * len(rows)),
        rows_pruned=_if_all((row.rows_pruned for row in rows), [1.0] * len(rows)),
        rows_wasted=_if_all((row.rows_wasted for row in rows), [1.0] * len(rows)),
        **averages,
    )


def ended_runs(sample: Sample) -> tuple[int, ...]:
    """Return the runs that ended with a miss, without the run that the answer's end cut off."""
    return sample.runs[: round(sample.mu_not_drafted * max(1, sample.tokens - 1))]


def _depths(samples: Iterable[Sample]) -> list[tuple[float, float]]:
    """Return, at depth 1, 2, ..., the shares of runs that reached it and that tried.

    The last depth is the first that no run reached. The run that an answer's end cut off counts as
    tried only as far as it got.
    """
    listed = list(samples)
    ended = [run for s in listed for run in ended_runs(s)]
    cut_off = [run for s in listed for run in s.runs[len(ended_runs(s)) :]]
    whole = [*ended, *cut_off]
    depths = []
    for depth in range(1, max(whole, default=-1) + 2):
        hits = sum(run >= depth for run in whole)
        tried = sum(run >= depth - 1 for run in ended) + sum(run >= depth for run in cut_off)
        depths.append((hits / len(whole), tried / len(whole)))
    return depths


def _mean_depths(sets: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """Return the mean over sets of both shares; sets without runs of that depth count as 0."""
    return [
        (fmean(hits for hits, _ in depth), fmean(tried for _, tried in depth))
        for depth in zip_longest(*sets, fillvalue=(0.0, 0.0))
    ]


def mean_idle(row: Row, cause: str) -> float:
    """Return a cause's share of the stages' time."""
    shares = [stage.get(cause, 0.0) for stage in row.stage_idle]
    return sum(shares) / len(shares) if shares else 0.0


def _per_token(samples: Sequence[Sample], count: Callable[[Sample], float]) -> float:
    tokens = sum(s.tokens for s in samples)
    return sum(map(count, samples)) / tokens if tokens else 0.0


def _per_token_known(
    samples: Sequence[Sample], count: Callable[[Sample], int | None]
) -> float | None:
    """Return the mean per token over answers with a known count; None if there are none."""
    known = [s for s in samples if count(s) is not None]
    return _per_token(known, lambda s: count(s) or 0) if known else None


def _clean_ttft(sample: Sample) -> float | None:
    """Return the time to first token, or None if it may include waiting for devices."""
    return None if sample.resumes or sample.rebuilt else sample.ttft_s


def _mean_known(
    samples: Sequence[Sample],
    value: Callable[[Sample], float | None],
    weight: Callable[[Sample], float],
) -> float | None:
    """Return the weighted mean over answers with a known value; None if there are none."""
    known = [s for s in samples if value(s) is not None]
    return _Weights(known, weight).mean(lambda s: value(s) or 0.0) if known else None


class _Weights(Generic[T]):
    """Weighted means over things; if all weights are 0, they are equal."""

    def __init__(self, things: Sequence[T], weight: Callable[[T], float]) -> None:
        self.things = things
        self.weights = [weight(thing) for thing in things]

    def mean(self, value: Callable[[T], float]) -> float:
        """Return the mean of a number."""
        return _weighted([value(thing) for thing in self.things], self.weights)

    def lists(self, values: Callable[[T], Sequence[float]]) -> tuple[float, ...]:
        """Return the mean per position, over the lists that are long enough."""
        columns: list[list[tuple[float, float]]] = []
        for thing, weight in zip(self.things, self.weights, strict=True):
            for place, value in enumerate(values(thing)):
                if place == len(columns):
                    columns.append([])
                columns[place].append((value, weight))
        return tuple(_weighted(*zip(*column, strict=True)) for column in columns)

    def mapping(self, values: Callable[[T], Mapping[str, float]]) -> dict[str, float]:
        """Return the mean per key; a missing key counts as 0."""
        found = [values(thing) for thing in self.things]
        names = dict.fromkeys(name for one in found for name in one)
        return {n: _weighted([one.get(n, 0.0) for one in found], self.weights) for n in names}

    def mappings(
        self, values: Callable[[T], Sequence[Mapping[str, float]]]
    ) -> tuple[dict[str, float], ...]:
        """Return the mean per position and key."""
        places = max((len(values(thing)) for thing in self.things), default=0)
        return tuple(self.mapping(_at(values, place)) for place in range(places))


def _at(
    values: Callable[[T], Sequence[Mapping[str, float]]], place: int
) -> Callable[[T], Mapping[str, float]]:
    return lambda thing: dict(*values(thing)[place : place + 1])


def _if_all(values: Iterable[float | None], weights: Sequence[float]) -> float | None:
    """Return the weighted mean; None if a value is missing or there are none."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return _weighted(known, weights) if known and len(known) == len(listed) else None


def _weighted(values: Sequence[float], weights: Sequence[float]) -> float:
    if not values:
        return 0.0
    return float(np.average(values, weights=weights if sum(weights) else None))
