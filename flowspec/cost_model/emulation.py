"""Emulation: the cost of every forward, message and hand-over of an emulated cluster.

The bundled model stands in for the emulated one: a stage's forward is really computed, and charged
the time that the emulated model's layers on that device would take. A forward takes as long as the
slower of memory and arithmetic, max(bytes / bandwidth, operations / rate), plus a fixed time per
layer (the roofline model, Williams et al. 2009). Times are in seconds, sizes in bytes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from flowspec.cost_model.profiles import (
    ClusterProfile,
    DeviceProfile,
    LayerSizes,
    ModelProfile,
    read_cluster,
    read_model,
)
from flowspec.protocol.messages import HEAD, HiddenStates, Message, Reroot, segments_of
from flowspec.request import NO_NODE
from flowspec.runtime.core import Work
from flowspec.transport.link_occupancy import Passage

DRAFTERS = ("eagle", "eagle3", "draft_model", "ngram", "none")
MESSAGE_BYTES = 64  # bytes of any message's header and framing
ROW_BYTES = 20  # bytes of a row's ids and token
NODE_BYTES = 8
CANDIDATE_BYTES = 4  # of a row's candidate
DRAWN_BYTES = 12  # of a token with its probability
NOTHING_S = 1e-6  # work without cost still takes its turn
SYSTEM_GB = 1.0  # of a device's memory, for caches and other programs
HALF = 2  # bytes of a 16-bit number


@dataclass(frozen=True, slots=True, kw_only=True)
class Emulation:
    """A model on a cluster with a drafter; `work`, `link` and `host` are the simulator's models."""

    cluster: ClusterProfile
    model: ModelProfile
    drafter: str
    layers: tuple[int, ...]  # layers of the emulated model on stages 1..N
    draft_scale: float = 1.0  # factor on the time of drafter forwards

    def __post_init__(self) -> None:
        if self.drafter not in DRAFTERS:
            raise ValueError(f"unknown drafter {self.drafter!r}; known: {', '.join(DRAFTERS)}")
        if not 0.0 <= self.draft_scale < math.inf:
            raise ValueError(f"draft_scale must not be negative: {self.draft_scale}")
        if len(self.layers) != self.cluster.num_stages:
            raise ValueError(
                f"layers of {len(self.layers)} stages are given, cluster {self.cluster.name} has "
                f"{self.cluster.num_stages}"
            )
        if sum(self.layers) != self.model.layers or min(self.layers) < 1:
            split = "+".join(str(count) for count in self.layers)
            raise ValueError(
                f"stages of {split} layers are not the {self.model.layers} of {self.model.name}, "
                "at least one each"
            )
        self._check_memory()

    def slowed(self, factor: float) -> "Emulation":
        """Return this emulation with every time multiplied by `factor`; decisions stay the same."""
        devices = tuple(
            replace(
                device,
                bandwidth_gb_s=device.bandwidth_gb_s / factor,
                fp16_tflops=device.fp16_tflops / factor,
                layer_overhead_ms=device.layer_overhead_ms * factor,
                host_overhead_ms=device.host_overhead_ms * factor,
            )
            for device in self.cluster.devices
        )
        links = tuple(
            replace(link, rate_mbps=link.rate_mbps / factor, latency_ms=link.latency_ms * factor)
            for link in self.cluster.links
        )
        return replace(self, cluster=replace(self.cluster, devices=devices, links=links))

    def check_stages(self, num_stages: int) -> None:
        """Raise ValueError when the stand-in model is split into another number of stages."""
        if num_stages != self.cluster.num_stages:
            raise ValueError(
                f"the model is split into {num_stages} stages, cluster {self.cluster.name} has "
                f"{self.cluster.num_stages}; split it into that many"
            )

    def work(self, rank: int, work: Work) -> float:
        """Return the seconds of a piece of work on `rank`."""
        if work.kind == "draft":
            drafted = self.draft_scale * self.draft_s(work.rows, work.context)
            return max(NOTHING_S, drafted + self._host_s(HEAD))
        segments = work.about.get("segments", ())
        requests = max(1, len({segment.request for segment in segments}))
        time = 0.0
        if rank != HEAD:  # a head that makes the verdicts runs only the lm_head
            time = self.forward_s(rank, work.rows, work.context, requests)
        if work.kind == "verify":
            asked = sum(
                int(segment.verify) if segment.prefix else len(segment.nodes)
                for segment in segments
            )
            time += self.lm_head_s(rank, asked if segments else work.rows)
        return time

    @property
    def link_row_ms(self) -> float:
        """Return a row's time on the slowest line of a stage, in milliseconds."""
        slowest = min(_bytes_per_s(link.rate_mbps) for link in self.cluster.links[1:])
        return self.model.hidden_size * HALF / slowest * 1e3

    def link(self, source: int, to: int, message: Message) -> Passage:
        """Return a message's demands on the lines of its sender and its receiver."""
        links = self.cluster.links
        return Passage(
            latency_s=(links[source].latency_ms + links[to].latency_ms) / 2e3,
            num_bytes=self.message_bytes(message),
            rate_out=_bytes_per_s(links[source].rate_mbps),
            rate_in=_bytes_per_s(links[to].rate_mbps),
        )

    def transfer_s(self, source: int, to: int, num_bytes: float) -> float:
        """Return the seconds of `num_bytes` on the slower of the two lines, without latency."""
        links = self.cluster.links
        return num_bytes / min(_bytes_per_s(links[rank].rate_mbps) for rank in (source, to))

    def host(self, rank: int, message: Message) -> float:
        """Return the seconds of `rank`'s own program per message taken in, or per slot sent."""
        del message
        return self._host_s(rank)

    def message_bytes(self, message: Message) -> float:
        """Return the bytes on the wire, with the emulated model's hidden states in 16 bits."""
        hidden = self.model.hidden_size * HALF
        size = float(MESSAGE_BYTES)
        for segment in segments_of(message):
            row = ROW_BYTES + (hidden if segment.hidden is not None else 0)
            size += len(segment.nodes) * row
            for sent in segment.candidates:
                size += len(sent.tokens) * CANDIDATE_BYTES + len(sent.drawn_from) * DRAWN_BYTES
        if isinstance(message, HiddenStates):
            size += len(message.nodes) * (NODE_BYTES + hidden)
        return size

    def forward_s(self, rank: int, rows: int, context: int, requests: int = 1) -> float:
        """Return the seconds of `rank`'s layers over rows of some requests, without lm_head.

        Each row sees `context` rows of its own request.
        """
        layers, device = self.layers[rank - 1], self.cluster.devices[rank]
        quantized = device.int4_bandwidth_share if self.model.weight_bits < 16 else 1.0
        cached = context * requests * self.model.kv_bytes
        read = layers * (self.model.layer_bytes / quantized + cached)
        if rank == 1:
            read += rows * self.model.hidden_size * HALF  # embedding
        return _roofline(device, read, layers * _operations(self.model, rows, context), layers)

    def lm_head_s(self, rank: int, rows: int) -> float:
        """Return the seconds of logits and the choice of a token for `rows` rows."""
        weights = self.model.lm_head_weights if rows else 0
        return _roofline(
            self.cluster.devices[rank], weights * HALF, 2.0 * weights * rows, 1 if rows else 0
        )

    def draft_s(self, rows: int, context: int) -> float:
        """Return the seconds of one drafter forward on the head's device; 0 if nothing runs."""
        if not rows or self.drafter in ("ngram", "none"):
            return 0.0
        model, weights = self._draft_sizes(), self._draft_weights()
        read = weights * HALF + model.layers * context * model.kv_bytes
        attention = model.layers * 4.0 * rows * context * model.num_heads * model.head_dim
        operations = 2.0 * rows * weights + attention
        return _roofline(self.cluster.devices[HEAD], read, operations, model.layers + 1)

    def ar_seconds_per_token(self, context: int) -> float:
        """Return the seconds per token of plain decoding: each stage, link and hand-over in turn.

        `context` is the mean number of rows in the KV cache over the answer.
        """
        last, hidden = self.cluster.num_stages, self.model.hidden_size * HALF
        # bytes of a row's content on the way to each stage
        sizes = [0.0, *[float(hidden)] * (last - 1)]
        total = self.lm_head_s(last, 1)
        for stage, size in enumerate(sizes, start=1):
            total += self.forward_s(stage, 1, context) + self._host_s(stage)
            total += self._passage_s(stage - 1, stage, MESSAGE_BYTES + ROW_BYTES + size)
        total += self._passage_s(last, HEAD, MESSAGE_BYTES)
        return total + 3 * self._host_s(HEAD)  # verdict and exit taken in, a segment sent

    def _passage_s(self, source: int, to: int, num_bytes: float) -> float:
        passage = self.link(source, to, Reroot(request=0, position=0, parent=NO_NODE, token=0))
        return passage.latency_s + self.transfer_s(source, to, num_bytes)

    def _host_s(self, rank: int) -> float:
        return self.cluster.devices[rank].host_overhead_ms / 1e3

    def _draft_weights(self) -> int:
        """Return the weights that a forward of the draft model reads, including its lm_head."""
        model, size = self._draft_sizes(), self.model.hidden_size
        weights = model.layers * model.layer_weights + model.lm_head_weights
        if self.drafter == "eagle":
            weights += 2 * size * size  # input projection: token and hidden state
        # three hidden states to one; token and hidden state side by side
        if self.drafter == "eagle3":
            weights += 3 * size * size + model.attention_weights(2 * size)
            weights -= model.attention_weights(size)
        return weights

    def _draft_sizes(self) -> LayerSizes:
        if self.drafter == "draft_model":
            return self.model.draft_model
        vocab = self.model.draft_vocab_size if self.drafter == "eagle3" else self.model.vocab_size
        return LayerSizes(
            layers=1,
            hidden_size=self.model.hidden_size,
            intermediate_size=self.model.intermediate_size,
            num_heads=self.model.num_heads,
            num_kv_heads=self.model.num_kv_heads,
            head_dim=self.model.head_dim,
            vocab_size=vocab,
        )

    def _check_memory(self) -> None:
        head = self.cluster.devices[HEAD]
        if self.drafter not in ("ngram", "none"):
            embedding = self._draft_sizes().hidden_size * self.model.vocab_size
            needed = (self._draft_weights() + embedding) * HALF / 2**30 + SYSTEM_GB
            if needed > head.memory_gb:
                raise ValueError(
                    f"the {self.drafter} drafter of {self.model.name} needs {needed:.1f} GiB on "
                    f"the head, {head.name} has {head.memory_gb:.1f}; take a larger device, or "
                    "the ngram drafter"
                )
        for rank, layers in enumerate(self.layers, start=1):
            device = self.cluster.devices[rank]
            needed = _stage_gb(self.model, layers, first=rank == 1, last=rank == len(self.layers))
            if needed > device.memory_gb:
                raise ValueError(
                    f"{layers} layers of {self.model.name} need {needed:.1f} GiB on stage {rank}, "
                    f"{device.name} has {device.memory_gb:.1f}; take {_smaller(self.model)}"
                )


