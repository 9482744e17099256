"""Plots a line per strategy over the varied value."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from flowspec.bench.aggregate import Row
from flowspec.bench.plots.theme import MARKERS, Theme, colors, frame, grid
from flowspec.bench.report import has_intervals
from flowspec.bench.sweeps import Sweep

LOG_FROM = 6.0  # ratio of the largest to the smallest value, from which the axis is logarithmic


def sweep_lines(found: Sweep, theme: Theme, baseline: str) -> Figure:
    """Draw tokens/s and, if the baseline was run everywhere, speed-ups with their intervals."""
    strategies = list(found.lines)
    color = colors(theme, strategies)
    marker = {name: MARKERS[place % len(MARKERS)] for place, name in enumerate(strategies)}
    legend = [
        (Line2D([], [], color=color[name], marker=marker[name], markersize=5), name)
        for name in strategies
    ]
    panels = 2 if found.has_baseline and len(strategies) > 1 else 1
    rows = [row for line in found.lines.values() for row in line.values()]
    bands = "; bands: 95 % intervals" if panels == 2 and has_intervals(rows) else ""
    figure = frame(
        theme,
        f"Speed by {found.axis.label.split(',')[0]}",
        f"{found.about}; mean over the sets" + bands,
        legend,
        height=3.3,
    )
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for panel in axes:
        grid(panel, "y")
    for name, points in found.lines.items():
        xs = list(points)
        style = {"color": color[name], "marker": marker[name], "markersize": 5, "linewidth": 1.8}
        axes[0].plot(xs, [row.tokens_per_s for row in points.values()], **style)
        if panels == 2 and name != baseline:
            _speedups(axes[1], points, style)
    axes[0].set_ylabel("tokens/s")
    if panels == 2:
        axes[1].axhline(1.0, color=theme.quiet, linewidth=1.0)
        axes[1].set_ylabel(f"times as fast as {baseline}")
    values = sorted({value for points in found.lines.values() for value in points})
    for panel in axes:
        panel.set_ylim(bottom=0)
        panel.set_xlabel(found.axis.label)
        _ticks(panel, values)
    return figure


def _speedups(axes: Axes, points: Mapping[float, Row], style: Mapping[str, object]) -> None:
    known = {x: row.speedup for x, row in points.items() if row.speedup is not None}
    axes.plot(list(known), [ratio.value for ratio in known.values()], **style)  # type: ignore[arg-type]
    lows = [r.value if r.low is None else r.low for r in known.values()]
    highs = [r.value if r.high is None else r.high for r in known.values()]
    axes.fill_between(list(known), lows, highs, color=str(style["color"]), alpha=0.18, linewidth=0)


def _ticks(axes: Axes, values: Sequence[float]) -> None:
    """Put ticks exactly at the values that were run."""
    if values[0] > 0 and values[-1] / values[0] >= LOG_FROM:
        axes.set_xscale("log")
    axes.xaxis.set_major_locator(FixedLocator(values))
    axes.xaxis.set_major_formatter(FixedFormatter([f"{value:g}" for value in values]))
    axes.xaxis.set_minor_locator(NullLocator())
    if len(values) > 8:
        axes.tick_params(axis="x", rotation=45)
