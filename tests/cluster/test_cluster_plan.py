"""The placement of layers is exact, never exceeds memory, and explains refusals with numbers."""

from itertools import permutations

import pytest

from flowspec.cluster.membership.device_planner import (
    DevicePlanner,
    as_candidate,
    model_profile,
    needs_of,
)
from flowspec.cluster.membership.placement import (
    Candidate,
    Needs,
    Weights,
    fixed_layers,
    needed_bytes,
    plan_layers,
    time_per_token,
    too_small,
)
from flowspec.cluster.membership.roster import DoesNotFitError, Placement
from flowspec.cost_model.profiles import DeviceProfile, LinkProfile, read_model
from flowspec.protocol.control import DeviceReport, Link, ModelSizes

SIZES = ModelSizes(
    layers=6,
    hidden_size=1024,
    intermediate_size=4096,
    num_heads=8,
    num_kv_heads=8,
    head_dim=128,
    vocab_size=8000,
)
MODEL = model_profile("small", SIZES, "float16")
NEEDS = needs_of("float16", context=512, requests=1, reserve_bytes=0.1e9)


def device(
    name: str, *, gb: float = 8.0, gb_s: float = 50.0, mbps: float = 1000.0, ms: float = 0.3
) -> Candidate:
    """Return a board."""
    return Candidate(
        name=name,
        device=DeviceProfile(
            name=name,
            memory_gb=gb,
            bandwidth_gb_s=gb_s,
            fp16_tflops=4.0,
            int4_bandwidth_share=1.0,
            layer_overhead_ms=0.1,
            host_overhead_ms=0.1,
        ),
        link=LinkProfile(name=name, rate_mbps=mbps, latency_ms=ms),
    )


def counts(placement: Placement) -> dict[str, int]:
    """Return the layers by device, in order."""
    return {place.name: place.last - place.first for place in placement.places}


def compositions(total: int, parts: int):
    """Yield all ways to write `total` as `parts` positive numbers."""
    if parts == 1:
        yield (total,)
        return
    for first in range(1, total - parts + 2):
        for rest in compositions(total - first, parts - 1):
            yield (first, *rest)


def best_by_trying_all(candidates: list[Candidate], weights: Weights) -> float:
    """Return the least predicted time over every order, subset and split that fits."""
    best = float("inf")
    for size in range(1, len(candidates) + 1):
        for order in permutations(candidates, size):
            for layers in compositions(MODEL.layers, size):
                fits = all(
                    needed_bytes(MODEL, NEEDS, n, first=k == 0, last=k == size - 1)
                    <= one.memory_bytes
                    for k, (one, n) in enumerate(zip(order, layers, strict=True))
                )
                if fits:
                    best = min(best, time_per_token(order, MODEL, NEEDS, layers, weights))
    return best


@pytest.mark.parametrize("miss", [0.0, 0.2, 1.0])
@pytest.mark.parametrize(
    "candidates",
    [
        [device("a"), device("b"), device("c")],
        [device("a", gb_s=80), device("b", gb_s=20), device("c", gb_s=5)],
        [device("a", gb=0.22, gb_s=100), device("b", gb_s=30), device("c", gb=0.25, gb_s=60)],
        [device("a", ms=20, gb_s=40), device("b", mbps=10, gb_s=90), device("c", gb=0.3)],
        [device("a", gb=0.2), device("b", gb=0.2), device("c", gb=0.2), device("d", gb=0.2)],
    ],
)
def test_the_search_finds_what_trying_everything_finds(candidates, miss):
    """Memory, speed and links differ; `miss` goes from plain decoding (1) to perfect drafts (0)."""
    weights = Weights(miss=miss)
    placement = plan_layers(candidates, MODEL, NEEDS, weights=weights)
    by_name = {one.name: one for one in candidates}
    found = time_per_token(
        [by_name[place.name] for place in placement.places],
        MODEL,
        NEEDS,
        [place.last - place.first for place in placement.places],
        weights,
    )
    # a longer pipeline has to be worth it, by a little
    assert found <= best_by_trying_all(candidates, weights) * 1.0201
    edges = [0, *(place.last for place in placement.places)]
    assert edges[:-1] == [place.first for place in placement.places]
    assert edges[-1] == MODEL.layers
    for k, place in enumerate(placement.places):
        ends = {"first": k == 0, "last": k == len(placement.places) - 1}
        needed = needed_bytes(MODEL, NEEDS, place.last - place.first, **ends)
        assert needed <= by_name[place.name].memory_bytes


def test_faster_devices_get_more_layers():
    """They are weighted by bandwidth, not by memory."""
    fast, slow = device("fast", gb_s=100), device("slow", gb=32, gb_s=25)
    model = read_model("vicuna-7b")
    placement = plan_layers([fast, slow], model, Needs(), weights=Weights(miss=0.1))
    layers = counts(placement)
    assert layers.get("fast", 0) > layers.get("slow", 0)


