"""Causes, totals and the critical path are right for runs that can be worked out by hand."""

from typing import Any

import pytest

from flowspec.engine.engine import generate, generate_all
from flowspec.protocol.messages import (
    CLIENT,
    Exit,
    Ping,
    Reroot,
    Segment,
    Started,
    Submit,
)
from flowspec.request import FinishReason, RequestOutput
from flowspec.runtime.core import Send, Work
from flowspec.runtime.recorder import Recorder
from flowspec.simulator.simulator import adversarial, instant_link, unit_work
from flowspec.speculation.strategies import STRATEGIES
from flowspec.tracing.chrome_trace import write_trace
from flowspec.tracing.idle_time import track
from flowspec.tracing.timeline import Timeline, make_timeline, sent_segments
from flowspec.tracing.totals import count, critical_path, verdicts
from flowspec.transport.link_occupancy import Passage
from tests.support.clusters import make_cluster
from tests.support.scripted import ScriptedDrafter, mixed, perfect
from tests.support.tiny import PROMPT, T1, request
from tests.support.traces import check_trace, record, shifted, timeline_of, times


def traced(strategy: str, *charges: Any, count: int = 14, **options: Any) -> Timeline:
    """Run one request on two stages."""
    cluster = make_cluster(2, strategy, charges=charges, **options)
    recorders = record(cluster)
    generate(cluster, request(max_new_tokens=count))
    return timeline_of(recorders)


def path_of(timeline: Timeline) -> dict[tuple[str, str], float]:
    """Return the critical path's seconds, rounded."""
    tracks = {rank: track(timeline, rank) for rank in timeline.processes}
    return {key: round(s, 9) for key, s in critical_path(timeline, tracks).items()}


PLAIN = ((1.0, 1.0), (0.25, 0.25, 0.25))
SLOW_LINK = ((1.0, 1.0), (0.25, 4.0, 0.5))
SLOW_STAGE = ((0.5, 3.0), (0.25, 0.125, 0.5))


@pytest.mark.parametrize(("work_s", "link_s"), [PLAIN, SLOW_LINK, SLOW_STAGE])
def test_a_plain_pipeline_by_hand(work_s, link_s):
    """`ar` with three tokens goes three times from head to stages 1 and 2 and back, then closes.

    While one process works or sends, all others wait, and the cause is known.
    """
    first, second = work_s
    to_first, to_second, to_head = link_s
    links = {(0, 1): to_first, (1, 2): to_second, (2, 0): to_head}
    timeline = traced(
        "ar",
        lambda rank, work: work_s[rank - 1],
        lambda source, to, message: Passage(latency_s=links.get((source, to), 0.01)),
        count=3,
        chunked_prefill_size=64,
    )
    trip = to_first + first + to_second + second + to_head
    after = to_first + to_second  # Close, which no request waits for
    assert timeline.wall_s == pytest.approx(3 * trip + after)
    assert times(timeline, 0) == pytest.approx(
        {"prompt in the pipe": trip, "waiting for verdict": 2 * trip, "no request": after}
    )
    assert times(timeline, 1) == pytest.approx(
        {
            "forward": 3 * first,
            "waiting for link": 3 * to_first,
            "nothing alive to run": 3 * (to_second + second + to_head),
            "no request": after,
        }
    )
    assert times(timeline, 2) == pytest.approx(
        {
            "verify": 3 * second,
            "waiting for link": 3 * (to_first + to_second),
            "upstream busy": 3 * first,
            "nothing alive to run": 3 * to_head,
            "no request": after,
        }
    )
    assert path_of(timeline) == pytest.approx(
        {
            ("stage 1", "forward"): 3 * first,
            ("stage 2", "verify"): 3 * second,
            ("links", "waiting for link"): 3 * (to_first + to_second + to_head),
        }
    )


