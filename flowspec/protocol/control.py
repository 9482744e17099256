"""The control protocol of a cluster: JSON objects over the encrypted control socket.

Activations travel on the data channel, never here. Every text and list has a length cap, and the
socket caps the frame itself before it is read. docs/cluster.md has the order of the messages.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, FailFast, Field, model_validator

from flowspec.config import NumericsConfig
from flowspec.protocol.schema import Count, Int64, MessageCodec, Name, Rate, Seconds, WireError
from flowspec.request import DecodeStats, Decoding, Failure, FailureKind, FinishReason, Latencies
from flowspec.system.address import as_seen_here

MAX_MESSAGE_BYTES = 1 << 20
MAX_ASK_BYTES = 16 << 20  # a conversation may be so long: over 100 bytes for each of 128k tokens
MAX_STAGES = 256

Words = Annotated[str, Field(max_length=4000)]
Text = Annotated[str, Field(max_length=MAX_MESSAGE_BYTES // 4)]
LongText = Annotated[str, Field(max_length=MAX_ASK_BYTES)]


class Strict(BaseModel):
    """Base of the messages: nothing is converted, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


MAX_TOKENS = 1 << 16  # of an answer with figures; all lists below are bounded by it
MAX_BINS = 1500
MAX_PARAMETERS = 64
MAX_PROMPT = 1 << 20  # tokens
MAX_CAUSE = 4000  # characters
COPIED = (  # fields copied from DecodeStats as they are
    *("num_tokens", "num_verdicts", "num_segments", "num_rows_sent", "num_draft_forwards"),
    *("num_prompt_reused", "run_length", "num_not_drafted", "num_not_in_flight"),
    *("num_nodes_alive", "num_resumes", "num_prefills", "resume_s", "draft_s"),
)
MOMENTS = ("first_token_at", "last_token_at", "finished_at")

Value = bool | Int64 | Annotated[float, Field(allow_inf_nan=False)]


class DecodingSpec(Strict):
    """The strategy, its parameters and the drafter that answer a request."""

    strategy: Name
    parameters: Annotated[Mapping[Name, Value], Field(max_length=MAX_PARAMETERS)] = {}
    drafter: Name = ""  # empty: the first one that is loaded

    def decoding(self) -> Decoding:
        """Return the decoding in the head's form."""
        return Decoding(
            strategy=self.strategy, parameters=dict(self.parameters), drafter=self.drafter
        )


class FailureReport(Strict):
    """Why a request ended with an error, and where (`request.Failure`)."""

    cause: Words
    kind: FailureKind = Field(default=FailureKind.FAILED, strict=False)
    rank: Annotated[int, Field(ge=0, le=MAX_STAGES)] | None = None
    device: Name = ""

    def failure(self) -> Failure:
        """Return the failure in the form that engines give to clients."""
        return Failure(cause=self.cause, kind=self.kind, rank=self.rank, device=self.device)


def report_of(failure: Failure) -> FailureReport:
    """Return the failure cut to the message's limits, without what UTF-8 cannot write."""
    cause = failure.cause[:MAX_CAUSE].encode(errors="replace").decode()
    device = failure.device[:200].encode(errors="replace").decode()
    return FailureReport(cause=cause, kind=failure.kind, rank=failure.rank, device=device)


class StageFigures(Strict):
    """The work of one stage for one finished request (`request.StageCounts`)."""

    rank: Annotated[int, Field(ge=1, le=MAX_STAGES)]
    rows_run: Count
    rows_pruned: Count
    busy_s: Seconds


class Figures(Strict):
    """A request's statistics (`request.DecodeStats`), with times counted from its submission.

    `epoch` is the epoch in which it ended, `first_epoch` the one in which it came (0: between two
    epochs).
    """

    num_tokens: Count
    num_verdicts: Count
    num_segments: Count
    num_rows_sent: Count
    num_draft_forwards: Count
    num_prompt_reused: Count
    run_length: Count
    num_not_drafted: Count
    num_not_in_flight: Count
    num_nodes_alive: Count
    num_resumes: Count
    num_prefills: Count
    resume_s: Seconds
    draft_s: Seconds
    first_token_at: Seconds
    last_token_at: Seconds
    finished_at: Seconds
    runs: Annotated[tuple[Count, ...], Field(max_length=MAX_TOKENS), FailFast()]
    latency_bins: Annotated[tuple[tuple[Int64, Count], ...], Field(max_length=MAX_BINS), FailFast()]
    num_zero_latencies: Count
    epoch: Count
    first_epoch: Count = 0


