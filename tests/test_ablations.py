"""Pipelines without a mechanism: the mechanism is gone, its price is paid, the text stays."""

from dataclasses import replace

import pytest
from clusters import check_empty, make_cluster, run_all_watched
from scripted import ScriptedDrafter, drafter_named, mixed
from tiny import T0, T1, expected, request, stage_models

from flowspec.cluster.base import generate
from flowspec.config import RunConfig
from flowspec.effects import Send
from flowspec.engine import check_run
from flowspec.model.stage_model import FINAL_NORM
from flowspec.request import Completion
from flowspec.simulate.ablated import UnprunedStage
from flowspec.simulate.cluster import SimulatedCluster
from flowspec.stage import Stage
from flowspec.strategies import ABLATIONS, find_strategy
from flowspec.wire import Batch, Message, Open, Reroot, Segment

PIPELINES = [name for name, spec in ABLATIONS.items() if spec.without is not None]
UNPRUNED = "streaming-unpruned"


@pytest.mark.parametrize("drafter", ["eagle", "eagle3", "perfect", "hostile"])
@pytest.mark.parametrize("strategy", PIPELINES)
def test_texts_are_the_targets_own_and_nothing_is_left(strategy, drafter):
    """For one request and for several in one segment, whatever the number of stages."""
    for num_stages, count in ((1, 1), (2, 3), (4, 2)):
        asked = [
            request(n, sampling=replace(T1, seed=n) if n % 2 else T0, max_new_tokens=9 + n)
            for n in range(1, count + 1)
        ]
        setup = {"num_stages": num_stages, "strategy": strategy}
        completions, watches = run_all_watched({**setup, "drafter": drafter_named(drafter)}, asked)
        assert [list(c.tokens) for c in completions] == [expected(one) for one in asked]
        if count > 1:
            assert any(isinstance(message, Batch) for message in watches[1].seen)


def answered(strategy: str) -> tuple[SimulatedCluster, Completion]:
    """One answer with a drafter that is right two times in three."""
    drafter = ScriptedDrafter(mixed, feature_layers=(2, FINAL_NORM))
    cluster = make_cluster(4, strategy, drafter=drafter)
    completion = generate(cluster, request(max_new_tokens=24))
    check_empty(cluster)
    return cluster, completion


# In-flight pruning ------------------------------------------------------------------------------


def test_without_pruning_every_row_is_computed_to_the_end():
    """All that is sent is run by every stage and weighs on every link; with pruning it is not."""
    pruned, with_it = answered("streaming")
    unpruned, without = answered(UNPRUNED)
    assert without.tokens == with_it.tokens
    num_prompt = len(request().prompt)
    for stage in unpruned.stages:
        assert stage.num_rows_pruned == 0
        assert stage.num_rows_run <= num_prompt + without.stats.num_rows_sent
    # what trails the end of the request finds no cache; all that came before was run
    run_by_last = [cluster.stages[-1].num_rows_run for cluster in (pruned, unpruned)]
    assert run_by_last[1] >= num_prompt + 0.9 * without.stats.num_rows_sent
    assert run_by_last[1] > 1.5 * run_by_last[0]
    assert sum(stage.num_rows_pruned for stage in pruned.stages) > 0
    assert without.stats.last_token_at > with_it.stats.last_token_at


def test_dead_rows_go_on_and_find_room():
    """Below a dead parent, beside the verdict, more than the head has made room for."""
    stage = UnprunedStage(1, 2, stage_models(2)[0])
    prompt = Segment(
        request=1, seq_no=0, nodes=(0, 1), parents=(-1, 0), tokens=(3, 14), prefix=True
    )
    run(stage, Open(request=1, capacity=8, context=8), prompt)
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
    """Messages in, everything that follows out."""
    sends: list[Send] = []
    for message in messages:
        sends += stage.handle(message, 0.0)
        while (step := stage.poll(0.0)) is not None:
            sends += step.sends
            if step.work is not None:
                step.work.run()
                sends += step.work.finish(0.5, 0.5)
    return sends


# Where they do not exist ------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", PIPELINES)
def test_no_real_cluster_runs_them(strategy):
    """Real stages have no such switch; nor does a simulated cluster turn into another one."""
    with pytest.raises(ValueError, match=f"{strategy} runs on an emulated cluster alone"):
        check_run(RunConfig(strategy=strategy))
    spec = find_strategy(strategy)
    with pytest.raises(ValueError, match="needs a cluster that was made for it"):
        make_cluster(2).configure(spec, spec.defaults)
