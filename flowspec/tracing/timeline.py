"""Timeline: joins the records of all processes of a run, on the head's clock.

A hop is a message's way from one process to another. Times are in seconds.
"""

import json
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from flowspec.protocol.messages import CLIENT, HEAD
from flowspec.request import rank_name
from flowspec.runtime.recorder import Record
from flowspec.tracing.clocks import Clock, estimate, pair_rounds

HOUSEKEEPING = ("Ping", "Status", "Stop", "Ready")  # these belong to no request


@dataclass(frozen=True, slots=True)
class SegmentRecord:
    """A segment in one record; only the head's sends have `parents` and `tokens`."""

    request: int
    seq_no: int
    nodes: tuple[int, ...]
    parents: tuple[int, ...] = ()
    tokens: tuple[int, ...] = ()
    prefix: bool = False

    @property
    def id(self) -> tuple[int, int]:
        """Return its request and number."""
        return self.request, self.seq_no


@dataclass(frozen=True, slots=True)
class Computation:
    """One computation of a process."""

    start: float
    end: float
    kind: str
    rows: int
    context: int
    requests: tuple[int, ...] = ()
    nodes: tuple[int, ...] = ()
    segments: tuple[SegmentRecord, ...] = ()
    order: int = 0  # of its end, among its process's records


@dataclass(frozen=True, slots=True)
class MessageEvent:
    """A message at one of its ends; `peer` is the receiver's rank at the sender."""

    when: float
    kind: str
    key: tuple[Any, ...]
    peer: int = CLIENT
    size: int = 0  # bytes
    details: dict[str, Any] = field(default_factory=dict)
    order: int = 0  # among its process's records


@dataclass(frozen=True, slots=True)
class Hop:
    """A message's way.

    `queued`: the receiver was computing, so the message may have come earlier.
    """

    source: int
    to: int
    sent: MessageEvent
    received: MessageEvent
    queued: bool

    @property
    def elapsed_s(self) -> float:
        """Return the time from sending to receiving; clock errors may make it slightly negative."""
        return self.received.when - self.sent.when


@dataclass(slots=True)
class Process:
    """One process's records. `num_dropped` is None if it ended without closing them."""

    rank: int
    pid: int = 0
    clock_kind: str = "monotonic"
    # None: unknown, taken as equal to the head's
    clock: Clock | None = field(default_factory=Clock)
    num_dropped: int | None = None
    works: list[Computation] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)
    # host time that a simulator charged
    hosted: list[tuple[float, float]] = field(default_factory=list)
    sent: list[MessageEvent] = field(default_factory=list)
    received: list[MessageEvent] = field(default_factory=list)

    @property
    def is_virtual(self) -> bool:
        """Whether a simulator ran it: its time without work or charge is then waiting."""
        return self.clock_kind == "virtual"


@dataclass(slots=True)
class Timeline:
    """A run from its first request's start to the last message about any request."""

    processes: dict[int, Process]
    start: float
    end: float
    hops: list[Hop]
    open: list[tuple[float, float]]  # times with any request open; disjoint, in order

    @property
    def head(self) -> Process:
        """Return the records of rank 0."""
        return self.processes[HEAD]

    @property
    def wall_s(self) -> float:
        """Return the length of the run."""
        return self.end - self.start


def read_records(path: Path) -> Iterator[Record]:
    """Yield the records of a file, without a last line that a dying process left incomplete."""
    with path.open() as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                return


def make_timeline(records: Iterable[Iterable[Record]]) -> Timeline:
    """Join the records of all processes.

    Raises ValueError when the head's are missing or hold no request.
    """
    processes = {process.rank: process for process in map(_load, records)}
    if HEAD not in processes:
        raise ValueError("the head left no trace records, so the trace cannot be made")
    head = processes[HEAD]
    submitted = [note.when for note in head.received if note.kind == "Submit"]
    if not submitted:
        raise ValueError("no request was served while tracing: there is nothing to show")
    finished = [note.when for note in head.sent if note.kind == "RequestOutput"]
    for process in processes.values():
        if process.rank != HEAD and not process.is_virtual:
            _align(process, head, before=submitted[0], after=max(finished, default=0.0))
    start, end = submitted[0], max(_ends(processes.values()))
    for process in processes.values():
        if process.is_virtual:
            process.waits = _gaps(process, start, end)
    return Timeline(processes, start, end, _match(processes), _open_times(head, end))


def _load(records: Iterable[Record]) -> Process:
    process = Process(-1)
    for order, (kind, *values) in enumerate(records):
        if kind == "process":
            process.rank, process.pid, process.clock_kind = values
        elif kind == "work":
            process.works.append(_work(*values, order=order))
        elif kind in ("wait", "host") and values[0] < values[1]:
            spans = process.waits if kind == "wait" else process.hosted
            spans.append((values[0], values[1]))
        elif kind == "send":
            when, to, key, size, details = values
            process.sent.append(MessageEvent(when, key[0], tuple(key), to, size, details, order))
        elif kind == "receive":
            when, key, details = values
            process.received.append(
                MessageEvent(when, key[0], tuple(key), details=details, order=order)
            )
        elif kind == "end":
            process.num_dropped = values[0]
    return process


