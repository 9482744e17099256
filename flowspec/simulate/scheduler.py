"""Simulator: every core of a cluster in one process, on a virtual clock, the same run every time.

Each core's work is really computed and charged the time a cost model says; each message arrives
after the time a link model says. Links keep the order of data; control messages overtake data and,
where the link model delays them unevenly, one another. Times in seconds.
"""

import heapq
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from random import Random

from flowspec.effects import CLIENT, EVERY_STAGE, HEAD, Core, Send, Work
from flowspec.request import ClusterError
from flowspec.trace import OFF, Trace
from flowspec.wire import DATA, Message

ChargeWork = Callable[[int, Work], float]  # (rank, work) -> seconds
ChargeLink = Callable[[int, int, Message], float]  # (from, to, message) -> seconds


def unit_work(rank: int, work: Work) -> float:
    """A second per forward, drafting a tenth: ticks for tests."""
    del rank
    return 0.1 if work.kind == "draft" else 1.0


def instant_link(source: int, to: int, message: Message) -> float:
    """Nearly no delay."""
    del source, to, message
    return 1e-3


def adversarial(seed: int) -> tuple[ChargeWork, ChargeLink]:
    """Random costs and delays over four orders of magnitude; control may be very late."""
    random = Random(seed)

    def work(rank: int, item: Work) -> float:
        del rank, item
        return float(10.0 ** random.uniform(-3, 0))

    def link(source: int, to: int, message: Message) -> float:
        del source, to, message
        return float(10.0 ** random.uniform(-4, 1))

    return work, link


@dataclass(slots=True)
class _Actor:
    core: Core
    inbox: deque[Message] = field(default_factory=deque)
    busy: bool = False
    polled_empty: bool = False


class Simulator:
    """Runs cores until none has anything to do."""

    def __init__(
        self,
        cores: Mapping[int, Core],
        *,
        work_time: ChargeWork = unit_work,
        link_time: ChargeLink = instant_link,
        max_events: int = 2_000_000,
    ) -> None:
        self.now = 0.0
        self.actors = {rank: _Actor(core) for rank, core in cores.items()}
        self.to_client: deque[Message] = deque()
        self.busy_s = dict.fromkeys(cores, 0.0)
        self.traces: dict[int, Trace] = dict.fromkeys(cores, OFF)
        self.work_log: list[tuple[float, float, int, str, int]] | None = None
        self._work_time, self._link_time = work_time, link_time
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._last_data: dict[tuple[int, int], float] = {}
        self._max_events = max_events

    def submit(self, message: Message) -> None:
        """A message from the client to the head, now."""
        self._at(self.now, lambda: self.deliver(HEAD, message))

    def replace(self, core: Core) -> None:
        """A device starts anew, or comes: what it computed and what had reached it is gone."""
        self.actors[core.rank] = _Actor(core)
        self.busy_s.setdefault(core.rank, 0.0)
        self.traces.setdefault(core.rank, OFF)

    def step(self) -> bool:
        """Run the next event; False when nothing is left.

        Raises ClusterError when the cluster is busy without end.
        """
        if not self._events:
            return False
        if self._count > self._max_events:
            raise ClusterError("simulator", f"no end after {self._max_events} events")
        self.now, _, event = heapq.heappop(self._events)
        event()
        return True

    def run(self) -> None:
        """Until nothing is left to do."""
        while self.step():
            pass

    def _at(self, when: float, event: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, event))

    def deliver(self, rank: int, message: Message) -> None:
        """Give a rank a message at once, or when its work is done; who is gone gets nothing."""
        actor = self.actors.get(rank)
        if actor is None:
            return
        actor.inbox.append(message)
        if not actor.busy:
            self._turn(rank)

    def _turn(self, rank: int) -> None:
        """Serve the inbox, then let the core decide, until it computes or has nothing to do."""
        actor = self.actors[rank]
        while True:
            while actor.inbox:
                message = actor.inbox.popleft()
                self.traces[rank].received(self.now, message)
                self._send_all(rank, actor.core.handle(message, self.now))
            step = actor.core.poll(self.now)
            if step is None:
                return
            self._send_all(rank, step.sends)
            if step.work is not None:
                self._compute(rank, step.work)
                return

    def _compute(self, rank: int, work: Work) -> None:
        actor = self.actors[rank]
        start, elapsed = self.now, self._work_time(rank, work)
        work.run()
        actor.busy = True
        self.busy_s[rank] += elapsed
        if self.work_log is not None:
            self.work_log.append((self.now, elapsed, rank, work.kind, work.rows))

        def done() -> None:
            if self.actors.get(rank) is not actor:
                return  # the device is gone
            actor.busy = False
            self.traces[rank].worked(start, self.now, work)
            self._send_all(rank, work.finish(self.now, elapsed))
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
        when = self.now + self._link_time(source, to, message)
        if isinstance(message, DATA):
            # what came down the pipe earlier also arrives earlier
            when = max(when, self._last_data.get((source, to), 0.0))
            self._last_data[source, to] = when
        self._at(when, lambda: self.deliver(to, message))
