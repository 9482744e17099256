"""A request's stream: slow readers, readers that fail, and what never comes."""

import asyncio
import threading
import time
from typing import Any

import pytest

from flowspec.engine.stream import Stream
from flowspec.request import FinishReason, RequestOutput, StageCounts, TokensOut

OUTPUT = RequestOutput(request=1, tokens=(1, 2), text="ab", reason=FinishReason.LENGTH)


def piece(*tokens: int, text: str = "") -> TokensOut:
    """More of the answer."""
    return TokensOut(request=1, tokens=tokens, text=text)


@pytest.fixture
def aborts() -> list[int]:
    """Requests that were taken back."""
    return []


@pytest.fixture
def stream(aborts: list[int]) -> Stream:
    """Of request 1."""
    return Stream(1, abort=aborts.append)


def test_who_reads_slowly_gets_what_came_meanwhile_as_one_event(stream):
    """However many came; text that is not certain yet may be missing."""
    for token in range(20_000):
        stream.put(piece(token, text="" if token % 3 else "x"))
    assert stream.poll() == piece(*range(20_000), text="x" * 6667)
    assert stream.poll() is None
    stream.put(piece(text="the rest"))
    assert stream.poll() == piece(text="the rest")


def test_nothing_happens_after_the_output(stream):
    """The first one counts."""
    stream.put(OUTPUT)
    stream.put(piece(9))
    stream.put(RequestOutput(request=1, reason=FinishReason.ERROR))
    assert list(stream) == [OUTPUT]
    assert stream.result() is OUTPUT


def test_a_listener_that_fails_harms_nobody(stream, caplog):
    """The engine goes on, so do the other listeners; the failed one is not called again."""
    calls: list[str] = []

    def fail() -> None:
        calls.append("fail")
        raise RuntimeError("its loop has ended")

    stream.listen(fail)
    stream.listen(lambda: calls.append("good"))
    for token in range(3):
        stream.put(piece(token))
    assert calls == ["fail", "good", "good", "good"]
    assert "its loop has ended" in caplog.text


def test_two_readers_share_the_events_and_both_come_to_the_end(stream):
    """No event is read twice, none is lost, nobody hangs."""
    found: list[Any] = []
    readers = [threading.Thread(target=lambda: found.extend(stream)) for _ in range(2)]
    for reader in readers:
        reader.start()
    for token in range(100):
        stream.put(piece(token))
    stream.put(OUTPUT)
    for reader in readers:
        reader.join(10.0)
        assert not reader.is_alive()
    tokens = [token for event in found if isinstance(event, TokensOut) for token in event.tokens]
    assert sorted(tokens) == list(range(100))
    assert found.count(OUTPUT) == 1


def test_waiting_has_an_end(stream):
    """The time that was asked for, and not the next look at the signals."""
    began = time.monotonic()
    with pytest.raises(TimeoutError):
        stream.result(timeout_s=0.02)
    stream.put(OUTPUT)
    assert stream.stage_stats(timeout_s=0.02) is None
    assert time.monotonic() - began < 0.19


def test_counts_are_asked_for_until_they_are_known():
    """None may be the answer, which then is the last one."""
    asked: list[int] = []
    stream = Stream(1, abort=asked.append, ask_counts=asked.append)
    stream.put(OUTPUT)
    assert stream.stage_stats(timeout_s=0.0) is None
    assert not stream.is_counted
    counts = {1: StageCounts(num_rows_run=3)}
    stream.put_counts(counts)
    stream.put_counts(None)
    assert stream.stage_stats() == counts
    assert asked == [1]
    never = Stream(2, abort=asked.append, ask_counts=asked.append)
    never.put(OUTPUT)
    never.put_counts(None)
    began = time.monotonic()
    assert never.stage_stats(timeout_s=30.0) is None
    assert time.monotonic() - began < 5.0
    assert asked == [1]


def test_who_leaves_takes_the_request_back(stream, aborts):
    """Unless it is over."""
    with stream:
        assert stream.poll() is None
    assert aborts == [1]
    with pytest.raises(KeyError), stream:
        raise KeyError
    assert aborts == [1, 1]
    stream.put(OUTPUT)
    with stream:
        stream.abort()
    assert aborts == [1, 1]


def test_an_engine_whose_clock_has_stopped_is_an_error():
    """Not an endless loop."""
    stopped = Stream(1, abort=lambda request: None, advance=lambda: False)
    with pytest.raises(RuntimeError, match="nothing is left to happen"):
        stopped.result()
    with pytest.raises(RuntimeError, match="nothing is left to happen"):
        next(iter(stopped))

    async def read() -> list[Any]:
        return [event async for event in stopped]

    with pytest.raises(RuntimeError, match="nothing is left to happen"):
        asyncio.run(read())
    stopped.put(OUTPUT)
    assert stopped.stage_stats(timeout_s=30.0) is None, "nothing will happen, so it does not wait"
