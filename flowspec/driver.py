"""Driver: runs one core over a transport and the wall clock. The other driver is the simulator."""

import time
from collections import deque
from collections.abc import Iterable
from typing import Protocol

from flowspec.effects import CLIENT, EVERY_STAGE, Core, Send, Work
from flowspec.trace import OFF, Trace
from flowspec.transport.base import Transport
from flowspec.wire import Message, Status, Stop


class Pace(Protocol):
    """How long things take on an emulated device, in seconds; whatever is faster waits."""

    def work(self, rank: int, work: Work) -> float:
        """A computation."""

    def host(self, rank: int, message: Message) -> float:
        """A message taken in, or a slot sent."""


class Driver:
    """One core on its device, or with a `pace` on one that it emulates. Times in seconds."""

    def __init__(
        self,
        core: Core,
        transport: Transport,
        num_stages: int,
        trace: Trace = OFF,
        *,
        pace: Pace | None = None,
    ) -> None:
        self.core = core
        self.pace = pace
        self.trace = trace
        self.transport = transport
        self.to_client: deque[Message] = deque()
        self.stopped = False
        self.last_progress = time.monotonic()  # of anything but statuses; work here counts
        # Modelled end of what this device did last; None once it has waited for messages. What the
        # real one takes beyond the model is made up for as long as there is something to do.
        self._paced_until: float | None = None
        self._stages = [rank for rank in range(1, num_stages + 1) if rank != core.rank]

    def inject(self, message: Message) -> None:
        """A message from this process itself (the head's client)."""
        now = time.monotonic()
        self.trace.received(now, message)
        self._send(self.core.handle(message, now))

    def turn(self, timeout_s: float) -> None:
        """Serve what has come, then do one thing; wait for messages only when there is nothing."""
        self._serve(0.0)
        start = time.monotonic()
        step = self.core.poll(start)
        if step is None:
            self.trace.rest()
            self._serve(timeout_s)
            return
        if self.pace is not None and step.work is None and step.sends:
            self._keep_pace(start, self.pace.host(self.core.rank, step.sends[0].message))
        self._send(step.sends)
        if step.work is not None:
            began = start = time.monotonic()
            step.work.run()
            if self.pace is not None:
                began = self._keep_pace(start, self.pace.work(self.core.rank, step.work))
            now = self.last_progress = time.monotonic()
            self.trace.worked(start, now, step.work)
            self._send(step.work.finish(now, now - began))

    def _serve(self, timeout_s: float) -> None:
        start = time.monotonic()
        messages = self.transport.receive(timeout_s)
        if timeout_s:
            self._paced_until = None
            self.trace.waited(start, time.monotonic())
        for message in messages:
            now = time.monotonic()
            self.trace.received(now, message)
            if not isinstance(message, Status):
                self.last_progress = now
            if isinstance(message, Stop):
                self.stopped = True
            sends = self.core.handle(message, now)
            if self.pace is not None:
                self._keep_pace(now, self.pace.host(self.core.rank, message))
            self._send(sends)

    def _keep_pace(self, start: float, seconds: float) -> float:
        """Wait until what began at `start` has taken `seconds`; returns when the model began it."""
        if self._paced_until is not None:
            start = self._paced_until
        self._paced_until = start + seconds
        if (left := self._paced_until - time.monotonic()) > 0:
            time.sleep(left)
        return start

    def _send(self, sends: Iterable[Send]) -> None:
        for send in sends:
            if send.to == CLIENT:
                self.trace.sent(time.monotonic(), CLIENT, send.message)
                self.to_client.append(send.message)
                continue
            for rank in self._stages if send.to == EVERY_STAGE else (send.to,):
                now = time.monotonic()
                self.transport.send(rank, send.message)  # type: ignore[arg-type]
                self.trace.sent(now, rank, send.message)
