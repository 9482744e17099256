"""An exclusive request runs alone: for a measurement that others must not disturb."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest

from flowspec.engine.simulated import SimulatedEngine
from flowspec.engine.stream import Stream
from flowspec.protocol.messages import Resume, Suspend
from flowspec.request import Decoding, Failure, FinishReason, Request
from flowspec.simulator.simulator import adversarial, instant_link, unit_work
from flowspec.stage.stage import Stage
from tests.support.clusters import check_empty, make_cluster
from tests.support.tiny import PROMPT, T1, VOCAB, expected, request, stage_models

ALONE = 3  # the exclusive request


def asked() -> list[Request]:
    """Five requests; the third one is exclusive."""
    return [
        request(1, max_new_tokens=10),
        request(2, prompt=PROMPT[2:], sampling=T1, max_new_tokens=14),
        replace(request(ALONE, prompt=PROMPT[::-1], max_new_tokens=12), exclusive=True),
        request(4, prompt=PROMPT[1:], max_new_tokens=8),
        replace(request(5, prompt=PROMPT[4:], sampling=T1), decoding=Decoding(strategy="ar")),
    ]


def run(
    engine: SimulatedEngine,
    streams: Sequence[Stream],
    *,
    meanwhile: Callable[[int], None] = lambda count: None,
) -> list[set[int]]:
    """Run to the end; return the sets of requests that ran together, in order.

    `meanwhile` is called after each event with how many there have been in which the exclusive
    request ran.
    """
    together: list[set[int]] = []
    count = 0
    while any(stream.output is None for stream in streams):
        engine.step()
        running = set(engine.head.scheduler.running)
        if running and (not together or together[-1] != running):
            together.append(running)
        count += ALONE in running
        meanwhile(count)
    return together


def check_alone(together: Sequence[set[int]]) -> None:
    """Whenever the exclusive request ran, no other did; before and after, several did."""
    assert {ALONE} in together
    assert all(ids == {ALONE} for ids in together if ALONE in ids)
    place = together.index({ALONE})
    assert max(map(len, together[:place])) == 2
    assert max(map(len, together[place:])) == 2
    assert all(ids <= {1, 2} for ids in together[:place]), "a later one overtook it"


@pytest.mark.parametrize("charges", [(unit_work, instant_link), adversarial(5)])
def test_it_runs_alone_and_the_others_wait_and_then_run(charges):
    """Those before it end first, those after it wait behind it; each text is as alone."""
    engine = make_cluster(3, charges=charges)
    streams = [engine.submit(one) for one in asked()]
    waiting: set[int] = set()

    def look(count: int) -> None:
        if count:
            waiting.add(engine.status().num_waiting)

    together = run(engine, streams, meanwhile=look)
    check_alone(together)
    assert 2 in waiting, "the requests that wait for it are not counted"
    for one, stream in zip(asked(), streams, strict=True):
        assert list(stream.result().tokens) == expected(one)
    check_empty(engine)


def test_it_takes_the_time_that_it_takes_without_company():
    """Waiting requests do not change what is measured for the exclusive one."""
    engine = make_cluster(3)
    [engine.submit(one).result() for one in asked()[:1]]
    alone = engine.submit(asked()[ALONE - 1]).result().stats
    engine = make_cluster(3)
    streams = [engine.submit(one) for one in asked() if one.id != 2]
    stats = [stream.result() for stream in streams][1].stats

    def course(of):
        return of.num_verdicts, of.num_segments, of.num_rows_sent, of.num_draft_forwards

    assert course(stats) == course(alone)
    decoding = stats.finished_at - stats.first_token_at
    assert decoding == pytest.approx(alone.finished_at - alone.first_token_at)


@pytest.mark.parametrize("count", [0, 1, 25])
def test_aborting_it_lets_the_others_run(count):
    """While it waits, as it begins, and in the middle of its answer."""
    engine = make_cluster(3)
    streams = [engine.submit(one) for one in asked()]
    aborted = []

    def abort(seen: int) -> None:
        if seen == count and not aborted:
            aborted.append(seen)
            streams[ALONE - 1].abort()

    together = run(engine, streams, meanwhile=abort)
    output = streams[ALONE - 1].result()
    assert output.reason is FinishReason.CANCELLED
    assert list(output.tokens) == expected(asked()[ALONE - 1])[: len(output.tokens)]
    assert ({ALONE} in together) == (count > 0)
    for one, stream in zip(asked(), streams, strict=True):
        if one.id != ALONE:
            assert list(stream.result().tokens) == expected(one)
    check_empty(engine)


@pytest.mark.parametrize("blames", [False, True])
@pytest.mark.parametrize("count", [1, 25, 60])
def test_it_goes_on_alone_when_a_stage_was_lost(count, blames):
    """A preempted exclusive request is the first to run again, and it still runs alone."""
    engine = make_cluster(2)
    streams = [engine.submit(one) for one in asked()]
    lost = []

    def lose(seen: int) -> None:
        if seen != count or lost:
            return
        lost.append(seen)
        failure = Failure(cause="connection lost", rank=2)
        engine.simulator.deliver(0, Suspend(failure=failure, blames=blames))
        stage = Stage(2, 2, stage_models(2)[1], epoch=engine.head.pipe.epoch)
        engine.simulator.replace(stage)
        engine.stages[1] = stage
        engine.simulator.deliver(0, Resume(num_stages=2))

    together = run(engine, streams, meanwhile=lose)
    assert lost
    check_alone(together)
    for one, stream in zip(asked(), streams, strict=True):
        output = stream.result()
        assert (output.error, list(output.tokens)) == (None, expected(one))
        assert output.stats.num_resumes == (one.id == ALONE)
    check_empty(engine)


def test_exclusive_ones_follow_each_other():
    """Two of them never run together."""
    engine = make_cluster(2)
    several = [
        replace(request(number, prompt=PROMPT[number:], max_new_tokens=6), exclusive=number > 1)
        for number in range(1, 4)
    ]
    streams = [engine.submit(one) for one in several]
    assert run(engine, streams) == [{1}, {2}, {3}]
    assert [list(stream.result().tokens) for stream in streams] == [expected(o) for o in several]


def test_one_that_fails_lets_the_others_run():
    """When its stage refuses an exclusive request, the waiting ones are answered."""
    engine = make_cluster(2)
    several = asked()
    unknown = replace(several[ALONE - 1], prompt=(*PROMPT, VOCAB))  # only a stage looks at it
    several[ALONE - 1] = replace(unknown, decoding=Decoding(strategy="ar"))
    streams = [engine.submit(one) for one in several]
    outputs = [stream.result() for stream in streams]
    failed = outputs.pop(ALONE - 1).error
    assert failed is not None
    assert failed.rank == 1
    others = [one for one in several if one.id != ALONE]
    assert [list(output.tokens) for output in outputs] == [expected(one) for one in others]
    check_empty(engine)