def figures_of(stats: DecodeStats, *, epoch: int = 0, first_epoch: int = 0) -> Figures:
    """Return the figures that a client receives about a finished request."""
    return Figures(
        **{name: getattr(stats, name) for name in COPIED},
        **{name: max(0.0, getattr(stats, name) - stats.submitted_at) for name in MOMENTS},
        runs=tuple(stats.runs[:MAX_TOKENS]),
        latency_bins=tuple(stats.inter_token.bins.items()),
        num_zero_latencies=stats.inter_token.num_zero,
        epoch=epoch,
        first_epoch=first_epoch,
    )


def stats_of(figures: Figures) -> DecodeStats:
    """Return the statistics that the figures were made from, with submission at time 0."""
    bins = dict(figures.latency_bins)
    count = sum(bins.values()) + figures.num_zero_latencies
    return DecodeStats(
        **{name: getattr(figures, name) for name in (*COPIED, *MOMENTS)},
        runs=list(figures.runs),
        inter_token=Latencies(bins, figures.num_zero_latencies, count),
    )


PROTOCOL_VERSION = 4
_ASK = b'{"kind":"ask",'  # the beginning that `pack` writes; no other message may be as long


class ControlError(WireError):
    """Bytes that are not a message of the control protocol."""


class Interface(Strict):
    """One network interface that is up. `rate_mbps` 0: not known (Wi-Fi, virtual)."""

    name: Name
    address: Name
    rate_mbps: Count = 0


class Link(Strict):
    """The measurements between a device and the head; 0: not measured."""

    latency_s: Seconds = 0.0  # half of a small message's round trip
    up_bytes_per_s: Rate = 0.0  # device to head
    down_bytes_per_s: Rate = 0.0

    @property
    def slower_bytes_per_s(self) -> float:
        """The rate of the slower direction that was measured; 0: none was."""
        rates = [rate for rate in (self.up_bytes_per_s, self.down_bytes_per_s) if rate]
        return min(rates, default=0.0)


class DeviceReport(Strict):
    """The hardware of a device."""

    hostname: Name
    kind: Name  # board or CPU
    machine: Name = ""  # as in platform.machine()
    torch_device: Name = "cpu"
    memory_available_bytes: Count
    memory_total_bytes: Count
    unified_memory: bool = False  # CPU and GPU share the memory
    disk_free_bytes: Count = 0
    power_mode: Name = ""
    bandwidth_bytes_per_s: Rate = 0.0  # of the memory that weights are read from, measured
    flops: Rate = 0.0  # of a matrix product as in a forward, measured
    interfaces: Annotated[tuple[Interface, ...], Field(max_length=32), FailFast()] = ()
    python: Name = ""
    torch: Name = ""
    link: Link = Link()


class ModelCard(Strict):
    """The model that a cluster serves and its numerics; devices compare it with what they hold."""

    model_id: Name
    model_hash: Name
    stored_dtype: Name = ""
    numerics: NumericsConfig = NumericsConfig()  # used for computing

    def is_same_weights(self, other: "ModelCard") -> bool:
        """Return whether the files of one serve the other; the numerics may differ."""
        mine = (self.model_hash, self.stored_dtype)
        return mine == (other.model_hash, other.stored_dtype)


class Hello(Strict):
    """Device to head, first: its name and hardware."""

    kind: Literal["hello"] = "hello"
    protocol: Count = PROTOCOL_VERSION
    version: Name
    session: Name  # random, of this process: tells a reconnection from a second copy
    name: Name
    report: DeviceReport
    clock: Seconds  # seconds since 1970
    model: ModelCard | None = None  # the model it still holds from before
    layers: tuple[Count, Count] | None = None  # first and last (exclusive) layer that it holds
    pinned: bool = False  # offline: it can use no other model than `model`


class Welcome(Strict):
    """Head to device: it is accepted; this is the rhythm of heartbeats."""

    kind: Literal["welcome"] = "welcome"
    name: Name  # the device's name on the head: its own, or with a number added if two are equal
    version: Name
    heartbeat_s: Seconds
    dead_after_s: Seconds
    clock: Seconds


class Refuse(Strict):
    """Head to a device or client: it is refused, and why. `retry`: it may try again later."""

    kind: Literal["refuse"] = "refuse"
    why: Words
    retry: bool = False


