"""Emulation gives the reference testbed's times, agrees with the closed form, and adds up."""

from dataclasses import replace
from functools import lru_cache
from random import Random

import pytest
import torch

from flowspec.cost_model.emulation import Emulation, load_emulation
from flowspec.engine.engine import generate
from flowspec.engine.simulated import SimulatedEngine
from flowspec.protocol.messages import Exit, HiddenStates, Segment
from flowspec.request import NodeId, RequestOutput
from flowspec.runtime.core import Work
from flowspec.simulator.simulator import Simulator, instant_link, unit_work
from tests.support.clusters import make_cluster
from tests.support.scripted import Script, ScriptedDrafter, mixed
from tests.support.tiny import VOCAB, request


@lru_cache
def reference(drafter: str = "eagle", cluster: str = "jetson-5") -> Emulation:
    """Return Vicuna-7B in fp16 on the reference testbed."""
    return load_emulation(cluster, "vicuna-7b", drafter=drafter)


def work(kind: str, rows: int, context: int = 0) -> Work:
    """Return a piece of work of these sizes."""
    return Work(kind, rows, context, lambda: None, lambda now, elapsed: ())


def segment(
    rows: int, *, prefix: bool = False, verify: bool = True, hidden: bool = True
) -> Segment:
    """Return a segment of `rows` rows."""
    return Segment(
        request=1,
        seq_no=1,
        nodes=tuple(NodeId(i) for i in range(rows)),
        parents=tuple(NodeId(i - 1) for i in range(rows)),
        tokens=(0,) * rows,
        hidden=torch.zeros(rows, 8) if hidden else None,
        prefix=prefix,
        verify=verify,
    )


def emulated(
    emulation: Emulation, strategy: str, *, tokens: int = 17, script: Script = mixed, **decode: int
) -> tuple[SimulatedEngine, RequestOutput]:
    """One short answer of the tiny model on the emulation's clock."""
    num_stages = emulation.cluster.num_stages
    cluster = make_cluster(num_stages, strategy, drafter=ScriptedDrafter(script), **decode)
    cluster.head.pipe.link_row_ms = emulation.link_row_ms
    simulator = cluster.simulator
    cluster.simulator = Simulator(
        {rank: actor.core for rank, actor in simulator.actors.items()},
        work_time=emulation.work,
        link_time=emulation.link,
        host_time=emulation.host,
    )
    return cluster, generate(cluster, request(max_new_tokens=tokens))


def test_reference_testbed_has_the_published_times():
    """A stage takes a quarter of Vicuna-7B at 55 GB/s, a draft 14 ms, the lm_head 5 ms."""
    bed = reference()
    assert bed.layers == (8, 8, 8, 8)
    assert 8 * bed.model.layer_bytes == pytest.approx(3.24e9, rel=0.001)
    assert bed.work(2, work("forward", 1)) == pytest.approx(3.24e9 / 55e9 + 2e-3, rel=0.001)
    assert bed.work(2, work("forward", 80)) == pytest.approx(3.24e9 / 55e9 + 2e-3, rel=0.001)
    assert bed.work(2, work("forward", 160)) == pytest.approx(2 * 3.24e9 / 55e9 + 2e-3, rel=0.001)
    verify = bed.work(4, work("verify", 16)) - bed.work(4, work("forward", 16))
    assert verify == pytest.approx(5e-3, rel=0.01)
    assert bed.draft_s(10, 0) == pytest.approx(14e-3, rel=0.02)


def test_context_costs_its_keys_and_values():
    """Every layer of the stage reads each row of the cache once."""
    bed = reference()
    more = bed.work(1, work("forward", 1, 1000)) - bed.work(1, work("forward", 1, 0))
    assert more == pytest.approx(8 * 1000 * 2 * 4096 * 2 / 55e9)


def test_requests_that_share_a_forward_read_their_own_caches():
    """Every cache is read once; a row attends only to its own request's cache."""
    bed = reference()
    one, both = (bed.forward_s(1, 1, 1000, requests) for requests in (1, 2))
    assert both - one == pytest.approx(8 * 1000 * 2 * 4096 * 2 / 55e9)
    assert bed.forward_s(1, 300, 1000, 8) == bed.forward_s(1, 300, 1000)  # bound by computing


