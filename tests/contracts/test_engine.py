"""The contract of engines, which all five keep to.

An engine knows most of what is wrong with a request before it begins: `submit` raises ValueError.
A remote engine's head knows it alone: there the same words come as the output's error.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any

import pytest

from flowspec.engine.build import build_head
from flowspec.engine.engine import Engine, generate, generate_all
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget, ReferenceEngine
from flowspec.engine.simulated import SimulatedEngine
from flowspec.engine.stream import Event
from flowspec.request import (
    ClusterError,
    Decoding,
    FailureKind,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokensOut,
)
from flowspec.stage.stage import Stage
from flowspec.weights.load import load_stage, load_stage_range
from tests.support.in_process import SOON_S, TinyModel, cluster, tiny_model

LONG = 300  # tokens: more than any engine answers before the test has looked
READERS_ARE_THE_CLOCK = ("simulated", "reference")
T1 = SamplingParams(temperature=1.0, seed=7)
SMALL = {"num_draft_tokens": 12, "draft_topk": 3}  # a tree that is drafted in no time
MESSAGES = [
    {"role": "user", "content": "how many apples"},
    {"role": "assistant", "content": "five dozen"},
    {"role": "user", "content": "in the box?"},
]
PROMPTS: dict[str, Any] = {"text": "a quick fox", "messages": MESSAGES, "tokens": (5, 41, 7, 99)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Two stages."""
    return tiny_model(tmp_path_factory.mktemp("engines")).with_config(decode=SMALL)


@pytest.fixture(scope="module")
def target(model: TinyModel) -> LocalTarget:
    """The model alone."""
    whole = load_stage_range(model.folder, 0, 2, device="cpu", dtype="float32", verify=False)
    return LocalTarget(whole, model.parts.max_context)


@contextmanager
def a_local(model: TinyModel) -> Iterator[Engine]:
    """Start an engine with two stage processes."""
    with LocalEngine(model.config, model.parts) as engine:
        yield engine


@contextmanager
def a_cluster(model: TinyModel) -> Iterator[Engine]:
    """Start an engine with two devices that have joined."""
    with cluster(model, "ada", "bob") as running:
        yield running.engine


@contextmanager
def a_remote(model: TinyModel) -> Iterator[Engine]:
    """A client of such a cluster."""
    with cluster(model, "ada", "bob") as running, running.client() as engine:
        yield engine


@contextmanager
def a_simulated(model: TinyModel) -> Iterator[Engine]:
    """Under the virtual clock."""
    stages = [
        Stage(rank, 2, load_stage(model.folder, rank, device="cpu", dtype="float32"))
        for rank in (1, 2)
    ]
    head = build_head(model.config, model.parts)
    yield SimulatedEngine(head, stages, render=model.parts.render, work_time=lambda rank, work: 1.0)


@contextmanager
def a_reference(model: TinyModel) -> Iterator[Engine]:
    """The target alone."""
    whole = load_stage_range(model.folder, 0, 2, device="cpu", dtype="float32", verify=False)
    target = LocalTarget(whole, model.parts.max_context)
    yield ReferenceEngine(target, render=model.parts.render, new_text=model.parts.new_text)