def load_emulation(
    cluster: str,
    model: str,
    *,
    drafter: str,
    stages: int | None = None,
    layers: Sequence[int] | None = None,
) -> Emulation:
    """Return an emulation from profiles, by name or file.

    `stages` changes the number of stages if all are alike; `layers` are those of the emulated model
    per stage. Raises ValueError that names what is unknown, inconsistent or too large.
    """
    found, sizes = read_cluster(cluster), read_model(model)
    if stages is not None:
        found = with_stages(found, stages)
    split = tuple(layers or found.layers) or balanced_layers(found, sizes)
    return Emulation(cluster=found, model=sizes, drafter=drafter, layers=split)


def with_stages(cluster: ClusterProfile, stages: int) -> ClusterProfile:
    """Change the number of stages, all alike. Raises ValueError if they differ."""
    if stages == cluster.num_stages:
        return cluster
    if not cluster.is_homogeneous:
        raise ValueError(
            f"cluster {cluster.name} has {cluster.num_stages} stages of several kinds and cannot "
            f"have {stages}"
        )
    return replace(
        cluster,
        devices=(cluster.devices[0], *[cluster.devices[1]] * stages),
        links=(cluster.links[0], *[cluster.links[1]] * stages),
        layers=(),
    )


def read_emulation(names: str, *, drafter: str, slowdown: float = 1.0) -> Emulation:
    """Return the emulation that `CLUSTER:MODEL` names. Raises ValueError."""
    cluster, colon, model = names.partition(":")
    if not colon or not cluster or not model:
        raise ValueError(f"emulate takes CLUSTER:MODEL, such as jetson-5:vicuna-7b, not {names!r}")
    return load_emulation(cluster, model, drafter=drafter).slowed(slowdown)


