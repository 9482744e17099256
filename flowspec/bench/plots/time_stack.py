"""Plots where each stage's time goes: to work, or to which cause of idleness."""

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from flowspec.bench.aggregate import Row
from flowspec.bench.plots.theme import Theme, frame, grid
from flowspec.tracing.idle_time import UNKNOWN

BUSY = "busy"
BAR = 0.17  # inches per stage
GAP = 0.55  # between strategies, in bars


def time_stack(rows: Sequence[Row], theme: Theme, subtitle: str) -> Figure:
    """Draw a bar per strategy and stage; `rows` has one per strategy."""
    rows = [row for row in rows if row.stage_busy]
    if not rows:
        raise ValueError("no record says what its stages did")
    parts = _parts(rows, theme)
    color = _colors(parts, theme)
    bars = sum(len(row.stage_busy) + GAP for row in rows)
    figure = frame(
        theme,
        "Where the stages' time goes",
        subtitle,
        [(Patch(color=color[part]), part) for part in parts],
        height=bars * BAR + 0.65,
    )
    axes = figure.subplots()
    grid(axes, "x")
    at, middles = 0.0, []
    for row in rows:
        for stage, busy in enumerate(row.stage_busy):
            _bar(axes, at + stage, busy, _idle(row)[stage], parts, color)
        last = at + len(row.stage_busy) - 1
        middles.append((at + last) / 2)
        mean = sum(row.stage_busy) / len(row.stage_busy)
        axes.text(1.01, middles[-1], f"{100 * mean:.0f} % busy", va="center", size=8.5)
        at = last + 1 + GAP
    axes.set_yticks(middles, [row.strategy for row in rows])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_ylim(at - GAP - 0.4, -0.6)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    stages = max(len(row.stage_busy) for row in rows)
    axes.set_xlabel(f"share of the decode time; a bar per stage, 1 to {stages} from the top")
    return figure


def _parts(rows: Sequence[Row], theme: Theme) -> list[str]:
    """Return busy, then causes in the theme's order, then others."""
    causes = {cause for row in rows for idle in _idle(row) for cause, s in idle.items() if s > 0}
    known = [part for part in theme.parts if part in causes or part == BUSY]
    return [*known, *sorted(causes - set(known))]


def _idle(row: Row) -> Sequence[Mapping[str, float]]:
    """Return shares by cause for each stage; runs on devices only tell how busy they were."""
    return row.stage_idle or [{UNKNOWN: 1.0 - busy} for busy in row.stage_busy]


def _colors(parts: Sequence[str], theme: Theme) -> dict[str, str]:
    spare = iter([*theme.others] * len(parts))
    return {part: theme.parts.get(part) or next(spare) for part in parts}


def _bar(
    axes: Axes,
    at: float,
    busy: float,
    idle: Mapping[str, float],
    parts: Sequence[str],
    color: Mapping[str, str],
) -> None:
    left = 0.0
    for part in parts:
        share = busy if part == BUSY else idle.get(part, 0.0)
        axes.barh(at, share, left=left, height=0.88, color=color[part])
        left += share
