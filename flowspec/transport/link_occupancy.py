"""Ports: how long messages occupy the lines between devices, without clock or socket.

Switched full-duplex Ethernet. A device's outgoing line is shared fairly by its lanes, one lane per
receiver and kind of message, as TCP connections share a line; within a lane the first comes first.
The switch's line to a device is a queue: a message that another one holds up there waits. Sizes in
bytes, rates in bytes per second, times in seconds.
"""

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass
from operator import itemgetter
from typing import Generic, TypeVar

T = TypeVar("T")
_REST = 1e-6  # bytes: less is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class Passage:
    """What a message asks of the network. Without bytes, or at no rate's limit: latency alone."""

    latency_s: float
    num_bytes: float = 0.0
    rate_out: float = math.inf  # of the sender's line
    rate_in: float = math.inf  # of the receiver's

    @property
    def occupies(self) -> bool:
        """Whether it takes time on any line."""
        return self.num_bytes > 0 and min(self.rate_out, self.rate_in) < math.inf


@dataclass(frozen=True, slots=True)
class Sent(Generic[T]):
    """Something that has left: from `start` to `end` it was on the line."""

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
        self._lanes: dict[Hashable, deque[_Transfer[T]]] = {}

    def add(self, now: float, lane: Hashable, num_bytes: float, item: T) -> None:
        """Queue `item`; take what is `done` by now first. No earlier than what was queued last."""
        assert self.next_end() >= now, "take what is done first"
        now = max(now, self._now)
        if self._lanes:
            self._advance((now - self._now) * self.rate / len(self._lanes))
        self._now = now
        queue = self._lanes.setdefault(lane, deque())
        queue.append(_Transfer(item, num_bytes, self._now))

    def next_end(self) -> float:
        """When the next message has left; infinity if there is none."""
        if not self._lanes:
            return math.inf
        return self._now + self._least() * len(self._lanes) / self.rate

    def done(self, now: float) -> list[Sent[T]]:
        """What has left by `now`, in order; however late it is asked, at the times it left."""
        sent: list[Sent[T]] = []
        while (end := self.next_end()) <= now:
            self._advance(self._least())
            self._now = end
            for lane in [lane for lane, queue in self._lanes.items() if queue[0].left <= _REST]:
                queue = self._lanes[lane]
                first = queue.popleft()
                sent.append(Sent(first.item, first.start, end))
                if queue:
                    queue[0].start = end
                else:
                    del self._lanes[lane]
        return sent

    def _least(self) -> float:
        return min(queue[0].left for queue in self._lanes.values())

    def _advance(self, num_bytes: float) -> None:
        """Every lane has sent `num_bytes` more."""
        for queue in self._lanes.values():
            queue[0].left = max(0.0, queue[0].left - num_bytes)


class Ingress:
    """The line from the switch to a device.

    A message comes in evenly while its sender sends it, and waits at the switch for what came
    before; the line never rests while anything waits. What has come by `end` has therefore passed
    at the latest of t + A(t, end) / rate over all t, with A(t, end) the bytes that came from t on
    (Reich's formula for a queue; a message still being sent is not known and does not count).
    """

    _KEPT = 32  # messages: one that is being sent for long may reach back behind some

    def __init__(self, rate: float) -> None:
        assert rate > 0, "a line without a rate takes nothing"
        self.rate = rate
        self._passed: deque[tuple[float, float, float, float]] = deque(maxlen=self._KEPT)

    def take(self, start: float, end: float, num_bytes: float) -> float:
        """When a message that left its sender from `start` to `end` has passed, latency apart."""
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
    """Bytes of a message (from, to, size) that came from `start` to `end`."""
    first, last, size = message
    if last <= first:
        return size if start <= first <= end else 0.0
    return size * max(0.0, min(last, end) - max(first, start)) / (last - first)
