"""What the head's two threads say to one another: commands to the core, and what came of them."""

from dataclasses import dataclass
from typing import TypeAlias

from flowspec.cluster.messages import Addresses, Ask, Done
from flowspec.cluster.roster import Engage, GiveUp, Halt, Resume


@dataclass(frozen=True, slots=True)
class NewRequest:
    """Answer `ask`; all that is told about it carries `ticket`."""

    ticket: int
    ask: Ask


@dataclass(frozen=True, slots=True)
class CancelTicket:
    """End it now."""

    ticket: int


@dataclass(frozen=True, slots=True)
class HeadBound:
    """The head's data sockets for this epoch."""

    epoch: int
    addresses: Addresses


@dataclass(frozen=True, slots=True)
class StageLost:
    """A stage takes or answers nothing."""

    epoch: int
    rank: int
    cause: str


@dataclass(frozen=True, slots=True)
class Crossed:
    """A token has come through every stage of this epoch; told once for each."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Blamed:
    """A request has ended, for devices were lost `count` times while it was served."""

    count: int


@dataclass(frozen=True, slots=True)
class MoreText:
    """Newly accepted tokens of a request."""

    ticket: int
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over; `done.id` is left to whoever knows the client."""

    ticket: int
    done: Done


Command: TypeAlias = Engage | Resume | Halt | GiveUp | NewRequest | CancelTicket
Event: TypeAlias = HeadBound | StageLost | Crossed | Blamed | MoreText | Ended
