"""ZeroMQ transport: a control and a data inbox per process, so that verdicts overtake segments."""

from collections.abc import Mapping, Sequence

import zmq

from flowspec.codec import MAX_FRAME_BYTES, WireError, decode, encode
from flowspec.request import ClusterError, rank_name
from flowspec.transport.wake import Wake
from flowspec.wire import DATA, WireMessage

SEND_TIMEOUT_MS = 10_000
MAX_QUEUED_MESSAGES = 1000
LINGER_MS = 1000
CONTROL, DATA_LANE = "control", "data"


class ZmqTransport:
    """Rank `rank` of a cluster whose ranks listen at `addresses[rank][lane]`.

    For local runs the addresses are ipc:// sockets in a folder that only this user may enter.
    """

    def __init__(self, rank: int, addresses: Mapping[int, Mapping[str, str]]) -> None:
        self.rank = rank
        self._addresses = addresses
        self._context = zmq.Context()
        self._inboxes = [self._bind(addresses[rank][lane]) for lane in (CONTROL, DATA_LANE)]
        self._outboxes: dict[tuple[int, str], zmq.Socket[bytes]] = {}
        self._poller = zmq.Poller()
        for inbox in self._inboxes:
            self._poller.register(inbox, zmq.POLLIN)
        self._wake = Wake()
        self._poller.register(self._wake, zmq.POLLIN)

    def send(self, to: int, message: WireMessage) -> None:
        """See Transport.send."""
        lane = DATA_LANE if isinstance(message, DATA) else CONTROL
        outbox = self._outboxes.get((to, lane)) or self._connect(to, lane)
        frames = encode(message)
        size = sum(len(frame) for frame in frames)
        try:
            outbox.send_multipart(frames, copy=size < 65536)
        except zmq.Again:
            raise ClusterError(
                rank_name(to),
                f"took no {type(message).__name__} for {SEND_TIMEOUT_MS / 1e3:.0f} s",
            ) from None

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """See Transport.receive."""
        messages = self._drain()
        if not messages and timeout_s > 0 and self._poller.poll(int(timeout_s * 1e3)):
            self._wake.clear()
            messages = self._drain()
        return messages

    def wake(self) -> None:
        """See Transport.wake."""
        self._wake.set()

    def close(self) -> None:
        """See Transport.close."""
        self._context.destroy(linger=LINGER_MS)
        self._wake.close()

    def _drain(self) -> list[WireMessage]:
        messages = []
        for inbox in self._inboxes:
            for _ in range(MAX_QUEUED_MESSAGES):
                try:
                    frames = inbox.recv_multipart(zmq.NOBLOCK, copy=False)
                except zmq.Again:
                    break
                try:
                    messages.append(decode([frame.buffer for frame in frames]))
                except WireError as error:
                    raise WireError(
                        f"{rank_name(self.rank)} received a bad frame: {error}"
                    ) from None
        return messages

    def _bind(self, address: str) -> zmq.Socket[bytes]:
        inbox = self._context.socket(zmq.PULL)
        inbox.set_hwm(MAX_QUEUED_MESSAGES)
        inbox.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME_BYTES)
        try:
            inbox.bind(address)
        except zmq.ZMQError as error:
            self.close()
            raise ValueError(
                f"{rank_name(self.rank)} cannot listen at {address}: {error}; for a local run set "
                "TMPDIR to a short path on a local disk"
            ) from None
        return inbox

    def _connect(self, to: int, lane: str) -> zmq.Socket[bytes]:
        outbox = self._context.socket(zmq.PUSH)
        outbox.set_hwm(MAX_QUEUED_MESSAGES)
        outbox.setsockopt(zmq.SNDTIMEO, SEND_TIMEOUT_MS)
        outbox.connect(self._addresses[to][lane])
        self._outboxes[to, lane] = outbox
        return outbox


def local_addresses(folder: str, num_stages: int) -> dict[int, dict[str, str]]:
    """ipc:// addresses of ranks 0..num_stages in `folder`."""
    return {
        rank: {lane: f"ipc://{folder}/{rank}-{lane}" for lane in (CONTROL, DATA_LANE)}
        for rank in range(num_stages + 1)
    }
