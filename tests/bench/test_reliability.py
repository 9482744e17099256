"""`flowspec reliability` compares forecasts with what came true."""

import json
import sys
from math import log
from pathlib import Path

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from typer.testing import CliRunner

from flowspec.bench.reliability import before_and_after, reliability, settled
from flowspec.cli.main import app, main
from flowspec.cli.reliability import _figure
from flowspec.head.calibration import PathForecast, SettledForecast
from tests.support.checkpoints import save_checkpoint


def test_figures_of_forecasts_counted_by_hand():
    """There are two bins: 0.2 was forecast twice and true once, 0.9 twice and always true."""
    forecasts = [(log(0.2), True), (log(0.2), False), (log(0.9), True), (log(0.9), True)]
    found = reliability(forecasts)
    assert [(b.predicted, b.happened, b.count) for b in found.bins] == [
        (pytest.approx(0.2), 0.5, 2),
        (pytest.approx(0.9), 1.0, 2),
    ]
    assert found.error == pytest.approx((2 * 0.3 + 2 * 0.1) / 4)
    assert found.brier == pytest.approx((0.64 + 0.04 + 0.01 + 0.01) / 4)
    assert found.count == 4


def test_nothing_forecast_has_no_error():
    """There is no division by zero."""
    found = reliability([])
    assert (found.count, found.error, found.brier) == (0, 0.0, 0.0)


def test_paths_come_true_as_a_whole_or_not_at_all():
    """A path that differs from the text before its end is decided; one that is longer is not."""
    text = [9, 9, 1, 2, 3]
    paths = [
        PathForecast(1, (1, 2), -0.1, -0.2),
        PathForecast(1, (1, 5), -0.3, -0.4),
        PathForecast(2, (2, 3, 4), -0.5, -0.6),  # may yet come true
        PathForecast(2, (2, 7, 4, 4), -0.7, -0.8),
        PathForecast(4, (1,), -0.9, -1.0),
    ]
    outcomes = settled(paths, text)
    assert [(o.raw, o.calibrated, o.happened) for o in outcomes] == [
        (-0.1, -0.2, True),
        (-0.3, -0.4, False),
        (-0.7, -0.8, False),
    ]


def test_before_is_the_drafters_word_and_after_the_calibrated_one():
    """The two are not mixed up."""
    before, after = before_and_after([SettledForecast("x", log(0.9), log(0.1), False)])
    assert before.error == pytest.approx(0.9)
    assert after.error == pytest.approx(0.1)


# The command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `target/`, `eagle/` and a prompt."""
    folder = save_checkpoint(tmp_path_factory.mktemp("reliability") / "tiny", num_layers=2)
    (folder / "prompts.jsonl").write_text(json.dumps({"prompt": "a fox in a box, a fox in a"}))
    return folder


@pytest.fixture
def command(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the command for the tiny checkpoint in its own folder (it writes to ./out)."""
    monkeypatch.chdir(tmp_path)
    words = ["reliability", str(tiny / "target"), "--draft", str(tiny / "eagle")]
    words += ["--prompts", str(tiny / "prompts.jsonl"), "--max-tokens", "6"]
    return [*words, "--stages", "2"]


@pytest.mark.parametrize("flags", [[], ["--merge", "--temperature", "1"]])
def test_the_figures_are_printed_and_written(command, flags):
    """They cover children and paths, before and after, with the bins of a plot."""
    result = CliRunner().invoke(app, [*command, *flags, "--out", "figures.json"])
    assert result.exit_code == 0, result.output
    figures = json.loads(Path("figures.json").read_text())
    assert len(figures) == 2
    for kinds in figures.values():
        assert set(kinds) == {"before", "after"}
        assert kinds["before"]["count"] == kinds["after"]["count"] > 0
        for found in kinds.values():
            assert found["count"] == sum(b["count"] for b in found["bins"])
            assert 0.0 <= found["expected_calibration_error"] <= 1.0
            assert 0.0 <= found["brier_score"] <= 1.0
    assert "Brier" in result.output


def test_the_text_alone_needs_no_draft_folder(tiny, command):
    """The ngram drafter works with any model."""
    words = [word for word in command if word not in ("--draft", str(tiny / "eagle"))]
    result = CliRunner().invoke(app, [*words, "--drafter", "ngram", "--max-tokens", "40"])
    assert result.exit_code == 0, result.output


def test_a_plot_is_drawn(command):
    """An SVG holds its labels as shapes, so the test only checks for a picture of some size."""
    result = CliRunner().invoke(app, [*command, "--out", "plot.svg"])
    assert result.exit_code == 0, result.output
    assert "<svg" in Path("plot.svg").read_text()


def test_the_legend_of_a_plot_covers_no_line():
    """It is above the axes, each entry in its own column of the figure."""
    forecasts = [(log(0.05 + 0.1 * k), k % 3 > 0) for k in range(10) for _ in range(5)]
    found = {"before": reliability(forecasts), "after": reliability(forecasts)}
    figure = _figure({"child": found, "path": found}, "eagle")
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert not legend.overlaps(axes.get_window_extent())
        assert not legend.overlaps(axes.title.get_window_extent())
        assert legend.y1 < figure.bbox.y1


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--out", "plot.bmp"], ["plot.bmp", ".png"]),
        (["--out", "nowhere/plot.svg"], ["nowhere", "folder", "--out"]),
        (["--strategy", "ar"], ["ar", "merge is no parameter of strategy ar"]),
        (["--strategy", "warp"], ["warp", "streaming"]),
        (["--drafter", "oracle"], ["oracle", "ngram"]),
        (["--max-tokens", "1"], ["--max-tokens"]),
        (["--limit", "0"], ["--limit"]),
    ],
)
def test_wrong_flags_end_with_exit_code_2_and_one_line(command, monkeypatch, capsys, flags, names):
    """The line names the mistake; a user's mistake gives no traceback."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["flowspec", *command, *flags])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for name in names:
        assert name in error, error
