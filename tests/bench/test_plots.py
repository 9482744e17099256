"""`flowspec plot` draws each kind in each format and theme, and refuses invalid input."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

from flowspec.bench.aggregate import MEAN, summarize
from flowspec.bench.plots.bars import speedup_bars
from flowspec.bench.plots.kinds import PLOTS, over
from flowspec.bench.plots.lengths import length_histogram
from flowspec.bench.plots.pipeline import pipeline_timeline
from flowspec.bench.plots.theme import THEMES, colors, drawing
from flowspec.bench.records import Sample
from flowspec.cli.main import app, main
from flowspec.engine.engine import generate
from flowspec.speculation.strategies import STRATEGIES
from flowspec.tracing.chrome_trace import FORMAT, write_trace
from flowspec.tracing.trace_summary import read_trace
from flowspec.transport.link_occupancy import Passage
from tests.support.clusters import make_cluster
from tests.support.made_up import benchmark, write
from tests.support.tiny import request
from tests.support.traces import record, timeline_of

MAGIC = {".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}
FEW = ("ar", "flowspec", "streaming")
SETS = ("gsm8k", "qa")
LIGHT = THEMES["light"]


def sweep_samples() -> list[Sample]:
    """Return samples of three link rates, one of them the cluster's own, and two tree depths."""
    found = []
    for name in ("jetson-5 link_mbps=125", "jetson-5-250mbit", "jetson-5"):
        own = benchmark(FEW, SETS, questions=2, cluster=name)
        found += [replace(one, key=f"{name} {one.key}") for one in own]
    return found


def depth_samples() -> list[Sample]:
    """`ar` once; the others with trees of two depths."""
    found = list(benchmark(("ar",), SETS, questions=2, parameters={"num_draft_steps": 6}))
    for depth in (2, 6):
        parameters = {"num_draft_steps": depth, "draft_topk": 4}
        found += benchmark(("flowspec", "streaming"), SETS, questions=2, parameters=parameters)
    return found


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Return records and a trace to plot."""
    folder = tmp_path_factory.mktemp("plots")
    stages = [
        replace(one, stages=number, key=f"{number} {one.key}")
        for number in (2, 4)
        for one in benchmark(FEW, SETS, questions=2)
    ]
    charges = (lambda rank, work: 0.05, lambda source, to, message: Passage(latency_s=0.001))
    cluster = make_cluster(3, "streaming", charges=charges)
    recorders = record(cluster)
    generate(cluster, request(max_new_tokens=12))
    write_trace(timeline_of(recorders), folder / "trace.json")
    plain = benchmark(FEW, SETS, questions=2)
    return {
        "speedup": write(folder / "plain.jsonl", plain),
        "lengths": folder / "plain.jsonl",
        "time": folder / "plain.jsonl",
        "bandwidth": write(folder / "bandwidth.jsonl", sweep_samples()),
        "stages": write(folder / "stages.jsonl", stages),
        "sweep": write(folder / "depths.jsonl", depth_samples()),
        "timeline": folder / "trace.json",
    }


@pytest.mark.parametrize(
    ("kind", "suffix", "theme"),
    [
        ("speedup", ".png", "dark"),
        ("speedup", ".svg", "light"),
        ("bandwidth", ".pdf", "light"),
        ("stages", ".svg", "dark"),
        ("sweep", ".png", "light"),
        ("lengths", ".svg", "light"),
        ("time", ".pdf", "dark"),
        ("timeline", ".svg", "light"),
        ("timeline", ".png", "dark"),
    ],
)
def test_a_picture_of_each_kind_is_written(files, tmp_path, kind, suffix, theme):
    """The ending names the format; both themes work."""
    out = tmp_path / f"plot{suffix}"
    words = ["plot", kind, str(files[kind]), "--out", str(out), "--theme", theme]
    words += ["--over", "num_draft_steps"] if kind == "sweep" else []
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (result.output, result.exception)
    data = out.read_bytes()
    assert data.startswith(MAGIC[suffix])
    assert len(data) > 5000
    if suffix == ".svg":
        assert THEMES[theme].paper in data.decode()


def test_the_same_records_give_the_same_bytes(files, tmp_path):
    """A picture has no date or random part, so it changes only with its figures."""
    outs = [tmp_path / f"{number}.svg" for number in (1, 2)]
    for out in outs:
        words = ["plot", "time", str(files["time"]), "--out", str(out)]
        assert CliRunner().invoke(app, words).exit_code == 0
    assert outs[0].read_bytes() == outs[1].read_bytes()


def test_bars_are_as_high_as_the_figures():
    """There is one for each strategy but the baseline, for each set and the mean."""
    samples = list(benchmark(FEW, SETS, questions=3))
    rows = summarize(samples)
    with drawing(LIGHT):
        (axes,) = speedup_bars(rows, LIGHT, "ar").axes
    heights = sorted(bar.get_height() for bar in axes.containers for bar in bar)
    ((_, own),) = rows.items()
    values = [row.speedup.value for row in own if row.strategy != "ar"]
    assert heights == pytest.approx(sorted(values))
    assert len(values) == 2 * (len(SETS) + 1)
    assert [label.get_text() for label in axes.get_xticklabels()][-1] == MEAN


def test_a_sweep_draws_what_was_run_in_order():
    """The link rate is the varied value, else that of the cluster's profile."""
    with drawing(LIGHT):
        figure = PLOTS["bandwidth"](sweep_samples(), LIGHT, "ar")
    speeds, ratios = figure.axes
    assert [list(line.get_xdata()) for line in speeds.lines] == [[125.0, 250.0, 1000.0]] * 3
    assert len([line for line in ratios.lines if len(line.get_xdata()) == 3]) == 2


