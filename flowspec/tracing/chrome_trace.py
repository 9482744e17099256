"""Writes a Timeline as a Chrome trace (Trace Event Format, JSON object form), for Perfetto.

Each process has three tracks: its work, its messages, joined by arrows, and verdicts. Segments and
hops are asynchronous spans. The file is written event by event. Times are in microseconds since the
first request came.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowspec import __version__
from flowspec.protocol.messages import CLIENT, HEAD
from flowspec.system.files import replacing, temporary_folder
from flowspec.tracing.idle_time import Span, track
from flowspec.tracing.timeline import (
    HOUSEKEEPING,
    Hop,
    MessageEvent,
    Process,
    Timeline,
    make_timeline,
    process_name,
    read_records,
    segment_ids,
    sent_segments,
)
from flowspec.tracing.totals import count, critical_path, verdicts


def check_trace_path(out: str) -> Path:
    """Return the path of the trace. Raises ValueError when it cannot be written."""
    target = Path(out)
    if target.is_dir():
        raise ValueError(f"--trace {out} cannot be written: it is a folder; name a file")
    if not target.parent.is_dir():
        raise ValueError(f"--trace {out} cannot be written: {target.parent} is not a folder")
    return target


@contextlib.contextmanager
def tracing(out: str) -> Iterator[Path | None]:
    """Yield the folder to record into (None without `out`); the trace is written at the end.

    A run that fails still leaves its trace up to that point. Raises ValueError when `out` cannot be
    written or nothing was recorded.
    """
    if not out:
        yield None
        return
    target = check_trace_path(out)
    with temporary_folder("flowspec-trace-") as folder:
        try:
            yield folder
        except BaseException:
            with contextlib.suppress(ValueError, OSError):  # the run's failure matters more
                save_trace(folder, target)
            raise
        save_trace(folder, target)


def save_trace(folder: Path, out: Path) -> None:
    """Write the trace of the records in `folder`. Raises ValueError when they hold no request."""
    files = sorted(folder.glob("rank-*.jsonl"))
    write_trace(make_timeline(read_records(file) for file in files), out)


FORMAT = "flowspec-trace-1"
# tracks of a process; Perfetto needs a separate track for instants
COMPUTE, MESSAGES, VERDICTS = 0, 1, 2
_MARK_US = 1.0  # width of a drawn message

Event = dict[str, Any]


def write_trace(timeline: Timeline, path: Path) -> None:
    """Write the trace of a run; an error leaves no incomplete file behind."""
    tracks = {rank: track(timeline, rank) for rank in sorted(timeline.processes)}
    with replacing(path) as half, half.open("w") as out:
        about = json.dumps(_about(timeline, tracks))
        out.write(f'{{"displayTimeUnit":"ms","otherData":{about},"traceEvents":[\n')
        for number, event in enumerate(_events(timeline, tracks)):
            out.write(",\n" if number else "")
            out.write(json.dumps(event, separators=(",", ":")))
        out.write("\n]}\n")


def _about(timeline: Timeline, tracks: Mapping[int, Sequence[Span]]) -> dict[str, Any]:
    """Return the totals, the clocks and the critical path."""
    processes = [
        {
            "rank": process.rank,
            "name": process_name(process),
            "clock": process.clock_kind,
            "clock_error_s": process.clock.error if process.clock else None,
            "clock_offset_s": process.clock.first[1] if process.clock else None,
            "clock_drift": process.clock.drift if process.clock else None,
            "records_dropped": process.num_dropped,
        }
        for _, process in sorted(timeline.processes.items())
    ]
    path = [
        {"where": where, "what": what, "seconds": seconds}
        for (where, what), seconds in critical_path(timeline, tracks).items()
    ]
    return {
        "format": FORMAT,
        "version": __version__,
        "wall_s": timeline.wall_s,
        "processes": processes,
        "totals": asdict(count(timeline)),
        "critical_path": path,
    }


def _events(timeline: Timeline, tracks: Mapping[int, Sequence[Span]]) -> Iterator[Event]:
    for rank, process in sorted(timeline.processes.items()):
        yield from _names(process)
        for span in tracks[rank]:
            event = _span_event(timeline, rank, span)
            if event["dur"] or span.work is not None:
                yield event
    hops = [hop for hop in timeline.hops if hop.sent.kind not in HOUSEKEEPING]
    yield from _message_events(timeline, hops)
    for number, hop in enumerate(hops):
        yield from _hop_events(timeline, hop, number)
    yield from _segment_events(timeline)
    yield from _verdict_events(timeline)


def _us(timeline: Timeline, when: float) -> float:
    """Round to eighths: exact in binary, so a reader's rounding makes no neighbours overlap."""
    return round((when - timeline.start) * 8e6) / 8


def _names(process: Process) -> Iterator[Event]:
    common = {"ph": "M", "pid": process.rank, "tid": COMPUTE}
    yield {**common, "name": "process_name", "args": {"name": process_name(process)}}
    yield {**common, "name": "process_sort_index", "args": {"sort_index": process.rank}}
    for tid, name in ((COMPUTE, "work and idle"), (MESSAGES, "messages"), (VERDICTS, "verdicts")):
        yield {**common, "tid": tid, "name": "thread_name", "args": {"name": name}}


