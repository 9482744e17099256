"""Plots the speed-up of every strategy on every set, with a panel per temperature."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flowspec.bench.aggregate import MEAN, Row
from flowspec.bench.datasets import TITLES
from flowspec.bench.plots.theme import Theme, colors, frame, grid
from flowspec.bench.report import describe, has_intervals
from flowspec.bench.settings import Setting

GROUP = 0.84  # share of the distance between sets that bars take


def speedup_bars(rows: Mapping[Setting, Sequence[Row]], theme: Theme, baseline: str) -> Figure:
    """Draw bars with intervals, one panel per setting; the baseline is the line at 1."""
    everything = [row for own in rows.values() for row in own]
    names = list(dict.fromkeys(row.strategy for row in everything))
    strategies = [name for name in names if name != baseline]
    if not strategies:
        raise ValueError(f"there is nothing but the baseline {baseline} in these records")
    sets = list(dict.fromkeys(row.dataset for row in everything if row.dataset != MEAN))
    color = colors(theme, strategies)
    intervals = "; lines: 95 % intervals" if has_intervals(everything) else ""
    without = ["temperature"] if len(rows) > 1 else []
    figure = frame(
        theme,
        f"Speed-up over {baseline}",
        describe(next(iter(rows)), without=without) + intervals,
        [(Patch(color=color[name]), name) for name in strategies],
        height=2.7 * len(rows),
    )
    panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axes, (setting, own) in zip(panels, rows.items(), strict=True):
        _panel(axes, own, [*sets, MEAN], color, theme)
        axes.set_ylabel(f"times as fast as {baseline}")
        if len(rows) > 1:
            axes.set_title(f"T = {setting.temperature:g}")
    return figure


def _panel(
    axes: Axes, rows: Sequence[Row], sets: Sequence[str], color: Mapping[str, str], theme: Theme
) -> None:
    grid(axes, "y")
    found = {(row.strategy, row.dataset): row for row in rows}
    wide = GROUP / len(color)
    last = len(sets) - 1
    axes.axvspan(last - 0.5, last + 0.5, color=theme.faint, alpha=0.45, linewidth=0, zorder=0)
    for place, strategy in enumerate(color):
        for group, name in enumerate(sets):
            row = found.get((strategy, name))
            if row is None or row.speedup is None:
                continue
            at = group + (place - (len(color) - 1) / 2) * wide
            _bar(axes, at, wide * 0.9, row, color[strategy], theme, labelled=name == MEAN)
    axes.axhline(1.0, color=theme.ink, linewidth=1.0)
    axes.set_xlim(-0.5, last + 0.5)
    axes.set_ylim(bottom=0)
    axes.set_xticks(range(len(sets)), [TITLES.get(name, name) for name in sets])
    for label in axes.get_xticklabels()[last:]:  # only the lowest panel has labels
        label.set_fontweight("bold")
    axes.tick_params(axis="x", length=0)


def _bar(
    axes: Axes, at: float, wide: float, row: Row, color: str, theme: Theme, *, labelled: bool
) -> None:
    ratio = row.speedup
    assert ratio is not None
    axes.bar(at, ratio.value, width=wide, color=color)
    top = ratio.value
    if ratio.low is not None and ratio.high is not None:
        for color, width in ((theme.paper, 2.4), (theme.ink, 0.9)):  # visible on any bar
            axes.vlines(at, ratio.low, ratio.high, color=color, linewidth=width)
        top = ratio.high
    if labelled:
        axes.annotate(
            f"{ratio.value:.2f}",
            (at, top),
            xytext=(0, 2),
            textcoords="offset points",
            ha="center",
            va="bottom",
            size=7.5,
            rotation=90 if wide < 0.14 else 0,
        )
