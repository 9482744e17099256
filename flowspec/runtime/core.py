"""What the state machines (cores) give back to whoever drives them: messages to send, work to run.

A core owns no socket, thread, sleep or clock. A driver (the simulator or a real process) feeds it
messages with `handle` and, when the inbox is empty, asks `poll` for the next thing to do. While a
core's work runs, its messages wait: a device does one thing at a time. Work that runs `beside` its
core leaves it free for messages and sends; it gives no other work before that is finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flowspec.protocol.messages import Message


@dataclass(frozen=True, slots=True)
class Send:
    """Give `message` to rank `to`; its kind decides whether it travels as control or as data."""

    to: int
    message: Message


@dataclass(frozen=True, slots=True)
class Work:
    """A computation: `run` does it, `finish(now, elapsed)` gives what follows; times in seconds.

    kind and sizes are what a device profile needs to charge it: "forward" (a stage's layers),
    "verify" (layers, lm_head and sampler), "draft" (one drafter forward).
    """

    kind: str
    rows: int
    context: int
    run: Callable[[], None]
    finish: Callable[[float, float], Sequence[Send]]
    about: Mapping[str, Any] = field(default_factory=dict)  # for traces: request, nodes, segments
    beside: bool = False  # `run` touches nothing of the core: it may run in a thread of its own
    done: bool = False  # and has nothing to do: it need not


@dataclass(frozen=True, slots=True)
class Step:
    """Messages to send now, then work to run (or none)."""

    sends: Sequence[Send] = ()
    work: Work | None = None


class Core(Protocol):
    """A state machine without input/output."""

    rank: int

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Take one message in; never computes."""

    def poll(self, now: float) -> Step | None:
        """The next thing to do, asked when no message waits; None: wait for a message."""