class Assign(Strict):
    """Head to device: its layers in this epoch; it fetches what is missing and loads them."""

    kind: Literal["assign"] = "assign"
    epoch: Count
    rank: Annotated[int, Field(ge=1, le=MAX_STAGES)]
    num_stages: Annotated[int, Field(ge=1, le=MAX_STAGES)]
    first_layer: Count
    last_layer: Count  # exclusive
    model: ModelCard
    manifest_sha256: Name
    shards: Name  # address of the shard server
    kv_memory_mb: Count = 0  # for a device without a limit of its own


class Progress(Strict):
    """Device to head: its progress. `phase`: fetch or load."""

    kind: Literal["progress"] = "progress"
    epoch: Count
    phase: Literal["fetch", "load"]
    done_bytes: Count
    total_bytes: Count
    cached_bytes: Count = 0


class Addresses(Strict):
    """The addresses where a process listens for its peers."""

    control: Name
    data: Name

    def seen_here(self, via: str, zone: str = "") -> "Addresses":
        """Return the addresses for this machine, which reaches that one, or its head, at `via`."""
        control, data = (as_seen_here(url, via, zone) for url in (self.control, self.data))
        return Addresses(control=control, data=data)


class StageReady(Strict):
    """Device to head: it has loaded its layers and listens at `addresses`."""

    kind: Literal["ready"] = "ready"
    epoch: Count
    model_hash: Name
    numerics: NumericsConfig  # it computes with these
    addresses: Addresses
    num_kv_tokens: Count = 0


class Serve(Strict):
    """Head to device: all stages are ready; rank k listens at `addresses[k]`."""

    kind: Literal["serve"] = "serve"
    epoch: Count
    addresses: Annotated[tuple[Addresses, ...], Field(max_length=MAX_STAGES + 1), FailFast()]


class Release(Strict):
    """Head to device: this epoch is over; keep the loaded layers and wait."""

    kind: Literal["release"] = "release"
    epoch: Count


class Standby(Strict):
    """Head to device: it has no work now, and why."""

    kind: Literal["standby"] = "standby"
    why: Words


class Trouble(Strict):
    """Device to head: this epoch cannot go on. `lost` is the unreachable rank, -1: the device."""

    kind: Literal["trouble"] = "trouble"
    epoch: Count
    cause: Words
    lost: Annotated[int, Field(ge=-1, le=MAX_STAGES)] = -1


class Beat(Strict):
    """Both ways: heartbeat. The head returns a device's `sent_at`, which gives the round trip."""

    kind: Literal["beat"] = "beat"
    sent_at: Seconds = 0.0
    memory_available_bytes: Count = 0
    power_w: Rate = 0.0  # 0: no sensor
    round_trip_s: Seconds = 0.0  # the newest that the device measured


class Bye(Strict):
    """Both ways: the sender leaves in order, and why."""

    kind: Literal["bye"] = "bye"
    why: Words


class WhoAreYou(Strict):
    """Head to a peer that it does not know (any more): send Hello again."""

    kind: Literal["who"] = "who"


