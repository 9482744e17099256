"""Placement of layers on real devices, from their reports and the model's sizes."""

from collections.abc import Mapping, Sequence

from flowspec.cluster.membership.placement import (
    Candidate,
    Needs,
    Weights,
    fixed_layers,
    plan_layers,
    time_per_token,
    too_small,
)
from flowspec.cluster.membership.roster import Place, Placement
from flowspec.cost_model.profiles import DeviceProfile, LayerSizes, LinkProfile, ModelProfile
from flowspec.model.architecture import ModelConfig
from flowspec.protocol.control import DeviceReport, ModelSizes

LAYER_OVERHEAD_MS, HOST_OVERHEAD_MS = 0.1, 0.1  # assumed: launching a layer, a message in Python
UNKNOWN_RATE_MBPS, UNKNOWN_LATENCY_MS = 1000.0, 0.3  # assumed for a link that was not measured
UNKNOWN_GB_S, UNKNOWN_TFLOPS = 10.0, 0.1


class DevicePlanner:
    """Plans placements over devices' reports; `layers` are the counts that the user has chosen."""

    def __init__(
        self,
        model: ModelProfile,
        needs: Needs,
        *,
        layers: Sequence[int] = (),
        weights: Weights | None = None,
    ) -> None:
        self.model, self.needs, self.layers = model, needs, tuple(layers)
        self.weights = weights or Weights()
        self.num_layers = model.layers

    def place(self, reports: Mapping[str, DeviceReport], *, spares: int) -> Placement:
        """Return the best placement, or that of the chosen `layers`. Raises DoesNotFitError."""
        candidates = [as_candidate(name, report) for name, report in reports.items()]
        if self.layers:
            return fixed_layers(candidates, self.model, self.needs, self.layers)
        return plan_layers(candidates, self.model, self.needs, weights=self.weights, spares=spares)

    def accepts(self, places: Sequence[Place]) -> bool:
        """Whether the chosen `layers`, if any, are those of these places."""
        return not self.layers or self.layers == tuple(p.last - p.first for p in places)

    def seconds_per_token(
        self, reports: Mapping[str, DeviceReport], places: Sequence[Place]
    ) -> float:
        """Return the predicted seconds per token on these places."""
        candidates = [as_candidate(place.name, reports[place.name]) for place in places]
        counts = [place.last - place.first for place in places]
        return time_per_token(candidates, self.model, self.needs, counts, self.weights)

    def too_small(self, report: DeviceReport, num_layers: int) -> str:
        """Return why a device cannot hold so many layers; empty if it can."""
        candidate = as_candidate(report.hostname, report)
        return too_small(candidate, self.model, self.needs, num_layers)


def as_candidate(name: str, report: DeviceReport) -> Candidate:
    """Convert a device's report to a candidate."""
    link = report.link
    return Candidate(
        name=name,
        device=DeviceProfile(
            name=name,
            memory_gb=max(report.memory_available_bytes, 1) / 2**30,
            bandwidth_gb_s=report.bandwidth_bytes_per_s / 1e9 or UNKNOWN_GB_S,
            fp16_tflops=report.flops / 1e12 or UNKNOWN_TFLOPS,
            int4_bandwidth_share=1.0,
            layer_overhead_ms=LAYER_OVERHEAD_MS,
            host_overhead_ms=HOST_OVERHEAD_MS,
        ),
        link=LinkProfile(
            name=name,
            rate_mbps=link.slower_bytes_per_s * 8 / 1e6 or UNKNOWN_RATE_MBPS,
            latency_ms=link.latency_s * 1e3 or UNKNOWN_LATENCY_MS,
        ),
    )


def model_sizes(config: ModelConfig) -> ModelSizes:
    """Return the sizes of a model that decide its speed and memory."""
    return ModelSizes(
        layers=config.num_layers,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab_size=config.vocab_size,
    )


def model_profile(name: str, sizes: ModelSizes, dtype: str) -> ModelProfile:
    """Return a model's profile for the cost model; its draft model counts as one of its layers."""
    values = sizes.model_dump()
    return ModelProfile(
        name=name,
        weight_bits=32 if dtype == "float32" else 16,
        draft_vocab_size=sizes.vocab_size,
        draft_model=LayerSizes(**{**values, "layers": 1}),
        **values,
    )


def needs_of(dtype: str, *, context: int, requests: int, reserve_bytes: float) -> Needs:
    """Return what a stage needs besides its layers, for a model of this dtype."""
    size = 4.0 if dtype == "float32" else 2.0
    return Needs(
        context=context,
        requests=requests,
        bytes_per_weight=size,
        kv_bytes_per_number=size,
        reserve_bytes=reserve_bytes,
    )
