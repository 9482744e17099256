"""A stage is lost in the middle of answers: they go on, token for token, at any temperature."""

from collections.abc import Callable, Mapping, Sequence

import pytest

from flowspec.engine.simulated import SimulatedEngine
from flowspec.protocol.messages import (
    AbandonRequests,
    AbortRequest,
    AddRequest,
    Exit,
    Failed,
    Reroot,
    Reset,
    Resume,
    Submit,
    Suspend,
)
from flowspec.request import (
    DecodeStats,
    Failure,
    FailureKind,
    FinishReason,
    NodeId,
    Request,
    RequestOutput,
    SamplingParams,
)
from flowspec.speculation.strategies import STRATEGIES
from flowspec.stage.stage import Stage
from flowspec.tokenizer import TextStream
from tests.support.clusters import LetterTokenizer, check_empty, grid, make_cluster
from tests.support.scripted import drafter_named
from tests.support.tiny import PROMPT, SAMPLINGS, T0, T1, expected, request, stage_models

Fault = Callable[[], None]


def lose(cluster: SimulatedEngine, *ranks: int) -> None:
    """The head learns that these stages are lost."""
    for rank in ranks:
        failure = Failure(cause="killed", rank=rank)
        cluster.simulator.deliver(0, Suspend(failure=failure))


def cover(cluster: SimulatedEngine, num_stages: int, *ranks: int, num_kv_tokens: int = 0) -> None:
    """Empty stages take these ranks; the layers are covered again, by `num_stages`."""
    simulator = cluster.simulator
    for rank in ranks:
        model, epoch = stage_models(num_stages)[rank - 1], cluster.head.pipe.epoch
        simulator.replace(Stage(rank, num_stages, model, epoch=epoch))
    simulator.actors = {r: a for r, a in simulator.actors.items() if r <= num_stages}
    cores = (simulator.actors[rank].core for rank in range(1, num_stages + 1))
    cluster.stages = [core for core in cores if isinstance(core, Stage)]
    simulator.deliver(0, Resume(num_stages=num_stages, num_kv_tokens=num_kv_tokens))


def serve(
    cluster: SimulatedEngine, asked: Sequence[Request], faults: Mapping[int, Fault]
) -> dict[int, RequestOutput]:
    """The answers as the client sees them; each fault strikes after so many events."""
    simulator = cluster.simulator
    for one in asked:
        simulator.submit(Submit(request=one))
    done: dict[int, RequestOutput] = {}
    count = 0
    while simulator.step():
        count += 1
        faults.get(count, lambda: None)()
        while simulator.to_client:
            event = simulator.to_client.popleft()
            if isinstance(event, RequestOutput):
                done[event.request] = event
    assert count > max(faults), f"over after {count} events, before the fault"
    return done


def pair(**options: object) -> list[Request]:
    """Two requests at different places of their prompts."""
    return [request(1, **options), request(2, **{**options, "prompt": PROMPT[4:]})]  # type: ignore[arg-type]


DRAFTERS = ("mixed", "eagle", "ngram", "perfect", "draft_model", "eagle3")
STEPS = (2, 7, 15, 26, 40, 55, 71, 90, 30, 21, 63)
CASES = list(grid(STEPS, sorted(STRATEGIES), DRAFTERS, SAMPLINGS, (1, 2, 3, 2)))


@pytest.mark.parametrize(("at", "strategy", "drafter", "sampling", "rank"), CASES)
def test_every_answer_goes_on_token_for_token(
    at: int, strategy: str, drafter: str, sampling: SamplingParams, rank: int
) -> None:
    """Whatever is under way when a stage is lost and another one takes its place."""
    cluster = make_cluster(3, strategy, drafter=drafter_named(drafter), calibrate=at % 2 == 0)

    def fault() -> None:
        lose(cluster, rank)
        cover(cluster, 3, rank)

    asked = pair(sampling=sampling)
    done = serve(cluster, asked, {at: fault})
    for one in asked:
        assert list(done[one.id].tokens) == expected(one)
        assert done[one.id].stats.num_tokens == len(expected(one))
    assert sum(completion.stats.num_resumes for completion in done.values()) >= 1
    check_empty(cluster)


