"""An ablated pipeline lacks its mechanism, pays the price, and keeps the text."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise

import pytest

from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import Emulation, load_emulation
from flowspec.engine.build import check_run
from flowspec.engine.engine import generate
from flowspec.engine.simulated import SimulatedEngine
from flowspec.head.request_state import RequestState
from flowspec.model.stage_model import FINAL_NORM
from flowspec.protocol.messages import (
    HEAD,
    AddRequest,
    Batch,
    HiddenStates,
    Message,
    Reroot,
    Segment,
)
from flowspec.request import Decoding, RequestOutput
from flowspec.runtime.core import Core, Send, Step
from flowspec.simulator.ablated import DecidingHead, UnprunedStage
from flowspec.speculation.strategies import ABLATIONS
from flowspec.speculation.strategies.ablations import Eager
from flowspec.speculation.strategies.streaming import Streaming, StreamingConfig
from flowspec.speculation.strategy import Outgoing
from flowspec.stage.stage import Stage
from tests.support.clusters import check_empty, make_cluster, run_all_watched
from tests.support.scripted import ScriptedDrafter, drafter_named, hostile, mixed
from tests.support.states import decoding_state
from tests.support.tiny import T0, T1, expected, request, stage_models

PIPELINES = [name for name, spec in ABLATIONS.items() if spec.without is not None]
HEAD_VERDICT, UNPRUNED = "streaming-head-verdict", "streaming-unpruned"


@pytest.mark.parametrize("drafter", ["eagle", "eagle3", "perfect", "hostile"])
@pytest.mark.parametrize("strategy", PIPELINES)
def test_texts_are_the_targets_own_and_nothing_is_left(strategy, drafter):
    """This holds for one request and for several in one segment, with any number of stages."""
    batches: list[Batch] = []
    for num_stages, count in ((1, 1), (2, 3), (4, 2)):
        asked = [
            request(n, sampling=replace(T1, seed=n) if n % 2 else T0, max_new_tokens=9 + n)
            for n in range(1, count + 1)
        ]
        setup = {"num_stages": num_stages, "strategy": strategy}
        completions, watches = run_all_watched({**setup, "drafter": drafter_named(drafter)}, asked)
        assert [list(c.tokens) for c in completions] == [expected(one) for one in asked]
        if strategy == HEAD_VERDICT:
            assert isinstance(watches[0].core, DecidingHead)
            assert not watches[0].core.end.requests
        batches += [message for message in watches[1].seen if isinstance(message, Batch)]
    assert batches, "no segment was of several"


def answered(
    strategy: str, *, num_stages: int = 4, wrap: Callable[[Core], Core] = lambda core: core
) -> tuple[SimulatedEngine, RequestOutput]:
    """One answer with a drafter that is right two times in three."""
    drafter = ScriptedDrafter(mixed, aux_hidden_state_layers=(2, FINAL_NORM))
    cluster = make_cluster(num_stages, strategy, drafter=drafter, wrap=wrap)
    cluster.simulator.work_log = []
    completion = generate(cluster, request(max_new_tokens=24))
    check_empty(cluster)
    return cluster, completion


# In-flight pruning ------------------------------------------------------------------------------


def test_without_pruning_every_row_is_computed_to_the_end():
    """Every stage and link handles all rows that are sent; with pruning, they do not."""
    pruned, with_it = answered("streaming")
    unpruned, without = answered(UNPRUNED)
    assert without.tokens == with_it.tokens
    num_prompt = len(request().prompt)
    for stage in unpruned.stages:
        assert stage.num_rows_pruned <= 8  # of a segment that trails the request's end
        assert stage.num_rows_run <= num_prompt + without.stats.num_rows_sent
    # what trails the end of the request finds no cache; all that came before was run
    run_by_last = [cluster.stages[-1].num_rows_run for cluster in (pruned, unpruned)]
    assert run_by_last[1] >= num_prompt + 0.9 * without.stats.num_rows_sent
    assert run_by_last[1] > 1.5 * run_by_last[0]
    assert sum(stage.num_rows_pruned for stage in pruned.stages) > 0
    assert without.stats.last_token_at >= with_it.stats.last_token_at


def test_dead_rows_go_on_and_find_room():
    """There are rows below a dead parent and beside the verdict, more than the head counts."""
    stage = UnprunedStage(1, 2, stage_models(2)[0])
    prompt = Segment(
        request=1, seq_no=0, nodes=(0, 1), parents=(-1, 0), tokens=(3, 14), prefix=True
    )
    run(stage, AddRequest(request=1, capacity=8, context=8), prompt)
    run(stage, Reroot(request=1, position=2, parent=1, token=5))
    dead = Segment(
        request=1,
        seq_no=1,
        nodes=tuple(range(20, 30)),
        parents=(1, 20, 99, *range(22, 29)),
        tokens=(6,) * 10,
    )
    (passed_on,) = [send.message for send in run(stage, dead) if send.to == 2]
    assert isinstance(passed_on, Segment)
    assert passed_on.nodes == dead.nodes
    assert passed_on.hidden is not None
    assert len(passed_on.hidden) == 10
    assert (stage.num_rows_run, stage.num_rows_pruned) == (12, 0)
    true = Segment(request=1, seq_no=2, nodes=(30,), parents=(1,), tokens=(5,))
    run(stage, true, Reroot(request=1, position=3, parent=30, token=7))
    assert (stage.requests[1].nodes, stage.requests[1].tip) == ([], 30)


def run(stage: Stage, *messages: Message) -> list[Send]:
    """Feed messages; return everything that follows."""
    sends: list[Send] = []
    for message in messages:
        sends += stage.handle(message, 0.0)
        while (step := stage.poll(0.0)) is not None:
            sends += step.sends
            if step.work is not None:
                step.work.run()
                sends += step.work.finish(0.5, 0.5)
    return sends


# The verdict on the last stage ------------------------------------------------------------------


@dataclass(slots=True)
class Clocked:
    """A core that records when its first verdict came, and what it sends."""

    core: Core
    first_verdict_at: float = 0.0
    sent: list[Message] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """Return the core's rank."""
        return self.core.rank

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Record the first verdict, and pass the message on."""
        if isinstance(message, Reroot) and not self.first_verdict_at:
            self.first_verdict_at = now
        return self.core.handle(message, now)

    def poll(self, now: float) -> Step | None:
        """Record the sends of the core's step."""
        step = self.core.poll(now)
        if step is None or step.work is None:
            return step
        work = step.work

        def finish(now: float, elapsed: float) -> Sequence[Send]:
            sends = work.finish(now, elapsed)
            self.sent.extend(send.message for send in sends)
            return sends

        return replace(step, work=replace(work, finish=finish))