def test_what_does_not_depend_on_the_sweep_counts_everywhere():
    """`ar` has no tree, so one run is the baseline of every depth."""
    with drawing(LIGHT):
        figure = over("num_draft_steps")(depth_samples(), LIGHT, "ar")
    ar = figure.axes[0].lines[0]
    assert list(ar.get_xdata()) == [2.0, 6.0]
    assert ar.get_ydata()[0] == ar.get_ydata()[1]


def test_shares_of_time_fill_the_bar(files):
    """Busy time and causes add up to the whole of every stage's time."""
    samples = list(benchmark(FEW, SETS, questions=2))
    with drawing(LIGHT):
        (axes,) = PLOTS["time"](samples, LIGHT, "ar").axes
    ends: dict[float, float] = {}
    for bar in axes.patches:
        middle = round(bar.get_y() + bar.get_height() / 2, 6)
        ends[middle] = max(ends.get(middle, 0.0), bar.get_x() + bar.get_width())
    assert len(ends) == 3 * 4
    assert list(ends.values()) == pytest.approx([1.0] * 12)


def test_the_timeline_shows_each_forward_where_it_ran(files):
    """A process has one box per computation; a window leaves the others out."""
    trace = read_trace(files["timeline"])
    works = [e for e in trace["traceEvents"] if e.get("cat") == "work"]
    with drawing(LIGHT):
        (axes,) = pipeline_timeline(trace, LIGHT).axes
        (part,) = pipeline_timeline(trace, LIGHT, start=0.3, end=0.6).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        *("head", "stage 1", "stage 2", "stage 3")
    ]
    assert len(axes.patches) == len(works)
    inside = [e for e in works if e["ts"] < 0.6e6 and e["ts"] + e["dur"] > 0.3e6]
    assert len(part.patches) == len(inside) < len(works)
    with pytest.raises(ValueError, match="no request 9; it has: 1"):
        pipeline_timeline(trace, LIGHT, request=9)
    with pytest.raises(ValueError, match="is empty; the request lasts from"):
        pipeline_timeline(trace, LIGHT, start=5.0, end=4.0)