def test_plain_decoding_does_not_gain_from_a_second_device():
    """Every token visits every stage, so hops only cost time; the placement says so."""
    placement = plan_layers([device("a"), device("b")], MODEL, NEEDS, weights=Weights(miss=1.0))
    assert len(placement.places) == 1
    assert "one device alone" in placement.about
    assert "slower" in next(iter(placement.left_out.values()))


def test_identical_boards_share_a_large_model():
    """They are four boards of 8 GB with a 7B model in fp16, as in the published testbed."""
    boards = [device(f"board-{k}", gb=7.4, gb_s=55) for k in range(4)]
    assert sorted(counts(plan_layers(boards, read_model("vicuna-7b"), Needs())).values()) == [8] * 4


def test_what_does_not_fit_is_explained_in_numbers():
    """The error has the needed and the available memory of each device."""
    boards = [device("one", gb=4.0), device("two", gb=2.0)]
    with pytest.raises(DoesNotFitError) as raised:
        plan_layers(boards, read_model("vicuna-7b"), Needs())
    text = str(raised.value)
    assert "13.48 GB for its 32 layers" in text
    assert "one has 4.29 GB, room for" in text
    assert "two has 2.15 GB" in text


def test_the_slowest_are_the_spares_as_far_as_memory_allows():
    """If memory does not allow all spares, the placement says how many there are."""
    boards = [device("a", gb_s=50), device("b", gb_s=5), device("c", gb_s=50)]
    placement = plan_layers(boards, MODEL, NEEDS, spares=1, weights=Weights(miss=0.0))
    assert "b" not in counts(placement)
    assert placement.left_out["b"].startswith("spare")
    tight = [device(name, gb=0.3) for name in "abc"]
    placement = plan_layers(tight, MODEL, NEEDS, spares=2)
    assert "2 spares were asked for, but the layers leave" in placement.about


def test_a_device_too_small_for_one_layer_is_left_out():
    """The reason has the numbers."""
    placement = plan_layers([device("a"), device("dust", gb=0.01)], MODEL, NEEDS)
    assert placement.left_out["dust"].startswith("too small: one layer")
    assert too_small(device("a"), MODEL, NEEDS) == ""


def test_chosen_counts_are_kept():
    """--layers overrides the search, but not the memory limits."""
    boards = [device("a", gb=1.0), device("b", gb=0.25), device("c")]
    placement = fixed_layers(boards, MODEL, NEEDS, (1, 5))
    assert list(counts(placement).values()) == [1, 5]
    assert len(placement.left_out) == 1
    with pytest.raises(DoesNotFitError, match="3 stages, devices that have joined: 2"):
        fixed_layers(boards[:2], MODEL, NEEDS, (2, 2, 2))
    with pytest.raises(DoesNotFitError, match=r"stage 1 with 5 layers needs .* GB"):
        fixed_layers([device("x", gb=0.15), device("y", gb=0.15)], MODEL, NEEDS, (5, 1))


def test_context_and_requests_cost_memory():
    """Caches are part of a stage's memory."""
    more = needs_of("float16", context=4096, requests=4, reserve_bytes=0.1e9)
    small, large = (needed_bytes(MODEL, n, 3, first=False, last=False) for n in (NEEDS, more))
    rows = 4096 * 4 - 512
    assert large - small == 3 * rows * 2 * SIZES.num_kv_heads * SIZES.head_dim * 2


def test_reports_become_candidates():
    """Measured figures are used if present, cautious ones otherwise."""
    report = DeviceReport(
        hostname="x",
        kind="board",
        memory_available_bytes=4 * 2**30,
        memory_total_bytes=8 * 2**30,
        bandwidth_bytes_per_s=30e9,
        flops=2e12,
        link=Link(latency_s=0.0002, up_bytes_per_s=1e8, down_bytes_per_s=5e7),
    )
    one = as_candidate("x", report)
    assert (one.device.memory_gb, one.device.bandwidth_gb_s) == (4.0, 30.0)
    assert (one.link.rate_mbps, one.link.latency_ms) == (400.0, 0.2)
    unknown = as_candidate("y", report.model_copy(update={"link": Link(), "flops": 0.0}))
    assert unknown.link.rate_mbps == 1000.0
    planner = DevicePlanner(MODEL, NEEDS, layers=(2, 4))
    placement = planner.place({"x": report, "y": report}, spares=0)
    assert list(counts(placement).values()) == [2, 4]
    assert planner.too_small(report, 6) == ""


def test_ten_devices_of_different_speed():
    """With forty layers, the search ends in time only because it is polynomial."""
    model = read_model("llama-2-13b")
    boards = [device(f"d{k}", gb=7.4, gb_s=30 + 5 * k) for k in range(10)]
    placement = plan_layers(boards, model, Needs())
    assert sum(counts(placement).values()) == 40
