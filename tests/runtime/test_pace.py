"""An event loop on an emulated device makes up for waking late, and for nothing else."""

import time
from collections.abc import Sequence

import pytest

from flowspec.protocol.messages import FinishRequest, Message, Ping, WireMessage
from flowspec.runtime.core import Send, Step, Work
from flowspec.runtime.event_loop import MOST_BEHIND_S, EventLoop
from flowspec.transport.emulated import EmulatedTransport
from flowspec.transport.link_occupancy import Passage

LATENCY_S = 0.2
WORK_S = 0.1


class Wire:
    """A transport that records what is sent, and delivers given messages."""

    def __init__(self) -> None:
        self.sent: list[float] = []
        self.incoming: list[WireMessage] = []

    def send(self, to: int, message: WireMessage) -> None:
        """Record the message."""
        self.sent.append(time.monotonic())

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """Return the given messages."""
        messages, self.incoming = self.incoming, []
        if not messages:
            time.sleep(timeout_s)
        return messages

    def wake(self) -> None:
        """Do nothing: no wait is long."""

    def close(self) -> None:
        """Do nothing: no socket is open."""


class Device:
    """Every computation takes WORK_S, everything else takes no time."""

    def work(self, rank: int, work: Work) -> float:
        """Return WORK_S."""
        return WORK_S

    def host(self, rank: int, message: Message) -> float:
        """Return 0."""
        return 0.0


class Core:
    """A core that computes for `slow_s` per message, then sends."""

    rank = 1

    def __init__(self, *, slow_s: float = 0.0) -> None:
        self.slow_s = slow_s
        self.num_waiting = 0
        self.finished: list[float] = []

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Count the message."""
        self.num_waiting += 1
        return [Send(2, FinishRequest(request=1))] if isinstance(message, FinishRequest) else []

    def poll(self, now: float) -> Step | None:
        """Compute once per message."""
        if not self.num_waiting:
            return None
        self.num_waiting -= 1

        def finish(now: float, elapsed: float) -> Sequence[Send]:
            self.finished.append(now)
            return [Send(2, FinishRequest(request=1))]

        return Step(work=Work("forward", 1, 1, lambda: time.sleep(self.slow_s), finish))


def passage(source: int, to: int, message: WireMessage) -> Passage:
    """Return a passage of latency only."""
    return Passage(latency_s=LATENCY_S)


@pytest.fixture
def make():
    """Return an event loop of a core on an emulated device with emulated lines."""
    made: list[EmulatedTransport] = []

    def build(core: Core) -> tuple[EventLoop, Wire]:
        wire = Wire()
        made.append(EmulatedTransport(wire, 1, passage))
        return EventLoop(core, made[-1], 2, pace=Device()), wire

    yield build
    for transport in made:
        transport.close()


def until_sent(wire: Wire, count: int) -> None:
    """Wait for the line's thread."""
    end = time.monotonic() + 5.0
    while len(wire.sent) < count:
        assert time.monotonic() < end, "it was never sent"
        time.sleep(0.005)


def test_a_pause_is_no_time_to_spare(make):
    """A request after a pause takes the line as long as ever."""
    driver, wire = make(Core())
    wire.incoming.append(Ping(rank=0))
    driver.turn(0.0)
    until_sent(wire, 1)
    time.sleep(0.5)
    start = time.monotonic()
    driver.inject(FinishRequest(request=1))
    until_sent(wire, 2)
    assert wire.sent[1] - start >= LATENCY_S


def test_nothing_begins_before_it_came(make):
    """A message for a device that is behind is handled after its own arrival at the earliest."""
    core = Core()
    driver, wire = make(core)
    wire.incoming.append(Ping(rank=0))
    driver.turn(0.0)
    time.sleep(0.3)  # its process does not get a turn
    came = time.monotonic()
    wire.incoming.append(Ping(rank=0))
    driver.turn(0.0)
    assert len(core.finished) == 2
    assert core.finished[1] - came >= WORK_S


def test_a_machine_that_is_too_slow_is_seen_to_be(make):
    """Work that is slower here than on the device delays the answer by all but a moment."""
    core = Core(slow_s=2 * WORK_S)
    driver, wire = make(core)
    start = time.monotonic()
    wire.incoming += [Ping(rank=0)] * 3
    for _ in range(4):
        driver.turn(0.1)
    until_sent(wire, 3)
    slow = 3 * 2 * WORK_S
    assert wire.sent[2] - start >= slow + LATENCY_S - MOST_BEHIND_S