def test_short_work_is_seen_and_no_two_counts_run_together(files):
    """A real stage's forward may take a thousandth of the plot's range."""
    trace = read_trace(files["timeline"])
    ends: dict[int, float] = {}  # by lane: one work right after the other
    for place, event in enumerate(e for e in trace["traceEvents"] if e.get("cat") == "work"):
        event["ts"] = ends.get(event["pid"], 0.0)
        event["dur"] = (1.0, 1_000.0, 600.0, 300.0)[place % 4]
        ends[event["pid"]] = event["ts"] + event["dur"]
    with drawing(LIGHT):
        figure = pipeline_timeline(trace, LIGHT)
    FigureCanvasAgg(figure).draw()
    (axes,) = figure.axes
    assert min(bar.get_window_extent().width for bar in axes.patches) > 2.0
    boxes = [text.get_window_extent() for text in axes.texts]
    assert boxes
    for one, other in combinations(boxes, 2):
        assert not one.expanded(1.2, 1.0).overlaps(other)


def test_a_timeline_without_hits_has_no_other_margins(files):
    """A missing mark takes no room."""
    trace = read_trace(files["timeline"])
    lefts = []
    for kinds in (("verdict: hit", "verdict: miss"), ("verdict: miss",), ()):
        events = [
            e for e in trace["traceEvents"] if e.get("cat") != "verdict" or e["name"] in kinds
        ]
        with drawing(LIGHT):
            figure = pipeline_timeline({**trace, "traceEvents": events}, LIGHT)
        FigureCanvasAgg(figure).draw()
        lefts.append(figure.axes[0].get_position().x0)
    assert lefts == pytest.approx([lefts[0]] * 3, abs=0.005)


def test_what_a_panel_of_lengths_says_covers_nothing():
    """It covers neither a bar nor the mean, which may lie beyond the last bar."""
    runs = {"streaming": [15] * 9 + [60], "flowspec": [0, 1, 1, 2], "pipedec": [14, 15, 15]}
    with drawing(LIGHT):
        figure = length_histogram(runs, LIGHT, "")
    FigureCanvasAgg(figure).draw()
    for axes in [axes for axes in figure.axes if axes.get_visible()]:
        assert axes.get_xlim()[1] == 15.7
        (text,) = axes.texts
        shown = [*axes.patches, *axes.lines]
        assert not any(text.get_window_extent().overlaps(one.get_window_extent()) for one in shown)
    assert [len(axes.lines) for axes in figure.axes[:3]] == [0, 1, 1]


