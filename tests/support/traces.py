"""Recording of simulated clusters, and checks for every Chrome trace."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from flowspec.engine.simulated import SimulatedEngine
from flowspec.runtime.recorder import Record, Recorder
from flowspec.tracing.idle_time import track
from flowspec.tracing.timeline import Timeline, make_timeline
from flowspec.tracing.trace_summary import read_trace

# The phases used, and the fields that the Trace Event Format requires beside ph, pid, tid, name.
REQUIRED = {
    "X": {"ts", "dur", "cat"},
    "M": {"args"},
    "i": {"ts", "s"},
    "b": {"ts", "id", "cat"},
    "e": {"ts", "id", "cat"},
    "s": {"ts", "id", "cat"},
    "f": {"ts", "id", "cat", "bp"},
}


def record(cluster: SimulatedEngine) -> dict[int, Recorder]:
    """Record everything from now on."""
    recorders = {rank: Recorder(rank, clock="virtual") for rank in cluster.simulator.traces}
    cluster.simulator.traces.update(recorders)
    return recorders


def timeline_of(recorders: Mapping[int, Recorder]) -> Timeline:
    """Return the timeline of the records."""
    for recorder in recorders.values():
        recorder.close()
    return make_timeline(recorder.records for recorder in recorders.values())


def times(timeline: Timeline, rank: int) -> dict[str, float]:
    """Return seconds by kind of work or cause of idleness."""
    sums: Counter[str] = Counter()
    for span in track(timeline, rank):
        sums[span.name] += span.end - span.start  # type: ignore[assignment]
    return {name: round(seconds, 9) for name, seconds in sums.items()}


def shifted(records: Iterable[Record], *, offset: float, drift: float) -> list[Record]:
    """Return a process's records as a clock that is ahead and too fast would show them."""
    moved = []
    for record in records:
        times = {"work": (1, 2), "wait": (1, 2), "send": (1,), "receive": (1,)}.get(record[0], ())
        values = list(record)
        for index in times:
            values[index] = values[index] * (1 + drift) + offset
        moved.append(values)
    return moved


def check_trace(path: Path) -> dict[str, Any]:
    """Check a Chrome trace: its times are possible, its spans fit; return its content."""
    data = read_trace(path)
    events = data["traceEvents"]
    assert set(data) == {"displayTimeUnit", "otherData", "traceEvents"}
    assert data["displayTimeUnit"] in ("ms", "ns")
    for event in events:
        assert {"ph", "pid", "tid", "name"} | REQUIRED[event["ph"]] <= set(event), event
        assert event.get("ts", 0.0) >= 0.0, event
        assert event.get("dur", 0.0) >= 0.0, event
    named = {e["pid"] for e in events if e["ph"] == "M" and e["name"] == "process_name"}
    assert named == {event["pid"] for event in events}
    wall_us = data["otherData"]["wall_s"] * 1e6
    for pid in named:
        check_tiles([e for e in events if (e["ph"], e["pid"], e["tid"]) == ("X", pid, 0)], wall_us)
        check_apart([e for e in events if (e["ph"], e["pid"], e["tid"]) == ("X", pid, 1)])
    check_pairs(events)
    return data


def check_tiles(spans: Sequence[Mapping[str, Any]], wall_us: float) -> None:
    """Check that busy and idle times add up to the run, without gap or overlap."""
    now = 0.0
    for span in spans:
        assert span["ts"] == now, span
        now = span["ts"] + span["dur"]
    assert now == pytest.approx(wall_us, abs=0.13)


def check_apart(spans: Sequence[Mapping[str, Any]]) -> None:
    """Check that the marks of messages do not overlap."""
    for before, after in zip(spans, spans[1:], strict=False):
        assert after["ts"] >= before["ts"] + before["dur"], (before, after)


def check_pairs(events: Sequence[Mapping[str, Any]]) -> None:
    """Check that begins have ends, arrows have two ends inside marks, and hops take time."""
    sides: dict[tuple[Any, ...], list[tuple[str, float]]] = defaultdict(list)
    marks = {(e["pid"], e["ts"]) for e in events if e["ph"] == "X" and e["tid"] == 1}
    for event in events:
        if event["ph"] in "besf":
            flow = event["ph"] in "sf"
            sides[flow, event["cat"], event["id"], event["name"]].append((event["ph"], event["ts"]))
            assert not flow or (event["pid"], event["ts"]) in marks, "an arrow begins nowhere"
    for (flow, *_), found in sides.items():
        assert sorted(ph for ph, _ in found) == (["f", "s"] if flow else ["b", "e"]), found
        by_phase = dict(found)
        if not flow:
            assert by_phase["e"] >= by_phase["b"], found


def hop_times_ms(data: Mapping[str, Any]) -> list[float]:
    """Return the times of all hops in a trace."""
    events = data["traceEvents"]
    return [e["args"]["ms"] for e in events if e["ph"] == "b" and e["cat"] == "link"]
