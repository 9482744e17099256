"""The interface of a core: a state machine that returns messages to send and work to run.

A core owns no socket, thread, sleep or clock. An event loop (of a real process, or the simulator)
passes it messages with `handle`; when the inbox is empty, it asks `poll` for the next step. While a
core's work runs, its messages wait, because a device does one thing at a time. Work that runs
`beside` its core leaves the core free for messages and sends; the core gives no other work until
that is finished.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from flowspec.protocol.messages import Message


@dataclass(frozen=True, slots=True)
class Send:
    """Send `message` to rank `to`; its kind decides whether it travels as control or as data."""

    to: int
    message: Message


@dataclass(frozen=True, slots=True)
class Work:
    """A computation: `run` performs it, `finish(now, elapsed)` returns the sends that follow.

    Times are in seconds. A device profile charges it by kind and sizes: "forward" (a stage's
    layers), "verify" (layers, lm_head and sampler), "draft" (one drafter forward).
    """

    kind: str
    rows: int
    context: int
    run: Callable[[], None]
    finish: Callable[[float, float], Sequence[Send]]
    about: Mapping[str, Any] = field(default_factory=dict)  # for traces: request, nodes, segments
    beside: bool = False  # `run` touches no state of the core, so it may run in its own thread
    done: bool = False  # there is nothing to run


@dataclass(frozen=True, slots=True)
class Step:
    """Messages to send now, then work to run, if any."""

    sends: Sequence[Send] = ()
    work: Work | None = None


class Core(Protocol):
    """A state machine without input or output."""

    rank: int

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Take one message in; this never computes."""

    def poll(self, now: float) -> Step | None:
        """Return the next step, asked when no message waits; None means wait for a message."""