MAKERS: dict[str, Callable[[TinyModel], AbstractContextManager[Engine]]] = {
    "local": a_local,
    "cluster": a_cluster,
    "remote": a_remote,
    "simulated": a_simulated,
    "reference": a_reference,
}
KINDS = [pytest.param(kind, marks=pytest.mark.slow if kind == "local" else ()) for kind in MAKERS]


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Of engine."""
    return str(request.param)


@pytest.fixture(scope="module")
def engine(kind: str, model: TinyModel) -> Iterator[Engine]:
    """One for all tests that leave it as it was."""
    with MAKERS[kind](model) as engine:
        yield engine


@pytest.fixture
def fresh(kind: str, model: TinyModel) -> Iterator[Engine]:
    """One to end."""
    with MAKERS[kind](model) as engine:
        yield engine


@pytest.fixture
def truth(model: TinyModel, target: LocalTarget) -> Callable[[Request], tuple[Any, ...]]:
    """Return the answer of the target alone: tokens, text and finish reason."""

    def answer(request: Request) -> tuple[Any, ...]:
        asked = model.parts.render(request)
        tokens, reason, text = target.generate(asked, model.parts.new_text)
        return tuple(tokens), text, reason

    return answer


def ask(prompt: Any = "a quick fox", **fields: Any) -> Request:
    """A short question."""
    return Request(prompt=prompt, **{"max_new_tokens": 12, **fields})


def answer_of(output: RequestOutput) -> tuple[Any, ...]:
    """Tokens, text and why it ended, of what went well."""
    assert output.error is None
    return output.tokens, output.text, output.reason


# Answers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [SamplingParams(), T1], ids=["T0", "T1"])
@pytest.mark.parametrize("form", PROMPTS)
def test_an_answer_is_the_target_s(engine, truth, model, form, sampling):
    """Every engine answers a text, a conversation and tokens."""
    request = ask(PROMPTS[form], sampling=sampling, max_new_tokens=24)
    output = generate(engine, request)
    assert answer_of(output) == truth(request)
    assert output.num_prompt_tokens == len(model.parts.render(request).prompt_tokens)
    assert output.stats.num_tokens == len(output.tokens)


def test_the_length_is_exact(engine, truth):
    """Every engine keeps to the least limit and to the end of the context."""
    for count in (1, 2, 7):
        request = ask(max_new_tokens=count)
        output = generate(engine, request)
        assert answer_of(output) == truth(request)
        assert (len(output.tokens), output.reason) == (count, FinishReason.LENGTH)


def test_a_stop_string_ends_the_text(engine, truth):
    """A stop string ends the text and is left out."""
    whole = ask(sampling=T1, max_new_tokens=40)
    _, text, _ = truth(whole)
    stop = text[len(text) // 2 :][:2]
    request = replace(whole, stop=("never said", stop))
    output = generate(engine, request)
    assert answer_of(output) == truth(request)
    assert output.reason is FinishReason.STOP
    assert output.text == text[: text.index(stop)]


def test_an_end_token_of_the_request_s_own_ends_it(engine, truth):
    """A request's end tokens replace the model's."""
    tokens, _, _ = truth(ask(sampling=T1))
    request = ask(sampling=T1, eos_token_ids=(tokens[4],))
    output = generate(engine, request)
    assert answer_of(output) == truth(request)
    assert (output.reason, output.tokens[-1]) == (FinishReason.STOP, tokens[4])


def test_threads_submit_while_others_run(engine, truth):
    """Each gets its own answer."""
    answers: dict[tuple[int, int], RequestOutput] = {}
    asked = {
        (thread, turn): ask(
            f"fox {thread} and dog {turn}",
            sampling=replace(T1, seed=10 * thread + turn),
            max_new_tokens=4 + 3 * thread,
        )
        for thread in range(5)
        for turn in range(3)
    }

    def client(thread: int) -> None:
        for turn in range(3):
            answers[thread, turn] = generate(engine, asked[thread, turn])

    threads = [threading.Thread(target=client, args=(number,)) for number in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON_S)
    assert {key: answer_of(output) for key, output in answers.items()} == {
        key: truth(request) for key, request in asked.items()
    }


def test_each_request_has_its_own_decoding(engine, truth):
    """Requests with different decodings run at once, and none changes the text."""
    decodings = [
        None,
        Decoding(strategy="ar"),
        Decoding(strategy="streaming", parameters={"draft_topk": 2, "num_draft_tokens": 9}),
        Decoding(strategy="pipedec", drafter="eagle", parameters=SMALL),
        Decoding(strategy="serial_pp", parameters=SMALL),
    ]
    requests = [
        ask(sampling=sampling, decoding=decoding, max_new_tokens=12)
        for decoding in decodings
        for sampling in (SamplingParams(), T1)
    ]
    outputs = generate_all(engine, requests)
    assert [answer_of(output) for output in outputs] == [truth(request) for request in requests]


# Streams ----------------------------------------------------------------------------------------


def check_events(events: list[Event], expected: tuple[Any, ...]) -> None:
    """They add up to the output, which is the last one."""
    *_, output = events
    assert isinstance(output, RequestOutput)
    assert answer_of(output) == expected
    pieces = [event for event in events if isinstance(event, TokensOut)]
    assert tuple(token for piece in pieces for token in piece.tokens) == output.tokens
    assert "".join(piece.text for piece in pieces) == output.text


def test_the_events_of_a_stream_add_up_to_its_output(engine, truth):
    """Read one after the other; afterwards there is nothing more."""
    request = ask(sampling=T1, max_new_tokens=30)
    stream = engine.submit(request)
    events = list(stream)
    check_events(events, truth(request))
    assert not list(stream)
    assert stream.result() is events[-1]


def test_streams_are_read_by_asyncio(engine, truth):
    """Several in one loop."""
    requests = [ask(f"fox {number}", sampling=T1, max_new_tokens=20) for number in range(3)]

    async def read(request: Request) -> list[Event]:
        return [event async for event in engine.submit(request)]

    async def read_all() -> list[list[Event]]:
        return await asyncio.gather(*[read(request) for request in requests])

    for request, events in zip(requests, asyncio.run(read_all()), strict=True):
        check_events(events, truth(request))


def test_a_reader_that_comes_late_gets_all_at_once(engine, truth):
    """A late reader gets one event with all tokens, and the output."""
    request = ask(sampling=T1)
    stream = engine.submit(request)
    stream.result()
    pieces, output = list(stream)
    assert isinstance(pieces, TokensOut)
    check_events([pieces, output], truth(request))


def test_who_waits_may_have_enough(engine):
    """The request goes on, until it is taken back."""
    stream = engine.submit(ask(max_new_tokens=LONG))
    with pytest.raises(TimeoutError, match="is not over after 0.01 s"):
        stream.result(timeout_s=0.01)
    assert stream.output is None
    stream.abort()
    assert stream.result(SOON_S).reason is FinishReason.CANCELLED


def test_an_aborted_request_keeps_what_it_has(engine, truth):
    """Others go on; a second abort, and one after the end, change nothing."""
    request, other = ask(sampling=T1, max_new_tokens=LONG), ask("another", max_new_tokens=30)
    beside = engine.submit(other)
    with engine.submit(request) as stream:
        first = next(event for event in stream if isinstance(event, TokensOut))
    stream.abort()
    output = stream.result(SOON_S)
    stream.abort()
    assert (output.reason, output.error) == (FinishReason.CANCELLED, None)
    assert 0 < len(first.tokens) <= len(output.tokens) < LONG
    tokens, text, _ = truth(request)
    assert output.tokens == tokens[: len(output.tokens)]
    assert text.startswith(output.text)
    assert answer_of(beside.result(SOON_S)) == truth(other)


def test_a_request_may_be_aborted_before_it_has_begun(engine, kind):
    """It ends at once."""
    stream = engine.submit(ask(max_new_tokens=LONG))
    stream.abort()
    output = stream.result(SOON_S)
    assert output.reason is FinishReason.CANCELLED
    assert len(output.tokens) < LONG


# What an engine says of itself ------------------------------------------------------------------


def test_the_status_is_true(engine, kind):
    """Status is truthful before, while and after a request is open."""
    before = engine.status()
    assert before.healthy
    assert before.max_context == 400
    assert before.strategy == ("ar" if kind == "reference" else "streaming")
    assert before.drafters == (() if kind == "reference" else ("eagle",))
    assert before.num_stages == (0 if kind == "reference" else 2)
    assert before.num_running + before.num_waiting == 0
    stream = engine.submit(ask(max_new_tokens=LONG))
    assert isinstance(next(iter(stream)), TokensOut)
    now = engine.status()
    assert (now.num_running, now.num_waiting) == (1, 0)
    stream.abort()
    stream.result(SOON_S)
    generate(engine, ask())
    failed = generate(engine, ask((10**6,)))
    assert failed.error is not None
    after = engine.status()
    assert after.num_running + after.num_waiting == 0
    assert after.num_finished == before.num_finished + 2
    assert after.num_failed == before.num_failed + 1
    assert after.healthy


def test_stages_say_what_they_did_for_a_request(engine, kind):
    """The stage counts of a request are the growth of the stages' totals."""
    first = engine.submit(ask("warm up"))
    first.result(SOON_S)
    first.stage_stats()
    before = engine.status().stages
    stream = engine.submit(ask("one more", sampling=T1, max_new_tokens=30))
    assert stream.result(SOON_S).error is None
    counts = stream.stage_stats()
    assert counts == stream.stage_stats()
    assert counts is not None
    if kind == "reference":
        assert counts == {}
        return
    assert set(counts) == {1, 2}
    assert counts[1].num_rows_run >= 30
    assert all(one.busy_s > 0.0 for one in counts.values())
    after = engine.status().stages
    if kind == "remote":
        return  # its totals have no rows
    for rank, one in counts.items():
        assert one.num_rows_run == after[rank].num_rows_run - before[rank].num_rows_run
        assert one.num_rows_pruned == after[rank].num_rows_pruned - before[rank].num_rows_pruned


