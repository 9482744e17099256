"""The head: prompts in chunks, stop rules, limits, cancellation, queues, late messages."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import flowspec.head.scheduler
from flowspec.engine.engine import generate
from flowspec.engine.simulated import SimulatedEngine
from flowspec.protocol.messages import (
    CLIENT,
    AbortRequest,
    Exit,
    HiddenStates,
    Message,
    Reroot,
    Started,
    Submit,
)
from flowspec.request import (
    Decoding,
    FinishReason,
    Request,
    RequestOutput,
    TokensOut,
)
from flowspec.speculation.strategies import STRATEGIES
from flowspec.tokenizer import TextStream
from tests.support.clusters import LetterTokenizer, check_empty, make_cluster, run_watched, serve
from tests.support.scripted import ScriptedDrafter, perfect
from tests.support.tiny import PROMPT, T0, T1, expected, local_target, request, truth


def answers(cluster: SimulatedEngine) -> dict[int, tuple[list[int], FinishReason]]:
    """Run to the end; tokens and reason of every request."""
    cluster.simulator.run()
    tokens: dict[int, list[int]] = {}
    reasons: dict[int, FinishReason] = {}
    for event in cluster.simulator.to_client:
        match event:
            case TokensOut():
                assert event.request not in reasons, "tokens after the end"
                tokens.setdefault(event.request, []).extend(event.tokens)
            case RequestOutput():
                reasons[event.request] = event.reason
    return {number: (tokens.get(number, []), reason) for number, reason in reasons.items()}


def own_tokens(count: int, sampling: Any = T0) -> list[int]:
    """The target's first `count` tokens after PROMPT."""
    return list(truth(PROMPT, sampling)[len(PROMPT) :][:count])


# Prefill ----------------------------------------------------------------------------------------


