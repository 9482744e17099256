"""Parts of files over an encrypted connection, requested by hash, offset and length.

A request is 48 bytes. A reply is a header and pieces; `pieces.py` says why there are pieces. No
path ever travels. The client keeps a window of requests in flight; a server queues no more than
that.
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
WINDOW = 16  # chunks in flight per client
MAX_QUEUED = 4 * WINDOW  # libzmq reports free room late, in batches of half its limit
MAX_PEERS = 64  # clients that are served at the same time
IDLE_S = 5.0  # a client that asks for nothing this long has left; libzmq does not report it
LINGER_MS = 500
IO_THREADS = 2  # they encrypt; clients are distributed among them
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
    """The reply to one request; `total` is the file's size, and without a file `pieces` is None."""

    digest: bytes
    offset: int
    total: int
    pieces: list[memoryview] | None
    busy: bool = False

    @property
    def num_bytes(self) -> int:
        """Return the bytes of this part."""
        return sum(len(piece) for piece in self.pieces or ())


class ChunkServer:
    """Answers requests with what `read(digest, offset, length)` returns: bytes and the file's size.

    `read` returns None for a file that it does not have. Only one thread at a time may call
    `serve`.
    """

    def __init__(self, address: str, keys: Keys, read: Read) -> None:
        self._read = read
        self._context = zmq.Context(io_threads=IO_THREADS)
        self._guard = Guard(self._context, keys, "shard server")
        self.dropped = Tally(logger, "shard server dropped requests")
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(MAX_QUEUED)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._peers: OrderedDict[bytes, float] = OrderedDict()  # time of each one's last request
        try:
            self.address = self._guard.listen(self._socket, address)
        except ValueError:
            self.close()
            raise

    def serve(self, timeout_s: float) -> None:
        """Answer the requests that have come; wait at most `timeout_s` for the first."""
        if not self._socket.poll(int(timeout_s * 1e3)):
            return
        for _ in range(MAX_QUEUED):
            try:
                peer, *frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._answer(peer, frames)

    def refusals(self) -> dict[str, int]:
        """Return how many connections were refused, by reason."""
        return self._guard.refusals.counts()

    def close(self) -> None:
        """Close the socket; replies that were sent are still delivered within half a second."""
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
            # the client is gone or does not read; if it still wants the part, it asks again
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
    """Asks one server for parts of files. Only one thread may use it."""

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
        """Ask for a part of a file; the reply may hold less than `length` bytes."""
        request = _HEADER.pack(_MAGIC, _VERSION, _ASK, digest, offset, length)
        self._socket.send(request, zmq.NOBLOCK)  # the window is smaller than the queue

    def receive(self, timeout_s: float) -> tuple[list[ChunkReply], bool]:
        """Return the replies in the order of their requests, and whether a connection is new.

        After a new connection, replies to earlier requests may never come. Waits at most
        `timeout_s`.
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
        """Close the connection, even with requests in flight."""
        self._guard.close()
        self._socket.disable_monitor()
        self._context.destroy(linger=0)


def _parse_request(frames: list[bytes]) -> tuple[bytes, int, int]:
    if len(frames) != 1 or len(frames[0]) != _HEADER.size:
        raise ValueError(f"request of {len(frames)} frames, needed: 1 of {_HEADER.size} bytes")
    magic, version, what, digest, offset, length = _HEADER.unpack(frames[0])
    if (magic, version, what) != (_MAGIC, _VERSION, _ASK) or not 0 < length <= CHUNK_BYTES:
        raise ValueError(f"it asks for {length} bytes in version {version}")
    return digest, offset, length


def _parse_reply(frames: list[memoryview]) -> ChunkReply | None:
    """Return the parsed reply, or None if it is malformed: the client then asks again."""
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
