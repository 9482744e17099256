"""EmulatedTransport: delays the messages of another transport as an emulated network would.

A thread sends each message when it would have left its sender's line and its latency is over; the
caller continues at once. The receiver holds it while another sender's message takes its own line.
Delays of the real transport and the machine come on top.
"""

import heapq
import itertools
import threading
import time
from collections.abc import Callable, Sequence

from flowspec.protocol.messages import DATA, WireMessage
from flowspec.request import ClusterError
from flowspec.transport.base import Transport
from flowspec.transport.link_occupancy import Egress, Ingress, Passage

Link = Callable[[int, int, WireMessage], Passage]  # (from, to, message)
MAX_HELD = 1000  # messages, on each side
SEND_TIMEOUT_S = 10.0
MAX_WAIT_S = 1.0
CLOSE_TIMEOUT_S = 1.0
_Letter = tuple[int, WireMessage, float]  # to, message, latency


class EmulatedTransport:
    """Rank `rank`'s `inner` transport, slowed down to the times of `link` for each message.

    `handed_at` returns when the emulated device would send the current message. This may be
    slightly in the past, because its process was late to wake.
    """

    def __init__(self, inner: Transport, rank: int, link: Link) -> None:
        self.inner = inner
        self.rank = rank
        self.handed_at: Callable[[], float] = time.monotonic
        self.came_at = 0.0  # arrival of the last message that `receive` returned
        self._link = link
        self._changed = threading.Condition()
        self._egress: Egress[_Letter] | None = None
        self._num_held = 0  # messages accepted and not sent yet
        self._outgoing: list[tuple[float, int, int, WireMessage]] = []  # due, count, to, message
        self._ingress: Ingress | None = None
        self._incoming: list[tuple[float, int, WireMessage]] = []  # due, count, message
        self._count = itertools.count()
        self._error: ClusterError | None = None
        self._closing = False
        self._woken = threading.Event()
        self._sender = threading.Thread(target=self._run, daemon=True, name="emulated-line")
        self._sender.start()

    def send(self, to: int, message: WireMessage) -> None:
        """Send a message; the next call raises the error of a message that failed in the thread."""
        passage = self._link(self.rank, to, message)
        with self._changed:
            self._changed.wait_for(
                lambda: self._num_held < MAX_HELD or self._error, timeout=SEND_TIMEOUT_S
            )
            if self._error is not None:
                raise self._error
            if self._num_held >= MAX_HELD:
                raise ClusterError.of_rank(to, f"{MAX_HELD} messages wait for an emulated line")
            self._collect(time.monotonic())
            handed_at = self.handed_at()
            self._num_held += 1
            if passage.occupies:
                if self._egress is None:
                    self._egress = Egress(passage.rate_out)
                flow = (to, isinstance(message, DATA))
                letter = (to, message, passage.latency_s)
                self._egress.add(handed_at, flow, passage.num_bytes, letter)
            else:
                self._hold(handed_at + passage.latency_s, to, message)
            self._changed.notify()

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """Return the messages whose emulated arrival has come, control first."""
        end = time.monotonic() + timeout_s
        while True:
            left = max(0.0, end - time.monotonic())
            if self._incoming:
                left = min(left, max(0.0, self._incoming[0][0] - time.monotonic()))
            if len(self._incoming) < MAX_HELD:
                self._take_in(left)
            elif left:
                time.sleep(left)
            now = time.monotonic()
            due: list[WireMessage] = []
            while self._incoming and self._incoming[0][0] <= now:
                self.came_at, _, message = heapq.heappop(self._incoming)
                due.append(message)
            if due or now >= end or self._woken.is_set():
                self._woken.clear()
                return sorted(due, key=lambda message: isinstance(message, DATA))

    def wake(self) -> None:
        """End the current or the next wait of `receive`."""
        self._woken.set()
        self.inner.wake()

    def close(self) -> None:
        """Send what is left within a second, then close the inner transport."""
        end = time.monotonic() + CLOSE_TIMEOUT_S
        with self._changed:
            self._changed.wait_for(
                lambda: not self._num_held or self._error, timeout=end - time.monotonic()
            )
            self._closing = True
            self._changed.notify_all()
        # the thread owns the sockets until it has ended
        self._sender.join(timeout=MAX_WAIT_S + CLOSE_TIMEOUT_S)
        self.inner.close()

    def _take_in(self, timeout_s: float) -> None:
        """Take messages in, each with the time at which it has passed this rank's line."""
        for message in self.inner.receive(timeout_s):
            now = time.monotonic()
            # this rank's line is the same for all senders, whose own rate does not matter here
            passage = self._link(self.rank, self.rank, message)
            if passage.occupies:
                if self._ingress is None:
                    self._ingress = Ingress(passage.rate_in)
                start = now - passage.num_bytes / passage.rate_in
                now = self._ingress.take(start, now, passage.num_bytes)
            heapq.heappush(self._incoming, (now, next(self._count), message))

    def _run(self) -> None:
        """Send messages one at a time, none before its time, in a thread."""
        while True:
            with self._changed:
                now = time.monotonic()
                self._collect(now)
                if not self._outgoing or self._outgoing[0][0] > now:
                    if self._closing:
                        return
                    self._changed.wait(timeout=min(MAX_WAIT_S, self._next_due() - now))
                    continue
                _, _, to, message = heapq.heappop(self._outgoing)
            try:
                self.inner.send(to, message)
            except ClusterError as error:
                with self._changed:
                    self._error = error
                    self._changed.notify_all()
                return
            with self._changed:
                self._num_held -= 1
                self._changed.notify_all()

    def _next_due(self) -> float:
        due = self._outgoing[0][0] if self._outgoing else float("inf")
        return min(due, self._egress.next_end()) if self._egress is not None else due

    def _collect(self, now: float) -> None:
        """Make each message that has left the line due one latency later."""
        if self._egress is None:
            return
        for sent in self._egress.done(now):
            to, message, latency_s = sent.item
            self._hold(sent.end + latency_s, to, message)

    def _hold(self, due: float, to: int, message: WireMessage) -> None:
        heapq.heappush(self._outgoing, (due, next(self._count), to, message))