def _work(*values: Any, order: int) -> Computation:
    start, end, kind, rows, context, requests, nodes, segments = values
    ran = tuple(_segment(*segment) for segment in segments)
    return Computation(start, end, kind, rows, context, tuple(requests), tuple(nodes), ran, order)


def _segment(
    request: int,
    seq_no: int,
    nodes: Sequence[int],
    parents: Sequence[int] = (),
    tokens: Sequence[int] = (),
    prefix: bool = False,
) -> SegmentRecord:
    return SegmentRecord(request, seq_no, tuple(nodes), tuple(parents), tuple(tokens), prefix)


def sent_segments(note: MessageEvent) -> list[SegmentRecord]:
    """Return the segments in a message that the head sent."""
    return [_segment(*values) for values in note.details.get("segments", ())]


def segment_ids(note: MessageEvent) -> list[tuple[int, int]]:
    """Return (request, seq_no) of each segment in a message."""
    return [(values[0], values[1]) for values in note.details.get("segments", ())]


def _align(process: Process, head: Process, *, before: float, after: float) -> None:
    """Convert a stage's times to the head's clock."""
    rank = process.rank
    rounds = pair_rounds(
        [n.when for n in head.sent if n.kind == "Ping" and n.peer == rank],
        [n.when for n in process.received if n.kind == "Ping"],
        [n.when for n in process.sent if n.kind == "Status"],
        [n.when for n in head.received if n.key == ("Status", rank)],
    )
    process.clock = clock = estimate(rounds, before=before, after=after)
    if clock is None or clock.first == (0.0, 0.0):
        return
    to_head = clock.to_head
    process.works = [replace(w, start=to_head(w.start), end=to_head(w.end)) for w in process.works]
    process.waits = [(to_head(start), to_head(end)) for start, end in process.waits]
    process.sent = [replace(note, when=to_head(note.when)) for note in process.sent]
    process.received = [replace(note, when=to_head(note.when)) for note in process.received]


def _ends(processes: Iterable[Process]) -> Iterator[float]:
    for process in processes:
        yield from (work.end for work in process.works[-1:])
        for notes in (process.sent, process.received):
            yield from (note.when for note in notes if note.kind not in HOUSEKEEPING)


def _gaps(process: Process, start: float, end: float) -> list[tuple[float, float]]:
    """Return the time between computations, cut where messages came, as a real process waits."""
    borders = sorted({start, end, *(note.when for note in process.received)})
    waits = []
    last = start
    busy = sorted([*((work.start, work.end) for work in process.works), *process.hosted])
    for until, finish in [*busy, (end, end)]:
        inside = borders[bisect_left(borders, last) : bisect_left(borders, until)]
        points = [last, *(point for point in inside if point > last), until]
        waits += [(a, b) for a, b in zip(points, points[1:], strict=False) if b > a]
        last = finish
    return waits


def _match(processes: dict[int, Process]) -> list[Hop]:
    """Match sends with receipts by key, in order; messages that never came are left out."""
    on_the_way: dict[tuple[int, tuple[Any, ...]], deque[tuple[int, MessageEvent]]] = defaultdict(
        deque
    )
    for process in processes.values():
        for note in process.sent:
            if note.peer != CLIENT:
                on_the_way[note.peer, note.key].append((process.rank, note))
    hops = []
    for process in processes.values():
        wait_ends = [end for _, end in process.waits]
        busy_ends = sorted([*(w.end for w in process.works), *(end for _, end in process.hosted)])
        for note in process.received:
            queued = _last(busy_ends, note.when) > _last(wait_ends, note.when)
            if waiting := on_the_way[process.rank, note.key]:
                source, sent = waiting.popleft()
                hops.append(Hop(source, process.rank, sent, note, queued))
    hops.sort(key=lambda hop: hop.sent.when)
    return hops


def _last(times: Sequence[float], until: float) -> float:
    """Return the last of the sorted `times` up to `until`."""
    index = bisect_right(times, until)
    return times[index - 1] if index else float("-inf")


def _open_times(head: Process, end: float) -> list[tuple[float, float]]:
    """Return when at least one request was submitted and not finished."""
    changes = [(n.when, 1) for n in head.received if n.kind == "Submit"]
    changes += [(n.when, -1) for n in head.sent if n.kind == "RequestOutput"]
    times: list[tuple[float, float]] = []
    count, since = 0, 0.0
    for when, change in sorted(changes, key=lambda pair: (pair[0], -pair[1])):
        if count == 0 and change > 0:
            since = when
        count += change
        if count == 0:
            times.append((since, when))
    return [*times, (since, end)] if count else times


def process_name(process: Process) -> str:
    """Return the process's name in the trace."""
    name = rank_name(process.rank)
    return name if process.is_virtual else f"{name} (process {process.pid})"
