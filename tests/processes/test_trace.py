"""Traces of real processes use one clock, lose nothing and change nothing."""

import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from flowspec.cli.main import main
from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts
from flowspec.engine.engine import StageStatus
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.request import Request
from flowspec.runtime.recorder import trace_path
from flowspec.tracing.chrome_trace import save_trace, tracing
from flowspec.tracing.timeline import make_timeline, read_records
from flowspec.tracing.totals import count
from flowspec.tracing.trace_summary import summarize
from flowspec.weights.load import load_whole
from tests.support.traces import check_trace, hop_times_ms, shifted

pytestmark = pytest.mark.slow


def ask(parts: HeadParts, number: int, count: int = 12) -> Request:
    """Return a request of a few tokens."""
    return Request(
        id=number, prompt=tuple(parts.tokenizer.encode("the lazy dog")), max_new_tokens=count
    )


@pytest.fixture(scope="module")
def recorded(
    config: EngineConfig, parts: HeadParts, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[int, StageStatus], list[tuple[int, ...]]]:
    """Return the records of two requests on two stages, the stages' totals, and the texts."""
    folder = tmp_path_factory.mktemp("records")
    with LocalEngine(config, parts, folder) as cluster:
        texts = []
        for number in (1, 2):
            stream = cluster.submit(ask(parts, number))
            texts.append(stream.result().tokens)
            assert set(stream.stage_stats()) == {1, 2}
        statuses = cluster.status().stages
    return folder, statuses, texts


def test_a_trace_of_real_processes_is_whole(recorded, tmp_path):
    """It is valid, every process closed its records, and the totals are those of the stages."""
    folder, statuses, _ = recorded
    save_trace(folder, tmp_path / "out.json")
    data = check_trace(tmp_path / "out.json")
    found = summarize(tmp_path / "out.json")
    assert (found.num_dropped, found.cut_off) == (0, [])
    assert found.clock_error_s is not None
    assert min(hop_times_ms(data)) >= -found.clock_error_s * 1e3
    timeline = make_timeline(read_records(trace_path(folder, rank)) for rank in range(3))
    totals = count(timeline)
    prompt_rows = sum(
        len(segment.nodes)
        for rank in (1, 2)
        for work in timeline.processes[rank].works
        for segment in work.segments
        if segment.seq_no == 0
    )
    assert totals.rows_run + prompt_rows == sum(s.num_rows_run for s in statuses.values())
    assert totals.rows_pruned == sum(s.num_rows_pruned for s in statuses.values())
    assert totals.num_tokens == 24
    for share in found.processes:
        assert share.wall_s == pytest.approx(found.wall_s, rel=1e-6)
        assert "unknown" not in share.idle_s
        assert share.idle_s["no request"] > 0


def test_clocks_of_other_machines_make_no_difference(recorded):
    """Stage clocks have other starts and drift; every hop lies within the stated error."""
    folder, _, _ = recorded
    records = [list(read_records(trace_path(folder, rank))) for rank in range(3)]
    same = make_timeline(records)
    records[1] = shifted(records[1], offset=1e5, drift=3e-5)
    records[2] = shifted(records[2], offset=-40.0, drift=0.0)
    moved = make_timeline(records)
    for rank in (1, 2):
        clock = moved.processes[rank].clock
        assert clock is not None
        assert same.processes[rank].clock is not None
        for work, before in zip(
            moved.processes[rank].works, same.processes[rank].works, strict=True
        ):
            assert abs(work.start - before.start) <= clock.error + 1e-5
    assert len(moved.hops) == len(same.hops)
    assert count(moved) == count(same)


def test_tracing_changes_no_text(recorded, parts):
    """The tokens are the target's own, as without a trace."""
    _, _, texts = recorded
    alone = LocalTarget(load_whole(parts.folder), parts.max_context)
    own = alone.generate(ask(parts, 1))[0]
    assert [list(tokens) for tokens in texts] == [own, own]


def test_a_failed_run_leaves_its_trace(
    config: EngineConfig, parts: HeadParts, tmp_path: Path, all_gone: Callable[[list[int]], None]
) -> None:
    """A killed stage loses its last records alone; its failure is the request's error."""
    out = tmp_path / "out.json"
    pids: list[int] = []

    with tracing(str(out)) as folder, LocalEngine(config, parts, folder) as cluster:
        pids.extend(child.pid for child in cluster.children.values())
        stream = cluster.submit(ask(parts, 1, count=5000))
        for number, _ in enumerate(stream):
            if number == 100:
                os.kill(cluster.children[2].pid, signal.SIGKILL)
        error = stream.result().error
    assert error is not None
    assert str(error).startswith("stage 2: ")
    all_gone(pids)
    check_trace(out)
    found = summarize(out)
    assert [name.partition(" (")[0] for name in found.cut_off] == ["stage 2"]
    assert found.processes[1].busy_s["forward"] > 0


@pytest.mark.parametrize("out", ["", "nowhere/out.json", "."])
def test_where_a_trace_cannot_be_written(tmp_path, monkeypatch, out):
    """The error comes before the run; without a name, nothing is recorded."""
    monkeypatch.chdir(tmp_path)
    if not out:
        with tracing(out) as folder:
            assert folder is None
        return
    with pytest.raises(ValueError, match="cannot be written"), tracing(out):
        pytest.fail("it ran")


def test_the_command_traces_and_tells(tmp_path, monkeypatch, capsys):
    """It runs `flowspec run --trace` on the bundled model, then `flowspec trace summary`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest keeps its own
    options = ["--stages", "2", "--max-new-tokens", "16", "--no-check", "--trace", "out.json"]
    for arguments in (["run", *options], ["trace", "summary", "out.json"]):
        monkeypatch.setattr("sys.argv", ["flowspec", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
    check_trace(tmp_path / "out.json")
    out = capsys.readouterr().out
    assert "16 tokens" in out
    assert "critical resource" in out