# What a dichromat sees of linear RGB (Machado, Oliveira and Fernandes 2009, severity 1).
BLINDNESS = {
    "none": np.eye(3),
    "protan": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    "deutan": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "tritan": [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = np.array([[0.4125, 0.3576, 0.1804], [0.2127, 0.7152, 0.0722], [0.0193, 0.1192, 0.9503]])


def lab(color: str, blindness: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the CIELAB values of a colour as it is seen."""
    rgb = np.array([int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(blindness) @ linear, 0, 1)
    xyz = TO_XYZ @ seen / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("kind", BLINDNESS)
def test_colors_stay_apart_for_everybody(theme, kind):
    """Strategies, and parts of a stage's time, have clearly visible CIELAB distances."""
    look = THEMES[theme]
    for palette in (look.strategies, look.parts):
        seen = {name: lab(color, BLINDNESS[kind]) for name, color in palette.items()}
        for one, other in combinations(seen, 2):
            distance = float(np.linalg.norm(seen[one] - seen[other]))
            assert distance > 12, (one, other, round(distance, 1))


@pytest.mark.parametrize("questions", [2, 3])
def test_intervals_are_named_where_there_are_any(questions):
    """Two questions are too few for an interval, and none is drawn."""
    with drawing(LIGHT):
        for kind, samples in (
            (PLOTS["speedup"], list(benchmark(FEW, SETS, questions=questions))),
            (
                PLOTS["stages"],
                [s for n in (2, 4) for s in benchmark(FEW, SETS, questions=questions, stages=n)],
            ),
        ):
            texts = [text.get_text() for text in kind(samples, LIGHT, "ar").texts]
            assert any("95 % intervals" in text for text in texts) is (questions > 2)


def test_every_strategy_has_its_color_and_variants_have_others():
    """The colours are the same in every plot."""
    for theme in THEMES.values():
        assert set(STRATEGIES) <= set(theme.strategies)
        names = [*STRATEGIES, *(f"streaming draft_topk={number}" for number in range(4))]
        found = colors(theme, names)
        assert len(set(found.values())) == len(names)
        assert found["streaming"] == theme.strategies["streaming"]


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["pie", "good.jsonl", "--out", "x.png"], ["pie", "speedup"]),
        (["speedup", "good.jsonl", "--out", "x.bmp"], ["x.bmp", ".svg"]),
        (["speedup", "good.jsonl", "--out", "nowhere/x.png"], ["nowhere", "folder"]),
        (["speedup", "good.jsonl", "--out", "x.png", "--theme", "pink"], ["pink", "dark"]),
        (["speedup", "empty.jsonl", "--out", "x.png"], ["no records yet"]),
        (["speedup", "good.jsonl", "--baseline", "pipedec", "--out", "x.png"], ["pipedec"]),
        (
            ["time", "mixed.jsonl", "--out", "x.png"],
            ["differ", "emulated: false, true", "--only emulated=false"],
        ),
        (["speedup", "mixed.jsonl", "--out", "x.png"], ["emulated", "--only"]),
        (["lengths", "ar.jsonl", "--out", "x.png"], ["ar", "drafts nothing"]),
        (["speedup", "ar.jsonl", "--out", "x.png"], ["nothing but the baseline ar"]),
        (["bandwidth", "good.jsonl", "--out", "x.png"], ["'testbed'", "clusters"]),
        (["stages", "good.jsonl", "--out", "x.png"], ["two values", "have: 4"]),
        (["sweep", "good.jsonl", "--out", "x.png"], ["--over"]),
        (["sweep", "good.jsonl", "--over", "moon", "--out", "x.png"], ["moon", "num_draft_steps"]),
        (["time", "good.jsonl", "--over", "draft_topk", "--out", "x.png"], ["--over"]),
        (["timeline", "good.jsonl", "--out", "x.png"], ["good.jsonl holds", "other plots"]),
        (["timeline", "one.jsonl", "--out", "x.png"], ["one.jsonl holds", "other plots"]),
        (["timeline", "empty.jsonl", "--out", "x.png"], ["empty.jsonl is not a trace"]),
        (["speedup", "trace.json", "--out", "x.png"], ["trace.json is a trace", "timeline"]),
        (["time", "many.jsonl", "--out", "x.png"], ["--only 'cluster=jetson-5 link_mbps=10'"]),
        (["time", "warm.jsonl", "--out", "x.png"], ["temperature: 0, 1", "--only temperature=0"]),
    ],
)
def test_what_cannot_be_plotted_ends_with_one_line(tmp_path, monkeypatch, capsys, words, names):
    """No picture is left behind."""
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    good = list(benchmark(FEW, SETS, questions=2))
    real = [replace(one, emulated=False, key=f"real {one.key}") for one in good]
    write(Path("good.jsonl"), good)
    write(Path("mixed.jsonl"), [*good, *real])
    write(Path("one.jsonl"), good[:1])
    many = [replace(one, cluster="jetson-5 link_mbps=10", key=f"slow {one.key}") for one in good]
    write(Path("many.jsonl"), [*good, *many])
    write(
        Path("warm.jsonl"),
        [*good, *(replace(one, temperature=1.0, key=f"w {one.key}") for one in good)],
    )
    about = json.dumps({"format": FORMAT})
    Path("trace.json").write_text(
        f'{{"displayTimeUnit":"ms","otherData":{about},"traceEvents":[]}}'
    )
    write(Path("ar.jsonl"), [one for one in good if one.strategy == "ar"])
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["flowspec", "plot", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for name in names:
        assert name in error, error
    assert not list(tmp_path.glob("*.png"))