def balanced_layers(cluster: ClusterProfile, model: ModelProfile) -> tuple[int, ...]:
    """Return the layers per stage that make the slowest stage fastest, within the memories.

    Raises ValueError when the model does not fit.
    """
    num_stages = cluster.num_stages
    if num_stages > model.layers:
        raise ValueError(f"{model.name} has {model.layers} layers, too few for {num_stages} stages")
    layers = [1] * num_stages
    for _ in range(model.layers - num_stages):
        options = [
            (_stage_s(cluster, model, index, count + 1), index)
            for index, count in enumerate(layers)
            if _fits(cluster, model, index, count + 1)
        ]
        if not options:
            have = sum(device.memory_gb for device in cluster.devices[1:])
            needed = _stage_gb(model, model.layers, first=True, last=True)
            raise ValueError(
                f"{model.name} needs {needed - SYSTEM_GB:.1f} GiB and {SYSTEM_GB:.0f} more on each "
                f"device, the stages of {cluster.name} have {have:.1f} together; take "
                f"{_smaller(model)}"
            )
        layers[min(options)[1]] += 1
    return tuple(layers)


def _stage_s(cluster: ClusterProfile, model: ModelProfile, index: int, layers: int) -> float:
    """Return the seconds of a stage's forward over one row, including the lm_head."""
    device = cluster.devices[index + 1]
    quantized = device.int4_bandwidth_share if model.weight_bits < 16 else 1.0
    time = _roofline(device, layers * model.layer_bytes / quantized, 0.0, layers)
    if index + 1 == cluster.num_stages:
        time += _roofline(device, model.lm_head_weights * HALF, 0.0, 1)
    return time


