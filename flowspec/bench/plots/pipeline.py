"""Plots the work of the head and every stage over time, for one request of a traced run."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from flowspec.bench.plots.theme import Theme, frame, grid
from flowspec.protocol.messages import HEAD
from flowspec.request import rank_name

MAX_SEGMENTS = 40  # of one stage, without a given window: more are hard to tell apart
TALL = 0.72  # height of a process's row
INCHES_PER_LANE = 0.42
# Shares of the window, which is about 1,600 pixels wide:
DIGIT, AROUND = 0.0075, 0.006  # room per digit and beside them; narrower work has no label
THINNEST = 0.0018  # shorter work is drawn this long, to stay visible
GAP = 0.0008  # between works that follow each other
HIT, MISS = "verdict: hit", "verdict: miss"


@dataclass(frozen=True, slots=True)
class TimeWindow:
    """A part of a run, in seconds since its first request came."""

    start: float
    end: float


def pipeline_timeline(
    trace: Mapping[str, Any],
    theme: Theme,
    *,
    request: int | None = None,
    start: float | None = None,
    end: float | None = None,
    subtitle: str = "",
) -> Figure:
    """Draw one row per process; a segment keeps its tint on its way down the stages.

    `trace` comes from `trace_summary.read_trace`. `start` and `end` are in seconds; by default, the
    plot shows the whole request, or as much from its first token on as stays readable. Raises
    ValueError when the request or the window holds nothing.
    """
    works = [event for event in trace["traceEvents"] if event.get("cat") == "work"]
    request = _find_request(works, request)
    own = [event for event in works if request in _requests(event)]
    marks = [
        event
        for event in trace["traceEvents"]
        if event.get("cat") == "verdict" and event["args"].get("request") == request
    ]
    window = _window(own, marks, start, end)
    shown = [event for event in works if _inside(event, window)]
    prompts = {
        event["id"]
        for event in trace["traceEvents"]
        if event.get("cat") == "segment" and event["name"].startswith("prompt")
    }
    if not shown:
        raise ValueError(f"nothing ran between {window.start:g} and {window.end:g} s")
    ranks = sorted({event["pid"] for event in works} | {HEAD})
    colors = _colors(theme)
    virtual = any(process["clock"] == "virtual" for process in trace["otherData"]["processes"])
    figure = frame(
        theme,
        "The pipeline at work",
        subtitle or f"{'Emulated' if virtual else 'Measured'}, request {request}; numbers: rows",
        _legend(theme, colors),
        height=INCHES_PER_LANE * len(ranks) + 0.55,
    )
    axes = figure.subplots()
    grid(axes, "x")
    axes.set_xlim(window.start, window.end)
    axes.set_ylim(len(ranks) - 0.4, -0.75)
    axes.set_yticks(range(len(ranks)), [rank_name(rank) for rank in ranks])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("seconds since the request came")
    for event in shown:
        lane = ranks.index(event["pid"])
        color = colors[_kind(event, prompts)] if event in own else theme.faint
        _work(axes, event, lane, window, color)
        if event in own:
            _label(axes, event, lane, window, color)
    _verdicts(axes, [m for m in marks if m["pid"] == HEAD], window, colors)
    return figure


def _find_request(works: Sequence[Mapping[str, Any]], request: int | None) -> int:
    there = sorted({served for event in works for served in _requests(event)})
    if not there:
        raise ValueError("the trace holds no work of a request")
    if request is None:
        return there[0]
    if request not in there:
        raise ValueError(
            f"the trace has no request {request}; it has: {', '.join(map(str, there))}"
        )
    return request


def _requests(event: Mapping[str, Any]) -> set[int]:
    """Return an event's requests: of a drafter forward, or of the segments of a stage's forward."""
    segments = {segment["request"] for segment in event["args"].get("segments", ())}
    return segments | set(event["args"].get("requests", ()))


def _window(
    own: Sequence[Mapping[str, Any]],
    marks: Sequence[Mapping[str, Any]],
    start: float | None,
    end: float | None,
) -> TimeWindow:
    begins = min(event["ts"] for event in own) / 1e6
    ends = max(event["ts"] + event["dur"] for event in own) / 1e6
    passes = sorted(event["ts"] / 1e6 for event in own if event["pid"] == 1)
    if start is None and end is None and len(passes) > MAX_SEGMENTS:
        firsts = [mark["ts"] / 1e6 for mark in marks if mark["name"] == "first token"]
        start = firsts[0] if firsts else begins
        later = [when for when in passes if when >= start]
        end = later[MAX_SEGMENTS] if len(later) > MAX_SEGMENTS else ends
    window = TimeWindow(begins if start is None else start, ends if end is None else end)
    if window.start >= window.end:
        raise ValueError(
            f"the window from {window.start:g} to {window.end:g} s is empty; the request "
            f"lasts from {begins:.3f} to {ends:.3f} s"
        )
    return window


def _inside(event: Mapping[str, Any], window: TimeWindow) -> bool:
    return bool(
        event["ts"] / 1e6 < window.end and (event["ts"] + event["dur"]) / 1e6 > window.start
    )


def _colors(theme: Theme) -> dict[str, str]:
    own = theme.strategies
    return {
        "draft": own["naive_pp"],
        "prompt": theme.parts["nothing alive to run"],
        "even": own["streaming"],
        "odd": own["serial_pp"],
        HIT: own["pipedec"],
        MISS: own["pruned_pp"],
    }


def _legend(theme: Theme, colors: Mapping[str, str]) -> list[tuple[Any, str]]:
    def mark(name: str, shape: str) -> Line2D:
        style = {"marker": shape, "markersize": 6, "linestyle": "none"}
        return Line2D([], [], color=colors[name], **style)  # type: ignore[arg-type]

    return [
        (Patch(color=colors["draft"]), "drafter forward"),
        (Patch(color=colors["prompt"]), "prompt"),
        ((Patch(color=colors["even"]), Patch(color=colors["odd"])), "segments, in turn"),
        (mark(HIT, "v"), "verdict: its token was sent already"),
        (mark(MISS, "X"), "verdict: a miss"),
    ]


def _work(axes: Axes, event: Mapping[str, Any], lane: int, window: TimeWindow, color: str) -> None:
    start, end = event["ts"] / 1e6, (event["ts"] + event["dur"]) / 1e6
    start, end = max(start, window.start), min(end, window.end)
    whole = window.end - window.start
    wide = max(end - start - GAP * whole, THINNEST * whole)
    axes.barh(lane, wide, left=start, height=TALL, color=color)


def _label(axes: Axes, event: Mapping[str, Any], lane: int, window: TimeWindow, color: str) -> None:
    """Write the number of rows if there is room."""
    start = max(event["ts"] / 1e6, window.start)
    end = min((event["ts"] + event["dur"]) / 1e6, window.end)
    rows = str(event["args"]["rows"])
    if (end - start) / (window.end - window.start) < DIGIT * len(rows) + AROUND:
        return
    text = axes.text(
        (start + end) / 2,
        lane,
        rows,
        ha="center",
        va="center_baseline",
        size=6.5,
        color=_ink_on(color),
        clip_on=True,
    )
    text.set_in_layout(False)  # it lies within the axes, which need no margin for it


def _kind(event: Mapping[str, Any], prompts: Collection[str]) -> str:
    if event["pid"] == HEAD:
        return "draft"
    segments = event["args"].get("segments", ())
    if not segments or f"{segments[0]['request']}.{segments[0]['seq_no']}" in prompts:
        return "prompt"
    return "odd" if segments[0]["seq_no"] % 2 else "even"


def _ink_on(color: str) -> str:
    """Return black or white, whichever has more contrast."""
    red, green, blue = (int(color[place : place + 2], 16) / 255 for place in (1, 3, 5))
    light = 0.2126 * red**2.2 + 0.7152 * green**2.2 + 0.0722 * blue**2.2
    return "#000000" if light > 0.19 else "#ffffff"


def _verdicts(
    axes: Axes, marks: Sequence[Mapping[str, Any]], window: TimeWindow, colors: Mapping[str, str]
) -> None:
    for name, shape in ((HIT, "v"), (MISS, "X")):
        times = [mark["ts"] / 1e6 for mark in marks if mark["name"] == name]
        times = [when for when in times if window.start <= when <= window.end]
        if times:  # an empty line would take the figure's corner
            axes.plot(
                times, [-0.57] * len(times), shape, color=colors[name], markersize=6, clip_on=False
            )
