"""Over the emulated network, messages arrive no earlier than its lines allow."""

import time
from collections.abc import Sequence

import pytest

from flowspec.protocol.messages import FinishRequest, Ping, WireMessage
from flowspec.request import ClusterError
from flowspec.transport import emulated
from flowspec.transport.emulated import EmulatedTransport
from flowspec.transport.link_occupancy import Passage

RATE = 1000.0  # bytes/s
DATA_BYTES = 100.0  # a tenth of a second


class Wire:
    """A transport that records what is sent and returns given messages."""

    def __init__(self) -> None:
        self.sent: list[tuple[float, int, WireMessage]] = []
        self.waiting: list[WireMessage] = []
        self.error: ClusterError | None = None
        self.closed = False

    def send(self, to: int, message: WireMessage) -> None:
        """Record the message, or raise `error`."""
        if self.error is not None:
            raise self.error
        self.sent.append((time.monotonic(), to, message))

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """Return the given messages."""
        messages, self.waiting = self.waiting, []
        if not messages:
            time.sleep(timeout_s)
        return messages

    def close(self) -> None:
        """Record that it was closed."""
        self.closed = True


def line(source: int, to: int, message: WireMessage) -> Passage:
    """Data occupies the line for a tenth of a second, control for nearly no time."""
    del source, to
    size = DATA_BYTES if isinstance(message, FinishRequest) else 1.0
    return Passage(latency_s=0.05, num_bytes=size, rate_out=RATE, rate_in=RATE)


@pytest.fixture
def wire() -> Wire:
    """Return the transport below."""
    return Wire()


@pytest.fixture
def transport(wire: Wire) -> EmulatedTransport:
    """Return rank 1 over it."""
    return EmulatedTransport(wire, 1, line)


def until(condition: object, timeout_s: float = 5.0) -> None:
    """Wait until `condition()` holds."""
    end = time.monotonic() + timeout_s
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_messages_take_the_lines_time_and_a_latency(wire, transport):
    """Three messages occupy a tenth of a second each, so the last leaves after three tenths."""
    start = time.monotonic()
    for number in range(1, 4):
        transport.send(2, FinishRequest(request=number))
    until(lambda: len(wire.sent) == 3)
    times = [when - start for when, _, _ in wire.sent]
    assert all(time >= 0.1 * n + 0.05 - 1e-3 for n, time in enumerate(times, start=1)), times
    assert [message.request for _, _, message in wire.sent] == [1, 2, 3]
    transport.close()


def test_control_shares_the_line_with_data(wire, transport):
    """A verdict does not wait for the segments that were sent before it."""
    for number in range(1, 4):
        transport.send(2, FinishRequest(request=number))
    transport.send(2, Ping(rank=0))
    until(lambda: len(wire.sent) == 4)
    assert isinstance(wire.sent[0][2], Ping)
    transport.close()


def test_a_receivers_line_takes_one_message_after_another(wire, transport):
    """Two senders send at the line's full rate; the second message waits for the first."""
    wire.waiting = [FinishRequest(request=1), FinishRequest(request=2)]
    start = time.monotonic()
    got: list[WireMessage] = []
    while len(got) < 2:
        got += transport.receive(1.0)
    assert time.monotonic() - start >= 0.099
    assert [message.request for message in got] == [1, 2]
    transport.close()


def test_what_could_not_be_sent_is_an_error_of_the_next_call(wire, transport):
    """The sending thread has no caller, so the next `send` raises the error."""
    wire.error = ClusterError("stage 2", "took no Ping for 10 s")
    transport.send(2, Ping(rank=0))

    def refused() -> bool:
        try:
            transport.send(2, Ping(rank=0))
        except ClusterError as error:
            return error is wire.error
        return False

    until(refused)
    transport.close()
    assert wire.closed


def test_no_more_is_held_than_a_bound(wire, transport, monkeypatch):
    """A line that is slower than its sender is noticed, and memory does not fill up."""
    monkeypatch.setattr(emulated, "MAX_HELD", 3)
    monkeypatch.setattr(emulated, "SEND_TIMEOUT_S", 0.0)
    for number in range(1, 4):
        transport.send(2, FinishRequest(request=number))
    with pytest.raises(ClusterError, match="stage 2: 3 messages wait for an emulated line"):
        transport.send(2, FinishRequest(request=4))
    transport.close()


def test_closing_sends_what_was_handed_over(wire, transport):
    """A stage's last messages reach the head."""
    transport.send(0, Ping(rank=1))
    transport.close()
    assert len(wire.sent) == 1
    assert wire.closed