def _fits(cluster: ClusterProfile, model: ModelProfile, index: int, layers: int) -> bool:
    last = index + 1 == cluster.num_stages
    needed = _stage_gb(model, layers, first=index == 0, last=last)
    return needed <= cluster.devices[index + 1].memory_gb


def _stage_gb(model: ModelProfile, layers: int, *, first: bool, last: bool) -> float:
    """Return the GiB of memory that a stage needs: weights, and the system's share."""
    ends = (first + last) * model.lm_head_weights * HALF
    return (layers * model.layer_bytes + ends) / 2**30 + SYSTEM_GB


def _smaller(model: ModelProfile) -> str:
    """Return advice for a model that does not fit."""
    return "more or larger devices" + (", or a 4-bit model" if model.weight_bits > 5 else "")


def _operations(model: LayerSizes, rows: int, context: int) -> float:
    """Return the operations of one layer: matrices, and each row's attention to `context` rows."""
    attention = 4.0 * rows * context * model.num_heads * model.head_dim
    return 2.0 * rows * model.layer_weights + attention


def _roofline(device: DeviceProfile, read: float, operations: float, layers: int) -> float:
    memory_s = read / (device.bandwidth_gb_s * 1e9)
    return max(memory_s, operations / (device.fp16_tflops * 1e12)) + (
        layers * device.layer_overhead_ms / 1e3
    )


def _bytes_per_s(rate_mbps: float) -> float:
    return rate_mbps * 1e6 / 8
