"""The messages of the cluster: frozen dataclasses, every one with its request's id.

flowspec/codec.py turns them into bytes; docs/wire_protocol.md describes each field. Shapes: n rows,
H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from torch import Tensor

from flowspec.request import FinishReason, NodeId, Request, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Open:
    """Head to stages, along the pipe: make room for a request."""

    request: int
    capacity: int  # KV rows, tree rows included
    context: int  # longest path: prompt and every token that may be generated
    sampling: SamplingParams = SamplingParams()
    feature_layers: tuple[
        int, ...
    ] = ()  # output-of-layer ids the drafter wants, -1: after the norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Rows of the tree (or, with `prefix`, tokens known to be true) travelling through the stages.

    `hidden` is None before stage 1. Parents come before children. An empty segment still travels.
    """

    request: int
    seq_no: int
    nodes: tuple[NodeId, ...]
    parents: tuple[NodeId, ...]
    tokens: tuple[int, ...]
    hidden: Tensor | None = None  # [n, H]
    prefix: bool = False
    verify: bool = True  # False: the verifier keeps its verdict for a later segment
    slowest_rows: int = 0  # the slowest forward on the way so far: its rows and milliseconds
    slowest_ms: float = 0.0
    verdict: "Reroot | None" = None  # newest one the head knew: bounds how late a stage learns it

    def select(self, rows: Sequence[int]) -> "Segment":
        """The segment with only these of its rows."""
        if len(rows) == len(self.nodes):
            return self
        hidden = self.hidden
        if hidden is not None:
            hidden = hidden[list(rows)] if rows else None
        return replace(
            self,
            nodes=tuple(self.nodes[row] for row in rows),
            parents=tuple(self.parents[row] for row in rows),
            tokens=tuple(self.tokens[row] for row in rows),
            hidden=hidden,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Close:
    """Head to stages, along the pipe: forget a request."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reroot:
    """Last stage to everybody: the path down to `parent` is committed, `token` comes next.

    `position` is the token's; what does not descend from parent's child with that token is dead.
    """

    request: int
    position: int
    parent: NodeId
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """First stage to head: this segment's forward begins (or it was empty): there is room again."""

    request: int
    seq_no: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit:
    """Last stage to head: this segment left the pipe with `rows` of its rows still alive."""

    request: int
    seq_no: int
    rows: int
    slowest_rows: int
    slowest_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """A stage to head: hidden states [n, H] of accepted nodes at feature layer `layer`."""

    request: int
    layer: int
    nodes: tuple[NodeId, ...]
    hidden: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A stage to head: totals since its start."""

    stage: int
    busy_s: float
    num_segments: int
    num_rows_run: int
    num_rows_pruned: int  # dropped in flight: dead before this stage ran them
    num_requests: int  # caches held now


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """A stage to head: it cannot go on (request 0) or cannot serve this request."""

    stage: int
    request: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A stage to head: loaded and listening. `model` is the manifest's model hash."""

    stage: int
    model: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Head to a stage that has been silent: it answers with a Status between two forwards."""

    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Head to stages: end."""


# Between the head and its client, inside one process; these have no bytes.
@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Client to head: generate."""

    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Cancel:
    """Client to head: end this request now, keep what it has."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """Head to client: newly accepted tokens and the text that is now certain."""

    request: int
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Head to client: the request is over. `error` says why where the reason is ERROR."""

    request: int
    reason: FinishReason
    error: str = ""


WireMessage: TypeAlias = (
    Open
    | Segment
    | Close
    | Reroot
    | Started
    | Exit
    | Features
    | Status
    | Failed
    | Ready
    | Ping
    | Stop
)
Message: TypeAlias = WireMessage | Submit | Cancel | Tokens | Finished
DATA = (
    Open,
    Segment,
    Close,
)  # these keep their order from head to last stage; the rest may overtake