class Echo(Strict):
    """Any client or device to the head, which returns it: measures round trip and rate."""

    kind: Literal["echo"] = "echo"
    payload: Text = ""
    reply_bytes: Annotated[int, Field(ge=0, le=MAX_MESSAGE_BYTES // 4)] = 0


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: LongText


class Ask(Strict):
    """Client to head: answer this request. `id` is the client's own.

    Either `turns` (a conversation) or `prompt` (token ids) is given. `end_ids` replaces the model's
    own end tokens. An `exclusive` request runs alone.
    """

    kind: Literal["ask"] = "ask"
    protocol: Count = PROTOCOL_VERSION
    version: Name
    id: Count
    turns: Annotated[tuple[Turn, ...], Field(max_length=1000), FailFast()] = ()
    prompt: Annotated[tuple[Count, ...], Field(max_length=MAX_PROMPT), FailFast()] = ()
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    temperature: Seconds = 0.0
    top_k: Count = 0
    top_p: Seconds = 1.0
    min_p: Seconds = 0.0
    seed: Count = 0
    acceptance: Name = "gumbel_coupled"
    stop: Annotated[tuple[Name, ...], Field(max_length=16), FailFast()] = ()
    end_ids: Annotated[tuple[Count, ...], Field(max_length=64, fail_fast=True)] | None = None
    decoding: DecodingSpec | None = None  # None: the cluster's default
    exclusive: bool = False

    @model_validator(mode="after")
    def _check_prompt(self) -> "Ask":
        if bool(self.turns) == bool(self.prompt):
            raise ValueError("one of turns and prompt is needed")
        return self


class Piece(Strict):
    """Head to client: the next part of an answer."""

    kind: Literal["piece"] = "piece"
    id: Count
    tokens: Annotated[tuple[Int64, ...], Field(max_length=4096), FailFast()]
    text: Text


class Note(Strict):
    """Head to client: why an answer waits (a device is lost, layers are on their way)."""

    kind: Literal["note"] = "note"
    id: Count
    text: Words


class Done(Strict):
    """Head to client: the answer is complete. `failure` is set if the reason is `error`."""

    kind: Literal["done"] = "done"
    id: Count
    reason: FinishReason = Field(strict=False)
    failure: FailureReport | None = None
    prompt_tokens: Count = 0  # 0 if the head did not process the prompt
    figures: Figures | None = None  # None if it never reached the head's core


class Drop(Strict):
    """Client to head: end my request `id`."""

    kind: Literal["drop"] = "drop"
    id: Count


class AskCounts(Strict):
    """Client to head: asks for the stages' work for the finished request `id`."""

    kind: Literal["ask_counts"] = "ask_counts"
    id: Count


class Counts(Strict):
    """Head to client: the stages' work for a request; None: they have not reported it."""

    kind: Literal["counts"] = "counts"
    id: Count
    stages: Annotated[tuple[StageFigures, ...], Field(max_length=MAX_STAGES, fail_fast=True)] | None


class Forget(Strict):
    """Client to head: forget learnt costs and acceptance. `id` is the client's own."""

    kind: Literal["forget"] = "forget"
    id: Count


class Forgotten(Strict):
    """Head to client: it has forgotten them, or (with `why`) cannot do so now."""

    kind: Literal["forgotten"] = "forgotten"
    id: Count
    why: Words = ""


class AskStatus(Strict):
    """Client to head: asks for the status; `what`: status, or plan for the table of devices."""

    kind: Literal["ask_status"] = "ask_status"
    protocol: Count = PROTOCOL_VERSION
    version: Name


class ModelSizes(Strict):
    """The sizes of the served model, for planning elsewhere."""

    layers: Count
    hidden_size: Count
    intermediate_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    vocab_size: Count


class DeviceStatus(Strict):
    """One device in the head's view."""

    name: Name
    state: Literal["serving", "loading", "spare", "too small", "lost"]
    about: Words = ""
    rank: Count = 0
    layers: tuple[Count, Count] | None = None
    report: DeviceReport
    heartbeat_age_s: Seconds = 0.0
    round_trip_s: Seconds = 0.0
    power_w: Rate = 0.0
    busy_s: Seconds = 0.0  # time of computing since the epoch began
    num_kv_tokens: Count = 0
    num_kv_tokens_used: Count = 0
    peak_memory_bytes: Count = 0


class ClusterStatus(Strict):
    """Head to client: the present status of the cluster."""

    kind: Literal["status"] = "status"
    version: Name
    protocol: Count = PROTOCOL_VERSION
    healthy: bool
    why: Words  # why it is healthy or not
    epoch: Count
    epoch_age_s: Seconds = 0.0
    model: ModelCard
    sizes: ModelSizes
    max_context: Count = 0  # tokens of prompt and answer together
    strategy: Name
    drafter: Name
    draft_hash: Name = ""  # of the draft model's files; empty if there are none
    code_hash: Name = ""  # of the head's sources
    uptime_s: Seconds
    probe_age_s: Seconds | None  # since a token last crossed every stage
    requests_active: Count
    requests_waiting: Count
    requests_done: Count
    requests_failed: Count
    devices: Annotated[tuple[DeviceStatus, ...], Field(max_length=MAX_STAGES), FailFast()]


FromDevice: TypeAlias = Hello | Progress | StageReady | Trouble | Beat | Bye
ToDevice: TypeAlias = Welcome | Refuse | Assign | Serve | Release | Standby | Beat | Bye | WhoAreYou
FromClient: TypeAlias = Ask | Drop | AskCounts | Forget | AskStatus | Echo
ToClient: TypeAlias = Piece | Note | Done | Counts | Forgotten | ClusterStatus | Echo | Refuse
Control: TypeAlias = FromDevice | ToDevice | FromClient | ToClient
_CODEC: MessageCodec[Control] = MessageCodec(
    Control, max_bytes=MAX_MESSAGE_BYTES, error=ControlError
)


def pack(message: Control) -> bytes:
    """Return a message as one frame."""
    return _CODEC.encode(message)


def unpack(frame: bytes) -> Control:
    """Return the message in a frame. Raises ControlError saying what is wrong with it."""
    is_ask = frame.startswith(_ASK)
    return _CODEC.decode(frame, max_bytes=MAX_ASK_BYTES if is_ask else MAX_MESSAGE_BYTES)
