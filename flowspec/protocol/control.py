"""The control protocol of a cluster: JSON objects over the encrypted control socket.

Activations never travel here; they have the data plane. Every text and list has a length cap, the
frame itself is capped by the socket before it is read. docs/cluster.md has the order.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from flowspec.config import NumericsConfig
from flowspec.request import DecodeStats, Latencies
from flowspec.system.address import as_seen_here

MAX_MESSAGE_BYTES = 1 << 20
MAX_ASK_BYTES = (
    16 << 20
)  # a conversation alone may be so long: over 100 bytes for each of 128k tokens
MAX_STAGES = 256

Name = Annotated[str, Field(max_length=200)]
Words = Annotated[str, Field(max_length=4000)]
Text = Annotated[str, Field(max_length=MAX_MESSAGE_BYTES // 4)]
LongText = Annotated[str, Field(max_length=MAX_ASK_BYTES)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Seconds = Annotated[float, Field(ge=0.0, le=1e12, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0.0, le=1e18, allow_inf_nan=False)]


class Strict(BaseModel):
    """Nothing is converted, an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


MAX_TOKENS = 1 << 16  # of an answer with figures: all lists below are bounded by it
MAX_BINS = 1500
MAX_PARAMETERS = 64
COPIED = (  # from DecodeStats as they are
    *("num_tokens", "num_verdicts", "num_segments", "num_rows_sent", "num_draft_forwards"),
    *("num_prompt_reused", "run_length", "num_not_drafted", "num_not_in_flight"),
    *("num_nodes_alive", "num_resumes", "num_prefills", "resume_s", "draft_s"),
)
MOMENTS = ("first_token_at", "last_token_at", "finished_at")

Value = bool | int | Annotated[float, Field(allow_inf_nan=False)]


class Decoding(Strict):
    """Which strategy answers, with which parameters; `run` names what may learn together.

    Another label than the one before means that costs and scores are learnt anew.
    """

    strategy: Name
    parameters: Annotated[Mapping[Name, Value], Field(max_length=MAX_PARAMETERS)]
    run: Name


class StageFigures(Strict):
    """What the stages did for one request that had them to itself."""

    rows_pruned: Count  # by all stages
    rows_run_by_last: Count  # prompt rows included
    busy_s: Annotated[tuple[Seconds, ...], Field(max_length=MAX_STAGES)]  # since the first token


