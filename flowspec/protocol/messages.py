"""The messages of the cluster: frozen dataclasses, every one with its request's id.

flowspec/protocol/codec.py turns them into bytes; docs/wire_protocol.md describes each field.
Shapes: n rows, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

from flowspec.request import FinishReason, NodeId, Request, SamplingParams

CLIENT = -1  # rank of whoever submitted a request, seen from the head
HEAD = 0
EVERY_STAGE = -2  # as a destination: stages 1..N, the sender left out

if TYPE_CHECKING:  # a client of a head has no tensors, and importing torch takes seconds
    from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class OfEpoch:
    """Belongs to one life of the pipeline; after a stage was lost the head begins another.

    Who knows of a newer epoch drops what is of an older one, wherever it comes from.
    """

    epoch: int = 0
    # who sent it, and as which of its messages (flowspec/protocol/sequencing.py); 0: not
    # counted
    source: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest(OfEpoch):
    """Head to stages, along the pipe: make room for a request."""

    request: int
    capacity: int  # KV rows, tree rows included
    context: int  # longest path: prompt and every token that may be generated
    sampling: SamplingParams = SamplingParams()
    # output-of-layer ids the drafter wants, -1: after the norm
    aux_hidden_state_layers: tuple[int, ...] = ()
    reuse: int = 0  # a kept request: its first num_cached_tokens rows are copied; it stays
    num_cached_tokens: int = 0
    # leading tokens of the prefix that are the prompt; those behind them were generated before a
    # stage was lost. 0: all are
    num_prompt_tokens: int = 0


MAX_CANDIDATES = 64  # of a row
MAX_SUPPORT = 1024  # tokens of the distribution that a row's candidates were drawn from


@dataclass(frozen=True, slots=True)
class Candidates:
    """The child tokens that the choice after a row may consider, in the drafter's order.

    `drawn_from` is the distribution that they were drawn from, as (token, probability) of all its
    tokens; empty: they were not drawn, each is as good as certain to be proposed.
    """

    tokens: tuple[int, ...] = ()
    drawn_from: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment(OfEpoch):
    """Rows of the tree (or, with `prefix`, tokens known to be true) travelling through the stages.

    `hidden` is None before stage 1. Parents come before children. An empty segment still travels.
    """

    request: int
    seq_no: int
    nodes: tuple[NodeId, ...]
    parents: tuple[NodeId, ...]
    tokens: tuple[int, ...]
    hidden: "Tensor | None" = None  # [n, H]
    prefix: bool = False
    verify: bool = True  # False: the verifier keeps its verdict for a later segment
    slowest_rows: int = 0  # the slowest forward on the way so far: its rows and milliseconds
    slowest_ms: float = 0.0
    verdict: "Reroot | None" = None  # newest one the head knew: bounds how late a stage learns it
    # of each row, fixed when it was sent; empty where the request's acceptance rule needs none
    candidates: tuple[Candidates, ...] = ()

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
            candidates=tuple(self.candidates[row] for row in rows) if self.candidates else (),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch(OfEpoch):
    """Segments of several requests that travel and run as one, so that weights are read once.

    The first one speaks for all in `Started`, `Exit` and `slowest_*`. A segment that travels alone
    goes without a batch.
    """

    segments: tuple[Segment, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRequest(OfEpoch):
    """Head to stages, along the pipe: a request is over.

    Its memory is free, unless `keep`: then what is committed by `verdict` stays for an `AddRequest`
    that reuses it, or until a second `FinishRequest`.
    """

    request: int
    keep: bool = False
    verdict: "Reroot | None" = None  # newest one the head knew


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeRequest(OfEpoch):
    """Head to stages: free a request at once, also its rows on the way. FinishRequest follows."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset(OfEpoch):
    """Head to stages: forget every request of an older epoch; the weights stay loaded."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reroot(OfEpoch):
    """Last stage to everybody: the path down to `parent` is committed, `token` comes next.

    `position` is the token's; what does not descend from parent's child with that token is dead.
    """

    request: int
    position: int
    parent: NodeId
    token: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(OfEpoch):
    """First stage to head: the forward of this segment (or its batch) begins; there is room."""

    request: int
    seq_no: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit(OfEpoch):
    """Last stage to head: this segment (or its batch) left with `rows` of its rows alive."""

    request: int
    seq_no: int
    rows: int
    slowest_rows: int
    slowest_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Features(OfEpoch):
    """A stage to head: hidden states [n, H] of accepted nodes at feature layer `layer`."""

    request: int
    layer: int
    nodes: tuple[NodeId, ...]
    hidden: "Tensor"


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A stage to head: totals since its start."""

    stage: int
    busy_s: float
    num_segments: int
    num_rows_run: int
    num_rows_pruned: int  # dropped in flight: dead before this stage ran them
    num_requests: int  # caches held now, kept ones included
    kv_rows_used: int = 0  # that those caches take
    peak_memory_bytes: int = 0  # of the process, 0: not known
    num_closes: int = 0  # `FinishRequest`s taken in, of this epoch


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(OfEpoch):
    """A stage to head: it cannot go on (request 0) or cannot serve this request."""

    stage: int
    request: int
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A stage to head: loaded and listening. `model` is the manifest's model hash."""

    stage: int
    model: str
    kv_rows: int = 0  # rows of all requests together that its memory holds; 0: no limit known


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Head to a stage that has been silent: it answers with a Status between two forwards."""

    rank: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Head to stages: end."""


# Between the head and its client or process, inside one process; these have no bytes.
@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Client to head: generate."""

    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequest:
    """Client to head: end this request now, keep what it has."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspend:
    """Its process to the head: a stage is lost; nothing more is sent until `Resume`.

    A new epoch begins. Requests that had begun wait again, ahead of those that had not. With
    `blames` one of them may be the cause: it ends if this happens to it again at once.
    """

    cause: str = ""  # which device, and what became of it
    blames: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Its process to the head: the layers are covered again, by this many stages.

    `kv_rows` is what the tightest one holds (0: no limit known). A head that serves already may be
    told too: it then suspends itself first.
    """

    num_stages: int
    kv_rows: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class GiveUp:
    """Its process to the head: end every request with this error; what was generated stays."""

    error: str


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
    AddRequest
    | Segment
    | Batch
    | FinishRequest
    | FreeRequest
    | Reset
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
Message: TypeAlias = (
    WireMessage | Submit | AbortRequest | Suspend | Resume | GiveUp | Tokens | Finished
)
# these keep their order from head to last stage; the rest may overtake
DATA = (AddRequest, Segment, Batch, FinishRequest)


def segments_of(message: Message) -> tuple[Segment, ...]:
    """The segments that travel in a message."""
    if isinstance(message, Batch):
        return message.segments
    return (message,) if isinstance(message, Segment) else ()


def epoch_of(message: Message) -> int | None:
    """The epoch a message belongs to; None: to no one in particular."""
    return message.epoch if isinstance(message, OfEpoch) else None


def stamped(message: WireMessage, *, epoch: int, source: int, number: int) -> WireMessage:
    """The message, and a verdict that it carries, as of `epoch`, where it can be of one."""
    if not isinstance(message, OfEpoch):
        return message
    if isinstance(message, Segment | FinishRequest) and message.verdict is not None:
        message = replace(message, verdict=replace(message.verdict, epoch=epoch))
    return replace(message, epoch=epoch, source=source, number=number)


def together(segments: Sequence[Segment]) -> Segment | Batch:
    """What carries `segments` (at least one)."""
    if len(segments) == 1:
        return segments[0]
    return Batch(epoch=segments[0].epoch, segments=tuple(segments))