def test_stages_work_on_different_chunks_of_the_prompt_at_once():
    """Chunked prefill is pipelined: C chunks on N stages take C + N - 1 forwards, not C * N."""
    cluster = make_cluster(3, "ar", chunked_prefill_size=5)
    cluster.simulator.work_log = log = []
    completion = generate(cluster, request(prompt=PROMPT * 3, max_new_tokens=1))
    chunks = -(-3 * len(PROMPT) // 5)
    begins = {(rank, when) for when, _, rank, _, _ in log}
    assert len(begins) == 3 * chunks
    busy_at_once = [
        sum(begin <= when < begin + took for begin, took, *_ in log) for when, *_ in log
    ]
    assert max(busy_at_once) == 3
    stats = completion.stats
    assert stats.first_token_at - stats.submitted_at == pytest.approx(chunks + 2, abs=0.1)


@pytest.mark.parametrize("chunk", [1, 4, len(PROMPT), 64])
def test_the_size_of_prefill_chunks_does_not_change_the_text(chunk):
    """The chunks of the prompt change the speed and not the text."""
    setup = {"num_stages": 2, "strategy": "streaming", "chunked_prefill_size": chunk}
    completion, _ = run_watched(setup, request(max_new_tokens=8))
    assert list(completion.tokens) == own_tokens(8)


def test_a_long_prompt_is_not_put_into_the_pipe_at_once():
    """The stages' queues stay bounded however long the prompt is."""
    setup = {"num_stages": 2, "strategy": "ar", "chunked_prefill_size": 1}
    asked = request(prompt=PROMPT * 6, max_new_tokens=2)
    _, watches = run_watched(setup, asked)
    assert max(watch.max_queued for watch in watches) <= 2 * 2 + 1


# Stop rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [T0, T1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nothing_follows_the_end_token(strategy, sampling):
    """A verdict may bring tokens behind the end; they are not part of the answer."""
    own = own_tokens(14, sampling)
    eos = own[7]
    cluster = make_cluster(2, strategy, drafter=ScriptedDrafter(perfect))
    completion = generate(cluster, request(sampling=sampling, max_new_tokens=40, eos=(eos,)))
    assert list(completion.tokens) == own[: own.index(eos) + 1]
    assert completion.reason is FinishReason.STOP
    assert completion.stats.num_tokens == len(completion.tokens)
    check_empty(cluster)


@pytest.mark.parametrize("limit", range(1, 9))
def test_the_length_limit_is_exact(limit):
    """Verdicts of several tokens must not carry an answer over its limit."""
    cluster = make_cluster(2, "streaming", drafter=ScriptedDrafter(perfect))
    completion = generate(cluster, request(max_new_tokens=limit))
    assert list(completion.tokens) == own_tokens(limit)
    assert completion.reason is FinishReason.LENGTH


def new_text(asked: Request) -> TextStream:
    """Letters with the request's stop strings."""
    return TextStream(LetterTokenizer(), asked.stop)


def letters(tokens: Sequence[int]) -> str:
    """The text of tokens."""
    return LetterTokenizer().decode(tokens, skip_special_tokens=True)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("length", [1, 2, 4])
def test_stop_strings_end_the_text_wherever_tokens_part(strategy, length):
    """A stop string across token borders ends the text before it, as with the target alone."""
    own = own_tokens(12, T1)
    stop = letters(own)[5 : 5 + length]
    asked = request(sampling=T1, max_new_tokens=12, stop=("never", stop))
    cluster = make_cluster(
        3, strategy, drafter=ScriptedDrafter(perfect), new_text=new_text, num_draft_tokens=12
    )
    pieces = [event.text for event in serve(cluster, [asked]) if isinstance(event, TokensOut)]
    completion = generate(make_cluster(3, strategy, new_text=new_text), asked)
    tokens, reason, text = local_target().generate(asked, new_text)
    assert (list(completion.tokens), completion.reason, completion.text) == (tokens, reason, text)
    assert "".join(pieces) == text == letters(own)[: letters(own).index(stop)]
    assert completion.reason is FinishReason.STOP


def test_text_without_a_stop_is_whole_and_given_out_piece_by_piece():
    """Text held back as a possible stop string appears at the end at the latest."""
    own = letters(own_tokens(9))
    asked = request(max_new_tokens=9, stop=(own[-2:] + "#", "#"))
    events = list(serve(make_cluster(2, new_text=new_text), [asked]))
    completion = events[-1]
    assert isinstance(completion, RequestOutput)
    assert completion.text == own
    assert "".join(event.text for event in events[:-1] if isinstance(event, TokensOut)) == own


# Context ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("room", [0, -3])
def test_a_prompt_that_fills_the_context_is_refused_with_both_numbers(room):
    """The user must learn how much too long it is; nothing is sent to the stages."""
    cluster = make_cluster(2, max_context=len(PROMPT) + room)
    completion = generate(cluster, request())
    assert completion.reason is FinishReason.ERROR
    assert f"{len(PROMPT)} tokens" in str(completion.error)
    assert str(len(PROMPT) + room) in str(completion.error)
    check_empty(cluster)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("room", [1, 6])
def test_the_context_ends_an_answer_as_a_length_limit(strategy, room):
    """The last position of the context is used, none behind it."""
    cluster = make_cluster(
        2, strategy, max_context=len(PROMPT) + room, drafter=ScriptedDrafter(perfect)
    )
    asked = request(max_new_tokens=20)
    completion = generate(cluster, asked)
    assert list(completion.tokens) == own_tokens(room) == expected(asked, len(PROMPT) + room)
    assert completion.reason is FinishReason.LENGTH


# Several requests -------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [1, 2, 3])
def test_requests_get_their_own_answers(max_num_seqs):
    """Each has its own prompt, parameters, tree, text and caches, in the queue or beside others."""
    cluster = make_cluster(3, "streaming", limits={"max_num_seqs": max_num_seqs})
    asked = [
        request(1, sampling=T0, max_new_tokens=9),
        request(2, prompt=PROMPT[::-1], sampling=T1, max_new_tokens=5),
        request(3, prompt=PROMPT[:2], max_new_tokens=7),
    ]
    for one in asked:
        cluster.simulator.submit(Submit(request=one))
    found = answers(cluster)
    assert sorted(found) == [1, 2, 3]
    assert [found[one.id][0] for one in asked] == [expected(one) for one in asked]
    check_empty(cluster)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cancelling_keeps_what_there_is_and_frees_every_stage(strategy):
    """A cancelled request leaves no cache behind, also with segments in flight."""
    cluster = make_cluster(3, strategy)
    tokens: list[int] = []
    stream = cluster.submit(request(max_new_tokens=40))
    for event in stream:
        if isinstance(event, RequestOutput):
            break
        tokens.extend(event.tokens)
        if len(tokens) >= 3:
            stream.abort()
    assert isinstance(event, RequestOutput)
    assert event.reason is FinishReason.CANCELLED
    assert 3 <= len(event.tokens) < 40
    assert list(event.tokens) == own_tokens(len(event.tokens))
    check_empty(cluster)
    assert list(generate(cluster, request(2, max_new_tokens=5)).tokens) == own_tokens(5)


def test_an_abandoned_stream_does_not_leak_into_the_next_answer():
    """Each stream has its own events, even if one of them is not read any more."""
    cluster = make_cluster(2)
    abandoned = cluster.submit(request(1, max_new_tokens=6))
    next(iter(abandoned))
    asked = request(2, prompt=PROMPT[::-1], max_new_tokens=6)
    assert list(generate(cluster, asked).tokens) == expected(asked)
    assert list(abandoned.result().tokens) == own_tokens(6)
    check_empty(cluster)


def test_cancelling_during_the_prompt_frees_every_stage():
    """Prompt chunks are still on their way when the request is over."""
    cluster = make_cluster(3, "streaming", chunked_prefill_size=1)
    cluster.simulator.submit(Submit(request=request()))
    while cluster.simulator.step() and cluster.simulator.now < 2.5:
        pass
    cluster.simulator.submit(AbortRequest(request=1))
    assert answers(cluster) == {1: ([], FinishReason.CANCELLED)}
    check_empty(cluster)


def test_a_queued_request_can_be_cancelled():
    """It never reaches the stages; the one being served does not notice."""
    cluster = make_cluster(2)
    cluster.simulator.submit(Submit(request=request(1, max_new_tokens=6)))
    cluster.simulator.submit(Submit(request=request(2, max_new_tokens=6)))
    cluster.simulator.submit(AbortRequest(request=2))
    cluster.simulator.submit(AbortRequest(request=77))
    found = answers(cluster)
    assert found[2] == ([], FinishReason.CANCELLED)
    assert found[1] == (own_tokens(6), FinishReason.LENGTH)
    check_empty(cluster)


def test_the_queue_of_requests_is_bounded():
    """A flood is refused by name instead of filling the memory."""
    head = make_cluster(1).head
    for number in range(flowspec.head.scheduler.MAX_QUEUED):
        assert head.handle(Submit(request=request(number + 1)), 0.0) == ()
    (refusal,) = head.handle(Submit(request=request(99)), 0.0)
    assert refusal.to == CLIENT
    assert isinstance(refusal.message, RequestOutput)
    assert refusal.message.reason is FinishReason.ERROR
    assert "waiting already" in str(refusal.message.error)


def late_messages(number: int) -> Iterator[Message]:
    """All that stages may still send about a request."""
    hidden = torch.zeros(1, 32)
    yield Reroot(request=number, position=200, parent=3, token=1)
    yield Started(request=number, seq_no=0)
    yield Exit(request=number, seq_no=0, rows=3, slowest_rows=3, slowest_ms=9e9)
    yield HiddenStates(request=number, layer=-1, nodes=(3,), hidden=hidden)


@pytest.mark.parametrize("active", [False, True])
def test_late_messages_of_a_finished_request_are_ignored(active):
    """They arrive while no request or another one runs, and change nothing."""
    cluster = make_cluster(2, "streaming")
    generate(cluster, request(1, max_new_tokens=3))
    if active:
        cluster.simulator.submit(Submit(request=request(2, max_new_tokens=6)))
        while not cluster.head.scheduler.running or not cluster.head.scheduler.running[2].tokens:
            assert cluster.simulator.step()
    cost = cluster.head.pipe.cost.milliseconds(3)
    for message in late_messages(1):
        assert cluster.head.handle(message, 1.0) == ()
    assert cluster.head.pipe.cost.milliseconds(3) == cost
    if active:
        assert answers(cluster)[2] == (own_tokens(6), FinishReason.LENGTH)


def test_requests_with_different_strategies_run_at_once():
    """Each request names its strategy and parameters; one that names none has the engine's own."""
    cluster = make_cluster(2, "ar")
    streaming = Decoding(strategy="streaming", parameters={"num_draft_tokens": 12})
    serial = Decoding(strategy="serial_pp", parameters={"num_draft_tokens": 8, "draft_topk": 3})
    asked = [
        request(1, max_new_tokens=12),
        replace(request(2, prompt=PROMPT[2:], max_new_tokens=12), decoding=streaming),
        replace(request(3, prompt=PROMPT[::-1], sampling=T1), decoding=serial),
    ]
    most = 0
    done = {}
    for event in serve(cluster, asked):
        most = max(most, len(cluster.head.scheduler.running))
        if isinstance(event, RequestOutput):
            done[event.request] = event
    assert most == 3
    assert [list(done[one.id].tokens) for one in asked] == [expected(one) for one in asked]
    assert done[1].stats.num_draft_forwards == 0
    assert min(done[2].stats.num_draft_forwards, done[3].stats.num_draft_forwards) > 0
    check_empty(cluster)


@pytest.mark.parametrize(
    ("decoding", "why"),
    [
        (Decoding(strategy="sreaming"), "unknown strategy 'sreaming'"),
        (Decoding(parameters={"num_draft_steps": 3}), "num_draft_steps is no parameter of"),
        (Decoding(parameters={"segment_size": 0}), "segment_size"),
        (Decoding(drafter="medusa"), "drafter medusa is not loaded; loaded: scripted"),
        (Decoding(drafter="none"), "needs a drafter"),
    ],
)
def test_a_decoding_that_cannot_be_had_is_refused_alone(decoding, why):
    """The error names what is wrong; the request beside it is answered."""
    cluster = make_cluster(2)
    stream = cluster.submit(request(1, max_new_tokens=5))
    with pytest.raises(ValueError, match=re.escape(why)):
        cluster.submit(replace(request(2), decoding=decoding))
    assert list(stream.result().tokens) == own_tokens(5)
    check_empty(cluster)