def test_what_is_learnt_is_forgotten_only_while_nothing_is_open(engine):
    """It is in use."""
    stream = engine.submit(ask(max_new_tokens=LONG))
    next(iter(stream))
    with pytest.raises(ValueError, match="requests are open"):
        engine.forget()
    stream.abort()
    stream.result(SOON_S)
    engine.forget()


# What is wrong with a request -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"decoding": Decoding(strategy="warp")}, "unknown strategy 'warp'; known: ar"),
        ({"decoding": Decoding(drafter="oracle")}, "oracle"),
        ({"decoding": Decoding(parameters={"speed": 9})}, "speed is no parameter of strategy"),
        ({"decoding": Decoding(parameters={"draft_topk": 0})}, "draft_topk"),
        ({"prompt": [{"role": "user", "content": ""}]}, "the prompt has no tokens"),
    ],
)
def test_what_is_wrong_and_known_at_once_is_said_at_once(engine, kind, fields, words):
    """A ValueError; of a remote engine, its output's error, which is one."""
    request = ask(**{"prompt": "a fox", **fields})
    if kind != "remote":
        with pytest.raises(ValueError, match=words):
            engine.submit(request)
    else:
        output = generate(engine, request)
        assert output.reason is FinishReason.ERROR
        assert output.error is not None
        assert output.error.kind is FailureKind.REFUSED
        assert isinstance(output.error.exception(), ValueError)
        assert words in str(output.error)
    assert engine.status().num_waiting == 0


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ((3, 10**6), "the prompt has the token"),
        (tuple([5] * 400), "context"),
    ],
)
def test_what_the_model_cannot_take_is_the_output_s_error(engine, prompt, words):
    """The request's own fault, so no process is named."""
    output = generate(engine, ask(prompt))
    assert output.reason is FinishReason.ERROR
    assert output.error is not None
    assert words in output.error.cause
    assert (output.error.kind, output.error.rank) == (FailureKind.REFUSED, None)
    assert isinstance(output.error.exception(), ValueError)
    assert not output.tokens


