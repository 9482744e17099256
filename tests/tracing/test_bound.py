"""Tests the lower bound of a recorded run's time."""

from dataclasses import replace

import pytest

from flowspec.cost_model.emulation import Emulation
from flowspec.engine.engine import generate
from flowspec.runtime.recorder import Recorder
from flowspec.simulator.simulator import Simulator
from flowspec.speculation.strategies import ABLATIONS, STRATEGIES
from flowspec.tracing.bound import least_seconds
from flowspec.tracing.timeline import make_timeline
from tests.cost_model.test_emulation import reference
from tests.support.clusters import make_cluster
from tests.support.scripted import ScriptedDrafter, mixed
from tests.support.tiny import request

TOKENS = 17


def without_overheads(emulation: Emulation) -> Emulation:
    """Return the cluster with hosts and links that cost nothing but bytes."""
    cluster = emulation.cluster
    devices = tuple(replace(one, host_overhead_ms=0.0) for one in cluster.devices)
    links = tuple(replace(one, latency_ms=0.0) for one in cluster.links)
    return replace(emulation, cluster=replace(cluster, devices=devices, links=links))


def run(emulation: Emulation, strategy: str) -> tuple[float, float]:
    """Return an answer's decode seconds on the emulation's clock, and their bound."""
    cluster = make_cluster(
        emulation.cluster.num_stages, strategy, drafter=ScriptedDrafter(mixed), segment_size=8
    )
    cluster.simulator = Simulator(
        {rank: actor.core for rank, actor in cluster.simulator.actors.items()},
        work_time=emulation.work,
        link_time=emulation.link,
        host_time=emulation.host,
    )
    recorders = {
        rank: Recorder(rank, clock="virtual", size_of=emulation.message_bytes)
        for rank in cluster.simulator.traces
    }
    cluster.simulator.traces.update(recorders)
    stats = generate(cluster, request(max_new_tokens=TOKENS)).stats
    for recorder in recorders.values():
        recorder.close()
    timeline = make_timeline(recorder.records for recorder in recorders.values())
    start, end = stats.first_token_at, stats.last_token_at
    return end - start, least_seconds(timeline, start, end, emulation.transfer_s)


def test_plain_decoding_is_bound_by_forwards_and_bytes():
    """Each token goes through every stage once; the hidden row crosses the line between two."""
    bed = reference()
    took, least = run(bed, "ar")
    forwards = sum(bed.forward_s(stage, 1, 20) for stage in (1, 2, 3, 4)) + bed.lm_head_s(4, 1)
    hidden = 3 * bed.transfer_s(1, 2, 8192)
    assert least == pytest.approx((TOKENS - 1) * (forwards + hidden), rel=0.002)
    assert least < 0.995 * took


@pytest.mark.parametrize("strategy", [*STRATEGIES, *ABLATIONS])
@pytest.mark.parametrize("cluster", ["jetson-5", "jetson-5-125mbit", "wifi-5"])
def test_no_run_beats_its_bound(strategy, cluster):
    """This holds for any schedule and line."""
    took, least = run(reference(cluster=cluster), strategy)
    assert 0.2 * took < least < took


def test_what_drafts_in_turns_is_bound_without_its_drafter():
    """Only the drafter's time differs if there is no other overhead."""
    bed = without_overheads(reference())
    took, least = run(bed, "serial_pp")
    free_took, free_least = run(replace(bed, draft_scale=0.0), "serial_pp")
    assert free_least == pytest.approx(free_took, rel=1e-3)
    assert least == pytest.approx(free_took, rel=1e-3)
    assert took > 1.1 * least


def test_plain_decoding_without_overheads_reaches_its_bound():
    """There is nothing to take away."""
    took, least = run(without_overheads(reference()), "ar")
    assert least == pytest.approx(took, rel=1e-4)
