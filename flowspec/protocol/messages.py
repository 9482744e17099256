"""The messages between head and stages: frozen dataclasses, most with the id of their request.

The messages in WireMessage travel between processes. flowspec/protocol/codec.py encodes them by the
types of their fields, so each type has bounds. docs/wire_protocol.md describes the fields. Shapes:
n rows, H hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Literal, TypeAlias

from pydantic import FailFast, Field

from flowspec.protocol.schema import (
    INT64,
    Count,
    CutText,
    Int32,
    Milliseconds,
    Name,
    Seconds,
    UInt32,
)
from flowspec.request import (
    Failure,
    NodeId,
    Request,
    RequestOutput,
    SamplingParams,
    TokensOut,
)

CLIENT = -1  # rank of the sender of requests, as seen from the head
HEAD = 0
DRAFTER = -3  # a drafter that pushes its drafts, beside the head or elsewhere
EVERY_STAGE = -2  # as a destination: stages 1..N without the sender

if TYPE_CHECKING:
    from torch import Tensor
else:  # importing torch takes seconds, and a client of a head has no tensors
    from flowspec.protocol.schema import TensorField as Tensor

MAX_ROWS = 4096  # of a segment, and of a whole batch
MAX_BATCH = 16  # segments, and so requests, in a batch
MAX_LAYERS = 4096
MAX_CONTEXT_TOKENS = 1 << 20  # of a prompt and its answer, in one message

Node: TypeAlias = Annotated[NodeId, INT64]
Nodes: TypeAlias = Annotated[tuple[Node, ...], Field(max_length=MAX_ROWS), FailFast()]
TokenIds: TypeAlias = Annotated[tuple[Int32, ...], Field(max_length=MAX_ROWS), FailFast()]


@dataclass(frozen=True, slots=True, kw_only=True)
class OfEpoch:
    """A message of one epoch. An epoch is one life of the pipeline; the loss of a stage ends it.

    A receiver drops messages of older epochs than the newest that it knows. `source` is the rank
    that sends the message. `number` counts the sender's messages to one receiver (see
    sequencing.py); 0: the message is not counted.
    """

    epoch: UInt32 = 0
    source: Int32 = 0
    number: UInt32 = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AddRequest(OfEpoch):
    """Head to stages, along the pipe: allocate the cache of a request."""

    kind: Literal["add_request"] = "add_request"
    request: Count
    capacity: UInt32  # KV rows, tree rows included
    context: UInt32  # longest path: prompt and every token that may be generated
    sampling: SamplingParams = SamplingParams()
    # output-of-layer ids that the drafter needs, -1: after the last norm
    aux_hidden_state_layers: Annotated[
        tuple[Int32, ...], Field(max_length=MAX_LAYERS), FailFast()
    ] = ()
    reuse: Count = 0  # a cached request, whose first num_cached_tokens rows are copied; it stays
    num_cached_tokens: UInt32 = 0
    # Number of leading prefix tokens that are the prompt; the rest was generated before a stage was
    # lost. 0: all of the prefix.
    num_prompt_tokens: UInt32 = 0


MAX_CANDIDATES = 64  # of a row
MAX_SUPPORT = 1024  # tokens of the distribution of a row's candidates
Drawn: TypeAlias = tuple[Int32, Annotated[float, Field(ge=0.0, le=1.0)]]


@dataclass(frozen=True, slots=True)
class Candidates:
    """The child tokens that the choice after a row may consider, in the drafter's order.

    `drawn_from` is the distribution that they were drawn from, as (token, probability) of all its
    tokens. If it is empty they were not drawn, and each counts as certain to be proposed.
    """

    tokens: Annotated[tuple[Int32, ...], Field(max_length=MAX_CANDIDATES), FailFast()] = ()
    drawn_from: Annotated[tuple[Drawn, ...], Field(max_length=MAX_SUPPORT), FailFast()] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment(OfEpoch):
    """Rows that travel through the stages: tree rows, or accepted tokens with `prefix`.

    `hidden` is None before stage 1. Parents come before children. An empty segment still travels.
    Raises ValueError if nodes, parents, tokens and hidden states differ in number, or if the
    verdict is on another request.
    """

    kind: Literal["segment"] = "segment"
    request: Count
    seq_no: Count
    nodes: Nodes
    parents: Nodes
    tokens: TokenIds
    hidden: "Tensor | None" = None  # [n, H]
    prefix: bool = False
    verify: bool = True  # False: the verifier keeps its verdict for a later segment
    slowest_rows: UInt32 = 0  # rows and milliseconds of the slowest forward so far
    slowest_ms: Milliseconds = 0.0
    verdict: "Reroot | None" = None  # the newest that the head knew: bounds a stage's delay
    # Candidates of each row, fixed when it was sent; empty if the acceptance rule needs none.
    candidates: Annotated[
        tuple[Candidates, ...],
        Field(max_length=MAX_ROWS, exclude_if=lambda found: not found),
        FailFast(),
    ] = ()

    def __post_init__(self) -> None:
        count = len(self.nodes)
        if not len(self.parents) == len(self.tokens) == count:
            raise ValueError(
                f"{count} nodes, {len(self.parents)} parents, {len(self.tokens)} tokens: these "
                "must be as many"
            )
        if self.candidates and len(self.candidates) != count:
            raise ValueError(f"{count} rows have candidates for {len(self.candidates)}")
        _check_hidden(self.hidden, count)
        _check_verdict(self.verdict, self.request)

    def select(self, rows: Sequence[int]) -> "Segment":
        """Return the segment with only these of its rows."""
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
    """Segments of several requests that run in one forward, so that weights are read once.

    `Started`, `Exit` and `slowest_*` name the first one for all. A single segment travels without a
    batch. Raises ValueError for segments of two epochs, two of one request, or more than MAX_ROWS
    rows in all.
    """

    kind: Literal["batch"] = "batch"
    segments: Annotated[tuple[Segment, ...], Field(min_length=1, max_length=MAX_BATCH), FailFast()]

    def __post_init__(self) -> None:
        if any(segment.epoch != self.epoch for segment in self.segments):
            raise ValueError(f"a segment of another epoch than the batch's, which is {self.epoch}")
        if len({segment.request for segment in self.segments}) < len(self.segments):
            raise ValueError("two segments of one request")
        num_rows = sum(len(segment.nodes) for segment in self.segments)
        if num_rows > MAX_ROWS:
            raise ValueError(f"{num_rows} rows in all, at most {MAX_ROWS} allowed")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishRequest(OfEpoch):
    """Head to stages, along the pipe: a request is over.

    Its memory is freed, unless `keep` is set. Then the rows committed by `verdict` stay for an
    `AddRequest` that reuses them, or until a second `FinishRequest`.
    """

    kind: Literal["finish_request"] = "finish_request"
    request: Count
    keep: bool = False
    verdict: "Reroot | None" = None  # the newest that the head knew

    def __post_init__(self) -> None:
        _check_verdict(self.verdict, self.request)


@dataclass(frozen=True, slots=True, kw_only=True)
class FreeRequest(OfEpoch):
    """Head to stages: free a request at once, with its rows in flight. FinishRequest follows."""

    kind: Literal["free_request"] = "free_request"
    request: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Reset(OfEpoch):
    """Head to stages: free every request of an older epoch; the weights stay loaded."""

    kind: Literal["reset"] = "reset"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reroot(OfEpoch):
    """The verdict, last stage to all: the path down to `parent` is committed, `token` follows.

    `position` is the token's. Every row is dead that does not descend from parent's child with that
    token.
    """

    kind: Literal["reroot"] = "reroot"
    request: Count
    position: UInt32
    parent: Node
    token: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Started(OfEpoch):
    """First stage to head: the forward of this segment (or its batch) begins; there is room."""

    kind: Literal["started"] = "started"
    request: Count
    seq_no: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Exit(OfEpoch):
    """Last stage to head: this segment (or its batch) left with `rows` living rows."""

    kind: Literal["exit"] = "exit"
    request: Count
    seq_no: Count
    rows: UInt32
    slowest_rows: UInt32
    slowest_ms: Milliseconds


@dataclass(frozen=True, slots=True, kw_only=True)
class HiddenStates(OfEpoch):
    """A stage to head: hidden states [n, H] of accepted nodes at hidden-state layer `layer`."""

    kind: Literal["hidden_states"] = "hidden_states"
    request: Count
    layer: Int32
    nodes: Nodes
    hidden: "Tensor"

    def __post_init__(self) -> None:
        _check_hidden(self.hidden, len(self.nodes))


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftContext(OfEpoch):
    """Head to a drafter that pushes: the tokens from `position` on are true.

    The first one of a request begins at position 0. `is_over`: no more guesses are wanted.
    """

    kind: Literal["draft_context"] = "draft_context"
    request: Count
    position: Count
    tokens: Annotated[tuple[Int32, ...], Field(max_length=MAX_CONTEXT_TOKENS), FailFast()] = ()
    is_over: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftSubtree(OfEpoch):
    """A drafter that pushes to the head: guesses below a path.

    The path begins with the token after the one at `position`, which the drafter knew to be true.
    Entry i of `parents`, `tokens` and `logprobs` is one guess; its parent is an earlier entry, or
    -1 for the end of the path. The head drops guesses that newer verdicts contradict.
    """

    kind: Literal["draft_subtree"] = "draft_subtree"
    request: Count
    position: Count
    path: Annotated[tuple[Int32, ...], Field(max_length=MAX_ROWS), FailFast()] = ()
    parents: Annotated[tuple[Int32, ...], Field(max_length=MAX_ROWS), FailFast()]
    tokens: Annotated[tuple[Int32, ...], Field(max_length=MAX_ROWS), FailFast()]
    logprobs: Annotated[tuple[float, ...], Field(max_length=MAX_ROWS), FailFast()]

    def __post_init__(self) -> None:
        if not len(self.parents) == len(self.tokens) == len(self.logprobs):
            raise ValueError("parents, tokens and logprobs must be as many")
        if any(not -1 <= parent < place for place, parent in enumerate(self.parents)):
            raise ValueError("a guess comes before its parent")


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """A stage to head: totals since its start."""

    kind: Literal["status"] = "status"
    stage: UInt32
    busy_s: Seconds
    num_segments: Count
    num_rows_run: Count
    num_rows_pruned: Count  # rows that were dead before this stage ran them
    num_requests: Count  # caches held now, those kept for reuse included
    num_kv_tokens_used: Count = 0  # tokens in those caches
    peak_memory_bytes: Count = 0  # of the process, 0: not known
    num_closes: Count = 0  # `FinishRequest`s of this epoch that were processed
    finished_request: Count = 0  # the request whose FinishRequest this answers; 0: none
    finished_rows_run: Count = 0  # rows of that request that this stage ran
    finished_rows_pruned: Count = 0  # and dropped
    finished_busy_s: Seconds = 0.0  # its share of forwards with rows of the draft tree


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed(OfEpoch):
    """A stage to head: it cannot go on (request 0) or cannot serve this request."""

    kind: Literal["failed"] = "failed"
    stage: Int32
    request: Count
    num_lost: Count = 0  # messages that a connection has lost, which no request caused
    text: CutText


@dataclass(frozen=True, slots=True, kw_only=True)
class Ready:
    """A stage to head: it has loaded its layers and listens.

    `model` is the manifest's model hash, `numerics` the JSON of the NumericsConfig that it uses.
    """

    kind: Literal["ready"] = "ready"
    stage: Int32
    model: Name
    numerics: CutText = ""  # the stage's NumericsConfig, as JSON
    num_kv_tokens: Count = 0  # most tokens of all requests together; 0: no limit known


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Head to a silent stage, which answers with a Status between two forwards."""

    kind: Literal["ping"] = "ping"
    rank: Int32


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Head to stages: end the process."""

    kind: Literal["stop"] = "stop"


# Messages within one process, between the head and its client or owner; they have no bytes.
@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Client to head: generate an answer."""

    request: Request