class Figures(Strict):
    """A request's statistics (`DecodeStats`), and what the stages did where that is known.

    `num_resumes` also counts a wait for lost stages before it had begun: `resume_s` has nothing of
    an outage before the first token, which is a part of the time to it. `alone` is of the time
    until it was over; who came after that, before the stages' last word, takes only `stages`.
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
    runs: Annotated[tuple[Count, ...], Field(max_length=MAX_TOKENS)]
    latency_bins: Annotated[tuple[tuple[int, Count], ...], Field(max_length=MAX_BINS)]
    num_zero_latencies: Count
    epoch: Count  # in which it ended
    first_epoch: Count = 0  # in which it came; 0: between two
    alone: bool  # no other request was served meanwhile
    fresh: bool = False  # the first under a strategy just put in force: nothing learnt before it
    stages: StageFigures | None = None


def figures_of(
    stats: DecodeStats,
    *,
    epoch: int,
    alone: bool,
    stages: StageFigures | None,
    first_epoch: int = 0,
    fresh: bool = False,
) -> Figures:
    """What a client is told of a request that is over."""
    return Figures(
        **{name: getattr(stats, name) for name in COPIED},
        **{name: max(0.0, getattr(stats, name) - stats.submitted_at) for name in MOMENTS},
        runs=tuple(stats.runs),
        latency_bins=tuple(stats.inter_token.bins.items()),
        num_zero_latencies=stats.inter_token.num_zero,
        epoch=epoch,
        first_epoch=first_epoch,
        alone=alone,
        fresh=fresh,
        stages=stages,
    )


def stats_of(figures: Figures) -> DecodeStats:
    """The statistics they were made from, submitted at 0."""
    bins = dict(figures.latency_bins)
    count = sum(bins.values()) + figures.num_zero_latencies
    return DecodeStats(
        **{name: getattr(figures, name) for name in (*COPIED, *MOMENTS)},
        runs=list(figures.runs),
        inter_token=Latencies(bins, figures.num_zero_latencies, count),
    )


PROTOCOL_VERSION = 4
_ASK = b'{"kind":"ask",'  # what `pack` begins it with: no other message may be as long


class ControlError(ValueError):
    """Bytes that are no message of this protocol."""


class Interface(Strict):
    """One network interface that is up. `rate_mbps` 0: not known (Wi-Fi, virtual)."""

    name: Name
    address: Name
    rate_mbps: Count = 0


class Link(Strict):
    """What was measured between a device and the head; 0: not measured."""

    latency_s: Seconds = 0.0  # half of a small message's round trip
    up_bytes_per_s: Rate = 0.0  # device to head
    down_bytes_per_s: Rate = 0.0

    @property
    def slower_bytes_per_s(self) -> float:
        """The slower way that was measured; 0: neither."""
        rates = [rate for rate in (self.up_bytes_per_s, self.down_bytes_per_s) if rate]
        return min(rates, default=0.0)


class DeviceReport(Strict):
    """What a device has."""

    hostname: Name
    kind: Name  # board or CPU
    machine: Name = ""  # as in platform.machine()
    torch_device: Name = "cpu"
    memory_available_bytes: Count
    memory_total_bytes: Count
    unified_memory: bool = False  # CPU and GPU share it
    disk_free_bytes: Count = 0
    power_mode: Name = ""
    bandwidth_bytes_per_s: Rate = 0.0  # of the memory that weights are read from, measured
    flops: Rate = 0.0  # of a matrix product as in a forward, measured
    interfaces: Annotated[tuple[Interface, ...], Field(max_length=32)] = ()
    python: Name = ""
    torch: Name = ""
    link: Link = Link()


class ModelCard(Strict):
    """Which model a cluster serves, and how; devices compare it with what they hold."""

    model_id: Name
    model_hash: Name
    stored_dtype: Name = ""
    numerics: NumericsConfig = NumericsConfig()  # it is computed by

    def is_same_weights(self, other: "ModelCard") -> bool:
        """Whether one's files serve the other; what is computed in may differ."""
        mine = (self.model_hash, self.stored_dtype)
        return mine == (other.model_hash, other.stored_dtype)


class Hello(Strict):
    """Device to head, first: who it is and what it has."""

    kind: Literal["hello"] = "hello"
    protocol: Count = PROTOCOL_VERSION
    version: Name
    session: Name  # of this process, random: tells a return from a copy
    name: Name
    report: DeviceReport
    clock: Seconds  # seconds since 1970
    model: ModelCard | None = None  # what it still holds from before
    layers: tuple[Count, Count] | None = None  # first and last (exclusive) of what it holds
    pinned: bool = False  # offline: it can use no other model than `model`


class Welcome(Strict):
    """Head to device: you are in; this is the rhythm of heartbeats."""

    kind: Literal["welcome"] = "welcome"
    name: Name  # how the head calls it: its own, or with a number where two have the same
    version: Name
    heartbeat_s: Seconds
    dead_after_s: Seconds
    clock: Seconds


class Refuse(Strict):
    """Head to a device, or a client of another version: no, and why. `retry`: later perhaps."""

    kind: Literal["refuse"] = "refuse"
    why: Words
    retry: bool = False


class Assign(Strict):
    """Head to device: these layers are yours in this epoch; fetch what is missing, load them."""

    kind: Literal["assign"] = "assign"
    epoch: Count
    rank: Annotated[int, Field(ge=1, le=MAX_STAGES)]
    num_stages: Annotated[int, Field(ge=1, le=MAX_STAGES)]
    first_layer: Count
    last_layer: Count  # exclusive
    model: ModelCard
    manifest_sha256: Name
    shards: Name  # address of the shard server
    kv_memory_mb: Count = 0  # for a device that was given none of its own


