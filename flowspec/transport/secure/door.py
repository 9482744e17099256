"""A listening TCP socket that can stop hearing single addresses, so that floods end in the kernel.

The kernel drops their packets by a classic BPF filter on the socket (Linux; needs no privilege).
Connections that are open already do not notice. libzmq by itself accepts connections until the
process has no descriptor left: docs/security.md has what was measured without this filter.
"""

import contextlib
import ctypes
import errno
import ipaddress
import os
import socket
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Any

from flowspec.system.address import ALL_INTERFACES, numeric, unmapped

WINDOW_S = 3.0
MAX_PER_ADDRESS = 64  # new connections of one address within the window
MAX_OPEN = 256  # connections at one time, of all addresses
SHUT_S = 10.0
ALL_SHUT_S = 3.0  # until the handshakes under way have had their time
MAX_SHUT = 64  # addresses in the filter; beyond them nobody new is let in
MAX_ADDRESSES = 1024  # that are remembered
BACKLOG = 64
EVERYBODY = "everybody"
_ATTACH_FILTER, _DETACH_FILTER = 26, 27
_LOAD_WORD, _LOAD_BYTE, _SHIFT_RIGHT = 0x20, 0x30, 0x74
_JUMP, _JUMP_IF_EQUAL, _RETURN = 0x05, 0x15, 0x06
_IP_HEADER = 0xFFF00000
_IPV4_SOURCE, _IPV6_SOURCE = _IP_HEADER + 12, _IP_HEADER + 8
_INSTRUCTION = struct.Struct("HBBI")
_Step = tuple[int, int, int, int]  # code, jump if true, jump if false, operand
_DROP: _Step = (_RETURN, 0, 0, 0)
_KEEP: _Step = (_RETURN, 0, 0, 0xFFFFFFFF)


class Door:
    """Listens at `host:port`, of `*` and `::` at both IPv4 and IPv6; port 0 takes a free one.

    `clock` gives seconds. Raises OSError where the address cannot be had.
    """

    def __init__(
        self, host: str, port: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._socket = _listen(host, port)
        self.host, self.port = numeric(self._socket.getsockname())
        self._open: dict[int, str] = {}
        self._arrivals: OrderedDict[str, deque[float]] = OrderedDict()
        self._shut: dict[str, float] = {}

    def handle(self) -> int:
        """A descriptor of the listening socket for another owner, who closes it."""
        return self._socket.dup().detach()

    def entered(self, descriptor: int) -> str | None:
        """A connection was accepted; who is kept out from now on because of it, if anybody."""
        now, address = self._clock(), _peer(descriptor)
        self._open[descriptor] = address
        if self._is_too_many(address, now):
            return self._keep_out(address, now)
        if len(self._open) > MAX_OPEN:
            return self._keep_out(EVERYBODY, now)
        return None

    def left(self, descriptor: int) -> str:
        """A connection has ended; whose it was."""
        return self._open.pop(descriptor, "unknown")

    def reopen(self) -> None:
        """Hear again those whose time is over."""
        now = self._clock()
        over = [address for address, until in self._shut.items() if until <= now]
        for address in over:
            del self._shut[address]
        if over:
            self._filter()

    def close(self) -> None:
        """Give up this end of the socket."""
        self._socket.close()

    def _is_too_many(self, address: str, now: float) -> bool:
        arrivals = self._arrivals.setdefault(address, deque(maxlen=MAX_PER_ADDRESS + 1))
        self._arrivals.move_to_end(address)
        if len(self._arrivals) > MAX_ADDRESSES:
            self._arrivals.popitem(last=False)
        arrivals.append(now)
        return len(arrivals) > MAX_PER_ADDRESS and now - arrivals[0] < WINDOW_S

    def _keep_out(self, address: str, now: float) -> str | None:
        if address not in self._shut and len(self._shut) >= MAX_SHUT:
            address = EVERYBODY
        known = address in self._shut
        self._shut[address] = now + (ALL_SHUT_S if address == EVERYBODY else SHUT_S)
        if known:
            return None
        self._filter()
        return address

    def _filter(self) -> None:
        # Where the kernel has no such filter, the time limit of handshakes must do.
        with contextlib.suppress(OSError):
            if not self._shut:
                self._socket.setsockopt(socket.SOL_SOCKET, _DETACH_FILTER, 0)
                return
            program = b"".join(_INSTRUCTION.pack(*step) for step in _steps(set(self._shut)))
            memory = ctypes.create_string_buffer(program)
            about = struct.pack("HP", len(program) // _INSTRUCTION.size, ctypes.addressof(memory))
            self._socket.setsockopt(socket.SOL_SOCKET, _ATTACH_FILTER, about)


def _listen(host: str, port: int) -> socket.socket:
    """A socket that listens at the first of the host's addresses that this machine has."""
    if host == ALL_INTERFACES:
        try:
            return _listen_at(socket.AF_INET6, ("::", port))
        except OSError as error:
            if error.errno not in (errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL):
                raise
        return _listen_at(socket.AF_INET, ("0.0.0.0", port))  # IPv6 is switched off here
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # of a name that has both
    refusal: OSError | None = None
    for family, _, _, _, address in found:
        try:
            return _listen_at(family, address)
        except OSError as error:
            refusal = refusal or error
    raise refusal or OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL))


def _listen_at(family: int, address: Any) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:  # `::` is for IPv4 too, whatever the system's default
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def _steps(shut: set[str]) -> list[_Step]:
    """The filter: drop what comes from these addresses, keep the rest."""
    if EVERYBODY in shut:
        return [_DROP]
    numbers = [number for text in sorted(shut) if (number := _number(text)) is not None]
    ipv4: list[_Step] = [(_LOAD_WORD, 0, 0, _IPV4_SOURCE)]
    ipv6: list[_Step] = []
    for number in numbers:
        if number.version == 4:
            ipv4 += [(_JUMP_IF_EQUAL, 0, 1, int(number)), _DROP]
            continue
        words = struct.unpack("!4I", number.packed)
        for index, word in enumerate(words):  # one that differs skips the rest of this address
            ipv6.append((_LOAD_WORD, 0, 0, _IPV6_SOURCE + 4 * index))
            ipv6.append((_JUMP_IF_EQUAL, 0, 2 * (len(words) - index) - 1, word))
        ipv6.append(_DROP)
    return [
        (_LOAD_BYTE, 0, 0, _IP_HEADER),
        (_SHIFT_RIGHT, 0, 0, 4),
        (_JUMP_IF_EQUAL, 0, 1, 6),  # the version
        (_JUMP, 0, 0, len(ipv4) + 1),
        *ipv4,
        _KEEP,
        *ipv6,
        _KEEP,
    ]


def _number(text: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _peer(descriptor: int) -> str:
    """Who is at the other end of a descriptor that somebody else owns, and may close any time."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as twin:
            if twin.family not in (socket.AF_INET, socket.AF_INET6):
                return "unknown"  # it was closed, and its number is another socket's by now
            return unmapped(str(twin.getpeername()[0]))
    except OSError:
        return "unknown"
