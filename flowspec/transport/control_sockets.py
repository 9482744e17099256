"""Control sockets of a cluster: one ROUTER on the head, one DEALER on every device and client.

Both are encrypted and authenticated by the cluster's token (transport/secure/curve.py). A message
is cut into pieces, whose size the sockets limit before they read them. This module does not know
what messages mean.
"""

import socket
import time
from collections import OrderedDict, deque

import zmq
from zmq.utils.monitor import recv_monitor_message

from flowspec.system.address import Address, parse_url, resolve, unmapped, zone_of
from flowspec.transport.secure.curve import MAX_PIECE_BYTES, Guard, ListenError
from flowspec.transport.secure.keys import Keys
from flowspec.transport.wake import Wake

MAX_PIECES = 256
MAX_QUEUED = 1000  # messages per peer and direction
LINGER_MS = 500
BURST = 256  # messages taken before the caller can act on them
CONNECT_TIMEOUT_S = 3.0
MAX_PEERS = 1024  # peers whose address is remembered
# Handshakes that must be broken off before the token is blamed; a restarting head breaks one.
MAX_BROKEN_OFF = 3
WRONG_TOKEN = (
    "the handshake was broken off: the token is not this cluster's, or that program is no "
    "FlowSpec head; copy the whole line that `flowspec serve` printed"
)

NO_HANDSHAKE = "it answers, but the handshake did not end in time; is the network unstable?"
BROKEN_OFF = (
    zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
)


class UnreachableError(Exception):
    """The connection to this peer is gone, or the peer accepts nothing."""


