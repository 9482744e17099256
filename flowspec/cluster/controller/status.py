"""Builds the status that `flowspec status` shows, from membership and core."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import flowspec
from flowspec.cluster.membership.membership import Membership, Phase
from flowspec.cluster.membership.roster import Device
from flowspec.protocol.control import ClusterStatus, DeviceReport, DeviceStatus, ModelSizes
from flowspec.protocol.messages import Status

MAX_BUSY_S, MAX_COUNT = 1e12, 2**62  # limits of a control message (protocol/schema.py)
PROBE_LIMIT_S = 30.0  # without a token across all stages for longer, the cluster is not healthy


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadFacts:
    """The core's part of the status. Times are of the monotonic clock."""

    strategy: str  # default strategy
    max_context: int
    drafter: str  # the loaded drafter
    draft_hash: str
    code_hash: str
    sizes: ModelSizes
    uptime_s: float
    epoch_at: float | None  # begin of the epoch
    crossed_at: float | None
    statuses: Mapping[int, Status]
    num_active: int
    num_waiting: int
    num_done: int
    num_failed: int


def cluster_status(membership: Membership, facts: HeadFacts, now: float) -> ClusterStatus:
    """Return the cluster's status at time `now`."""
    probe_age_s = None if facts.crossed_at is None else max(0.0, now - facts.crossed_at)
    why = _why_unhealthy(membership, probe_age_s)
    devices = [_device(d, membership, facts, now) for d in membership.devices.values()]
    lost = [
        DeviceStatus(
            name=name,
            state="lost",
            about=cause,
            report=DeviceReport(hostname=name, kind="", memory_available_bytes=0,
                                memory_total_bytes=0),
        )
        for name, cause in membership.gone.items()
    ]  # fmt: skip
    return ClusterStatus(
        version=flowspec.__version__,
        healthy=not why,
        why=why or f"a token crossed every stage {probe_age_s or 0.0:.1f} s ago",
        epoch=membership.epoch,
        epoch_age_s=0.0 if facts.epoch_at is None else max(0.0, now - facts.epoch_at),
        model=membership.config.model,
        sizes=facts.sizes,
        strategy=facts.strategy,
        drafter=facts.drafter,
        draft_hash=facts.draft_hash,
        code_hash=facts.code_hash,
        max_context=facts.max_context,
        uptime_s=facts.uptime_s,
        probe_age_s=probe_age_s,
        requests_active=facts.num_active,
        requests_waiting=facts.num_waiting,
        requests_done=facts.num_done,
        requests_failed=facts.num_failed,
        devices=(*devices, *lost[-16:]),
    )


def _why_unhealthy(membership: Membership, probe_age_s: float | None) -> str:
    if membership.phase is not Phase.SERVING:
        return membership.missing()
    if probe_age_s is None:
        return "no token has crossed every stage yet"
    if probe_age_s > PROBE_LIMIT_S:
        return f"no token has crossed every stage for {probe_age_s:.0f} s"
    return ""


def _device(device: Device, membership: Membership, facts: HeadFacts, now: float) -> DeviceStatus:
    status = facts.statuses.get(device.rank) if device.rank else None
    if status is not None and not _can_be(status):
        status = None
    place = device.place if device.rank else None
    return DeviceStatus(
        name=device.name,
        state=_state(device, membership),
        about=device.about,
        rank=device.rank,
        layers=(place.first, place.last) if place is not None else None,
        report=device.report,
        heartbeat_age_s=max(0.0, now - device.heard_at),
        round_trip_s=device.beat.round_trip_s,
        power_w=device.beat.power_w,
        busy_s=status.busy_s if status else 0.0,
        num_kv_tokens=device.ready.num_kv_tokens if device.ready else 0,
        num_kv_tokens_used=status.num_kv_tokens_used if status else 0,
        peak_memory_bytes=status.peak_memory_bytes if status else 0,
    )


def _can_be(status: Status) -> bool:
    """Return whether values that a device reports can be shown."""
    counts = (status.num_kv_tokens_used, status.peak_memory_bytes)
    return 0.0 <= status.busy_s <= MAX_BUSY_S and all(0 <= count <= MAX_COUNT for count in counts)


def _state(
    device: Device, membership: Membership
) -> Literal["serving", "loading", "spare", "too small"]:
    if not device.rank:
        return "too small" if device.about.startswith("too small") else "spare"
    return "serving" if membership.phase is Phase.SERVING else "loading"
