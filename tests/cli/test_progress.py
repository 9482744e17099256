"""How far a long command is, where no bar can be drawn."""

import io

import pytest
from rich.console import Console

from flowspec.bench.records import SampleFile
from flowspec.cli import bench_plan
from flowspec.cli.ui import progress
from flowspec.request import ClusterError
from tests.support.samples import sample


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time, to be set."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_log_gets_a_line_now_and_then(clock: list[float]) -> None:
    """What is ahead at once; then one in half a minute, however many steps there are."""
    out = io.StringIO()
    with progress.shown(Console(file=out), "samples", what="1 of 2 draft_topk=4") as tell:
        tell(5, 65)
        for step in range(60):
            clock[0] += 1.0
            tell(6 + step, 65, "mt_bench, streaming [x]")
    assert out.getvalue().splitlines() == [
        "1 of 2 draft_topk=4: 60 samples ahead",
        "1 of 2 draft_topk=4: 35 of 65 samples, the last: mt_bench, streaming [x]",
        "1 of 2 draft_topk=4: 65 of 65 samples, the last: mt_bench, streaming [x]",
    ]


def test_nothing_to_run_is_no_line(clock: list[float]) -> None:
    """As when a benchmark is asked for that is there."""
    out = io.StringIO()
    with progress.shown(Console(file=out), "samples") as tell:
        tell(0, 0)
    assert not out.getvalue()


def test_a_terminal_gets_a_bar_that_goes(clock: list[float]) -> None:
    """No lines are left there."""
    out = io.StringIO()
    with progress.shown(Console(file=out, force_terminal=True, width=80), "samples") as tell:
        tell(0, 4)
        tell(3, 4, "mt_bench, ar")
    assert "3/4" in out.getvalue()
    assert "mt_bench, ar" in out.getvalue()
    assert "ahead" not in out.getvalue()
    assert out.getvalue().endswith("\x1b[2K")  # the bar is wiped out


@pytest.mark.parametrize("count", [0, 2])
def test_what_is_kept_is_told_where_a_run_ends_early(tmp_path, monkeypatch, capsys, count):
    """And nothing where there is nothing."""

    def broken(plan: object, file: SampleFile, **rest: object) -> None:
        raise ClusterError("head", "connection lost")

    monkeypatch.setattr(bench_plan, "run_plan", broken)
    with SampleFile(tmp_path) as file:
        for number in range(count):
            file.add(sample(question=str(number)))
    with pytest.raises(ClusterError, match="connection lost"):
        bench_plan.run_shown(None, tmp_path, jobs=1)  # type: ignore[arg-type]
    told = f"2 samples are in {tmp_path}; the same command runs what is missing\n"
    assert capsys.readouterr().err.endswith(told) == (count == 2)
