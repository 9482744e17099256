"""A client of a running head: ask, follow the answer, look at the cluster."""

import time
from collections.abc import Iterator
from itertools import count
from types import TracebackType

from pydantic import ValidationError

import flowspec
from flowspec.protocol.control import (
    MAX_ASK_BYTES,
    Ask,
    AskStatus,
    ClusterStatus,
    Control,
    Done,
    Drop,
    Note,
    Piece,
    Refuse,
    pack,
    unpack,
)
from flowspec.request import ClusterError, RefusedError
from flowspec.system import signals
from flowspec.system.address import Address
from flowspec.system.open_files import check_open_files
from flowspec.transport.control_sockets import WRONG_TOKEN, ControlClient, UnreachableError
from flowspec.transport.secure.keys import Keys

HANDSHAKE_TIMEOUT_S = 5.0
STATUS_TIMEOUT_S = 5.0
POLL_S = 0.2
MIN_FILES = 32
SILENCE_S = 10.0  # of a head that has been asked whether it is there
FORGOTTEN_AFTER = 3  # such words, each after so long a silence, that it serves nobody


class HeadClient:
    """A connection to the head at host:port.

    Raises ClusterError where it cannot be had, with why; RefusedError where the token is another.

    Use it with `with`.
    """

    def __init__(self, host: str, port: int, keys: Keys) -> None:
        check_open_files(MIN_FILES)
        self.where = f"head at {Address(host, port)}"
        self.control = ControlClient(host, port, keys)
        self._ids = count(1)
        if reason := self.control.connect(HANDSHAKE_TIMEOUT_S):
            self.control.close()
            raise (RefusedError if WRONG_TOKEN in reason else ClusterError)("head", reason)

    def __enter__(self) -> "HeadClient":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hang up; what is open is cancelled by the head."""
        self.control.close()

    def new_ask(self, **fields: object) -> Ask:
        """An Ask with an id of its own and this package's version. Raises ValueError."""
        content = {"version": flowspec.__version__, "id": next(self._ids), **fields}
        try:
            ask = Ask.model_validate(content, strict=False)
        except ValidationError as error:
            raise ValueError(_why_invalid(error)) from None
        if (size := len(pack(ask))) > MAX_ASK_BYTES:
            raise ValueError(_too_long(size))
        return ask

    def ask(self, ask: Ask) -> Iterator[Piece | Note | Done]:
        """Follow one answer to its Done. Whoever turns away early cancels it.

        Raises ClusterError where the head is lost or has forgotten it, RefusedError where it
        speaks to other versions.
        """
        with signals.undoing():  # who turns away takes the request back
            yield from self._follow(ask)

    def _follow(self, ask: Ask) -> Iterator[Piece | Note | Done]:
        self._send(ask)
        heard_at, is_done, has_asked = time.monotonic(), False, False
        num_idle = 0  # of its last words, how many said that it serves nobody
        try:
            while True:
                signals.check()
                for message in self._receive():
                    heard_at, has_asked = time.monotonic(), False
                    num_idle = self._count_idle(message, num_idle)
                    if isinstance(message, Refuse):
                        is_done = True
                        raise RefusedError(self.where, message.why)
                    if isinstance(message, Piece | Note | Done) and message.id == ask.id:
                        is_done = isinstance(message, Done)
                        yield message
                        if is_done:
                            return
                silence_s = time.monotonic() - heard_at
                if not self.control.is_connected:
                    raise ClusterError(self.where, "connection lost")
                if silence_s > SILENCE_S and not has_asked:
                    self._send(AskStatus(version=flowspec.__version__))  # any word will do
                    has_asked = True
                if silence_s > 2 * SILENCE_S:
                    raise ClusterError(self.where, f"no word from it for {silence_s:.0f} s")
        finally:
            if not is_done:
                self._send(Drop(id=ask.id))

    def status(self) -> ClusterStatus:
        """The cluster now. Raises ClusterError where the head does not answer or refuses."""
        self._send(AskStatus(version=flowspec.__version__))
        end = time.monotonic() + STATUS_TIMEOUT_S
        while time.monotonic() < end:
            for message in self._receive():
                if isinstance(message, ClusterStatus):
                    return message
                if isinstance(message, Refuse):
                    raise RefusedError(self.where, message.why)
        raise ClusterError(self.where, f"no answer within {STATUS_TIMEOUT_S:.0f} s")

    def _count_idle(self, message: Control, before: int) -> int:
        """How many words in a row say that no request is open, the one asked for neither.

        Raises ClusterError where these are too many.
        """
        if not isinstance(message, ClusterStatus):
            return 0
        if message.requests_active or message.requests_waiting:
            return 0
        if before + 1 >= FORGOTTEN_AFTER:
            raise ClusterError(self.where, "it serves nobody now, and has not answered: ask again")
        return before + 1

    def _receive(self) -> Iterator[Control]:
        for frame in self.control.receive(POLL_S):
            yield unpack(frame)

    def _send(self, message: Control) -> None:
        try:
            self.control.send(pack(message))
        except UnreachableError as error:
            raise ClusterError(self.where, str(error)) from None


def _why_invalid(error: ValidationError) -> str:
    """The first thing that is wrong with an Ask, for a person."""
    first = error.errors(include_url=False)[0]
    place, value, limits = first["loc"], first["input"], first.get("ctx", {})
    kind = first["type"]
    if place[0] == "turns" and place[-1] == "content" and kind == "string_too_long":
        return _too_long(len(value.encode(errors="replace")))
    if kind == "string_unicode":
        return "the text has half of a surrogate pair, which is no character; remove it"
    if place[0] == "turns" and kind == "too_long":
        return (
            f"the conversation has {len(value)} messages, at most {limits['max_length']} are sent"
        )
    if place[0] == "stop" and kind == "too_long":
        return f"{len(value)} stop strings are given, at most {limits['max_length']} can be"
    if place[0] == "stop" and kind == "string_too_long":
        most = limits["max_length"]
        return f"a stop string has {len(value)} characters, at most {most} are possible"
    name = ".".join(str(part) for part in place)
    return f"{name} cannot be {value!a}: {first['msg'].lower()}"


def _too_long(size: int) -> str:
    return (
        f"the conversation takes {size:,} bytes, at most {MAX_ASK_BYTES:,} can be sent to the "
        "head; shorten it"
    )