@pytest.mark.parametrize(("num_stages", "sampling"), [(1, T0), (2, T1), (5, T1)])
def test_another_number_of_stages_takes_over(num_stages: int, sampling: SamplingParams) -> None:
    """Fewer devices hold all layers, or more: the tokens are the same."""
    cluster = make_cluster(3, "streaming", drafter=drafter_named("mixed"))
    asked = pair(sampling=sampling)

    def fault() -> None:
        lose(cluster, 1)
        cover(cluster, num_stages, *range(1, num_stages + 1))

    done = serve(cluster, asked, {45: fault})
    for one in asked:
        assert list(done[one.id].tokens) == expected(one)
    check_empty(cluster)


def test_losses_one_after_the_other() -> None:
    """A stage may be lost before the prefix is through again, or while layers are missing."""
    cluster = make_cluster(2, "streaming", drafter=drafter_named("eagle"))
    asked = pair(sampling=T1, max_new_tokens=20)

    def again(rank: int) -> Fault:
        def fault() -> None:
            lose(cluster, rank)
            cover(cluster, 2, rank)

        return fault

    def twice() -> None:
        lose(cluster, 1)
        lose(cluster, 2)
        cover(cluster, 2, 1, 2)

    done = serve(cluster, asked, {20: again(1), 26: again(2), 60: twice, 64: again(2)})
    for one in asked:
        assert list(done[one.id].tokens) == expected(one)
        assert done[one.id].stats.num_resumes >= 3
    check_empty(cluster)


def test_text_and_stop_strings_go_on() -> None:
    """A stop string may begin before the loss and end after it; nothing is said twice."""
    tokenizer = LetterTokenizer()
    whole = TextStream(tokenizer, ())
    whole.push(expected(request()))
    whole.flush()
    stop = whole.text[6:9]
    for at in (30, 40, 50):
        cluster = make_cluster(2, "ar", new_text=lambda r: TextStream(tokenizer, r.stop))

        def fault(cluster: SimulatedEngine = cluster) -> None:
            lose(cluster, 1)
            cover(cluster, 2, 1)

        done = serve(cluster, [request(stop=(stop,))], {at: fault})
        assert done[1].text == whole.text[: whole.text.index(stop)]
        assert done[1].reason is FinishReason.STOP


def test_an_outage_is_counted_apart() -> None:
    """Speed is that of the pipeline while there was one; tau counts no verdict for a prefix."""
    quiet = serve(make_cluster(2, "ar"), [request()], {1: lambda: None})[1].stats
    cluster = make_cluster(2, "ar")
    simulator = cluster.simulator

    def fault() -> None:
        lose(cluster, 2)
        simulator._at(simulator.now + 50.0, lambda: cover(cluster, 2, 2))

    stats = serve(cluster, [request()], {40: fault})[1].stats
    assert stats.num_resumes == 1
    assert 50.0 <= stats.resume_s <= 60.0
    assert stats.finished_at - stats.first_token_at > 50.0
    assert stats.tokens_per_s == pytest.approx(quiet.tokens_per_s, rel=0.3)
    assert stats.mean_accepted_length == quiet.mean_accepted_length == 1.0
    assert DecodeStats(num_tokens=3, num_verdicts=2).mean_accepted_length == 1.0


