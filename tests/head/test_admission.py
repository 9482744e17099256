"""Scheduler by memory: budgets known before, refusals with both numbers, memory freed at once."""

from flowspec.engine.engine import generate_all
from flowspec.head.pipeline import Pipeline
from flowspec.head.request_state import MIN_TREE_TOKENS
from flowspec.head.scheduler import Scheduler
from flowspec.protocol.messages import (
    AbortRequest,
    AddRequest,
    Failed,
    FinishRequest,
    FreeRequest,
    Segment,
    Submit,
)
from flowspec.request import LONGEST_CONTEXT, FailureKind, FinishReason, RequestOutput, TokensOut
from flowspec.speculation.strategy import StrategyConfig
from flowspec.stage.stage import Stage
from tests.head.test_requests import check_answers, several
from tests.support.clusters import check_empty, make_cluster, serve
from tests.support.states import running_state
from tests.support.tiny import MAX_CONTEXT, PROMPT, expected, request


def limited(max_rows: int, **limits: int):
    """A cluster whose stages hold `max_rows`."""
    cluster = make_cluster(2, "streaming", limits=limits)
    cluster.head.scheduler.limit_kv_tokens(max_rows)
    for stage in cluster.stages:
        stage.num_kv_tokens = max_rows
    return cluster


def test_what_can_never_fit_is_refused_with_both_numbers():
    """A refused request ends at once, and the others go on."""
    cluster = limited(300)
    small, large = request(1, max_new_tokens=8), request(2, max_new_tokens=100)
    answers = generate_all(cluster, [small, large])
    assert list(answers[0].tokens) == expected(small)
    assert answers[1].reason is FinishReason.ERROR
    assert answers[1].error.kind is FailureKind.TOO_LARGE
    assert "needs 367 tokens" in answers[1].error.cause
    assert "holds 300" in answers[1].error.cause
    check_empty(cluster)


def test_what_does_not_fit_now_waits():
    """The books of head and stages agree at every moment, and nothing exceeds the budget."""
    cluster = limited(600)
    asked = several(5)
    most = 0
    done = []
    for event in serve(cluster, asked):
        for stage in cluster.stages:
            assert stage.num_kv_tokens_used <= 600
        most = max(most, len(cluster.head.scheduler.running))
        done += [event] if isinstance(event, RequestOutput) else []
    assert most == 2
    check_answers(asked, sorted(done, key=lambda completion: completion.request))
    check_empty(cluster)


def test_a_large_request_is_not_overtaken_for_ever():
    """Small ones behind it wait, although they would fit."""
    pipe = Pipeline(2)
    scheduler = Scheduler(pipe=pipe, max_context=1000, max_kv_tokens=2 * MIN_TREE_TOKENS + 100)
    for number, new in ((1, 50), (2, 70), (3, 5)):
        asked = request(number, prompt=(1,), max_new_tokens=new)
        assert scheduler.check(asked, StrategyConfig()) == new
        scheduler.add(running_state(asked, StrategyConfig(), pipe))
    first = scheduler.next_to_start()
    assert first is not None
    assert scheduler.start(first).request.id == 1
    assert scheduler.next_to_start() is None
    del scheduler.running[1]
    second = scheduler.next_to_start()
    assert second is not None
    assert second.id == 2
    scheduler.start(second)
    third = scheduler.next_to_start()
    assert third is not None
    assert third.id == 3


def test_a_stage_defends_its_memory():
    """A head that asks for more than there is gets a clear refusal, and the stage serves on."""
    cluster = limited(300)
    stage = cluster.stages[0]
    stage.handle(AddRequest(request=1, capacity=200, context=100), 0.0)
    stage.handle(AddRequest(request=2, capacity=200, context=100), 0.0)
    stage.poll(0.0)
    (refusal,) = stage.poll(0.0).sends
    assert isinstance(refusal.message, Failed)
    assert (refusal.message.request, refusal.message.stage) == (2, 1)
    assert "200 rows was asked for, 100 of 300 are free" in refusal.message.text
    assert list(stage.requests) == [1]
    stage.handle(AddRequest(request=3, capacity=2, context=LONGEST_CONTEXT + 1), 0.0)
    (refusal,) = stage.poll(0.0).sends
    assert f"needed: at most {LONGEST_CONTEXT}" in refusal.message.text


def test_a_cancelled_request_is_freed_at_once():
    """Its memory does not wait for the segments that are under way."""
    cluster = make_cluster(3, "streaming")
    for one in (request(1, max_new_tokens=40), request(2, prompt=PROMPT[:5], max_new_tokens=20)):
        cluster.simulator.submit(Submit(request=one))
    while len(cluster.head.scheduler.running) < 2 or not cluster.head.scheduler.running[2].tokens:
        assert cluster.simulator.step()
    now = cluster.simulator.now
    cluster.simulator.submit(AbortRequest(request=1))
    while any(1 in stage.requests for stage in cluster.stages):
        assert cluster.simulator.step()
    # a forward that runs is finished first, and takes a second here
    assert cluster.simulator.now - now <= 1.1
    cluster.simulator.run()
    check_empty(cluster)


def test_a_late_open_does_not_bring_a_cancelled_request_back():
    """Abandon may overtake Open; Close follows in order and frees what came late."""
    stage: Stage = make_cluster(1).stages[0]
    stage.handle(FreeRequest(request=1), 0.0)
    for message in (
        AddRequest(request=1, capacity=64, context=64),
        Segment(request=1, seq_no=0, nodes=(0,), parents=(-1,), tokens=(3,), prefix=True),
        FinishRequest(request=1),
    ):
        stage.handle(message, 0.0)
    while (step := stage.poll(0.0)) is not None:
        if step.work is not None:
            step.work.run()
            step.work.finish(1.0, 1.0)
    assert not stage.requests


def test_one_full_cache_fails_one_request(monkeypatch):
    """The others' rows in the same batch are run, and the emptied segment still travels on."""
    cluster = make_cluster(2, "streaming")
    asked = several(3, new=12)
    for one in asked:
        cluster.simulator.submit(Submit(request=one))
    while len(cluster.head.scheduler.running) < 3 or not cluster.head.scheduler.running[3].tokens:
        assert cluster.simulator.step()
    cache = cluster.stages[1].requests[2].cache
    cache.capacity = cache.prefix_length + cache.num_tree_rows
    cluster.simulator.run()
    tokens = {1: [], 2: [], 3: []}
    for event in cluster.simulator.to_client:
        if isinstance(event, TokensOut):
            tokens[event.request].extend(event.tokens)
    assert tokens[1] == expected(asked[0])
    assert tokens[3] == expected(asked[2])
    assert tokens[2] == expected(asked[1])[: len(tokens[2])]
    check_empty(cluster)


def test_limits_of_one_request_are_those_of_the_model():
    """A context that is full is an error of the one request."""
    cluster = make_cluster(2, "streaming")
    fits, long = request(1, max_new_tokens=4), request(2, prompt=PROMPT * 40)
    answers = generate_all(cluster, [fits, long])
    assert list(answers[0].tokens) == expected(fits)
    assert f"holds {MAX_CONTEXT}" in answers[1].error.cause
