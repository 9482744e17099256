"""A listening TCP socket that can stop hearing single addresses, so that floods end in the kernel.

The kernel drops their packets by a classic BPF filter on the socket (Linux; needs no privilege).
Connections that are open already do not notice.
"""

import contextlib
import ctypes
import ipaddress
import os
import socket
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable

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
_LOAD_WORD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_SOURCE_ADDRESS = 0xFFF00000 + 12  # in the IPv4 header
_INSTRUCTION = struct.Struct("HBBI")


class Door:
    """Listens at `host:port` (IPv4); port 0 takes a free one.

    `clock` gives seconds. Raises OSError where the address cannot be had.
    """

    def __init__(
        self, host: str, port: int, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._clock = clock
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._socket.bind((host, port))
            self._socket.listen(BACKLOG)
            self._socket.setblocking(False)
        except OSError:
            self._socket.close()
            raise
        self.host, self.port = self._socket.getsockname()
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


def _steps(shut: set[str]) -> list[tuple[int, int, int, int]]:
    """The filter: drop what comes from these addresses, keep the rest."""
    drop, keep = (_RETURN, 0, 0, 0), (_RETURN, 0, 0, 0xFFFFFFFF)
    numbers = [int(ipaddress.IPv4Address(a)) for a in shut - {EVERYBODY} if _is_ipv4(a)]
    if EVERYBODY in shut:
        return [drop]
    jumps = [(_JUMP_IF_EQUAL, len(numbers) - i, 0, number) for i, number in enumerate(numbers)]
    return [(_LOAD_WORD, 0, 0, _SOURCE_ADDRESS), *jumps, keep, drop]


def _is_ipv4(text: str) -> bool:
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True


def _peer(descriptor: int) -> str:
    """Who is at the other end of a descriptor that somebody else owns, and may close any time."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as twin:
            return str(twin.getpeername()[0])
    except OSError:
        return "unknown"