@dataclass(frozen=True, slots=True, kw_only=True)
class AbortRequest:
    """Client to head: end this request now and keep its tokens."""

    request: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ForgetCosts:
    """Client to head: forget learnt costs and calibration. Ignored while requests are open."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Suspend:
    """Owner to head: a stage is lost; nothing more is sent until `Resume`.

    A new epoch begins. Running requests wait again, ahead of those that had not begun. With
    `blames` one of them may be the cause: it ends if this happens to it again at once.
    """

    failure: Failure  # which device, and what happened to it
    blames: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Owner to head: the pipeline is complete again, with this many stages.

    `num_kv_tokens` is what the smallest one holds (0: no limit known). A head that already serves
    may be told too; it then suspends itself first.
    """

    num_stages: int
    num_kv_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class AbandonRequests:
    """Owner to head: end every request with this failure; their tokens stay."""

    failure: Failure


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
    | HiddenStates
    | DraftContext
    | DraftSubtree
    | Status
    | Failed
    | Ready
    | Ping
    | Stop
)
Message: TypeAlias = (
    WireMessage
    | Submit
    | AbortRequest
    | ForgetCosts
    | Suspend
    | Resume
    | AbandonRequests
    | TokensOut
    | RequestOutput
)
# These keep their order from head to last stage; others may overtake them.
DATA = (AddRequest, Segment, Batch, FinishRequest, DraftContext)


def segments_of(message: Message) -> tuple[Segment, ...]:
    """Return the segments that travel in a message."""
    if isinstance(message, Batch):
        return message.segments
    return (message,) if isinstance(message, Segment) else ()


def epoch_of(message: Message) -> int | None:
    """Return the epoch of a message; None if it belongs to none."""
    return message.epoch if isinstance(message, OfEpoch) else None


def together(segments: Sequence[Segment]) -> Segment | Batch:
    """Return the message that carries `segments` (at least one)."""
    if len(segments) == 1:
        return segments[0]
    return Batch(epoch=segments[0].epoch, segments=tuple(segments))


def _check_hidden(hidden: "Tensor | None", count: int) -> None:
    if hidden is not None and (hidden.ndim != 2 or len(hidden) != count):
        raise ValueError(
            f"hidden states of shape {list(hidden.shape)} for {count} nodes: a row each is needed"
        )


def _check_verdict(verdict: Reroot | None, request: int) -> None:
    if verdict is not None and verdict.request != request:
        raise ValueError(f"a verdict on request {verdict.request} in a message on {request}")