def test_a_drafter_pays_for_the_prompt_too():
    """It attends to the whole text, not only to generated tokens."""
    contexts = []

    def charge(rank: int, work: Work) -> float:
        if work.kind == "draft":
            contexts.append(work.context)
        return unit_work(rank, work)

    drafter = ScriptedDrafter(mixed)
    cluster = make_cluster(4, "serial_pp", drafter=drafter, charges=(charge, instant_link))
    generate(cluster, request(max_new_tokens=8))
    assert contexts[0] == len(request().prompt)
    assert max(contexts) > len(request().prompt)


def useless(random: Random, true: int | None, draft_topk: int) -> list[tuple[int, float]]:
    """As sure as any head, and never right."""
    wrong = [token for token in random.sample(range(VOCAB), draft_topk + 1) if token != true]
    return [(token, -0.4 - 0.9 * rank) for rank, token in enumerate(wrong[:draft_topk])]


@pytest.mark.parametrize("cluster", ["jetson-5", "jetson-5-125mbit", "wifi-5"])
def test_streaming_backs_off_where_guessing_does_not_pay(cluster):
    """A useless drafter makes no cluster slower than plain decoding, not on a slow line either."""
    sizes = {"num_draft_tokens": 400, "segment_size": 80, "draft_topk": 16}
    took = {}
    for strategy in ("ar", "streaming"):
        _, done = emulated(reference(cluster=cluster), strategy, tokens=60, script=useless, **sizes)
        took[strategy] = done.stats.finished_at - done.stats.first_token_at
    assert took["streaming"] < 1.01 * took["ar"]


def test_a_piece_of_the_prompt_pays_no_lm_head():
    """Only rows whose next token is needed use it: the last row of a prompt."""
    bed = reference()
    plain = bed.forward_s(4, 16, 0)
    for seg, head in (
        (segment(16, prefix=True, verify=False), 0.0),
        (segment(16, prefix=True), bed.lm_head_s(4, 1)),
        (segment(16), bed.lm_head_s(4, 16)),
    ):
        asked = replace(work("verify", 16), about={"segments": [seg]})
        assert bed.work(4, asked) == pytest.approx(plain + head)


def test_messages_weigh_what_the_emulated_model_would_send():
    """Hidden states count as 4096 numbers of 16 bits, whatever the stand-in model has."""
    bed = reference()
    assert bed.message_bytes(segment(10)) == 64 + 10 * (20 + 8192)
    assert bed.message_bytes(segment(10, hidden=False)) == 64 + 10 * 20
    hidden_states = HiddenStates(
        request=1, layer=-1, nodes=(NodeId(1),) * 3, hidden=torch.zeros(3, 8)
    )
    assert bed.message_bytes(hidden_states) == 64 + 3 * (8 + 8192)
    left = Exit(request=1, seq_no=1, rows=1, slowest_rows=1, slowest_ms=1.0)
    passage = bed.link(4, 0, left)
    assert (passage.latency_s, passage.num_bytes, passage.rate_out) == (0.3e-3, 64, 125e6)


def test_a_head_has_room_for_its_drafter():
    """The head's memory holds the draft layer, lm_head, embedding, and the system's share."""
    bed = reference()
    devices = bed.cluster.devices
    for name, memory_gb, fits in (
        ("eagle", 1.9, False),
        ("eagle", 2.1, True),
        ("ngram", 0.1, True),
    ):
        small = replace(devices[0], memory_gb=memory_gb)
        cluster = replace(bed.cluster, devices=(small, *devices[1:]))
        if fits:
            replace(bed, cluster=cluster, drafter=name)
        else:
            with pytest.raises(
                ValueError, match=r"eagle drafter of vicuna-7b needs .* on the head"
            ):
                replace(bed, cluster=cluster, drafter=name)


def test_drafters_cost_what_they_weigh():
    """Look-ups cost only the host's time; a small model costs less than a head on a large one."""
    cost = {name: reference(name).draft_s(10, 100) for name in ("ngram", "draft_model", "eagle3")}
    assert cost["ngram"] == 0.0
    half = replace(reference(), draft_scale=0.5)
    host_s = half.host(0, Exit(request=1, seq_no=1, rows=1, slowest_rows=1, slowest_ms=1.0))
    assert half.work(0, work("draft", 10, 100)) == pytest.approx(half.draft_s(10, 100) / 2 + host_s)
    assert 0.0 < cost["draft_model"] < reference().draft_s(10, 100) < cost["eagle3"]


