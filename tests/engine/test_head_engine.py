"""A head's engine and its clients' threads, over devices that have joined in this process."""

import random
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from flowspec.engine.build import HeadParts
from flowspec.engine.engine import generate
from flowspec.engine.reference import LocalTarget
from flowspec.engine.stream import Notice, Stream
from flowspec.request import (
    ClusterError,
    Decoding,
    FinishReason,
    Request,
    SamplingParams,
    TokensOut,
)
from flowspec.weights.load import load_stage_range
from tests.support.in_process import (
    SOON_S,
    InProcessCluster,
    TinyModel,
    cluster,
    tiny_model,
    wait_for,
)

T1 = SamplingParams(temperature=1.0, seed=3)
LONG = 300


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Two stages."""
    return tiny_model(tmp_path_factory.mktemp("head"))


@pytest.fixture(scope="module")
def served(model: TinyModel) -> Iterator[InProcessCluster]:
    """With two devices; tests leave it serving."""
    with cluster(model, "ada", "bob") as running:
        yield running


def ask(prompt: str = "a quick fox", **fields: object) -> Request:
    """A short question."""
    return Request(prompt=prompt, **{"max_new_tokens": 12, **fields})  # type: ignore[arg-type]


def first_tokens(stream: Stream) -> TokensOut:
    """The first that come."""
    return next(event for event in stream if isinstance(event, TokensOut))


# Threads ----------------------------------------------------------------------------------------


def test_requests_of_many_threads_come_to_the_core_in_the_order_of_their_numbers(
    model, monkeypatch
):
    """It refuses any other. Without devices they all wait, however slow a thread is."""
    streams: list[Stream] = []
    may_begin = threading.Barrier(6)
    with cluster(model) as running:
        engine = running.engine
        post = engine.post

        def slow_post(command: Callable[[], None]) -> None:
            time.sleep(random.uniform(0.0, 0.002))
            post(command)

        def client() -> None:
            may_begin.wait()
            streams.extend(engine.submit(ask()) for _ in range(10))

        monkeypatch.setattr(engine, "post", slow_post)
        threads = [threading.Thread(target=client) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON_S)
        wait_for(lambda: len(engine.head.scheduler.waiting) == 60, "every request")
        assert len({stream.request for stream in streams}) == 60
        assert engine.status().num_waiting == 60
        assert all(stream.output is None for stream in streams)
    for stream in streams:
        output = stream.result(SOON_S)
        assert output.error is not None
        assert output.error.cause == "the engine was closed"


def test_whoever_submits_while_the_engine_closes_is_refused_or_gets_an_end(model):
    """No stream is left behind."""
    streams: list[Stream] = []
    refused = threading.Event()

    def client() -> None:
        while True:
            try:
                streams.append(engine.submit(ask(max_new_tokens=2)))
            except ClusterError:
                refused.set()
                return
            time.sleep(0.002)

    with cluster(model, "ada", "bob") as running:
        engine = running.engine
        threads = [threading.Thread(target=client) for _ in range(4)]
        for thread in threads:
            thread.start()
        wait_for(lambda: len(streams) > 20)
        engine.close()
        for thread in threads:
            thread.join(SOON_S)
    assert refused.is_set()
    reasons = {stream.result(1.0).reason for stream in streams}
    assert reasons <= {FinishReason.LENGTH, FinishReason.ERROR}


def test_an_engine_whose_thread_dies_says_so_to_everybody(model, monkeypatch):
    """Every stream ends with what it has, and nothing waits any more."""
    with cluster(model, "ada", "bob") as running:
        engine = running.engine
        over = engine.submit(ask(max_new_tokens=2))
        over.result(SOON_S)
        streams = [engine.submit(ask(max_new_tokens=LONG)) for _ in range(2)]
        first = first_tokens(streams[0])

        def broken(timeout_s: float) -> None:
            raise KeyError("a bug")

        monkeypatch.setattr(engine, "turn", broken)
        for stream in streams:
            output = stream.result(SOON_S)
            assert output.reason is FinishReason.ERROR
            assert str(output.error) == "head: KeyError: 'a bug'; see its log"
        assert len(streams[0].output.tokens) >= len(first.tokens)
        now = engine.status()
        assert (now.healthy, now.why) == (False, "KeyError: 'a bug'")
        assert now.num_failed == 2
        began = time.monotonic()
        for refused in (lambda: engine.submit(ask()), engine.forget, running.server.check):
            with pytest.raises(ClusterError, match="a bug"):
                refused()
        assert engine.drain(SOON_S)
        streams[0].stage_stats(timeout_s=SOON_S)
        streams[0].abort()
        assert time.monotonic() - began < 5.0


def test_a_listener_that_raises_does_not_end_the_engine(served):
    """It is somebody's code."""
    stream = served.engine.submit(ask())

    def fail() -> None:
        raise RuntimeError("not mine")

    stream.listen(lambda: None if stream.output is None else fail())
    assert stream.result(SOON_S).error is None
    assert generate(served.engine, ask()).error is None


def test_who_never_reads_keeps_nobody_waiting(served):
    """Neither through the engine nor over the network."""
    with served.client() as client:
        unread = [served.engine.submit(ask(max_new_tokens=60)), client.submit(ask())]
        assert generate(client, ask()).error is None
        for stream in unread:
            assert stream.result(SOON_S).error is None


# Decoding and counts ----------------------------------------------------------------------------


