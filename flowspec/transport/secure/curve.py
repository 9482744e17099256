"""CURVE on ZeroMQ sockets: mutual authentication and encryption, and a guard over connections.

A listener accepts only holders of the member key; a caller talks only to the holder of the server
key. libzmq drops all others before it takes any byte of theirs as a message; they are counted and
reported in a log line from time to time.
"""

import contextlib
import errno
import logging
import os
import threading
import time
from collections import deque

import zmq
from zmq.utils.monitor import recv_monitor_message

from flowspec.system.address import Address, is_ipv6, parse_url
from flowspec.transport.base import LOST, LostPeer
from flowspec.transport.secure.door import Door
from flowspec.transport.secure.keys import Keys
from flowspec.transport.secure.tally import Tally

HANDSHAKE_LIMIT_MS = 3000
DOUBT_S = 2 * HANDSHAKE_LIMIT_MS / 1e3  # a connection that lasts this long belongs to a member
# libzmq's own thread sends heartbeats, even during a long forward
HEARTBEAT_MS, SILENCE_LIMIT_MS = 500, 2500
RECONNECT_MS, RECONNECT_MAX_MS = 100, 2000
CONNECT_LIMIT_MS = 3000
UNACKNOWLEDGED_LIMIT_MS = 5000
MAX_PIECE_BYTES = 64 << 10  # also what a stranger can make libzmq hold, per connection
POLL_MS = 100
MAX_EVENTS = 10_000
ZAP_ADDRESS = "inproc://zeromq.zap.01"
ZAP_DOMAIN = b"flowspec"
ZAP_VERSION = b"1.0"
_EVENTS = (
    zmq.EVENT_ACCEPTED
    | zmq.EVENT_DISCONNECTED
    | zmq.EVENT_CLOSED
    | zmq.EVENT_HANDSHAKE_SUCCEEDED
    | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
    | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
    | zmq.EVENT_HANDSHAKE_FAILED_AUTH
)
WRONG_KEY = "wrong token, no encryption, or not FlowSpec"
WRONG_MEMBER = "key not in the list"
NO_HANDSHAKE = "no handshake in time, or none at all"
KEPT_OUT = "kept out for a while, too many connections"
_REASONS: dict[int, str] = {
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL: WRONG_KEY,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL: NO_HANDSHAKE,
}

logger = logging.getLogger(__name__)


class ListenError(ValueError):
    """No socket can listen at this address of this machine."""

    def __init__(self, address: str, error: OSError) -> None:
        super().__init__(f"cannot listen at {address}: {error.strerror or error}")
        self.is_in_use = error.errno == errno.EADDRINUSE