def _span_event(timeline: Timeline, rank: int, span: Span) -> Event:
    start, end = _us(timeline, span.start), _us(timeline, span.end)
    event = {
        "ph": "X",
        "pid": rank,
        "tid": COMPUTE,
        "cat": span.category,
        "name": span.name,
        "ts": start,
        "dur": end - start,
    }
    work = span.work
    if work is None:
        return event
    args: dict[str, Any] = {"rows": work.rows, "context": work.context}
    if work.requests:
        args |= {"requests": work.requests, "nodes": work.nodes}
    if work.segments:
        args["segments"] = [
            {"request": s.request, "seq_no": s.seq_no, "nodes": s.nodes} for s in work.segments
        ]
    return {**event, "args": args}


def _message_events(timeline: Timeline, hops: Sequence[Hop]) -> Iterator[Event]:
    """Yield a mark at each end of a hop, side by side if several coincide, and the arrow."""
    ends: dict[int, list[tuple[float, int, int]]] = {}
    for number, hop in enumerate(hops):
        ends.setdefault(hop.source, []).append((_us(timeline, hop.sent.when), 0, number))
        ends.setdefault(hop.to, []).append((_us(timeline, hop.received.when), 1, number))
    for rank, marks in sorted(ends.items()):
        free = 0.0
        for when, side, number in sorted(marks):
            hop = hops[number]
            ts = max(when, free)
            free = ts + _MARK_US
            place = {"pid": rank, "tid": MESSAGES, "ts": ts}
            name = f"{'received' if side else 'sent'} {hop.sent.kind}"
            args = {"peer": hop.source if side else hop.to, "at_us": when} | _plain(hop.sent)
            yield {"ph": "X", "cat": "message", "name": name, "dur": _MARK_US, "args": args} | place
            arrow = {"cat": "hop", "name": hop.sent.kind, "id": number} | place
            yield arrow | ({"ph": "f", "bp": "e"} if side else {"ph": "s"})


def _plain(note: MessageEvent) -> dict[str, Any]:
    """Return a message's details as plain data."""
    known = {name: value for name, value in note.details.items() if name != "segments"}
    if note.details.get("segments"):
        known["segments"] = [f"{request}.{seq_no}" for request, seq_no in segment_ids(note)]
    return known


def _hop_events(timeline: Timeline, hop: Hop, number: int) -> Iterator[Event]:
    """Yield an asynchronous span on the receiver; clock errors may put its end before its start."""
    start = _us(timeline, hop.sent.when)
    end = max(start, _us(timeline, hop.received.when))
    common = {"cat": "link", "id": f"hop{number}", "pid": hop.to, "tid": MESSAGES}
    common["name"] = f"{hop.sent.kind} from {hop.source}"
    args = {
        "source": hop.source,
        "to": hop.to,
        "ms": round(hop.elapsed_s * 1e3, 6),
        "bytes": hop.sent.size,
        "queued": hop.queued,
    }
    yield {"ph": "b", "ts": start, "args": args | _plain(hop.sent)} | common
    yield {"ph": "e", "ts": end} | common


def _segment_events(timeline: Timeline) -> Iterator[Event]:
    """Yield a segment's life, from the head and back; without return it lasts to the end."""
    exits = {(n.key[1], n.key[2]): n for n in timeline.head.received if n.kind == "Exit"}
    for note in timeline.head.sent:
        together = sent_segments(note)
        for segment in together:
            exit_note = exits.get(together[0].id)  # the first one stands for its batch
            name = f"{'prompt' if segment.prefix else 'segment'} {segment.seq_no}"
            common = {"cat": "segment", "pid": HEAD, "tid": COMPUTE, "name": name}
            common["id"] = f"{segment.request}.{segment.seq_no}"
            args: dict[str, Any] = {"request": segment.request, "seq_no": segment.seq_no}
            args |= {"rows": len(segment.nodes), "nodes": segment.nodes}
            if len(together) > 1:
                args["beside"] = [other.request for other in together if other is not segment]
            args |= {"trip_rows_alive_at_exit": exit_note.details["rows"] if exit_note else None}
            end = exit_note.when if exit_note else timeline.end
            yield {"ph": "b", "ts": _us(timeline, note.when), "args": args} | common
            yield {"ph": "e", "ts": _us(timeline, max(end, note.when))} | common


def _verdict_events(timeline: Timeline) -> Iterator[Event]:
    """Yield verdicts where they were made and where the head received them, tokens, and ends."""
    made = {
        note.key: (process.rank, note.when)
        for process in timeline.processes.values()
        for note in process.sent
        if note.kind == "Reroot" and note.peer == HEAD
    }
    for verdict in verdicts(timeline):
        places = [(HEAD, verdict.note.when)]
        if verdict.note.key in made:
            places.append(made[verdict.note.key])
        args = {"request": verdict.request} | verdict.note.details
        for rank, when in places:
            yield _instant(timeline, rank, when, verdict.name, args)
    for note in timeline.head.sent:
        if note.peer == CLIENT:
            yield _instant(timeline, HEAD, note.when, note.kind.lower(), note.details)


def _instant(
    timeline: Timeline, rank: int, when: float, name: str, args: Mapping[str, Any]
) -> Event:
    event: Event = {"ph": "i", "s": "t", "pid": rank, "tid": VERDICTS, "cat": "verdict"}
    return event | {"name": name, "ts": _us(timeline, when), "args": dict(args)}
