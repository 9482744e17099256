"""ZeroMQ transport: each process has a control and a data inbox, so verdicts overtake segments."""

import logging
from collections.abc import Mapping, Sequence

import zmq

from flowspec.protocol.codec import MAX_FRAME_BYTES, WireError, decode, encode
from flowspec.protocol.messages import DATA, WireMessage
from flowspec.request import ClusterError, rank_name
from flowspec.transport.secure.curve import MAX_PIECE_BYTES, Guard, Line
from flowspec.transport.secure.keys import Keys
from flowspec.transport.secure.pieces import cut, join
from flowspec.transport.secure.tally import Tally
from flowspec.transport.wake import Wake

SEND_TIMEOUT_MS = 10_000
MAX_QUEUED_MESSAGES = 1000
LINGER_MS = 1000
CONTROL, DATA_LANE = "control", "data"
BAD_FRAME = "bad frame"
_POLLIN = int(zmq.POLLIN)  # plain int: `&` on the flag would create a new one every time

logger = logging.getLogger(__name__)


class ZmqTransport:
    """Rank `rank` of a cluster whose ranks listen at `addresses[rank][channel]`.

    In local runs, the addresses are ipc:// sockets in a folder that only this user may enter. With
    `keys`, they are tcp://host:port, every connection is encrypted, and both ends prove that they
    hold the keys (see curve.py). Messages in flight may be lost when such a connection breaks, and
    their receiver would wait for ever, so the sender's `receive` raises LostPeer. `addresses` is
    read when a rank is first sent to. Port 0 takes a free port; `bound` gives its address.

    A frame that is not a message raises WireError in a local run, where only a bug can cause it.
    With `keys`, it is dropped and counted in `dropped`, because a cluster must outlive one faulty
    member.
    """

    def __init__(
        self, rank: int, addresses: Mapping[int, Mapping[str, str]], keys: Keys | None = None
    ) -> None:
        self.rank = rank
        self.dropped = Tally(logger, f"{rank_name(rank)} dropped messages")
        self._addresses = addresses
        self._context = zmq.Context()
        self._guard = Guard(self._context, keys, rank_name(rank)) if keys else None
        self._wake = Wake()
        self._wake_fd = self._wake.fileno()
        self.bound: dict[str, str] = {}
        self._inboxes = [self._bind(channel) for channel in (CONTROL, DATA_LANE)]
        self._outboxes: dict[tuple[int, str], zmq.Socket[bytes]] = {}
        self._lines: dict[zmq.Socket[bytes], Line] = {}  # by monitor
        self._poller = zmq.Poller()
        for inbox in self._inboxes:
            self._poller.register(inbox, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def send(self, to: int, message: WireMessage) -> None:
        """Send a message; raises ClusterError when the peer accepts nothing for too long."""
        channel = DATA_LANE if isinstance(message, DATA) else CONTROL
        outbox = self._outboxes.get((to, channel)) or self._connect(to, channel)
        frames = encode(message)
        size = sum(len(frame) for frame in frames)
        if self._guard:
            frames = cut(frames, MAX_PIECE_BYTES)
        try:
            outbox.send_multipart(frames, copy=size < 65536)
        except zmq.Again:
            raise ClusterError.of_rank(
                to,
                f"took no {type(message).__name__} for {SEND_TIMEOUT_MS / 1e3:.0f} s",
            ) from None

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """Return the messages that have come, control first; wait at most `timeout_s` for one."""
        if timeout_s <= 0:
            return self._drain()
        for source, _ in self._poller.poll(int(timeout_s * 1e3)):
            if source in self._lines:
                self._lines[source].look()
            # for other than ZeroMQ sockets, the poller returns the number
            elif source == self._wake_fd:
                self._wake.clear()
        return self._drain()

    def wake(self) -> None:
        """End the current or the next wait of `receive`."""
        self._wake.set()

    def close(self) -> None:
        """Close the sockets; messages that were sent are still delivered within a second."""
        if self._guard:
            self._guard.close()
        self._context.destroy(linger=LINGER_MS)
        self._wake.close()

    def refusals(self) -> dict[str, int]:
        """Return how many connections were refused, by reason."""
        return self._guard.refusals.counts() if self._guard else {}

    def _drain(self) -> list[WireMessage]:
        messages = []
        for inbox in self._inboxes:
            for _ in range(MAX_QUEUED_MESSAGES):
                if not int(inbox.get(zmq.EVENTS)) & _POLLIN:  # faster than catching an exception
                    break
                frames = inbox.recv_multipart(zmq.NOBLOCK, copy=False)
                try:
                    messages.append(self._decode([frame.buffer for frame in frames]))
                except WireError as error:
                    if self._guard is None:
                        raise WireError(
                            f"{rank_name(self.rank)} received a bad frame: {error}"
                        ) from None
                    self.dropped.add(BAD_FRAME, str(error))
        return messages

    def _decode(self, frames: list[memoryview]) -> WireMessage:
        return decode(join(frames) if self._guard else frames)

    def _bind(self, channel: str) -> "zmq.Socket[bytes]":
        address = self._addresses[self.rank][channel]
        inbox = self._context.socket(zmq.PULL)
        inbox.set_hwm(MAX_QUEUED_MESSAGES)
        try:
            if self._guard:
                self.bound[channel] = self._guard.listen(inbox, address)
                return inbox
            inbox.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
            inbox.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(
                f"{rank_name(self.rank)} cannot listen at {address}: {error}; for a local run set "
                "TMPDIR to a short path on a local disk"
            ) from None
        except ValueError as error:
            self.close()
            raise ValueError(f"{rank_name(self.rank)} {error}") from None
        self.bound[channel] = address
        return inbox

    def _connect(self, to: int, channel: str) -> "zmq.Socket[bytes]":
        outbox = self._context.socket(zmq.PUSH)
        outbox.set_hwm(MAX_QUEUED_MESSAGES)
        outbox.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
        if self._guard:
            line = Line(outbox, to)
            self._lines[line.monitor] = line
            self._poller.register(line.monitor, zmq.POLLIN)
            self._guard.connect(outbox, self._addresses[to][channel])
        else:
            outbox.connect(self._addresses[to][channel])
        self._outboxes[to, channel] = outbox
        return outbox


def local_addresses(folder: str, num_stages: int) -> dict[int, dict[str, str]]:
    """Return the ipc:// addresses of ranks 0..num_stages in `folder`."""
    return {
        rank: {channel: f"ipc://{folder}/{rank}-{channel}" for channel in (CONTROL, DATA_LANE)}
        for rank in range(num_stages + 1)
    }
