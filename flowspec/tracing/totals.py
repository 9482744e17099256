"""Totals of a run: segments, rows by their fate, verdicts, and its critical path.

"Rows run" counts a tree row once per stage that computed it. Times are in seconds.
"""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flowspec.protocol.messages import HEAD
from flowspec.request import rank_name
from flowspec.tracing.idle_time import Span
from flowspec.tracing.timeline import Hop, MessageEvent, Process, Timeline, sent_segments

LINKS = "links"


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verdict at the head. `hit`: its token was already sent; None: the verdict of a prompt."""

    request: int
    note: MessageEvent
    hit: bool | None

    @property
    def name(self) -> str:
        """Return its name in the trace."""
        return {None: "first token", True: "verdict: hit", False: "verdict: miss"}[self.hit]


@dataclass(slots=True)
class TraceTotals:
    """Counts over the whole run; rows are those of trees."""

    num_segments: int = 0
    num_prompt_segments: int = 0
    rows_sent: int = 0
    rows_run: int = 0  # once per stage
    rows_pruned: int = 0  # dropped before a stage ran them
    rows_wasted: int = 0  # run, but never accepted
    num_verdicts: int = 0
    num_hits: int = 0
    num_tokens: int = 0


def verdicts(timeline: Timeline) -> list[Verdict]:
    """Return the verdicts that told the head something new, in order."""
    sent_at: dict[tuple[int, int, int], float] = {}
    for note in timeline.head.sent:
        for segment in sent_segments(note):
            for parent, token in zip(segment.parents, segment.tokens, strict=True):
                sent_at.setdefault((segment.request, parent, token), note.when)
    newest: dict[int, int] = {}
    found = []
    for note in timeline.head.received:
        if note.kind != "Reroot":
            continue
        request, position = note.key[1], note.details["position"]
        if position <= newest.get(request, -1):
            continue
        child = (request, note.details["parent"], note.details["token"])
        hit = sent_at.get(child, float("inf")) < note.when if request in newest else None
        newest[request] = position
        found.append(Verdict(request, note, hit))
    return found


def count(timeline: Timeline) -> TraceTotals:
    """Return the run's totals."""
    totals = TraceTotals()
    parents: dict[tuple[int, int], int] = {}
    tree: set[tuple[int, int]] = set()  # ids of segments that are not prompts
    for note in timeline.head.sent:
        totals.num_tokens += note.details.get("tokens", 0)
        for segment in sent_segments(note):
            if segment.prefix:
                totals.num_prompt_segments += 1
                continue
            tree.add(segment.id)
            totals.num_segments += 1
            totals.rows_sent += len(segment.nodes)
            for child, parent in zip(segment.nodes, segment.parents, strict=True):
                parents[segment.request, child] = parent
    accepted: set[tuple[int, int]] = set()
    for verdict in verdicts(timeline):
        totals.num_verdicts += verdict.hit is not None
        totals.num_hits += bool(verdict.hit)
        node = (verdict.request, verdict.note.details["parent"])
        while node in parents and node not in accepted:
            accepted.add(node)
            node = (verdict.request, parents[node])
    for process in timeline.processes.values():
        if process.rank != HEAD:
            _count_rows(process, tree, accepted, totals)
    return totals


def _count_rows(
    process: Process,
    tree: set[tuple[int, int]],
    accepted: set[tuple[int, int]],
    totals: TraceTotals,
) -> None:
    came = sum(
        rows
        for note in process.received
        for request, seq_no, rows in note.details.get("segments", ())
        if (request, seq_no) in tree
    )
    ran = [
        (segment.request, node)
        for work in process.works
        for segment in work.segments
        if segment.id in tree
        for node in segment.nodes
    ]
    totals.rows_run += len(ran)
    totals.rows_pruned += came - len(ran)
    totals.rows_wasted += sum(row not in accepted for row in ran)


def critical_path(
    timeline: Timeline, tracks: Mapping[int, Sequence[Span]]
) -> dict[tuple[str, str], float]:
    """Return seconds by (process or links, kind) along the chain of causes that ends with the run.

    The chain is followed backwards from the last token: a process at work leads to the end of its
    last wait, a wait to the message that ended it, a message to its sender.
    """
    arrivals: dict[int, list[Hop]] = defaultdict(list)
    for hop in sorted(timeline.hops, key=lambda hop: hop.received.when):
        arrivals[hop.to].append(hop)
    shares: dict[tuple[str, str], float] = defaultdict(float)
    rank, now = HEAD, timeline.open[-1][1] if timeline.open else timeline.end
    while now > timeline.start:
        process = timeline.processes[rank]
        index = bisect_right(process.waits, now, key=lambda wait: wait[1])
        wait = process.waits[index - 1] if index else (timeline.start, timeline.start)
        busy_since = max(wait[1], timeline.start)
        for span in _between(tracks[rank], busy_since, now):
            shares[rank_name(rank), span.name] += min(span.end, now) - max(span.start, busy_since)
        until, now = now, busy_since
        cause = _cause(process, arrivals[rank], now, until)
        if cause is None or cause.sent.when >= now:
            start = min(max(wait[0], timeline.start), now)
            shares[rank_name(rank), "idle"] += now - start
            now = start
            continue
        shares[LINKS, "waiting for link"] += now - max(cause.sent.when, timeline.start)
        rank, now = cause.source, cause.sent.when
    return {key: seconds for key, seconds in shares.items() if seconds > 0}


def _between(spans: Sequence[Span], start: float, end: float) -> Sequence[Span]:
    """Return the spans that overlap [start, end)."""
    first = bisect_right(spans, start, key=lambda span: span.end)
    return spans[first : bisect_left(spans, end, key=lambda span: span.start)]


def _cause(process: Process, arrivals: Sequence[Hop], start: float, until: float) -> Hop | None:
    """Return the message that made the process act, among those that ended its wait at `start`."""
    later = bisect_left(process.works, start, key=lambda work: work.start)
    sent = bisect_left(process.sent, start, key=lambda note: note.when)
    acts = [until, *(work.start for work in process.works[later : later + 1])]
    acts += [note.when for note in process.sent[sent : sent + 1]]
    first = bisect_left(arrivals, start, key=lambda hop: hop.received.when)
    last = bisect_right(arrivals, min(acts), key=lambda hop: hop.received.when)
    weighty = (
        ("Reroot", "HiddenStates")
        if process.rank == HEAD
        else ("Segment", "AddRequest", "FinishRequest")
    )
    return max(
        arrivals[first:last],
        key=lambda hop: (hop.sent.kind in weighty, hop.sent.when),
        default=None,
    )
