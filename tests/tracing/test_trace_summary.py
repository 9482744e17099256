"""`flowspec trace summary` gives the numbers worked out by hand, and refuses other files."""

import json
import signal
import sys
from pathlib import Path

import pytest

from flowspec.cli.main import main
from flowspec.engine.engine import generate
from flowspec.runtime.recorder import Recorder
from flowspec.tracing.chrome_trace import FORMAT, write_trace
from flowspec.tracing.timeline import make_timeline
from flowspec.tracing.trace_summary import summarize
from flowspec.transport.link_occupancy import Passage
from tests.support.clusters import make_cluster
from tests.support.tiny import request
from tests.support.traces import check_trace, record, timeline_of


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """Return a trace of `ar`: three tokens, forwards of 1 and 3 s, links of 0.5 s."""
    charges = (
        lambda rank, work: 2.0 * rank - 1.0,
        lambda source, to, message: Passage(latency_s=0.5),
    )
    cluster = make_cluster(2, "ar", charges=charges, chunked_prefill_size=64)
    recorders = record(cluster)
    generate(cluster, request(max_new_tokens=3))
    write_trace(timeline_of(recorders), tmp_path / "out.json")
    check_trace(tmp_path / "out.json")
    return tmp_path / "out.json"


def flowspec(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Run the command in this process."""
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest keeps its own
    monkeypatch.setattr(sys, "argv", ["flowspec", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, 2)


def test_the_summary_adds_up(trace):
    """It has times per process, links, the slowest stage, and the critical path."""
    found = summarize(trace)
    assert found.wall_s == pytest.approx(17.5)  # and the Close's second
    assert [share.name for share in found.processes] == ["head", "stage 1", "stage 2"]
    assert all(share.wall_s == pytest.approx(17.5) for share in found.processes)
    assert found.processes[2].busy_s == pytest.approx({"verify": 9.0})
    assert (found.slowest_stage, found.slowest_stage_ms) == ("stage 2", pytest.approx(3000.0))
    assert found.critical_resource == ("stage 2", pytest.approx(9.0))
    everything = found.links[-1]
    assert everything.num_messages == sum(link.num_messages for link in found.links[:-1])
    assert everything.num_bytes > 0
    assert found.links[0].name == "head > stage 1"
    assert found.links[0].median_ms == found.links[0].p95_ms == pytest.approx(500.0)
    assert found.totals["num_tokens"] == 3
    assert (found.clock_error_s, found.num_dropped, found.cut_off) == (0.0, 0, [])


def test_the_command_prints_tables(trace, monkeypatch, capsys):
    """It shows what a person asks first, on one screen."""
    flowspec(monkeypatch, "trace", "summary", str(trace))
    out = capsys.readouterr().out
    for words in (
        *("stage 2", "verify", "9.000", "51.4%", "waiting for verdict", "nothing alive to run"),
        *("head > stage 1", "500.000", "2 of trees, 1 of prompts", "critical resource"),
        *("stage 2, 55% of it", "stage 2, 3000.000 ms per forward", "at most 0.000 ms"),
    ):
        assert words in out, out


def test_the_command_prints_json(trace, monkeypatch, capsys):
    """Scripts can read it."""
    flowspec(monkeypatch, "trace", "summary", "--json", str(trace))
    data = json.loads(capsys.readouterr().out)
    assert data["critical_resource"] == "stage 2"
    assert data["processes"][1]["busy_s"] == {"forward": pytest.approx(3.0)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        ("half a {", "is not a trace"),
        ("[]", "is not a trace"),
        ('{"traceEvents": []}', "format None, needed"),
        (json.dumps({"traceEvents": 3, "otherData": {"format": FORMAT}}), "is not a trace"),
        (b"\xff\xfe\x00", "is not a trace"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path, monkeypatch, capsys, content, message):
    """There is one clear line, even for a trace of another program."""
    file = tmp_path / "file.json"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    flowspec(monkeypatch, "trace", "summary", str(file))
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def test_what_is_missing_is_said(tmp_path, monkeypatch, capsys):
    """Dropped records and a killed process do not look like a complete trace."""
    charges = (lambda rank, work: 1.0, lambda source, to, message: Passage(latency_s=0.5))
    cluster = make_cluster(2, "ar", charges=charges)
    recorders = record(cluster)
    cluster.simulator.traces[1] = recorders[1] = Recorder(1, clock="virtual", max_records=9)
    generate(cluster, request(max_new_tokens=6))
    for rank in (0, 1):
        recorders[rank].close()
    write_trace(make_timeline(r.records for r in recorders.values()), tmp_path / "out.json")
    check_trace(tmp_path / "out.json")
    found = summarize(tmp_path / "out.json")
    assert found.num_dropped == recorders[1].num_dropped > 0
    assert found.cut_off == ["stage 2"]
    assert "unknown" in found.processes[2].idle_s
    flowspec(monkeypatch, "trace", "summary", str(tmp_path / "out.json"))
    out = capsys.readouterr().out
    assert "records dropped" in out
    assert "cut off" in out
