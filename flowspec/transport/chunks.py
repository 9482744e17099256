"""Parts of files over an encrypted connection: whoever asks by hash, offset and length gets them.

A request is 48 bytes. A reply is a header and pieces, see `pieces.py` for why there are pieces. No
path ever travels. The asker keeps a window of requests under way; that is all a server queues.
"""

import logging
import struct
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from flowspec.transport.secure.curve import MAX_PIECE_BYTES, Guard
from flowspec.transport.secure.keys import Keys
from flowspec.transport.secure.tally import Tally

CHUNK_BYTES = 256 << 10
WINDOW = 16  # chunks under way per asker
MAX_QUEUED = 4 * WINDOW  # libzmq tells of room late, in batches of half its limit
MAX_PEERS = 64  # that are served at one time
IDLE_S = 5.0  # who asks for nothing for so long is taken to have left: libzmq does not tell
LINGER_MS = 500
IO_THREADS = 2  # they encrypt; askers are shared out among them
HASH_BYTES = 32
_HEADER = struct.Struct("<2sBB32sQI")  # magic, version, what, hash, offset, length of the part
_TOTAL = struct.Struct("<Q")  # in a reply, after the header: bytes of the whole file
_MAGIC, _VERSION = b"FC", 1
_ASK, _PART, _UNKNOWN, _BUSY = range(4)
logger = logging.getLogger(__name__)
BAD_REQUEST, NOT_TAKEN, TOO_MANY = "bad request", "part not taken", "too many askers"

Read = Callable[[bytes, int, int], tuple[bytes, int] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkReply:
    """What came for one request; `total` is the file's size, `pieces` None where there is none."""

    digest: bytes
    offset: int
    total: int
    pieces: list[memoryview] | None
    busy: bool = False

    @property
    def num_bytes(self) -> int:
        """Of this part."""
        return sum(len(piece) for piece in self.pieces or ())


class ChunkServer:
    """Answers requests with what `read(digest, offset, length)` gives: bytes and the file's size.

    `read` gives None for what it does not have. One thread at a time may call `serve`.
    """

    def __init__(self, address: str, keys: Keys, read: Read) -> None:
        self._read = read
        self._context = zmq.Context(io_threads=IO_THREADS)
        self._guard = Guard(self._context, keys, "shard server")
        self.dropped = Tally(logger, "shard server dropped requests")
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(MAX_QUEUED)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._peers: OrderedDict[bytes, float] = OrderedDict()  # when each last asked
        try:
            self.address = self._guard.listen(self._socket, address)
        except ValueError:
            self.close()
            raise

    def serve(self, timeout_s: float) -> None:
        """Answer what has come; waits at most `timeout_s` for the first request."""
        if not self._socket.poll(int(timeout_s * 1e3)):
            return
        for _ in range(MAX_QUEUED):
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._answer(peer, frames)

    def refusals(self) -> dict[str, int]:
        """How many connections were refused, by reason."""
        return self._guard.refusals.counts()

    def close(self) -> None:
        """Give up the socket; what was sent is still delivered within half a second."""
        self._guard.close()
        self._context.destroy(linger=LINGER_MS)

    def _answer(self, peer: bytes, frames: list[bytes]) -> None:
        try:
            digest, offset, length = _parse_request(frames)
        except ValueError as error:
            self.dropped.add(BAD_REQUEST, str(error))
            return
        what, content, total = _UNKNOWN, b"", 0
        if not self._admit(peer):
            what = _BUSY
        elif (found := self._read(digest, offset, length)) is not None:
            what = _PART
            content, total = found
        header = _HEADER.pack(_MAGIC, _VERSION, what, digest, offset, len(content))
        view = memoryview(content)
        pieces = [view[at : at + MAX_PIECE_BYTES] for at in range(0, len(view), MAX_PIECE_BYTES)]
        try:
            self._socket.send_multipart([peer, header + _TOTAL.pack(total), *pieces], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            # gone, or it asks without reading; whoever still wants the part asks again
            self._peers.pop(peer, None)
            self.dropped.add(NOT_TAKEN, error.strerror)

    def _admit(self, peer: bytes) -> bool:
        now = time.monotonic()
        if peer not in self._peers and len(self._peers) >= MAX_PEERS:
            oldest = next(iter(self._peers))
            if now - self._peers[oldest] < IDLE_S:
                self.dropped.add(TOO_MANY, f"at most {MAX_PEERS} at one time")
                return False
            del self._peers[oldest]
        self._peers[peer] = now
        self._peers.move_to_end(peer)
        return True


class ChunkClient:
    """Asks one server. Not for several threads."""

    def __init__(self, address: str, keys: Keys) -> None:
        self._context = zmq.Context()
        self._guard = Guard(self._context, keys, "shard client")
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(MAX_QUEUED)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self.was_connected = False
        self._guard.connect(self._socket, address)
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def ask(self, digest: bytes, offset: int, length: int) -> None:
        """For a part of a file; the reply may hold less than `length` bytes."""
        request = _HEADER.pack(_MAGIC, _VERSION, _ASK, digest, offset, length)
        self._socket.send(request, zmq.NOBLOCK)  # the window is smaller than the queue

    def receive(self, timeout_s: float) -> tuple[list[ChunkReply], bool]:
        """Parts that have come, in the order they were asked for, and whether a connection is new.

        With a new one, what was asked for before may never come. Waits at most `timeout_s`.
        """
        self._poller.poll(int(timeout_s * 1e3))
        is_new = False
        while self._monitor.poll(0):
            event = int(recv_monitor_message(self._monitor)["event"])
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                is_new, self.was_connected = self.was_connected, True
        parts = []
        for _ in range(MAX_QUEUED):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            part = _parse_reply([frame.buffer for frame in frames])
            if part is not None:
                parts.append(part)
        return parts, is_new

    def close(self) -> None:
        """Give up the connection, whatever is under way."""
        self._guard.close()
        self._socket.disable_monitor()
        self._context.destroy(linger=0)


def _parse_request(frames: list[bytes]) -> tuple[bytes, int, int]:
    if len(frames) != 1 or len(frames[0]) != _HEADER.size:
        raise ValueError(f"{len(frames)} frames, needed: 1 of {_HEADER.size} bytes")
    magic, version, what, digest, offset, length = _HEADER.unpack(frames[0])
    if (magic, version, what) != (_MAGIC, _VERSION, _ASK) or not 0 < length <= CHUNK_BYTES:
        raise ValueError(f"it asks for {length} bytes in version {version}")
    return digest, offset, length


def _parse_reply(frames: list[memoryview]) -> ChunkReply | None:
    """None where it is no reply: what is missing is asked for again."""
    if len(frames[0]) != _HEADER.size + _TOTAL.size:
        return None
    magic, version, what, digest, offset, length = _HEADER.unpack_from(frames[0])
    (total,) = _TOTAL.unpack_from(frames[0], _HEADER.size)
    pieces = frames[1:]
    if (magic, version) != (_MAGIC, _VERSION) or sum(map(len, pieces)) != length:
        return None
    return ChunkReply(
        digest=digest,
        offset=offset,
        total=total,
        pieces=pieces if what == _PART else None,
        busy=what == _BUSY,
    )
