"""Line occupancy: how long messages occupy the lines between devices, without clock or socket.

The model is switched full-duplex Ethernet. The flows of a device, one for each receiver and kind of
message, share its outgoing line fairly, as TCP connections do; each flow sends in order. The
switch's line to a device is a queue: a message waits there for earlier ones. Sizes are in bytes,
rates in bytes per second, times in seconds.
"""

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, TypeVar

T = TypeVar("T")
_REST = 1e-6  # bytes; less is a rounding error


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """The demands of a message; without bytes or a finite rate, it only takes its latency."""

    latency_s: float
    num_bytes: float = 0.0
    rate_out: float = math.inf  # of the sender's line
    rate_in: float = math.inf  # of the receiver's line

    @property
    def occupies(self) -> bool:
        """Whether the message takes time on any line."""
        return self.num_bytes > 0 and min(self.rate_out, self.rate_in) < math.inf


@dataclass(frozen=True, slots=True)
class Sent(Generic[T]):
    """An item that was on the line from `start` to `end` and has left."""

    item: T
    start: float
    end: float


@dataclass(slots=True)
class _Transfer(Generic[T]):
    item: T
    left: float  # bytes
    start: float


class Egress(Generic[T]):
    """A device's outgoing line."""

    def __init__(self, rate: float) -> None:
        assert rate > 0, "a line without a rate sends nothing"
        self.rate = rate
        self._now = 0.0
        self._flows: dict[Hashable, deque[_Transfer[T]]] = {}

    def add(self, now: float, flow: Hashable, num_bytes: float, item: T) -> None:
        """Queue `item`. Take what is `done` by `now` first. Time never goes back."""
        assert self.next_end() >= now, "take what is done first"
        now = max(now, self._now)
        if self._flows:
            self._advance((now - self._now) * self.rate / len(self._flows))
        self._now = now
        queue = self._flows.setdefault(flow, deque())
        queue.append(_Transfer(item, num_bytes, self._now))

    def next_end(self) -> float:
        """Return when the next message will have left; infinity if there is none."""
        if not self._flows:
            return math.inf
        return self._now + self._least() * len(self._flows) / self.rate

    def done(self, now: float) -> list[Sent[T]]:
        """Return what has left by `now`, in order, each with the time at which it left."""
        sent: list[Sent[T]] = []
        while (end := self.next_end()) <= now:
            self._advance(self._least())
            self._now = end
            for flow in [flow for flow, queue in self._flows.items() if queue[0].left <= _REST]:
                queue = self._flows[flow]
                first = queue.popleft()
                sent.append(Sent(first.item, first.start, end))
                if queue:
                    queue[0].start = end
                else:
                    del self._flows[flow]
        return sent

    def _least(self) -> float:
        return min(queue[0].left for queue in self._flows.values())

    def _advance(self, num_bytes: float) -> None:
        """Move every flow on by `num_bytes`."""
        for queue in self._flows.values():
            queue[0].left = max(0.0, queue[0].left - num_bytes)


class Ingress:
    """The line from the switch to a device.

    A message comes in evenly while its sender sends it, and waits at the switch for earlier ones;
    the line never rests while anything waits. What has come by `end` has therefore passed at the
    latest of t + A(t, end) / rate over all t, with A(t, end) the bytes that came from t on (Reich's
    formula for a queue; a message that is still being sent is unknown and does not count).
    """

    _KEPT = 32  # messages; a slow one may have begun before several others

    def __init__(self, rate: float) -> None:
        assert rate > 0, "a line without a rate takes nothing"
        self.rate = rate
        self._passed: deque[tuple[float, float, float, float]] = deque(maxlen=self._KEPT)

    def take(self, start: float, end: float, num_bytes: float) -> float:
        """Return when a message sent from `start` to `end` has passed, without its latency."""
        came = [(start, end, num_bytes)]
        busy_since = start
        for begin, last, size, passed in sorted(self._passed, key=itemgetter(3), reverse=True):
            if passed <= busy_since:
                break
            came.append((begin, last, size))
            busy_since = min(busy_since, begin)
        passed = end
        for t in {begin for begin, _, _ in came}:
            passed = max(passed, t + sum(_came(one, t, end) for one in came) / self.rate)
        self._passed.append((start, end, num_bytes, passed))
        return passed


def _came(message: tuple[float, float, float], start: float, end: float) -> float:
    """Return the bytes of a message (from, to, size) that came from `start` to `end`."""
    first, last, size = message
    if last <= first:
        return size if start <= first <= end else 0.0
    return size * max(0.0, min(last, end) - max(first, start)) / (last - first)