def test_what_no_longer_fits_ends_with_both_numbers() -> None:
    """Its tokens are kept; what fits goes on; who is cancelled meanwhile is cancelled."""
    cluster = make_cluster(3, "streaming")
    large, small = request(1, max_new_tokens=60), request(2, max_new_tokens=40)
    fits = len(PROMPT) + 40 + 256

    def fault() -> None:
        lose(cluster, 3)
        cluster.simulator.deliver(0, AbortRequest(request=3))
        cover(cluster, 2, 1, 2, num_kv_tokens=fits)

    done = serve(cluster, [large, small, request(3, max_new_tokens=40)], {150: fault})
    assert done[1].reason is FinishReason.ERROR
    assert done[1].error is not None
    assert done[1].error.kind is FailureKind.TOO_LARGE
    assert f"needs {fits + 20} tokens of KV cache" in done[1].error.cause
    assert f"holds {fits}" in done[1].error.cause
    assert 0 < len(done[1].tokens) < 60
    assert list(done[1].tokens) == expected(large)[: len(done[1].tokens)]
    assert list(done[2].tokens) == expected(small)
    assert done[3].reason is FinishReason.CANCELLED
    check_empty(cluster)


def test_giving_up_ends_every_request_with_one_error() -> None:
    """Those that had begun, with what they had, and those that had not."""
    cluster = make_cluster(2, "ar", limits={"max_num_seqs": 1})

    gone = Failure(cause="not back after 60 s", rank=1, device="ada")

    def fault() -> None:
        lose(cluster, 1)
        cluster.simulator.deliver(0, AbandonRequests(failure=gone))

    done = serve(cluster, pair(), {40: fault})
    assert {completion.error for completion in done.values()} == {gone}
    assert list(done[1].tokens) == expected(request())[: len(done[1].tokens)]
    assert done[1].tokens
    assert not done[2].tokens
    assert not cluster.head.scheduler.waiting


def test_kept_prefixes_are_gone_with_the_stages() -> None:
    """The next turn of a conversation computes everything again, and says the same."""
    cluster = make_cluster(2, "streaming", limits={"max_cached": 2})
    first = serve(cluster, [request()], {1: lambda: None})[1]
    lose(cluster, 1)
    cover(cluster, 2, 1)
    cluster.simulator.run()
    assert not cluster.head.scheduler.cache.requests
    assert not any(stage.requests for stage in cluster.stages)
    turn = request(2, prompt=(*PROMPT, *first.tokens, 5))
    done = serve(cluster, [turn], {1: lambda: None})
    assert list(done[2].tokens) == expected(turn)
    assert done[2].stats.num_prompt_reused == 0


def test_the_head_drops_what_is_of_a_lost_pipeline() -> None:
    """A late verdict, exit or last word of a stage that is no more changes nothing."""
    cluster = make_cluster(1, "ar")
    head = cluster.head
    head.handle(Submit(request=request()), 0.0)
    head.handle(Suspend(failure=Failure(cause="killed", rank=1)), 0.0)
    assert head.poll(0.0) is None, "something was sent to a pipeline that is not there"
    head.handle(Resume(num_stages=1), 0.0)
    for _ in range(4):
        assert head.poll(0.0) is not None
    trips, session = dict(head.pipe.batches), head.scheduler.running[1]
    for late in (
        Reroot(request=1, position=11, parent=NodeId(10), token=3),
        Exit(request=1, seq_no=0, rows=5, slowest_rows=5, slowest_ms=1.0),
        Failed(stage=1, request=0, text="out of memory"),
    ):
        assert not head.handle(late, 1.0)
    assert head.pipe.batches == trips
    assert not session.tokens
    assert 1 in head.scheduler.running


def test_a_stage_forgets_at_the_first_message_of_a_newer_epoch() -> None:
    """Be it the Reset or what overtook it; then it drops what is older."""
    cluster = make_cluster(1, "ar")
    stage = cluster.stages[0]
    cluster.head.handle(Submit(request=request()), 0.0)
    step = cluster.head.poll(0.0)
    assert step is not None
    opened = step.sends[0].message
    assert isinstance(opened, AddRequest)
    stage.handle(opened, 0.0)
    stage.poll(0.0)
    assert stage.requests
    stage.handle(Reset(epoch=2), 0.0)
    assert not stage.requests
    stage.handle(opened, 0.0)
    assert stage.poll(0.0) is None, "a late AddRequest was taken for a new one"
