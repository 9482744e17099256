"""Driver: runs one core over a transport and the wall clock. The other driver is the simulator."""

import time
from collections import deque
from collections.abc import Iterable

from flowspec.effects import CLIENT, EVERY_STAGE, HEAD, Core, Send
from flowspec.lanes import Lanes
from flowspec.trace import OFF, Trace
from flowspec.transport.base import Transport
from flowspec.wire import Message, Status, Stop


class Driver:
    """One core on its device. Times in seconds."""

    def __init__(
        self, core: Core, transport: Transport, num_stages: int, trace: Trace = OFF
    ) -> None:
        self.core = core
        self.trace = trace
        self.transport = transport
        self.lanes = Lanes(core.rank)
        self.to_client: deque[Message] = deque()
        self.stopped = False
        self.last_progress = time.monotonic()  # of anything but statuses; work here counts
        self._stages = [rank for rank in range(1, num_stages + 1) if rank != core.rank]

    def inject(self, message: Message) -> None:
        """A message from this process itself (the head's client)."""
        now = time.monotonic()
        self.trace.received(now, message)
        self._send(self.core.handle(message, now))

    def turn(self, timeout_s: float) -> None:
        """Serve what has come, then do one thing; wait for messages only when there is nothing."""
        self._serve(0.0)
        step = self.core.poll(time.monotonic())
        if step is None:
            self.trace.rest()
            self._serve(timeout_s)
            return
        self._send(step.sends)
        if step.work is not None:
            start = time.monotonic()
            step.work.run()
            now = self.last_progress = time.monotonic()
            self.trace.worked(start, now, step.work)
            self._send(step.work.finish(now, now - start))

    def _serve(self, timeout_s: float) -> None:
        start = time.monotonic()
        messages = self.transport.receive(timeout_s)
        if timeout_s:
            self.trace.waited(start, time.monotonic())
        for arrived in messages:
            now = time.monotonic()
            self.trace.received(now, arrived)
            if not isinstance(arrived, Status):
                self.last_progress = now
            message = self.lanes.take(arrived)
            if isinstance(message, Stop):
                self.stopped = True
            if message is not None and message is not arrived and self.core.rank != HEAD:
                self._send([Send(HEAD, message)])  # a gap is the head's to deal with
            elif message is not None:
                self._send(self.core.handle(message, now))

    def _send(self, sends: Iterable[Send]) -> None:
        for send in sends:
            if send.to == CLIENT:
                self.trace.sent(time.monotonic(), CLIENT, send.message)
                self.to_client.append(send.message)
                continue
            for rank in self._stages if send.to == EVERY_STAGE else (send.to,):
                now = time.monotonic()
                message = self.lanes.number(rank, send.message)
                self.transport.send(rank, message)  # type: ignore[arg-type]
                self.trace.sent(now, rank, send.message)