@pytest.mark.parametrize("prompt", [(), "", []])
def test_an_empty_prompt_is_no_request(prompt):
    """A request without tokens is refused before it reaches an engine."""
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        ask(prompt)


# Ends -------------------------------------------------------------------------------------------


def test_an_engine_drains(fresh, truth):
    """Open requests end as usual, and nothing new begins."""
    requests = [ask(f"fox {number}", sampling=T1, max_new_tokens=25) for number in range(3)]
    streams = [fresh.submit(request) for request in requests]
    assert fresh.drain(SOON_S)
    assert [answer_of(stream.result()) for stream in streams] == [truth(r) for r in requests]
    with pytest.raises(ClusterError, match="no more requests"):
        fresh.submit(ask())
    assert fresh.drain(0.0)


def test_closing_ends_what_is_open(fresh, kind, truth):
    """Open requests end with an error and their tokens, and nothing new begins."""
    request = ask(sampling=T1, max_new_tokens=LONG)
    streams = [fresh.submit(request), fresh.submit(ask("another", max_new_tokens=LONG))]
    first = next(event for event in streams[0] if isinstance(event, TokensOut))
    ends: list[RequestOutput] = []
    reader = threading.Thread(target=lambda: ends.append(streams[0].result()))
    if kind not in READERS_ARE_THE_CLOCK:
        reader.start()
    fresh.close()
    if kind in READERS_ARE_THE_CLOCK:
        reader.start()
    reader.join(SOON_S)
    assert ends
    for output in [*ends, streams[1].result(SOON_S)]:
        assert output.reason is FinishReason.ERROR
        assert output.error is not None
    assert len(first.tokens) <= len(ends[0].tokens) < LONG
    assert ends[0].tokens == truth(request)[0][: len(ends[0].tokens)]
    began = time.monotonic()
    streams[0].stage_stats(timeout_s=SOON_S)
    assert time.monotonic() - began < SOON_S / 2, "nobody will say any more, which is known"
    for refused in (lambda: fresh.submit(ask()), fresh.forget):
        with pytest.raises(ClusterError):
            refused()
    streams[0].abort()
    fresh.close()