def first_verdicts(emulation: Emulation, strategy: str) -> tuple[list[float], float]:
    """Return when each stage receives the prompt's verdict, and the client its token."""
    cores: list[Clocked] = []

    def wrap(core: Core) -> Core:
        cores.append(Clocked(core))
        return cores[-1]

    drafter = ScriptedDrafter(hostile)
    charges = emulation.work, emulation.link
    cluster = make_cluster(4, strategy, drafter=drafter, charges=charges, wrap=wrap)
    stats = generate(cluster, request(max_new_tokens=6)).stats
    return [core.first_verdict_at for core in cores[1:4]], stats.first_token_at


def test_a_verdict_on_the_head_is_late_by_the_hop_and_the_heads_lm_head():
    """The hidden row travels instead of the verdict: one hop and the head's lm_head more."""
    bed = load_emulation("jetson-5-125mbit", "vicuna-7b", drafter="eagle")
    at_stages, at_client = first_verdicts(bed, "streaming")
    late_at_stages, late_at_client = first_verdicts(bed, HEAD_VERDICT)
    row = Segment(request=1, seq_no=1, nodes=(1,), parents=(0,), tokens=(0,))
    row = replace(row, hidden=stage_models(1)[0].model.norm.weight[None])
    lm_head = bed.lm_head_s(HEAD, 1) - bed.lm_head_s(4, 1)
    hop = bed.link(4, HEAD, row)
    hidden = hop.num_bytes / hop.rate_out
    assert hidden == pytest.approx((64 + 20 + 2 * 4096) * 8 / 125e6)
    assert late_at_client - at_client == pytest.approx(hidden + lm_head, abs=5e-5)
    for late, early in zip(late_at_stages, at_stages, strict=True):
        assert late - early == pytest.approx(hidden + lm_head + hop.latency_s, abs=5e-5)