class Progress(Strict):
    """Device to head: how far it is. `phase`: fetch or load."""

    kind: Literal["progress"] = "progress"
    epoch: Count
    phase: Literal["fetch", "load"]
    done_bytes: Count
    total_bytes: Count
    cached_bytes: Count = 0


class Addresses(Strict):
    """Where a process listens for its peers."""

    control: Name
    data: Name

    def seen_here(self, via: str, zone: str = "") -> "Addresses":
        """As this machine must write them, which reaches that one, or its head, at `via`."""
        control, data = (as_seen_here(url, via, zone) for url in (self.control, self.data))
        return Addresses(control=control, data=data)


class StageReady(Strict):
    """Device to head: loaded and listening at `addresses`."""

    kind: Literal["ready"] = "ready"
    epoch: Count
    model_hash: Name
    numerics: NumericsConfig  # it computes by
    addresses: Addresses
    num_kv_tokens: Count = 0


class Serve(Strict):
    """Head to device: all are ready; `addresses[k]` is where rank k listens."""

    kind: Literal["serve"] = "serve"
    epoch: Count
    addresses: Annotated[tuple[Addresses, ...], Field(max_length=MAX_STAGES + 1)]


class Release(Strict):
    """Head to device: this epoch is over; keep what you have loaded and wait."""

    kind: Literal["release"] = "release"
    epoch: Count


class Standby(Strict):
    """Head to device: nothing for you now, and why."""

    kind: Literal["standby"] = "standby"
    why: Words


class Trouble(Strict):
    """Device to head: this epoch cannot go on. `lost` is the rank it cannot reach, -1: itself."""

    kind: Literal["trouble"] = "trouble"
    epoch: Count
    cause: Words
    lost: Annotated[int, Field(ge=-1, le=MAX_STAGES)] = -1


class Beat(Strict):
    """Both ways: alive. The head sends a device's `sent_at` back, which gives the round trip."""

    kind: Literal["beat"] = "beat"
    sent_at: Seconds = 0.0
    memory_available_bytes: Count = 0
    power_w: Rate = 0.0  # 0: no sensor
    round_trip_s: Seconds = 0.0  # as the device measured it last


class Bye(Strict):
    """Both ways: leaving in order, and why."""

    kind: Literal["bye"] = "bye"
    why: Words


class WhoAreYou(Strict):
    """Head to a peer it does not know (any more): say hello again."""

    kind: Literal["who"] = "who"


