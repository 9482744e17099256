"""Event loop: runs one core over a transport and the wall clock. The simulator is another one."""

import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch

from flowspec.protocol.messages import CLIENT, EVERY_STAGE, HEAD, Message, Status, Stop
from flowspec.protocol.sequencing import SequenceNumbers
from flowspec.runtime.core import Core, Send, Work
from flowspec.runtime.recorder import OFF, Trace
from flowspec.transport.base import Transport
from flowspec.transport.emulated import EmulatedTransport

MOST_BEHIND_S = 0.02  # a process wakes late by less; one that is too slow for its model stays late


class Pace(Protocol):
    """How long things take on an emulated device, in seconds; a faster real device waits."""

    def work(self, rank: int, work: Work) -> float:
        """Return the time of a computation."""

    def host(self, rank: int, message: Message) -> float:
        """Return the time to take a message in, or to send a slot."""


@dataclass(slots=True)
class _Beside:
    """Work that runs in its own thread."""

    work: Work
    start: float
    end: Future[float]
    due: float | None  # modelled end, on an emulated device


class EventLoop:
    """Runs one core on its device, or on an emulated device with a `pace`. Times are in seconds."""

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
        self._records = trace is not OFF
        self.transport = transport
        self.numbers = SequenceNumbers(core.rank)
        self.to_client: deque[Message] = deque()
        self.stopped = False
        self.last_progress = time.monotonic()  # statuses are no progress; work here is
        # Modelled end of this device's last action, or arrival of the message that it waited for;
        # None while it rests. Time beyond the model is made up for, up to MOST_BEHIND_S, as long as
        # there is something to do.
        self._paced_until: float | None = None
        self._thread: ThreadPoolExecutor | None = None
        self._beside: _Beside | None = None
        self._waited = False  # the last turn ended by waiting for messages
        self._stages = [rank for rank in range(1, num_stages + 1) if rank != core.rank]
        self._follow_pace()

    def go_on(self, transport: Transport, num_stages: int) -> None:
        """Continue over another network with other stages; running work and client output stay."""
        self.transport = transport
        self.numbers = SequenceNumbers(self.core.rank)
        self._stages = [rank for rank in range(1, num_stages + 1) if rank != self.core.rank]
        self._follow_pace()

    def _follow_pace(self) -> None:
        """Let emulated lines take messages when the emulated device has them ready."""
        self._line = self.transport if isinstance(self.transport, EmulatedTransport) else None
        if self._line is not None:
            self._line.handed_at = lambda: self._begin(time.monotonic())

    def inject(self, message: Message) -> None:
        """Handle a message from this process itself (the head's client)."""
        now = time.monotonic()
        self._paced_until = None  # the loop did not run since the last request
        if self._records:
            self.trace.received(now, message)
        self._send(self.core.handle(message, now))

    def turn(self, timeout_s: float) -> None:
        """Serve the messages that have come, then do one step; wait only when there is none."""
        if not self._waited:  # else the last turn has served them just now
            self._serve(0.0)
        self._waited = False
        self._take_finished()
        start = time.monotonic()
        step = self.core.poll(start)
        if step is None:
            if self._records:
                self.trace.rest()
            self._serve(timeout_s)
            self._waited = timeout_s > 0.0
            return
        if self.pace is not None and step.work is None and step.sends:
            self._keep_pace(start, self.pace.host(self.core.rank, step.sends[0].message))
        self._send(step.sends)
        work = step.work
        if work is None:
            return
        # an emulated device takes its time even when there is nothing to run
        if work.beside and not (work.done and self.pace is None):
            self._run_beside(work)
            return
        began = start = time.monotonic()
        work.run()
        if self.pace is not None:
            began = self._keep_pace(start, self.pace.work(self.core.rank, work))
        now = self.last_progress = time.monotonic()
        if self._records:
            self.trace.worked(start, now, work)
        self._send(work.finish(now, now - began))

    def _run_beside(self, work: Work) -> None:
        if self._thread is None:
            num_threads = (torch.get_num_threads(),)  # torch keeps this number per thread
            self._thread = ThreadPoolExecutor(1, "beside", torch.set_num_threads, num_threads)
        start, due = time.monotonic(), None
        if self.pace is not None:
            due = self._begin(start) + self.pace.work(self.core.rank, work)

        def run() -> float:
            work.run()
            if due is not None:
                _sleep_until(due)
            return time.monotonic()

        self._beside = _Beside(work, start, self._thread.submit(run), due)
        self._beside.end.add_done_callback(lambda _: self.transport.wake())

    def _take_finished(self) -> None:
        """Finish work that ran beside; an exception in it is raised here."""
        beside = self._beside
        if beside is None or not beside.end.done():
            return
        self._beside = None
        end = beside.end.result()
        if beside.due is not None:  # the model's end counts, however late the thread woke
            self._paced_until = max(self._paced_until or 0.0, beside.due)
        self.last_progress = max(self.last_progress, end)  # it may have ended before an outage
        if self._records:
            self.trace.worked(beside.start, end, beside.work)
        self._send(beside.work.finish(time.monotonic(), end - beside.start))

    def _serve(self, timeout_s: float) -> None:
        start = time.monotonic()
        messages = self.transport.receive(timeout_s)
        if timeout_s:
            self._paced_until = None
            if self._records and self._beside is None:
                self.trace.waited(start, time.monotonic())
        if messages and self._line is not None:  # none begins before it came
            self._paced_until = max(self._paced_until or 0.0, self._line.came_at)
        for arrived in messages:
            now = time.monotonic()
            if self._records:
                self.trace.received(now, arrived)
            if not isinstance(arrived, Status):
                self.last_progress = now
            message = self.numbers.take(arrived)
            if message is not None and message is not arrived and self.core.rank != HEAD:
                self._send([Send(HEAD, message)])  # the head handles a gap in the sequence
            elif message is not None:
                self._handle(message, now)

    def _handle(self, message: Message, now: float) -> None:
        """Give the core a message, and send what follows from it."""
        if isinstance(message, Stop):
            self.stopped = True
        sends = self.core.handle(message, now)
        if self.pace is not None:
            self._keep_pace(now, self.pace.host(self.core.rank, message))
        self._send(sends)

    def _keep_pace(self, start: float, seconds: float) -> float:
        """Wait until the work that begins now has taken `seconds`; return its modelled start."""
        start = self._begin(start)
        self._paced_until = start + seconds
        _sleep_until(self._paced_until)
        return start

    def _begin(self, now: float) -> float:
        """Return when the emulated device begins the work that its process begins now."""
        if self._paced_until is None:
            return now
        return max(self._paced_until, now - MOST_BEHIND_S)

    def _send(self, sends: Sequence[Send]) -> None:
        for send in sends:  # first those to the client: what fails at a stage must not stop them
            if send.to == CLIENT:
                if self._records:
                    self.trace.sent(time.monotonic(), CLIENT, send.message)
                self.to_client.append(send.message)
        for send in sends:
            if send.to == CLIENT:
                continue
            for rank in self._stages if send.to == EVERY_STAGE else (send.to,):
                now = time.monotonic()
                message = self.numbers.number(rank, send.message)
                self.transport.send(rank, message)  # type: ignore[arg-type]
                if self._records:
                    self.trace.sent(now, rank, send.message)


def _sleep_until(when: float) -> None:
    if (left := when - time.monotonic()) > 0:
        time.sleep(left)
