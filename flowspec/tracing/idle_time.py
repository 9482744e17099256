"""Splits each process's time into work by kind, host overhead, and idle time with its cause.

The causes need the records of all processes: a stage's wait is explained by the journey of the
segment that it ran next, the head's by the messages that made it act again. Times are in seconds.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from flowspec.protocol.messages import HEAD
from flowspec.tracing.timeline import Computation, Hop, Process, Timeline, segment_ids

NO_REQUEST = "no request"
# causes of a stage's idle time
ON_LINK = "waiting for link"
UPSTREAM = "upstream busy"
DRAFTING = "head drafting"
NOTHING_ALIVE = "nothing alive to run"
UNKNOWN = "unknown"  # the necessary records are lost
# causes of the head's idle time
PROMPT = "prompt in the pipe"
VERDICT = "waiting for verdict"
PIPE_FULL = "pipe full"
DRAINING = "pipe draining"
HOST = "host overhead"

Interval = tuple[float, float]
Piece = tuple[float, float, str]  # start, end, cause


@dataclass(frozen=True, slots=True)
class Span:
    """A part of a process's main track; `work` is set while it computed."""

    start: float
    end: float
    category: str  # work, host or idle
    name: str  # kind of work, or cause
    work: Computation | None = None


def track(timeline: Timeline, rank: int) -> list[Span]:
    """Return the process's time from the run's start to its end, without gap or overlap."""
    process = timeline.processes[rank]
    causes = _HeadCauses(timeline) if rank == HEAD else _StageCauses(timeline, process)
    busy = sorted(
        [(work.start, work.end, work) for work in process.works]
        + [(start, end, None) for start, end in process.waits],
        key=lambda item: (item[0], item[1]),
    )
    spans: list[Span] = []
    now = timeline.start
    for start, end, work in busy:
        start, end = max(start, now), min(end, timeline.end)
        if end <= start:
            continue
        spans += _host(timeline, process, now, start)
        if work is not None:
            spans.append(Span(start, end, "work", work.kind, work))
        else:
            for open_start, open_end, is_open in _split(start, end, timeline.open):
                pieces: Iterable[Piece] = [(open_start, open_end, NO_REQUEST)]
                if is_open:
                    pieces = causes.of(open_start, open_end)
                spans += (Span(a, b, "idle", cause) for a, b, cause in pieces if b > a)
        now = end
    spans += _host(timeline, process, now, timeline.end)
    return _joined(spans)


def _joined(spans: Iterable[Span]) -> list[Span]:
    """Join neighbours of the same name: a message that changed nothing does not split idle time."""
    joined: list[Span] = []
    for span in spans:
        if joined and span.work is None and joined[-1].end == span.start:
            last = joined[-1]
            if (last.category, last.name) == (span.category, span.name):
                span = replace(last, end=span.end)
                joined.pop()
        joined.append(span)
    return joined


def _host(timeline: Timeline, process: Process, start: float, end: float) -> Iterator[Span]:
    """Yield time that is neither work nor wait: (de)serialising, deciding, the head's caller."""
    for a, b, is_open in _split(start, end, timeline.open):
        if is_open or process.rank != HEAD:
            yield Span(a, b, "host", HOST)
        else:  # without a request, the head's loop does not run
            yield Span(a, b, "idle", NO_REQUEST)


def _split(
    start: float, end: float, inside: Sequence[Interval]
) -> Iterator[tuple[float, float, bool]]:
    """Cut [start, end) at the ends of the intervals, which are disjoint and in order."""
    index = bisect_right(inside, start, key=lambda interval: interval[1])
    while start < end:
        if index == len(inside) or inside[index][0] >= end:
            yield start, end, False
            return
        if inside[index][0] > start:
            yield start, inside[index][0], False
            start = inside[index][0]
        until = min(end, inside[index][1])
        yield start, until, True
        start, index = until, index + 1