class Guard:
    """Answers libzmq's questions about keys (ZAP) and watches the listeners of one context.

    Its own thread does both; it starts with the first listener.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", keys: Keys, name: str) -> None:
        if not zmq.has("curve"):
            raise ValueError(
                "this build of libzmq has no encryption (CURVE); install pyzmq from its wheel, or "
                "build libzmq with libsodium"
            )
        self.refusals = Tally(logger, f"{name} refused connections")
        self._context, self._keys, self._name = context, keys, name
        self._arriving: deque[_Watch] = deque()
        self._closing = threading.Event()
        self._thread: threading.Thread | None = None

    def listen(self, inbox: "zmq.Socket[bytes]", address: str) -> str:
        """Bind `inbox` to `tcp://host:port` for holders of the member key; return its address.

        Raises ValueError for an invalid address, and ListenError when this machine cannot listen at
        it.
        """
        host, port = parse_url(address)
        try:
            door = Door(host, port)
        except OSError as error:
            raise ListenError(address, error) from None
        self._start()
        _set_limits(inbox)
        inbox.setsockopt(zmq.CURVE_SERVER, 1)
        inbox.setsockopt(zmq.CURVE_SECRETKEY, self._keys.server_secret)
        inbox.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
        inbox.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # without the guard, nobody is let in
        inbox.setsockopt(zmq.USE_FD, door.handle())
        monitor = inbox.get_monitor_socket(_EVENTS)
        monitor.set_hwm(MAX_EVENTS)
        inbox.setsockopt(zmq.IPV6, is_ipv6(door.host))
        own = Address(door.host, door.port).url
        inbox.bind(own)
        self._arriving.append(_Watch(monitor, door, self.refusals))
        return own

    def connect(self, outbox: "zmq.Socket[bytes]", address: str) -> None:
        """Connect `outbox` to the holder of the server key at `tcp://host:port`."""
        host = parse_url(address).host
        _set_limits(outbox)
        outbox.setsockopt(zmq.IPV6, is_ipv6(host))
        outbox.setsockopt(zmq.CURVE_SERVERKEY, self._keys.server_public)
        outbox.setsockopt(zmq.CURVE_PUBLICKEY, self._keys.member_public)
        outbox.setsockopt(zmq.CURVE_SECRETKEY, self._keys.member_secret)
        outbox.connect(address)

    def close(self) -> None:
        """End the thread; nobody new is let in afterwards."""
        if self._thread is None or self._closing.is_set():
            return
        self._closing.set()
        os.write(self._wake_write, b".")
        self._thread.join(timeout=2.0)
        os.close(self._wake_read)
        os.close(self._wake_write)

    def _start(self) -> None:
        if self._thread is not None:
            return
        self._zap = self._context.socket(zmq.ROUTER)
        self._zap.setsockopt(zmq.LINGER, 0)
        self._zap.bind(ZAP_ADDRESS)
        self._wake_read, self._wake_write = os.pipe()
        self._thread = threading.Thread(target=self._run, daemon=True, name=f"guard-{self._name}")
        self._thread.start()

    def _run(self) -> None:
        poller = zmq.Poller()
        poller.register(self._zap, zmq.POLLIN)
        poller.register(self._wake_read, zmq.POLLIN)
        watches: dict[zmq.Socket[bytes], _Watch] = {}
        try:
            while not self._closing.is_set():
                while self._arriving:
                    watch = self._arriving.popleft()
                    watches[watch.monitor] = watch
                    poller.register(watch.monitor, zmq.POLLIN)
                ready = dict(poller.poll(POLL_MS))
                if self._zap in ready:
                    self._answer()
                for watch in watches.values():
                    watch.door.reopen()
                    if watch.monitor in ready:
                        watch.look()
        except zmq.ContextTerminated:
            return
        finally:
            for watch in (*watches.values(), *self._arriving):
                watch.close()
            self._zap.close()

    def _answer(self) -> None:
        frames = self._zap.recv_multipart()
        # address of the asking socket, empty, version, request id, domain, ..., mechanism, key
        good = (
            len(frames) == 9
            and frames[2] == ZAP_VERSION
            and frames[4] == ZAP_DOMAIN
            and frames[7] == b"CURVE"
            and frames[8] == self._keys.member_public
        )
        verdict = [b"200", b"OK"] if good else [b"400", b"key not in the list"]
        request_id = frames[3] if len(frames) > 3 else b""
        self._zap.send_multipart(
            [*frames[:2], ZAP_VERSION, request_id, *verdict, b"", b""], flags=zmq.NOBLOCK
        )


class _Watch:
    """Watches one listener: counts who came, who was refused, and why."""

    def __init__(self, monitor: "zmq.Socket[bytes]", door: Door, refusals: Tally) -> None:
        self.monitor, self.door, self._refusals = monitor, door, refusals
        self._reason: str | None = None  # reason for the next connection that closes
        # libzmq reports that a key was right, but not whose. Until only members are left, each of
        # these may be a stranger. Times at which they came, oldest first.
        self._in_doubt: dict[int, float] = {}
        self._num_passed = self._num_denied = 0  # how many had a right, a wrong member key

    def look(self) -> None:
        """Process the events since the last call."""
        for _ in range(MAX_EVENTS):
            try:
                event = recv_monitor_message(self.monitor, zmq.NOBLOCK)
            except zmq.Again:
                return
            self._take(int(event["event"]), int(event["value"]))

    def _take(self, event: int, value: int) -> None:
        if event == zmq.EVENT_ACCEPTED:
            self._in_doubt[value] = time.monotonic()
            if (kept_out := self.door.entered(value)) is not None:
                self._refusals.add(KEPT_OUT, kept_out)
        elif event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._num_passed += 1
            self._decide()
        elif event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
            self._num_denied += 1  # the peer is told, and may stay until its time is over
        elif event in _REASONS:
            self._reason = _REASONS[event]
        elif event == zmq.EVENT_DISCONNECTED:
            self._left(value)

    def _left(self, descriptor: int) -> None:
        address = self.door.left(descriptor)
        reason, self._reason = self._reason, None
        entered_at = self._in_doubt.pop(descriptor, None)
        if reason is None and entered_at is not None:
            reason = self._guess(entered_at)
        self._decide()
        if reason is not None:
            self._refusals.add(reason, f"from {address}")

    def _guess(self, entered_at: float) -> str | None:
        """Guess why a doubtful connection ended, None for a member; totals stay right anyway."""
        if self._num_denied:
            self._num_denied -= 1
            return WRONG_MEMBER
        if self._num_passed:
            self._num_passed -= 1
            return None
        # libzmq says nothing more about peers that do not speak its protocol
        return WRONG_KEY if time.monotonic() - entered_at < DOUBT_S else None

    def _decide(self) -> None:
        """Take as members all that outlast a handshake, or all once every one has passed."""
        latest = time.monotonic() - DOUBT_S
        while self._in_doubt and next(iter(self._in_doubt.values())) < latest:
            del self._in_doubt[next(iter(self._in_doubt))]
            self._num_passed = max(0, self._num_passed - 1)
        if self._num_passed >= len(self._in_doubt):
            self._in_doubt.clear()
            self._num_passed = self._num_denied = 0

    def close(self) -> None:
        """Stop watching."""
        self.door.close()
        with contextlib.suppress(zmq.ZMQError):
            self.monitor.close(linger=0)


class Line:
    """An outbox's connection; a break loses the messages in flight."""

    def __init__(self, outbox: "zmq.Socket[bytes]", peer: int) -> None:
        self.monitor = outbox.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._peer, self._is_up = peer, False

    def look(self) -> None:
        """Process the events since the last call. Raises LostPeer when an open connection broke."""
        for _ in range(MAX_EVENTS):
            try:
                event = int(recv_monitor_message(self.monitor, zmq.NOBLOCK)["event"])
            except zmq.Again:
                return
            if event == zmq.EVENT_DISCONNECTED and self._is_up:
                cause = f"{LOST}: it broke, or was closed at the other end"
                raise LostPeer.of_rank(self._peer, cause)
            self._is_up = self._is_up or event == zmq.EVENT_HANDSHAKE_SUCCEEDED


def _set_limits(socket: "zmq.Socket[bytes]") -> None:
    """Limit in time and size what a peer, or a pulled cable, can cause."""
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PIECE_BYTES + 1024)  # libzmq wraps pieces in commands
    socket.setsockopt(zmq.HANDSHAKE_IVL, HANDSHAKE_LIMIT_MS)
    socket.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, SILENCE_LIMIT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TTL, SILENCE_LIMIT_MS)
    socket.setsockopt(zmq.CONNECT_TIMEOUT, CONNECT_LIMIT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL, RECONNECT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, RECONNECT_MAX_MS)
    socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
    socket.setsockopt(zmq.TCP_KEEPALIVE_IDLE, 10)
    socket.setsockopt(zmq.TCP_KEEPALIVE_INTVL, 3)
    socket.setsockopt(zmq.TCP_KEEPALIVE_CNT, 3)
    socket.setsockopt(zmq.TCP_MAXRT, UNACKNOWLEDGED_LIMIT_MS)