class Echo(Strict):
    """Anybody with the token to the head, which sends it back: round trip and rate of the link."""

    kind: Literal["echo"] = "echo"
    payload: Text = ""
    reply_bytes: Annotated[int, Field(ge=0, le=MAX_MESSAGE_BYTES // 4)] = 0


class Turn(Strict):
    """One message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: LongText


class Ask(Strict):
    """Client to head: answer this conversation. `id` is the client's own."""

    kind: Literal["ask"] = "ask"
    protocol: Count = PROTOCOL_VERSION
    version: Name
    id: Count
    turns: Annotated[tuple[Turn, ...], Field(min_length=1, max_length=1000)]
    max_new_tokens: Annotated[int, Field(ge=1, le=1_000_000)] = 200
    temperature: Seconds = 0.0
    top_k: Count = 0
    top_p: Seconds = 1.0
    min_p: Seconds = 0.0
    seed: Count = 0
    stop: Annotated[tuple[Name, ...], Field(max_length=16)] = ()
    decoding: Decoding | None = None  # None: as the cluster was served


class Piece(Strict):
    """Head to client: more of an answer."""

    kind: Literal["piece"] = "piece"
    id: Count
    tokens: Annotated[tuple[int, ...], Field(max_length=4096)]
    text: Text


class Note(Strict):
    """Head to client: why an answer waits (a device is lost, layers are on their way)."""

    kind: Literal["note"] = "note"
    id: Count
    text: Words


class Done(Strict):
    """Head to client: the answer is over. `error` is set where the reason is `error`."""

    kind: Literal["done"] = "done"
    id: Count
    reason: Name
    error: Words = ""
    num_tokens: Count = 0
    tokens_per_s: Rate = 0.0
    time_to_first_token_s: Seconds = 0.0
    tau: Rate = 0.0  # tokens per verdict
    resumed: Count = 0  # how often the cluster was rebuilt under it
    prompt_tokens: Count = 0  # of what was asked; 0 where the head did not look at it
    refused: bool = False  # because of what was asked; another question may be answered
    bad_prompt: bool = False  # refused: the chat template or the tokenizer does not take it
    too_large: bool = False  # the devices' memory cannot hold what was asked, with `decoding`
    figures: Figures | None = None  # of an Ask with `decoding` that was answered


class Drop(Strict):
    """Client to head: end my request `id`."""

    kind: Literal["drop"] = "drop"
    id: Count


class AskStatus(Strict):
    """Client to head: how are you? `what` status, or plan for the devices' table."""

    kind: Literal["ask_status"] = "ask_status"
    protocol: Count = PROTOCOL_VERSION
    version: Name


class ModelSizes(Strict):
    """Of the model that is served, for planning elsewhere."""

    layers: Count
    hidden_size: Count
    intermediate_size: Count
    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    vocab_size: Count


class DeviceStatus(Strict):
    """One device as the head sees it."""

    name: Name
    state: Literal["serving", "loading", "spare", "too small", "lost"]
    about: Words = ""
    rank: int = 0
    layers: tuple[Count, Count] | None = None
    report: DeviceReport
    heartbeat_age_s: Seconds = 0.0
    round_trip_s: Seconds = 0.0
    power_w: Rate = 0.0
    busy_s: Seconds = 0.0  # computing, since the epoch began
    num_kv_tokens: Count = 0
    num_kv_tokens_used: Count = 0
    peak_memory_bytes: Count = 0


class ClusterStatus(Strict):
    """Head to client: the cluster now."""

    kind: Literal["status"] = "status"
    version: Name
    protocol: Count = PROTOCOL_VERSION
    healthy: bool
    why: Words  # it is, or is not
    epoch: Count
    epoch_age_s: Seconds = 0.0
    model: ModelCard
    sizes: ModelSizes
    max_context: Count = 0  # tokens of prompt and answer together
    strategy: Name
    drafter: Name
    draft_hash: Name = ""  # of the draft model's files; empty where there is none
    code_hash: Name = ""  # of the head's sources
    uptime_s: Seconds
    probe_age_s: Seconds | None  # since a token last crossed every stage
    requests_active: Count
    requests_waiting: Count
    requests_done: Count
    requests_failed: Count
    devices: Annotated[tuple[DeviceStatus, ...], Field(max_length=MAX_STAGES)]


FromDevice: TypeAlias = Hello | Progress | StageReady | Trouble | Beat | Bye
ToDevice: TypeAlias = Welcome | Refuse | Assign | Serve | Release | Standby | Beat | Bye | WhoAreYou
FromClient: TypeAlias = Ask | Drop | AskStatus | Echo
ToClient: TypeAlias = Piece | Note | Done | ClusterStatus | Echo | Refuse
Control: TypeAlias = FromDevice | ToDevice | FromClient | ToClient
_ADAPTER: TypeAdapter[Control] = TypeAdapter(Annotated[Control, Field(discriminator="kind")])


def pack(message: Control) -> bytes:
    """A message as one frame."""
    return message.model_dump_json(exclude_defaults=False).encode()


def unpack(frame: bytes) -> Control:
    """The message in a frame. Raises ControlError saying what is wrong with it."""
    limit = MAX_ASK_BYTES if frame.startswith(_ASK) else MAX_MESSAGE_BYTES
    if len(frame) > limit:
        raise ControlError(f"{len(frame)} bytes, at most {limit}")
    try:
        return _ADAPTER.validate_json(frame)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])[:100]
        raise ControlError(f"{where or 'message'}: {first['msg'][:200]}") from None