class _StageCauses:
    """Finds the causes of a stage's waits."""

    def __init__(self, timeline: Timeline, process: Process) -> None:
        self.rank = process.rank
        self.works = [work for work in process.works if work.segments]
        self.drafts = [(work.start, work.end) for work in timeline.head.works]
        self.legs: dict[tuple[int, int], dict[int, Hop]] = defaultdict(dict)
        for hop in timeline.hops:
            for identity in segment_ids(hop.received):
                self.legs[identity][hop.to] = hop

    def of(self, start: float, end: float) -> Iterator[Piece]:
        """Cut a wait by cause."""
        index = bisect_left(self.works, end, key=lambda work: work.start)
        journey: list[Piece] = []
        if index < len(self.works):
            journey = self._journey(self.works[index])
            if not journey:
                yield start, end, UNKNOWN
                return
        for piece_start, piece_end, cause in journey:
            if piece_start > start:
                until = min(piece_start, end)
                yield from self._before(start, until)
                start = until
            until = min(piece_end, end)
            if until > start:
                yield start, until, cause
                start = until
        # after the last piece, the segment is here and this stage is about to take it
        if journey and start < end:
            yield start, end, ON_LINK
        elif start < end:
            yield from self._before(start, end)

    def _before(self, start: float, end: float) -> Iterator[Piece]:
        """Explain time in which the head has not sent the next segment."""
        for a, b, drafting in _split(start, end, self.drafts):
            yield a, b, DRAFTING if drafting else NOTHING_ALIVE

    def _journey(self, work: Computation) -> list[Piece]:
        """Return where the last segment of `work` to arrive was since the head sent it."""
        came = []
        for segment in work.segments:
            hops = self.legs.get(segment.id, {})
            if any(rank not in hops for rank in range(1, self.rank + 1)):
                return []
            came.append([hops[rank] for rank in range(1, self.rank + 1)])
        hops_of_last = max(came, key=lambda hops: hops[-1].received.when)
        journey: list[Piece] = []
        now = hops_of_last[0].sent.when
        for hop in hops_of_last:
            journey.append((now, hop.sent.when, UPSTREAM))
            here = hop.to == self.rank
            # if it is queued, it came while the receiving stage was computing
            cause = UPSTREAM if hop.queued and not here else ON_LINK
            journey.append((hop.sent.when, hop.received.when, cause))
            now = hop.received.when
        return journey


class _HeadCauses:
    """Finds the causes of the head's waits."""

    def __init__(self, timeline: Timeline) -> None:
        head = timeline.head
        self.wait_ends = [end for _, end in head.waits]
        sends = [n for n in head.sent if n.kind in ("Segment", "AddRequest", "FinishRequest")]
        self.actions = sorted([*(w.start for w in head.works), *(n.when for n in sends)])
        self.received = head.received
        self.receipts = [note.when for note in head.received]
        self.sent_at = sorted(n.when for n in sends if n.kind == "Segment")
        self.exited_at = [n.when for n in head.received if n.kind == "Exit"]
        self.prefills = _prefills(timeline)

    def of(self, start: float, end: float) -> Iterator[Piece]:
        """Yield the wait with its one cause."""
        if any(begin <= start and end <= until for begin, until in self.prefills):
            yield start, end, PROMPT
            return
        action = bisect_left(self.actions, end)
        until = self.actions[action] if action < len(self.actions) else float("inf")
        last_wait = self.wait_ends[bisect_right(self.wait_ends, until) - 1]
        first = bisect_left(self.receipts, last_wait)
        kinds = {note.kind for note in self.received[first : bisect_right(self.receipts, until)]}
        yield start, end, self._awaited(kinds, end, until)

    def _awaited(self, kinds: set[str], end: float, until: float) -> str:
        if not kinds or kinds & {"Reroot", "HiddenStates", "AbortRequest"}:
            return VERDICT
        in_flight = bisect_right(self.sent_at, end) - bisect_right(self.exited_at, until)
        return PIPE_FULL if in_flight > 0 else DRAINING


def _prefills(timeline: Timeline) -> list[Interval]:
    """Return when only prompts were in the pipe: from a request's start to its first verdict.

    When requests overlap, a wait is charged to the decoding ones.
    """
    first: dict[int, float] = {}
    for note in timeline.head.received:
        if note.kind == "Reroot":
            first.setdefault(note.key[1], note.when)
    submitted = {
        note.details["request"]: note.when
        for note in timeline.head.received
        if note.kind == "Submit"
    }
    finished = {n.key[1]: n.when for n in timeline.head.sent if n.kind == "RequestOutput"}
    decoding = sorted(
        (when, finished.get(request, timeline.end)) for request, when in first.items()
    )
    intervals = []
    for request, when in submitted.items():
        until = min(first.get(request, timeline.end), finished.get(request, timeline.end))
        for a, b, busy in _split(when, until, _union(decoding)):
            if not busy:
                intervals.append((a, b))
    return intervals


def _union(intervals: Iterable[Interval]) -> list[Interval]:
    joined: list[Interval] = []
    for start, end in intervals:
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
