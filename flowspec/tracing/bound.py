"""A lower bound of a recorded run's time: the same run without drafting, host or link latency.

The bound keeps the stages' computations, the messages and, on every process, the order of both.
Drafts take no time, nor does anything that a program does between computations, and a message takes
only the time of its bytes on the slower of the two lines. Every process continues as soon as its
next step has what it waited for: these are the earliest times of a max-plus system (Baccelli et
al., Synchronization and Linearity, 1992). None is later than in the run itself, whose times fulfil
the same conditions with longer delays. Times are in seconds.
"""

from collections.abc import Callable
from math import inf

from flowspec.tracing.timeline import Computation, MessageEvent, Timeline

TransferTime = Callable[[int, int, int], float]  # of source, receiver and bytes
DRAFT = "draft"
_END, _RECEIVE, _SEND, _BEGIN = range(4)


def least_seconds(timeline: Timeline, start: float, end: float, transfer_s: TransferTime) -> float:
    """Return the least time from `start`, until which all stays as it was, to the head's last step.

    Steps after `end` do not count. `transfer_s` gives the seconds of a message's bytes on the way,
    without latency.
    """
    hops = {id(hop.received): hop for hop in timeline.hops}
    done: dict[int, float] = {}  # starts of computations and departures of messages, by id
    now = dict.fromkeys(timeline.processes, start)
    last = start
    for when, kind, rank, what in _steps(timeline):
        time = now[rank]
        if isinstance(what, Computation):
            if kind == _END:
                begun = done.get(id(what), time)  # one that takes no time ends first
                time = max(time, begun + what.end - what.start)
            done[id(what)] = time = time if when > start else when
        else:
            hop = hops.get(id(what)) if kind == _RECEIVE else None
            if hop is not None and id(hop.sent) in done:  # else it took no time at all
                on_the_way = transfer_s(hop.source, hop.to, hop.sent.size)
                time = max(time, done[id(hop.sent)] + on_the_way)
            done[id(what)] = time = time if when > start else when
        now[rank] = time
        if rank == 0 and start < when <= end:
            last = time
    return last - start


def _steps(timeline: Timeline) -> list[tuple[float, int, int, Computation | MessageEvent]]:
    """Return the steps of all processes in the order of time, without drafts.

    Steps at the same time keep the order of their process's records; a computation starts last.
    """
    steps: list[tuple[float, float, int, int, Computation | MessageEvent]] = []
    for rank, process in timeline.processes.items():
        for work in process.works:
            if work.kind != DRAFT:
                steps.append((work.start, inf, _BEGIN, rank, work))
                steps.append((work.end, work.order, _END, rank, work))
        steps += [(note.when, note.order, _RECEIVE, rank, note) for note in process.received]
        steps += [(note.when, note.order, _SEND, rank, note) for note in process.sent]
    steps.sort(key=lambda step: step[:4])
    return [(when, kind, rank, what) for when, _, kind, rank, what in steps]