def test_two_clients_with_their_own_strategies_are_served_at_once(served, model):
    """Each gets the target's text, and its own statistics."""
    whole = load_stage_range(model.folder, 0, 2, device="cpu", dtype="float32", verify=False)
    target = LocalTarget(whole, model.parts.max_context)
    request = ask(sampling=T1, max_new_tokens=80)
    tokens, *_ = target.generate(model.parts.render(request), model.parts.new_text)
    with served.client() as one, served.client() as other:
        plain = one.submit(ask(sampling=T1, max_new_tokens=80, decoding=Decoding(strategy="ar")))
        tree = other.submit(
            ask(sampling=T1, max_new_tokens=80, decoding=Decoding(strategy="flowspec"))
        )
        first_tokens(plain)
        first_tokens(tree)
        assert one.status().num_running == 2
        outputs = plain.result(SOON_S), tree.result(SOON_S)
    assert [list(output.tokens) for output in outputs] == [tokens, tokens]
    assert outputs[0].stats.num_draft_forwards == 0
    assert outputs[1].stats.num_draft_forwards > 0


def test_an_exclusive_request_waits_visibly_and_then_runs_alone(served):
    """For its client, and for those behind it."""
    with served.client() as client:
        first = client.submit(ask(max_new_tokens=80))
        first_tokens(first)
        alone = client.submit(ask("alone", exclusive=True, max_new_tokens=40))
        behind = client.submit(ask("behind"))
        notice = next(iter(alone))
        assert isinstance(notice, Notice)
        assert "it runs alone, so it waits" in notice.text
        notice = next(iter(behind))
        assert isinstance(notice, Notice)
        assert "a request that runs alone" in notice.text
        first_tokens(alone)
        assert first.output is not None
        now = client.status()
        assert (now.num_running, now.num_waiting) == (1, 1) or alone.output is not None
        assert behind.result(SOON_S).error is None
        assert alone.output.stats.finished_at > 0.0


def test_the_counts_of_requests_add_up_to_the_stages_totals(served):
    """Also of requests that share batches, and of one that was aborted."""
    engine = served.engine
    last = engine.submit(ask("the last before"))
    last.result(SOON_S)
    last.stage_stats()
    before = engine.status().stages
    streams = [
        engine.submit(ask(f"fox {number}", sampling=T1, max_new_tokens=10 + 7 * number))
        for number in range(4)
    ]
    streams.append(engine.submit(ask(max_new_tokens=LONG)))
    first_tokens(streams[-1])
    streams[-1].abort()
    for stream in streams:
        assert stream.result(SOON_S).error is None
    counted = [stream.stage_stats() for stream in streams]
    after = engine.status().stages
    for rank in (1, 2):
        for name in ("num_rows_run", "num_rows_pruned"):
            grown = getattr(after[rank], name) - getattr(before[rank], name)
            assert sum(getattr(counts[rank], name) for counts in counted) == grown
        grown = after[rank].busy_s - before[rank].busy_s
        assert 0.0 < sum(counts[rank].busy_s for counts in counted) <= grown + 1e-6


def test_forget_learns_anew_and_is_refused_while_requests_are_open(served):
    """Also where the head's own probe is on its way."""
    engine = served.engine
    generate(engine, ask(max_new_tokens=40))
    assert engine.head.calibrations
    stream = engine.submit(ask(max_new_tokens=LONG))
    with pytest.raises(ValueError, match="1 requests are open"):
        engine.forget()
    assert engine.head.calibrations
    stream.abort()
    stream.result(SOON_S)
    engine.crossed_at = None  # a probe is due
    engine.forget()
    assert not engine.head.calibrations
    engine.crossed_at = time.monotonic()


def test_a_request_whose_prompt_is_being_rendered_is_counted(served, monkeypatch):
    """A client that waits for it must not think that the head has forgotten it."""
    may_render = threading.Event()
    render = HeadParts.render

    def slow(parts: HeadParts, request: Request) -> Request:
        may_render.wait(SOON_S)
        return render(parts, request)

    monkeypatch.setattr(HeadParts, "render", slow)
    with served.client() as client:
        stream = client.submit(ask())
        wait_for(lambda: client.status().num_waiting == 1, "the request")
        assert served.engine.status().num_waiting == 0
        may_render.set()
        assert stream.result(SOON_S).error is None


# Losses -----------------------------------------------------------------------------------------


def test_an_answer_goes_on_after_a_device_was_lost(served, model):
    """The status says what is wrong meanwhile; the text is as it would have been."""
    whole = load_stage_range(model.folder, 0, 2, device="cpu", dtype="float32", verify=False)
    target = LocalTarget(whole, model.parts.max_context)
    request = ask(sampling=T1, max_new_tokens=120)
    tokens, *_ = target.generate(model.parts.render(request), model.parts.new_text)
    with served.client() as client:
        stream = client.submit(request)
        first_tokens(stream)
        served.devices["bob"].fail("out of memory")
        notice = next(event for event in stream if isinstance(event, Notice))
        assert "on bob: RuntimeError: out of memory" in notice.text
        now = served.engine.status()
        assert now.healthy or (now.num_stages == 0 and "bob" in now.why)
        output = stream.result(SOON_S)
        assert list(output.tokens) == tokens
        assert output.error is None
        assert output.stats.num_resumes == 1
        first_epoch, epoch = client.epochs[stream.request]
        assert epoch == first_epoch + 1
        wait_for(lambda: client.status().healthy)


def test_nobody_waits_long_for_the_counts_of_a_lost_stage(served):
    """They went with it."""
    with served.client() as client:
        streams = [served.engine.submit(ask(max_new_tokens=LONG)), client.submit(ask("b"))]
        first_tokens(streams[0])
        served.devices["bob"].fail("gone")
        wait_for(lambda: served.engine.head.outage is not None)
        for stream in streams:
            stream.abort()
        for stream in streams:
            stream.result(SOON_S)
            began = time.monotonic()
            counts = stream.stage_stats()
            assert counts is None or set(counts) == {1, 2}
            assert time.monotonic() - began < 5.0
        assert streams[0].stage_stats() is None
        served.wait_until_served()