def test_the_lm_head_competes_with_the_drafter():
    """They share one device, so no two computations of the head overlap."""
    cluster, with_it = answered(HEAD_VERDICT)
    assert cluster.simulator.work_log is not None
    log = [entry for entry in cluster.simulator.work_log if entry[2] == HEAD]
    assert {kind for *_, kind, _ in log} == {"draft", "verify"}
    for (start, elapsed, *_), (after, *_) in pairwise(log):
        assert after >= start + elapsed
    assert with_it.stats.last_token_at > answered("streaming")[1].stats.last_token_at


def test_the_last_stage_decides_nothing_and_sends_hidden_states():
    """It sends no verdict, no lm_head and no last hidden state; those of its layers stay."""
    cores: list[Clocked] = []

    def wrap(core: Core) -> Core:
        cores.append(Clocked(core))
        return cores[-1]

    cluster, _ = answered(HEAD_VERDICT, num_stages=1, wrap=wrap)
    assert cluster.stages[0].model.lm_head is None
    kinds = {type(message) for message in cores[1].sent}
    assert {Segment, HiddenStates} <= kinds
    assert Reroot not in kinds
    assert {m.layer for m in cores[1].sent if isinstance(m, HiddenStates)} == {2}
    assert all(m.hidden is not None for m in cores[1].sent if isinstance(m, Segment) and m.nodes)


# Where they do not exist ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", PIPELINES)
def test_no_real_cluster_runs_them(strategy):
    """Real stages have no such switch."""
    with pytest.raises(ValueError, match=f"{strategy} runs on an emulated cluster alone"):
        check_run(EngineConfig(strategy=strategy))


@pytest.mark.parametrize(
    ("own", "asked_for"),
    [("streaming", UNPRUNED), ("ar", HEAD_VERDICT), (UNPRUNED, HEAD_VERDICT), (UNPRUNED, "ar")],
)
def test_a_request_cannot_change_what_its_pipeline_lacks(own, asked_for):
    """A pipeline is made with or without pruning; a request that names another kind is refused."""
    cluster = make_cluster(2, own)
    asked = replace(request(1), decoding=Decoding(strategy=asked_for))
    with pytest.raises(ValueError, match=f"strategy {asked_for} needs a pipeline"):
        cluster.submit(asked)
    assert list(generate(cluster, request(2)).tokens) == expected(request(2))


def test_chosen_ahead_segments_are_whole():
    """While the first stage computes `streaming` waits; this one sends all that there is."""
    config = StreamingConfig()
    session = decoding_state(config, num_stages=4)
    for token in range(4):
        session.tree.add(session.tree.root.id, token, -1.0)
    session.pipe.cost.record(1, 1000.0)
    session.pipe.depart(1, ((1, 0),))
    session.pipe.start((1, 0))
    assert Streaming(config).next_segment(session).early
    outgoing = Eager(config).next_segment(session)
    assert not outgoing.early
    assert len(outgoing.nodes) == 5


@pytest.mark.parametrize(("num_stages", "most"), [(1, 2), (2, 2), (4, 4)])
def test_there_is_one_segment_per_stage(monkeypatch, num_stages, most):
    """One stage has two, so that it never waits; with more, `streaming-queued` queues one."""
    seen: dict[str, list[int]] = {}
    choose = Streaming.next_segment

    def counting(own: Streaming, session: RequestState) -> Outgoing | None:
        outgoing = choose(own, session)
        if outgoing is not None:
            seen[strategy].append(session.pipe.num_in_flight_for(session.request.id) + 1)
        return outgoing

    monkeypatch.setattr(Streaming, "next_segment", counting)
    for strategy in ("streaming", "streaming-queued"):
        seen[strategy] = []
        answered(strategy, num_stages=num_stages)
    assert max(seen["streaming"]) == most
    assert max(seen["streaming-queued"]) == num_stages + 1
