"""Plots how many drafted tokens are accepted between two misses."""

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flowspec.bench.plots.theme import Theme, colors, frame, grid

LONGEST = 15  # longer runs are counted together
COLUMNS = 3
HEADROOM = 1.35  # space above the tallest bar for each panel's text


def length_histogram(runs: Mapping[str, Sequence[int]], theme: Theme, subtitle: str) -> Figure:
    """Draw a panel per strategy over the same axes; `runs` holds the lengths by strategy."""
    runs = {name: own for name, own in runs.items() if own}
    if not runs:
        raise ValueError(
            "no strategy in these records has a run that a miss ended; ar drafts nothing"
        )
    columns = 2 if len(runs) == 4 else min(COLUMNS, len(runs))
    lines = -(-len(runs) // columns)
    figure = frame(theme, "Accepted tokens between two misses", subtitle, height=1.9 * lines + 0.2)
    panels = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    longest = min(LONGEST, max(max(own) for own in runs.values()))
    color = colors(theme, list(runs))
    tallest = max(max(_shares(own, longest)) for own in runs.values())
    panels[0, 0].set_ylim(0, HEADROOM * tallest)
    for axes, (name, own) in zip(panels.flat, runs.items(), strict=False):
        _panel(axes, own, longest, tallest, color[name], theme)
        axes.set_title(name)
    for axes in panels.flat[len(runs) :]:
        axes.set_visible(False)
    for column in range(columns):  # the lowest panel of each column
        shown = [axes for axes in panels[:, column] if axes.get_visible()]
        shown[-1].tick_params(labelbottom=True)
        shown[-1].set_xlabel("accepted in a row")
    for axes in panels[:, 0]:
        axes.set_ylabel("share of runs")
    return figure


def _shares(runs: Sequence[int], longest: int) -> list[float]:
    """Return the shares of runs of 0, 1, ..., and `longest` or more."""
    counts = Counter(min(run, longest) for run in runs)
    return [counts[length] / len(runs) for length in range(longest + 1)]


def _panel(
    axes: Axes, runs: Sequence[int], longest: int, tallest: float, color: str, theme: Theme
) -> None:
    grid(axes, "y")
    axes.bar(range(longest + 1), _shares(runs, longest), width=0.86, color=color)
    mean = float(np.mean(runs))
    if mean <= longest:  # else it lies beyond the axis, somewhere in the last bar
        top = 1.04 * tallest
        axes.plot([mean, mean], [0, top], color=theme.ink, linewidth=1.0, linestyle=(0, (4, 2)))
    axes.annotate(
        f"mean {mean:.2f}\n{len(runs):,} runs",
        (0.99, 0.98),
        xycoords="axes fraction",
        ha="right",
        va="top",
        size=8,
        color=theme.quiet,
    )
    ticks = list(range(0, longest + 1, 1 if longest < 8 else 3 if longest % 3 == 0 else 2))
    if ticks[-1] != longest:
        ticks.append(longest)
    labels = [str(tick) for tick in ticks]
    if longest == LONGEST:
        labels[-1] = f"{LONGEST}+"
    axes.set_xticks(ticks, labels)
    axes.set_xlim(-0.7, longest + 0.7)
    axes.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.tick_params(axis="x", length=0)