def test_a_slow_drafter_by_hand():
    """The stages wait for the drafter: the prompt is prefilled, then 2 forwards of 5 s follow.

    The prompt's verdict is taken in after 2.75 s, while the first draft runs until 5 s. The second
    one ends at 10 s, and the last token's trip takes 2.75 s more.
    """
    timeline = traced(
        "serial_pp",
        lambda rank, work: 5.0 if work.kind == "draft" else 1.0,
        lambda source, to, message: Passage(latency_s=0.25),
        count=2,
        chunked_prefill_size=64,
        drafter=ScriptedDrafter(perfect),
    )
    assert times(timeline, 0) == {"draft": 10.0, "waiting for verdict": 2.75, "no request": 0.5}
    assert times(timeline, 1) == {
        "forward": 2.0,
        "waiting for link": 0.5,
        "head drafting": 8.75,
        "nothing alive to run": 1.5,
        "no request": 0.5,
    }
    assert times(timeline, 2) == {
        "verify": 2.0,
        "waiting for link": 1.0,
        "upstream busy": 2.0,
        "head drafting": 7.5,
        "nothing alive to run": 0.25,
        "no request": 0.5,
    }
    path = path_of(timeline)
    assert path["head", "draft"] == 10.0
    assert sum(path.values()) == pytest.approx(12.75)
    assert not any(hop.queued for hop in timeline.hops if hop.to == 0)  # drafting holds none up
    assert all(hop.elapsed_s == pytest.approx(0.25) for hop in timeline.hops if not hop.queued)


def head_records(*awaited: Any, in_flight: int) -> Timeline:
    """Return a head that waits from 3.0 to 4.0 in a request, gets `awaited`, and drafts."""
    head = Recorder(0, clock="virtual")
    head.received(0.0, Submit(request=request(1)))
    for seq_no in range(in_flight):
        segment = Segment(request=1, seq_no=seq_no, nodes=(9,), parents=(8,), tokens=(1,))
        head.sent(1.0, 1, segment)
    head.received(2.0, Reroot(request=1, position=11, parent=10, token=3))
    draft = Work("draft", 1, 1, lambda: None, lambda now, elapsed: (), {"request": 1})
    head.worked(2.0, 3.0, draft)
    for message in awaited:
        head.received(4.0, message)
    head.worked(4.0, 5.0, draft)
    head.sent(5.0, CLIENT, RequestOutput(request=1, reason=FinishReason.LENGTH))
    head.close()
    return make_timeline([head.records])


VERDICT = Reroot(request=1, position=12, parent=9, token=3)
STARTED = Started(request=1, seq_no=0)
EXIT = Exit(request=1, seq_no=0, rows=1, slowest_rows=1, slowest_ms=1.0)


@pytest.mark.parametrize(
    ("awaited", "in_flight", "cause"),
    [
        ([VERDICT], 1, "waiting for verdict"),
        ([VERDICT, EXIT], 1, "waiting for verdict"),
        ([STARTED], 2, "pipe full"),
        ([EXIT], 2, "pipe full"),
        ([EXIT], 1, "pipe draining"),
    ],
)
def test_what_makes_the_head_act_is_what_it_waited_for(awaited, in_flight, cause):
    """Its action after the wait shows what was missing."""
    timeline = head_records(*awaited, in_flight=in_flight)
    assert times(timeline, 0) == {"prompt in the pipe": 2.0, "draft": 2.0, cause: 1.0}


def test_time_between_requests_is_nobodys_fault():
    """The second request comes later, and every process reports the pause as such."""
    cluster = make_cluster(2, "ar", charges=(unit_work, instant_link))
    recorders = record(cluster)
    generate(cluster, request(1, max_new_tokens=2))
    cluster.simulator.now += 50.0
    generate(cluster, request(2, max_new_tokens=2))
    timeline = timeline_of(recorders)
    assert len(timeline.open) == 2
    for rank in timeline.processes:
        assert times(timeline, rank)["no request"] == pytest.approx(50.0, abs=0.01)


