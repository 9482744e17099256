"""Simulator: runs every core of a cluster in one process, on a virtual clock, reproducibly.

Each core's work is really computed and charged the time of a cost model. Each message occupies the
lines of its sender and receiver (transport/link_occupancy.py) and arrives one latency later, both
by a link model. Links keep the order of data; control messages overtake data and, where the link
model delays them unevenly, one another. A core may also be charged for every message that it takes
in, and for every slot that it sends without a computation. Times are in seconds.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from random import Random

from flowspec.protocol.messages import CLIENT, DATA, EVERY_STAGE, HEAD, Message
from flowspec.request import ClusterError
from flowspec.runtime.core import Core, Send, Work
from flowspec.runtime.recorder import OFF, Trace
from flowspec.transport.link_occupancy import Egress, Ingress, Passage

ChargeWork = Callable[[int, Work], float]  # (rank, work) -> seconds
ChargeLink = Callable[[int, int, Message], Passage]  # (from, to, message)
ChargeHost = Callable[[int, Message], float]  # (rank, message) -> seconds


def unit_work(rank: int, work: Work) -> float:
    """Return a second per forward and a tenth per draft, for tests."""
    del rank
    return 0.1 if work.kind == "draft" else 1.0


def instant_link(source: int, to: int, message: Message) -> Passage:
    """Return a passage with nearly no delay."""
    del source, to, message
    return Passage(latency_s=1e-3)


def free_host(rank: int, message: Message) -> float:
    """Return no cost for taking in and sending messages."""
    del rank, message
    return 0.0


def adversarial(seed: int) -> tuple[ChargeWork, ChargeLink]:
    """Return random costs and delays over four orders of magnitude; control may be very late."""
    random = Random(seed)

    def work(rank: int, item: Work) -> float:
        del rank, item
        return float(10.0 ** random.uniform(-3, 0))

    def link(source: int, to: int, message: Message) -> Passage:
        del source, to, message
        return Passage(latency_s=float(10.0 ** random.uniform(-4, 1)))

    return work, link


@dataclass(frozen=True, slots=True)
class _Letter:
    source: int
    to: int
    message: Message
    passage: Passage


@dataclass(slots=True)
class _Actor:
    core: Core
    inbox: deque[Message] = field(default_factory=deque)
    busy: bool = False
    ended: deque[Callable[[], None]] = field(default_factory=deque)  # ended work beside the core


class Simulator:
    """Runs cores until none has anything to do."""

    def __init__(
        self,
        cores: Mapping[int, Core],
        *,
        work_time: ChargeWork = unit_work,
        link_time: ChargeLink = instant_link,
        host_time: ChargeHost = free_host,
        max_events: int = 2_000_000,
    ) -> None:
        self.now = 0.0
        self.actors = {rank: _Actor(core) for rank, core in cores.items()}
        self.to_client: deque[Message] = deque()
        self.busy_s = dict.fromkeys(cores, 0.0)  # seconds of work; the host's share is in host_s
        self.host_s = dict.fromkeys(cores, 0.0)
        self.link_bytes: dict[tuple[int, int], float] = {}
        self.traces: dict[int, Trace] = dict.fromkeys(cores, OFF)
        self.work_log: list[tuple[float, float, int, str, int]] | None = None
        self._work_time, self._link_time, self._host_time = work_time, link_time, host_time
        self._egress: dict[int, Egress[_Letter]] = {}
        self._ingress: dict[int, Ingress] = {}
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._last_data: dict[tuple[int, int], float] = {}
        self._max_events = max_events

    def submit(self, message: Message, *, at: float | None = None) -> None:
        """A message from the client to the head, now or `at` a later time."""
        when = self.now if at is None else max(at, self.now)
        self._at(when, lambda: self.deliver(HEAD, message))

    def replace(self, core: Core) -> None:
        """Start a device anew, or add one: its earlier work and messages are gone."""
        self.actors[core.rank] = _Actor(core)
        self.busy_s.setdefault(core.rank, 0.0)
        self.traces.setdefault(core.rank, OFF)

    def step(self) -> bool:
        """Run the next event; return False when nothing is left.

        Raises ClusterError when the cluster stays busy without end.
        """
        if not self._events:
            return False
        if self._count > self._max_events:
            raise ClusterError("simulator", f"no end after {self._max_events} events")
        self.now, _, event = heapq.heappop(self._events)
        event()
        return True

    def run(self) -> None:
        """Run until nothing is left to do."""
        while self.step():
            pass

    def _at(self, when: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def deliver(self, rank: int, message: Message) -> None:
        """Give a rank a message at once, or when its work is done; a missing rank gets nothing."""
        actor = self.actors.get(rank)
        if actor is None:
            return
        actor.inbox.append(message)
        if not actor.busy:
            self._turn(rank)

    def _turn(self, rank: int) -> None:
        """Serve the inbox, then let the core decide, until it computes or has nothing to do."""
        actor = self.actors[rank]
        while not actor.busy:
            if actor.ended:
                actor.ended.popleft()()
                continue
            if actor.inbox:
                message = actor.inbox.popleft()
                self.traces[rank].received(self.now, message)
                charge = self._host_time(rank, message)
                self._spend(rank, charge, partial(self._handle, rank, message))
                continue
            step = actor.core.poll(self.now)
            if step is None:
                return
            if step.work is not None:
                self._send_all(rank, step.sends)
                self._compute(rank, step.work)
                continue
            charge = sum(self._host_time(rank, send.message) for send in step.sends[:1])
            self._spend(rank, charge, partial(tuple, step.sends))

    def _handle(self, rank: int, message: Message) -> Sequence[Send]:
        return self.actors[rank].core.handle(message, self.now)

    def _spend(self, rank: int, charge: float, sends: Callable[[], Iterable[Send]]) -> None:
        """Charge a core's host `charge` seconds, then send the messages it returns."""
        if not charge:
            self._send_all(rank, sends())
            return
        actor = self.actors[rank]
        actor.busy = True
        start = self.now
        self.host_s[rank] += charge

        def done() -> None:
            actor.busy = False
            self.traces[rank].hosted(start, self.now)
            self._send_all(rank, sends())
            self._turn(rank)

        self._at(self.now + charge, done)

    def _compute(self, rank: int, work: Work) -> None:
        actor = self.actors[rank]
        start, elapsed = self.now, self._work_time(rank, work)
        work.run()
        actor.busy = not work.beside
        self.busy_s[rank] += elapsed
        if self.work_log is not None:
            self.work_log.append((self.now, elapsed, rank, work.kind, work.rows))

        def finish() -> None:
            self.traces[rank].worked(start, start + elapsed, work)
            self._send_all(rank, work.finish(self.now, elapsed))

        def done() -> None:
            if self.actors.get(rank) is not actor:
                return  # the device was replaced meanwhile
            actor.ended.append(finish)
            if not work.beside:
                actor.busy = False
            self._turn(rank)

        self._at(self.now + elapsed, done)

    def _send_all(self, source: int, sends: Iterable[Send]) -> None:
        for send in sends:
            for to in self._receivers(source, send):
                self._send(source, to, send.message)

    def _receivers(self, source: int, send: Send) -> list[int]:
        if send.to != EVERY_STAGE:
            return [send.to]
        return [rank for rank in self.actors if rank not in (HEAD, source)]

    def _send(self, source: int, to: int, message: Message) -> None:
        self.traces[source].sent(self.now, to, message)
        if to == CLIENT:
            self.to_client.append(message)
            return
        passage = self._link_time(source, to, message)
        link = (source, to)
        self.link_bytes[link] = self.link_bytes.get(link, 0.0) + passage.num_bytes
        letter = _Letter(source, to, message, passage)
        if not passage.occupies:
            self._arrive(letter, self.now)
            return
        egress = self._egress.setdefault(source, Egress(passage.rate_out))
        self._leave(source)
        egress.add(self.now, (to, isinstance(message, DATA)), passage.num_bytes, letter)
        self._wait_for(source)

    def _wait_for(self, source: int) -> None:
        """Look at a line again when its next message will have left it."""
        when = self._egress[source].next_end()
        if when < inf:
            self._at(when, lambda: self._leave(source, again=True))

    def _leave(self, source: int, *, again: bool = False) -> None:
        """Pass on the messages that have left `source`'s line to their receivers."""
        gone = self._egress[source].done(self.now)
        for sent in gone:
            letter = sent.item
            ingress = self._ingress.setdefault(letter.to, Ingress(letter.passage.rate_in))
            passed = ingress.take(sent.start, sent.end, letter.passage.num_bytes)
            self._arrive(letter, passed)
        if gone and again:
            self._wait_for(source)

    def _arrive(self, letter: _Letter, passed: float) -> None:
        when = passed + letter.passage.latency_s
        source, to, message = letter.source, letter.to, letter.message
        if isinstance(message, DATA):
            # data that was sent earlier also arrives earlier
            when = max(when, self._last_data.get((source, to), 0.0))
            self._last_data[source, to] = when
        self._at(when, lambda: self.deliver(to, message))