def test_four_bit_stages_read_less_and_compute_as_much():
    """They are faster while reading weights takes the time, but not for many rows."""
    full, small = reference(), load_emulation("jetson-5", "vicuna-7b-4bit", drafter="eagle")
    assert small.forward_s(2, 1, 0) < 0.55 * full.forward_s(2, 1, 0)
    assert small.forward_s(2, 300, 0) == pytest.approx(full.forward_s(2, 300, 0))
    assert small.draft_s(10, 100) == full.draft_s(10, 100)


@pytest.mark.parametrize(
    "cluster", ["jetson-5", "jetson-5-125mbit", "jetson-9", "mixed-5", "wifi-5"]
)
def test_plain_decoding_takes_what_the_closed_form_says(cluster: str):
    """The difference is below one percent on every kind of cluster."""
    emulation = reference(cluster=cluster)
    _, completion = emulated(emulation, "ar")
    stats = completion.stats
    took = (stats.finished_at - stats.first_token_at) / (stats.num_tokens - 1)
    context = len(request().prompt) + stats.num_tokens // 2
    assert took == pytest.approx(emulation.ar_seconds_per_token(context), rel=0.01)


def test_hosts_and_links_are_accounted_for():
    """The simulator reports bytes per link and host seconds per device."""
    cluster, _ = emulated(reference(), "ar")
    simulator = cluster.simulator
    assert all(0.0 < seconds < simulator.now for seconds in simulator.host_s.values())
    sent = simulator.link_bytes
    assert sent[1, 2] == sent[2, 3] == sent[3, 4] > 17 * 8192
    assert all(0 < sent[link] < 17 * 8192 for link in ((0, 1), (4, 0), (1, 0)))


def test_a_slow_link_slows_wide_segments_down():
    """Many rows take time on the wire; a single row takes nearly none."""
    for strategy, least, most in (("ar", 1.0, 1.03), ("serial_pp", 1.05, 3.0)):
        fast, slow = (
            emulated(reference(cluster=name), strategy)[1].stats.tokens_per_s
            for name in ("jetson-5", "jetson-5-125mbit")
        )
        assert least <= fast / slow <= most, strategy


def test_a_mixed_cluster_is_split_by_speed():
    """A faster device gets more layers, so that all stage times are alike."""
    emulation = reference(cluster="mixed-5")
    times = [emulation.forward_s(rank, 1, 0) for rank in range(1, 5)]
    assert emulation.layers[2] == max(emulation.layers)
    assert emulation.layers[1] == min(emulation.layers)
    one_layer = max(t / n for t, n in zip(times, emulation.layers, strict=True))
    assert max(times) - min(times) < 1.5 * one_layer


def test_what_does_not_fit_is_refused():
    """The error has the numbers and the remedy."""
    with pytest.raises(ValueError, match="llama-3.1-70b needs 131.4 GiB .* 4-bit model"):
        load_emulation("jetson-5", "llama-3.1-70b", drafter="eagle")
    with pytest.raises(ValueError, match="29 layers of vicuna-7b need .* on stage 4"):
        load_emulation("jetson-5", "vicuna-7b", drafter="eagle", layers=[1, 1, 1, 29])
    with pytest.raises(ValueError, match="stages of 8.8.8.7 layers are not the 32"):
        load_emulation("jetson-5", "vicuna-7b", drafter="eagle", layers=[8, 8, 8, 7])
    with pytest.raises(ValueError, match="unknown drafter 'medusa'; known: eagle"):
        load_emulation("jetson-5", "vicuna-7b", drafter="medusa")


def test_another_number_of_stages():
    """This works if all stages are alike, but not on a mixed cluster."""
    emulation = load_emulation("jetson-5", "vicuna-7b", drafter="eagle", stages=8)
    assert emulation.layers == (4,) * 8
    with pytest.raises(ValueError, match="4 stages of several kinds and cannot have 8"):
        load_emulation("mixed-5", "vicuna-7b", drafter="eagle", stages=8)
