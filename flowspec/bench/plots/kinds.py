"""The kinds of plots that sample records allow."""

from collections.abc import Callable, Sequence

from matplotlib.figure import Figure

from flowspec.bench.aggregate import MEAN, Row, ended_runs, summarize
from flowspec.bench.plots.bars import speedup_bars
from flowspec.bench.plots.lengths import length_histogram
from flowspec.bench.plots.sweep_lines import sweep_lines
from flowspec.bench.plots.theme import Theme
from flowspec.bench.plots.time_stack import time_stack
from flowspec.bench.records import Sample
from flowspec.bench.report import describe
from flowspec.bench.settings import Setting, by_setting, check_one, drafts, strategies_of
from flowspec.bench.sweeps import find_axis, sweep


def speedup(samples: Sequence[Sample], theme: Theme, baseline: str) -> Figure:
    """Draw bars per set, one panel per temperature."""
    rows = summarize(samples, baseline=baseline)
    check_one(rows, free=("temperature",))
    return speedup_bars(rows, theme, baseline)


def lengths(samples: Sequence[Sample], theme: Theme, baseline: str) -> Figure:
    """Draw the runs that a miss ended, over all sets; the baseline is one of the strategies."""
    del baseline
    settings = by_setting(samples)
    check_one(settings)
    ((setting, own),) = settings.items()
    runs = {
        strategy: [run for s in own if s.strategy == strategy for run in ended_runs(s)]
        for strategy in strategies_of(own)
        if drafts(strategy)
    }
    return length_histogram(runs, theme, f"{describe(setting)}; all sets")


def time(samples: Sequence[Sample], theme: Theme, baseline: str) -> Figure:
    """Draw the time shares of all sets; the baseline is one of the strategies."""
    del baseline
    setting, rows = _means(samples)
    return time_stack(rows, theme, f"{describe(setting)}; mean over the sets")


def _means(samples: Sequence[Sample]) -> tuple[Setting, list[Row]]:
    settings = by_setting(samples)
    check_one(settings)
    anyone = strategies_of(next(iter(settings.values())))[0]
    ((setting, rows),) = summarize(samples, baseline=anyone).items()
    return setting, [row for row in rows if row.dataset == MEAN]


def over(axis: str) -> Callable[[Sequence[Sample], Theme, str], Figure]:
    """Return a plot over a named axis of `sweeps.AXES`."""
    found = find_axis(axis)

    def draw(samples: Sequence[Sample], theme: Theme, baseline: str) -> Figure:
        return sweep_lines(sweep(samples, found, baseline=baseline), theme, baseline)

    return draw


PLOTS: dict[str, Callable[[Sequence[Sample], Theme, str], Figure]] = {
    "speedup": speedup,
    "bandwidth": over("link_mbps"),
    "stages": over("stages"),
    "lengths": lengths,
    "time": time,
}
