"""The look of plots: two themes, one colour per strategy everywhere, a frame around each figure.

Colours stay distinct under the three kinds of colour blindness, and series differ in more than
colour (place, marker, label). matplotlib takes a second to import, so only drawing code imports
this.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.legend_handler import HandlerTuple

SUFFIXES = (".png", ".pdf", ".svg")
DPI = 200
WIDTH = 9.0  # inches
INCH_PER_CHARACTER = 0.075  # average width in the legend's type
MARKERS = "osD^vP*X"


@dataclass(frozen=True, slots=True)
class Theme:
    """Colours by use."""

    paper: str
    ink: str
    quiet: str  # secondary text
    faint: str  # grid, separators
    strategies: Mapping[str, str]
    others: Sequence[str]  # for strategies that are not in the table
    parts: Mapping[str, str]  # for parts of a stage's time, by kind of work or cause


_CAUSES = ("host overhead", "waiting for link", "upstream busy", "head drafting")


def _parts(busy: str, causes: Sequence[str], nothing: str, unknown: str) -> dict[str, str]:
    return {
        "busy": busy,
        **dict(zip(_CAUSES, causes, strict=True)),
        "nothing alive to run": nothing,
        "unknown": unknown,
    }


THEMES = {
    "light": Theme(
        paper="#ffffff",
        ink="#1a1c20",
        quiet="#5d636d",
        faint="#dfe2e6",
        strategies={
            "ar": "#7d7d7d",
            "serial_pp": "#35b5f2",
            "naive_pp": "#d9a514",
            "pruned_pp": "#b0309f",
            "pipedec": "#00915a",
            "flowspec": "#6b2f06",
            "streaming": "#0d2fc4",
        },
        others=("#d1495b", "#2f4b56", "#8a6fd1", "#5f7f12"),
        parts=_parts("#0d2fc4", ("#b0309f", "#d9a514", "#35b5f2", "#6b2f06"), "#c9cdd3", "#f0f1f3"),
    ),
    "dark": Theme(
        paper="#15171c",
        ink="#eceef1",
        quiet="#a4abb6",
        faint="#343841",
        strategies={
            "ar": "#9a9a9a",
            "serial_pp": "#a7d1ff",
            "naive_pp": "#f3d321",
            "pruned_pp": "#bd3fae",
            "pipedec": "#1fe594",
            "flowspec": "#e4631a",
            "streaming": "#3068ff",
        },
        others=("#ff8fa3", "#7fb2c4", "#b9a4ff", "#b5d65a"),
        parts=_parts("#3068ff", ("#bd3fae", "#f3d321", "#a7d1ff", "#e4631a"), "#4b515c", "#262a31"),
    ),
}


def find_theme(name: str) -> Theme:
    """Return a theme by name. Raises ValueError that lists the known ones."""
    if name not in THEMES:
        raise ValueError(f"--theme must be one of {', '.join(THEMES)}, not {name!r}")
    return THEMES[name]


def colors(theme: Theme, strategies: Sequence[str]) -> dict[str, str]:
    """A colour for each; variants ("streaming draft_topk=4") take turns with the spare ones."""
    found: dict[str, str] = {}
    spare = iter([*theme.others, *theme.strategies.values()] * (1 + len(strategies)))
    for name in strategies:
        own = theme.strategies.get(name.split(" ")[0])
        found[name] = own if own and own not in found.values() else next(spare)
    return found


@contextmanager
def drawing(theme: Theme) -> Iterator[None]:
    """Apply matplotlib's settings while a figure is made and saved."""
    settings: dict[Any, Any] = {
        "figure.facecolor": theme.paper,
        "savefig.facecolor": theme.paper,
        "axes.facecolor": theme.paper,
        "axes.edgecolor": theme.quiet,
        "axes.labelcolor": theme.ink,
        "axes.titlecolor": theme.ink,
        "axes.titlesize": 9.5,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.labelsize": 9,
        "axes.linewidth": 0.8,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.axisbelow": True,
        "text.color": theme.ink,
        "xtick.color": theme.quiet,
        "ytick.color": theme.quiet,
        "xtick.labelcolor": theme.ink,
        "ytick.labelcolor": theme.ink,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "grid.color": theme.faint,
        "grid.linewidth": 0.7,
        "legend.frameon": False,
        "legend.fontsize": 8.5,
        "legend.handlelength": 1.2,
        "legend.handletextpad": 0.5,
        "legend.columnspacing": 1.4,
        "hatch.linewidth": 0.5,
        "pdf.fonttype": 42,  # text stays text, for printers and search
        "svg.fonttype": "path",  # looks the same in every viewer
        "svg.hashsalt": "flowspec",
    }
    with matplotlib.rc_context(settings):
        yield


def frame(
    theme: Theme,
    title: str,
    subtitle: str,
    legend: Sequence[tuple[Any, str]] = (),
    *,
    height: float,
    width: float = WIDTH,
) -> Figure:
    """Make a figure of `width` x `height` inches below a band with title, subtitle and legend.

    `legend` holds pairs of an artist, or several for one entry, and its label.
    """
    lines = _legend_lines([label for _, label in legend], width)
    band = 0.62 + 0.27 * len(lines)
    whole = height + band
    figure = Figure(figsize=(width, whole), dpi=DPI, layout="constrained")
    figure.get_layout_engine().set(rect=(0.008, 0.012, 0.984, 1 - band / whole - 0.012))  # type: ignore[union-attr,call-arg]
    figure.text(0.012, 1 - 0.12 / whole, title, va="top", size=12, weight="bold")
    figure.text(0.012, 1 - 0.38 / whole, subtitle, va="top", size=8.5, color=theme.quiet)
    start = 0
    for line, length in enumerate(lines):
        part = legend[start : start + length]
        figure.legend(
            [artist for artist, _ in part],
            [label for _, label in part],
            loc="upper left",
            bbox_to_anchor=(0.004, 1 - (0.58 + 0.25 * line) / whole),
            ncols=length,
            handler_map={tuple: HandlerTuple(ndivide=None, pad=0.15)},
        )
        start += length
    return figure


def _legend_lines(labels: Sequence[str], width: float) -> list[int]:
    """Return how many entries fit in each line."""
    lines: list[int] = []
    used = width
    for label in labels:
        wide = len(label) * INCH_PER_CHARACTER + 0.4
        if used + wide > width - 0.3:
            lines.append(0)
            used = 0.0
        lines[-1] += 1
        used += wide
    return lines


def grid(axes: Axes, axis: str) -> None:
    """Draw faint lines for reading values, in place of ticks."""
    axes.grid(axis=axis)  # type: ignore[arg-type]
    axes.tick_params(axis=axis, length=0)  # type: ignore[arg-type]
    axes.spines["left" if axis == "y" else "bottom"].set_visible(False)


def save(figure: Figure, path: Path) -> None:
    """Save in the format of the file's ending; the same figure gives the same bytes."""
    dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
    figure.savefig(path, metadata=dates.get(path.suffix))