class ControlServer:
    """Listens at host:port; `receive` gives each peer's name with its messages.

    `host` is the numeric address that it listens at.
    """

    def __init__(self, host: str, port: int, keys: Keys) -> None:
        self._context = zmq.Context()
        self.guard = Guard(self._context, keys, "head")
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.set_hwm(MAX_QUEUED)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        try:
            address = self.guard.listen(self._socket, Address(host, port).url)
        except ListenError as error:
            self.guard.close()
            self._context.destroy(linger=0)
            if error.is_in_use:
                fix = "is another `flowspec serve` running? choose another --port"
            else:
                fix = "choose a --host that this machine has; without it all are listened at"
            raise ValueError(f"{error}; {fix}") from None
        self.host, self.port = parse_url(address)
        self._hosts: OrderedDict[bytes, str] = OrderedDict()
        self._wake = Wake()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._wake, zmq.POLLIN)

    def receive(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        """Return the (peer, message) pairs that have come; wait at most `timeout_s` for one."""
        self._poller.poll(int(timeout_s * 1e3))
        self._wake.clear()
        messages = []
        for _ in range(BURST):
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                break
            peer, *pieces = [frame.bytes for frame in frames]
            self._note_host(peer, unmapped(str(frames[-1].get("Peer-Address"))))
            messages.append((peer, _joined(pieces)))
        return messages

    def host_of(self, peer: bytes) -> str:
        """Return the address a peer last sent from, with this machine's zone; empty if unknown."""
        return self._hosts.get(peer, "")

    def send(self, peer: bytes, message: bytes) -> None:
        """Send a message without waiting. Raises UnreachableError."""
        try:
            self._socket.send_multipart([peer, *_cut(message)], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise UnreachableError(error.strerror) from None

    def wake(self) -> None:
        """End a waiting `receive`; any thread may call this, also after `close`."""
        self._wake.set()

    def close(self) -> None:
        """Close the socket; messages that were sent are still delivered within half a second."""
        self.guard.close()
        self._context.destroy(linger=LINGER_MS)
        self._wake.close()

    def _note_host(self, peer: bytes, host: str) -> None:
        if self._hosts.get(peer) != host:
            self._hosts[peer] = host
            if len(self._hosts) > MAX_PEERS:
                self._hosts.popitem(last=False)


class ControlClient:
    """A connection to the head's control socket.

    A name may have several addresses. They are tried in order, and `host` is the one in use.
    """

    def __init__(self, host: str, port: int, keys: Keys) -> None:
        self._context = zmq.Context()
        self._guard = Guard(self._context, keys, "client")
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.set_hwm(MAX_QUEUED)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_DISCONNECTED
        )
        self.is_connected = False
        self._where, self._url = Address(host, port), ""
        self.host, self._left = host, _addresses(host, port)
        self._why_none = "" if self._left else why_unreachable(host, port)
        self._try_next()
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._wake = Wake()
        self._poller.register(self._wake, zmq.POLLIN)

    def connect(self, timeout_s: float) -> str:
        """Connect within `timeout_s`; return the reason of a failure, else an empty text."""
        if self._why_none:
            return self._why_none
        end, num_broken_off = time.monotonic() + timeout_s, 0
        while not self.is_connected and num_broken_off < MAX_BROKEN_OFF:
            left_s = end - time.monotonic()
            if left_s <= 0 or not self._monitor.poll(int(left_s * 1e3)):
                break
            event = int(recv_monitor_message(self._monitor)["event"])
            self.is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
            num_broken_off += event in BROKEN_OFF
            if event == zmq.EVENT_CONNECT_RETRIED:
                if self._left:
                    self._try_next()
                elif reason := why_unreachable(*self._where):
                    return reason
        if self.is_connected:
            return ""
        if reason := why_unreachable(*self._where):
            return reason
        why = WRONG_TOKEN if num_broken_off >= MAX_BROKEN_OFF else NO_HANDSHAKE
        return f"{self._where}: {why}"

    def receive(self, timeout_s: float) -> list[bytes]:
        """Return the messages that have come; wait at most `timeout_s`.

        May set `is_connected` False.
        """
        self._poller.poll(int(timeout_s * 1e3))
        self._wake.clear()
        while self._monitor.poll(0):
            event = int(recv_monitor_message(self._monitor)["event"])
            self.is_connected = event == zmq.EVENT_HANDSHAKE_SUCCEEDED
        messages = []
        for _ in range(BURST):
            try:
                messages.append(_joined(self._socket.recv_multipart(zmq.NOBLOCK)))
            except zmq.Again:
                break
        return messages

    def send(self, message: bytes) -> None:
        """Send a message without waiting. Raises UnreachableError when too much waits already."""
        try:
            self._socket.send_multipart(_cut(message), zmq.NOBLOCK)
        except zmq.ZMQError as error:
            raise UnreachableError(error.strerror) from None

    def wake(self) -> None:
        """End a waiting `receive`; any thread may call this."""
        self._wake.set()

    def close(self) -> None:
        """Close the socket; messages that were sent are still delivered within half a second."""
        self._guard.close()
        self._socket.disable_monitor()
        self._context.destroy(linger=LINGER_MS)
        self._wake.close()

    def _try_next(self) -> None:
        """Replace the address in use by the host's next one."""
        if not self._left:
            return
        if self._url:
            self._socket.disconnect(self._url)
        address = self._left.popleft()
        self.host, self._url = address.host, address.url
        self._guard.connect(self._socket, self._url)


def _addresses(host: str, port: int) -> deque[Address]:
    """Return the host's numeric addresses; none if it has none."""
    try:
        return deque(resolve(host, port))
    except OSError:
        return deque()


def why_unreachable(host: str, port: int, timeout_s: float = CONNECT_TIMEOUT_S) -> str:
    """Return why no TCP connection to host:port is possible and what to do; empty if one is."""
    try:
        socket.create_connection((host, port), timeout_s).close()
    except socket.gaierror as error:
        if zone := zone_of(host):
            return (
                f"{host} cannot be reached: this device has no interface {zone}; after the %, "
                "write one that `ip link` lists"
            )
        return f"no address is known for {host} ({error.strerror}); give its IP address"
    except ConnectionRefusedError:
        return (
            f"{host} refuses port {port}: nothing listens there; is `flowspec serve` running with "
            "this --port, and not with a --host of another address?"
        )
    except TimeoutError:
        return (
            f"{host} does not answer at port {port} within {timeout_s:.0f} s: a firewall drops it, "
            "or this device is not in that address's network; open the port on the head, or "
            "use an address that `flowspec serve` lists"
        )
    except OSError as error:
        return f"{Address(host, port)}: {error.strerror or error}; check cable, Wi-Fi and address"
    return ""


def has_curve() -> bool:
    """Whether the installed libzmq can encrypt."""
    return bool(zmq.has("curve"))


def _cut(message: bytes) -> list[bytes]:
    return [
        message[start : start + MAX_PIECE_BYTES]
        for start in range(0, max(len(message), 1), MAX_PIECE_BYTES)
    ]


def _joined(pieces: list[bytes]) -> bytes:
    """Return one message; it is empty, and so invalid, if there are more pieces than allowed."""
    return b"".join(pieces) if len(pieces) <= MAX_PIECES else b""