@pytest.mark.parametrize(("seed", "number"), [(0, 1), (1, 1), (1, 3), (2, 3)])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_any_run_adds_up(strategy, seed, number, tmp_path):
    """Costs and delays are random: no gaps, a path as long as the run, the stages' totals.

    This also holds when requests share messages and forwards.
    """
    cluster = make_cluster(
        3, strategy, drafter=ScriptedDrafter(mixed, seed=seed), charges=adversarial(seed)
    )
    recorders = record(cluster)
    asked = [request(i + 1, sampling=T1, prompt=PROMPT[i:]) for i in range(number)]
    stats = [completion.stats for completion in generate_all(cluster, asked)]
    cluster.simulator.run()
    timeline = timeline_of(recorders)
    shared = [note for note in timeline.head.sent if len(sent_segments(note)) > 1]
    assert bool(shared) == (number > 1)
    write_trace(timeline, tmp_path / "out.json")
    check_trace(tmp_path / "out.json")
    for rank in timeline.processes:
        assert "unknown" not in times(timeline, rank)
        assert "host overhead" not in times(timeline, rank)
        busy = sum(work.end - work.start for work in timeline.processes[rank].works)
        assert busy == pytest.approx(cluster.simulator.busy_s[rank])
    assert sum(path_of(timeline).values()) == pytest.approx(timeline.open[-1][1])
    totals = count(timeline)
    stages = cluster.stages
    prompt_rows = 3 * sum(len(one.prompt) for one in asked)
    assert totals.rows_run == sum(stage.num_rows_run for stage in stages) - prompt_rows
    assert totals.rows_pruned == sum(stage.num_rows_pruned for stage in stages)
    assert totals.num_segments == sum(own.num_segments for own in stats)
    assert totals.rows_sent == sum(own.num_rows_sent for own in stats)
    assert totals.num_tokens == sum(own.num_tokens for own in stats)
    assert totals.num_verdicts >= sum(own.num_verdicts for own in stats)
    assert 0 <= totals.rows_wasted <= totals.rows_run


@pytest.mark.parametrize(("script", "hits"), [(perfect, True), (mixed, False)])
def test_hits_are_verdicts_whose_token_was_on_its_way(script, hits):
    """With a drafter that is always right, only decoys are wasted."""
    timeline = traced("streaming", unit_work, instant_link, drafter=ScriptedDrafter(script))
    found = [verdict.hit for verdict in verdicts(timeline)]
    assert found[0] is None
    assert all(found[1:-1]) is hits


def test_stages_with_clocks_of_their_own_are_put_on_the_heads():
    """Their clocks are years apart and drift; after the pings, the run agrees within the error."""
    cluster = make_cluster(2, "streaming", charges=(unit_work, lambda *_: Passage(latency_s=0.25)))
    recorders = record(cluster)
    ping(cluster)
    generate(cluster, request())
    ping(cluster)
    same = timeline_of(recorders)
    records = {rank: list(recorder.records) for rank, recorder in recorders.items()}
    for rank in records:
        first = records[rank][0]
        records[rank][0] = (*first[:3], "monotonic")
    alike = make_timeline(records.values())
    records[1] = shifted(records[1], offset=1e6, drift=2e-5)
    records[2] = shifted(records[2], offset=-3e4, drift=-5e-6)
    moved = make_timeline(records.values())
    error = max(process.clock.error for process in moved.processes.values() if process.clock)
    assert 0.2 < error < 0.3  # half of a round trip of 2 x 0.25
    assert moved.processes[1].clock.drift == pytest.approx(2e-5, rel=0.1)
    for hop, before in zip(
        sorted(moved.hops, key=lambda hop: (hop.to, hop.sent.key, hop.source)),
        sorted(same.hops, key=lambda hop: (hop.to, hop.sent.key, hop.source)),
        strict=True,
    ):
        assert hop.elapsed_s == pytest.approx(before.elapsed_s, abs=1e-3)
        assert hop.elapsed_s >= -error
    assert count(moved) == count(alike) == count(same)


def ping(cluster: Any) -> None:
    """Ping as the head of a real cluster does before and after."""
    for rank in (1, 2):
        cluster.simulator._send_all(0, [Send(rank, Ping(rank=0))])
        cluster.simulator.run()
