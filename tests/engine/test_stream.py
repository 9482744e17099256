"""Stream: a request's events by iteration, as a whole, by callback, by asyncio; bounded memory."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import count

import pytest

from flowspec.engine.engine import generate, generate_all
from flowspec.engine.simulated import SimulatedEngine
from flowspec.engine.stream import Event, Notice, Stream
from flowspec.request import (
    ClusterError,
    Failure,
    FinishReason,
    Request,
    RequestOutput,
    StageCounts,
    TokensOut,
)
from flowspec.tokenizer import TextStream
from tests.support.clusters import LetterTokenizer, check_empty, make_cluster
from tests.support.tiny import PROMPT, T1, expected, request

TIMEOUT_S = 20.0  # of what takes milliseconds


def new_text(asked: Request) -> TextStream:
    """Letters with the request's stop strings."""
    return TextStream(LetterTokenizer(), asked.stop)


def letters(asked: Request) -> str:
    """The text of the target's own answer."""
    return LetterTokenizer().decode(expected(asked), skip_special_tokens=True)


def several() -> list[Request]:
    """Two requests that run at once."""
    return [
        request(1, max_new_tokens=12),
        request(2, prompt=PROMPT[2:], sampling=T1, max_new_tokens=16),
    ]


def check_events(events: list[Event], asked: Request, *, text: str) -> None:
    """Pieces of tokens and text that add up to the answer, and then its output, once."""
    *pieces, output = events
    assert isinstance(output, RequestOutput)
    assert all(isinstance(piece, TokensOut) for piece in pieces)
    assert [token for piece in pieces for token in piece.tokens] == expected(asked)
    assert "".join(piece.text for piece in pieces) == output.text == text
    assert list(output.tokens) == expected(asked)
    assert {event.request for event in events} == {output.request}


# Over a simulated engine ------------------------------------------------------------------------


def test_iteration_gives_pieces_and_then_the_output():
    """Reading advances the clock; nothing comes after the output, however often it is read."""
    asked = request(max_new_tokens=12)
    stream = make_cluster(2, new_text=new_text).submit(asked)
    events = list(stream)
    assert len(events) > 3
    check_events(events, asked, text=letters(asked))
    assert list(stream) == []
    assert stream.poll() is None
    assert stream.output is events[-1]
    assert stream.result() is stream.output


def test_streams_of_one_engine_are_read_in_any_order():
    """Reading one runs all; what is not read waits, merged, for its own reader."""
    engine = make_cluster(3, new_text=new_text)
    first, second = several()
    streams = [engine.submit(first), engine.submit(second)]
    second_events = list(streams[1])
    check_events(second_events, second, text=letters(second))
    first_events = list(streams[0])
    check_events(first_events, first, text=letters(first))
    assert len(first_events) == 2, "what came before it was read is one piece and the output"
    check_empty(engine)


def test_abort_ends_one_stream_and_no_other():
    """The output says so and keeps what there is; a second abort changes nothing."""
    engine = make_cluster(2)
    first, second = several()
    one, other = engine.submit(replace(first, max_new_tokens=60)), engine.submit(second)
    piece = next(iter(one))
    assert isinstance(piece, TokensOut)
    one.abort()
    one.abort()
    output = one.result()
    assert output.reason is FinishReason.CANCELLED
    assert output.tokens[: len(piece.tokens)] == piece.tokens
    assert len(output.tokens) < 60
    assert list(other.result().tokens) == expected(second)
    other.abort()
    assert other.result().reason is FinishReason.LENGTH, "it was over already"
    check_empty(engine)


def test_who_leaves_the_context_early_takes_the_request_back():
    """By an exception, too; whoever reads to the end takes nothing back."""
    engine = make_cluster(2)
    with engine.submit(request(max_new_tokens=5)) as stream:
        list(stream)
    assert stream.result().reason is FinishReason.LENGTH

    def fail(stream: Stream) -> None:
        with stream:
            next(iter(stream))
            raise KeyError("the reader fails")

    stream = engine.submit(request(2, max_new_tokens=40))
    with pytest.raises(KeyError):
        fail(stream)
    assert stream.result().reason is FinishReason.CANCELLED
    check_empty(engine)


def test_a_request_may_be_submitted_while_others_run():
    """Now, or at a later virtual time."""
    engine = make_cluster(2)
    first, second = several()
    events = iter(engine.submit(first))
    next(events)
    assert engine.status().num_running == 1
    late = engine.submit(second, at=engine.simulator.now + 3.0)
    third = engine.submit(request(3, prompt=PROMPT[4:]), at=engine.simulator.now + 4.0)
    assert [e for e in events if isinstance(e, RequestOutput)][0].tokens == tuple(expected(first))
    outputs = [late.result(), third.result()]
    assert list(outputs[0].tokens) == expected(second)
    assert list(outputs[1].tokens) == expected(request(3, prompt=PROMPT[4:]))
    began = [output.stats.submitted_at for output in outputs]
    assert began[1] - began[0] == pytest.approx(1.0)


def test_requests_are_submitted_in_the_order_of_their_times():
    """The head takes ids in rising order, so an earlier time than the last one's is refused."""
    engine = make_cluster(2)
    late = engine.submit(request(1, max_new_tokens=4), at=5.0)
    with pytest.raises(ValueError, match=r"at 2 s.* one is submitted for 5 s"):
        engine.submit(request(2), at=2.0)
    with pytest.raises(ValueError, match="submitted for 5 s"):
        engine.submit(request(2))
    assert list(late.result().tokens) == expected(request(1, max_new_tokens=4))
    assert late.result().stats.submitted_at == 5.0
    assert list(generate(engine, request(2)).tokens) == expected(request(2))


def test_a_request_can_be_aborted_before_it_begins():
    """It ends when it would have begun."""
    engine = make_cluster(2)
    late = engine.submit(request(1, max_new_tokens=40), at=5.0)
    late.abort()
    output = late.result()
    assert (output.reason, output.tokens) == (FinishReason.CANCELLED, ())
    assert output.stats.submitted_at == output.stats.finished_at == 5.0
    check_empty(engine)


def test_the_engine_numbers_requests_that_bring_no_id():
    """And refuses an id that is open already."""
    engine = make_cluster(2)
    without = replace(request(), id=0, max_new_tokens=4)
    streams = [engine.submit(without) for _ in range(3)]
    assert [stream.request for stream in streams] == [1, 2, 3]
    with pytest.raises(ValueError, match="request 2 is open already"):
        engine.submit(replace(without, id=2))
    assert {stream.result().tokens for stream in streams} == {tuple(expected(request()))[:4]}


def test_stage_stats_tell_what_each_stage_did():
    """Also while others run; rows of the prompt and of the tree, busy time in virtual seconds."""
    engine = make_cluster(3)
    streams = [engine.submit(one) for one in several()]
    for stream, one in zip(streams, several(), strict=True):
        counts = stream.stage_stats(TIMEOUT_S)
        assert counts is not None
        assert sorted(counts) == [1, 2, 3]
        sent = len(one.prompt_tokens) + stream.result().stats.num_rows_sent
        for count_ in counts.values():
            assert 0 < count_.num_rows_run <= sent
            assert count_.busy_s > 0.0
        assert counts[1].num_rows_run + counts[1].num_rows_pruned <= sent


def test_stage_stats_of_a_refused_request_are_none():
    """It was on no stage; the question ends at once."""
    engine = make_cluster(2)
    refused = engine.submit(request(prompt=PROMPT * 40))
    assert refused.stage_stats() is None
    assert refused.result().error is not None


def test_an_engine_that_closes_ends_open_streams_with_what_they_have():
    """Readers get an error with its place; a closed engine takes no more requests."""
    engine = make_cluster(2)
    one, other = engine.submit(request(max_new_tokens=40)), engine.submit(request(2))
    piece = next(iter(one))
    assert isinstance(piece, TokensOut)
    engine.close()
    engine.close()
    for stream in (one, other):
        output = stream.result()
        assert output.reason is FinishReason.ERROR
        assert output.error == Failure(cause="the engine was closed", rank=0)
    assert one.result().tokens[: len(piece.tokens)] == piece.tokens
    assert [type(event) for event in one] == [RequestOutput]
    assert not engine.status().healthy
    with pytest.raises(ClusterError, match="takes no more requests: the engine was closed"):
        engine.submit(request(3))


def test_draining_answers_what_is_open_and_takes_nothing_more():
    """All open requests end in order."""
    engine = make_cluster(2)
    streams = [engine.submit(one) for one in several()]
    assert engine.drain(TIMEOUT_S)
    outputs = [stream.output for stream in streams]
    assert [list(output.tokens) for output in outputs if output] == [
        expected(one) for one in several()
    ]
    with pytest.raises(ClusterError, match="draining"):
        engine.submit(request(3))


def test_forgetting_is_refused_while_a_request_is_open():
    """What was learnt is in use; afterwards the cost is unknown again."""
    engine = make_cluster(2)
    stream = engine.submit(request(max_new_tokens=12))
    next(iter(stream))
    with pytest.raises(ValueError, match="1 requests are open"):
        engine.forget()
    stream.result()
    cost = engine.head.pipe.cost
    assert cost.milliseconds(4) != 1.0
    engine.forget()
    assert engine.head.pipe.cost.milliseconds(4) == 1.0
    assert not engine.head.pipe.draft_s


def test_status_counts_requests():
    """Running, waiting, finished and failed ones, and the stages' totals."""
    engine = make_cluster(2, limits={"max_num_seqs": 1})
    streams = [engine.submit(one) for one in several()]
    next(iter(streams[0]))
    status = engine.status()
    assert (status.healthy, status.num_stages, status.strategy) == (True, 2, "streaming")
    assert status.drafters == ("scripted",)
    assert (status.num_running, status.num_waiting) == (1, 1)
    generate_all(engine, [request(3, prompt=PROMPT * 40)])
    [stream.result() for stream in streams]
    status = engine.status()
    assert (status.num_finished, status.num_failed) == (2, 1)
    assert {rank: stage.num_requests for rank, stage in status.stages.items()} == {1: 0, 2: 0}


def test_two_threads_read_two_streams():
    """Each gets its own events, whoever advances the clock."""
    engine = make_cluster(2, new_text=new_text)
    streams = [engine.submit(one) for one in several()]
    found: list[list[Event]] = [[], []]

    def read(place: int) -> None:
        found[place] = list(streams[place])

    threads = [threading.Thread(target=read, args=(place,), daemon=True) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    for events, one in zip(found, several(), strict=True):
        check_events(events, one, text=letters(one))


def test_two_coroutines_read_two_streams():
    """Their events come alternately; a slow one gets several pieces at once."""
    engine = make_cluster(2, new_text=new_text)
    first, second = several()
    order: list[int] = []

    async def read(asked: Request, pauses: int) -> list[Event]:
        events = []
        async for event in engine.submit(asked):
            events.append(event)
            order.append(asked.id)
            for _ in range(pauses):
                await asyncio.sleep(0)
        return events

    async def both() -> list[list[Event]]:
        return await asyncio.gather(read(first, 0), read(second, 20))

    for events, one in zip(asyncio.run(both()), (first, second), strict=True):
        check_events(events, one, text=letters(one))
    assert order.index(2) < len(order) - 1 - order[::-1].index(1), "one after the other"


def test_a_pipeline_that_stands_still_gives_every_reader_an_error():
    """By iteration, as a whole, by asyncio: the output says what happened."""

    def stuck() -> SimulatedEngine:
        engine = make_cluster(2, "ar")
        engine.stages[-1]._verdict = lambda state, segment: []  # type: ignore[method-assign]
        return engine

    async def read(stream: Stream) -> list[Event]:
        return [event async for event in stream]

    failure = Failure(cause="nothing is left to do", rank=0)
    assert generate(stuck(), request()).error == failure
    (event,) = stuck().submit(request())
    assert isinstance(event, RequestOutput)
    assert event.error == failure
    (event,) = asyncio.run(read(stuck().submit(request())))
    assert isinstance(event, RequestOutput)
    assert event.error == failure


# A stream alone, fed from a thread --------------------------------------------------------------


def tokens(*ids: int, text: str = "") -> TokensOut:
    """Some tokens of request 1."""
    return TokensOut(request=1, tokens=ids, text=text)


END = RequestOutput(request=1, tokens=(1, 2, 3), text="abc", reason=FinishReason.LENGTH)


def bare(abort: Callable[[int], None] = lambda request: None) -> Stream:
    """A stream of an engine with a thread of its own."""
    return Stream(1, abort=abort)


class Feeder(threading.Thread):
    """An engine's thread: puts events into a stream, one whenever it is let."""

    def __init__(self, stream: Stream, events: Iterator[Event], *, pause_s: float = 0.0) -> None:
        super().__init__(daemon=True)
        self.stream, self.events, self.pause_s = stream, events, pause_s
        self.failed: BaseException | None = None

    def run(self) -> None:
        """Put all events."""
        try:
            for event in self.events:
                time.sleep(self.pause_s)
                self.stream.put(event)
        except BaseException as error:
            self.failed = error


def fed(*events: Event, pause_s: float = 0.01) -> Stream:
    """A stream that a thread feeds."""
    stream = bare()
    Feeder(stream, iter(events), pause_s=pause_s).start()
    return stream


def test_a_reader_waits_for_another_thread():
    """Each event as it comes."""
    parts = tokens(1, text="a"), tokens(2, text="b"), tokens(3, text="c")
    assert list(fed(*parts, END, pause_s=0.05)) == [*parts, END]
    assert fed(*parts, END).result(TIMEOUT_S) == END


def test_result_has_a_time_limit():
    """It says whose answer is missing; the stream can be read on."""
    stream = bare()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"request 1 is not over after 0\.1 s"):
        stream.result(0.1)
    assert time.monotonic() - began < 5.0
    stream.put(END)
    assert stream.result(0.1) == END


def test_a_slow_reader_gets_merged_events():
    """What waits is one event, however much came; the text and the tokens are all there."""
    stream = bare()
    for place in range(2000):
        stream.put(tokens(place, text=chr(97 + place % 26)))
    stream.put(END)
    merged, end = list(stream)
    assert isinstance(merged, TokensOut)
    assert merged.tokens == tuple(range(2000))
    assert merged.text == ("abcdefghijklmnopqrstuvwxyz" * 77)[:2000]
    assert end == END


def test_a_reader_that_pauses_loses_nothing():
    """Pieces in order, each token once, while another thread puts them as fast as it can."""
    stream = bare()
    feeder = Feeder(stream, iter([*(tokens(place) for place in range(3000)), END]))
    feeder.start()
    seen: list[int] = []
    for number, event in zip(count(), stream):
        if isinstance(event, TokensOut):
            seen.extend(event.tokens)
        if number < 5:
            time.sleep(0.01)
    assert seen == list(range(3000))
    assert feeder.failed is None


def test_notices_come_in_order_and_only_the_newest_wait():
    """A person reads them: of many that nobody read, the last eight are enough."""
    stream = bare()
    for number in range(30):
        stream.put(Notice(text=f"device {number} is lost"))
    stream.put(tokens(1))
    stream.put(END)
    events = list(stream)
    notices = [event.text for event in events if isinstance(event, Notice)]
    assert notices == [f"device {number} is lost" for number in range(22, 30)]
    assert events[-2:] == [tokens(1), END]


def test_a_listener_is_told_of_everything():
    """Also of what had come before; `poll` then has it, and nothing more."""
    stream = bare()
    stream.put(tokens(1))
    heard: list[Event] = []

    def listener() -> None:
        while (event := stream.poll()) is not None:
            heard.append(event)

    stream.listen(listener)
    assert heard == [tokens(1)]
    Feeder(stream, iter([tokens(2), Notice(text="wait"), tokens(3), END])).run()
    assert heard == [tokens(1), tokens(2), Notice(text="wait"), tokens(3), END]
    assert stream.poll() is None


def test_abort_tells_the_engine_until_the_request_is_over():
    """By its number."""
    aborted: list[int] = []
    stream = bare(aborted.append)
    with stream:
        stream.put(tokens(1))
    assert aborted == [1]
    stream.put(END)
    stream.abort()
    assert aborted == [1]


def test_stage_stats_wait_for_the_stages_and_no_longer_than_they_may():
    """They are asked for once the request is over, and come a trip later, or never."""
    counts = {1: StageCounts(num_rows_run=5), 2: StageCounts(num_rows_run=4)}
    asked_for: list[int] = []

    def answer(number: int) -> None:
        asked_for.append(number)
        threading.Timer(0.05, stream.put_counts, args=(counts,)).start()

    stream = Stream(1, abort=lambda number: None, ask_counts=answer)
    threading.Timer(0.05, stream.put, args=(END,)).start()
    assert stream.stage_stats(TIMEOUT_S) == counts
    assert asked_for == [1]
    silent = bare()
    silent.put(END)
    began = time.monotonic()
    assert silent.stage_stats(0.1) is None
    assert time.monotonic() - began < 5.0


def test_coroutines_read_streams_that_threads_feed():
    """Two at once; while one waits the other goes on."""
    parts = [tokens(place) for place in range(5)]

    async def read(stream: Stream) -> list[Event]:
        return [event async for event in stream]

    async def both() -> list[list[Event]]:
        slow, fast = fed(*parts, END, pause_s=0.06), fed(*parts, END, pause_s=0.02)
        slow_task = asyncio.create_task(read(slow))
        events = await read(fast)
        assert not slow_task.done(), "it waited for the other one"
        return [events, await slow_task]

    for events in asyncio.run(asyncio.wait_for(both(), TIMEOUT_S)):
        assert [t for event in events[:-1] for t in event.tokens] == list(range(5))
        assert events[-1] == END


def test_a_slow_coroutine_gets_merged_events():
    """The thread that feeds never waits for it."""
    stream = bare()

    async def read() -> list[Event]:
        events = []
        async for event in stream:
            events.append(event)
            if len(events) == 1:
                await asyncio.to_thread(feeder.join, TIMEOUT_S)
        return events

    feeder = Feeder(stream, iter([*(tokens(place) for place in range(500)), END]))

    async def main() -> list[Event]:
        task = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        feeder.start()
        return await task

    events = asyncio.run(asyncio.wait_for(main(), TIMEOUT_S))
    assert [t for event in events[:-1] for t in event.tokens] == list(range(500))
    assert events[-1] == END
    assert len(events) <= 3, "the first piece, all that came while it slept, the output"


def test_a_cancelled_coroutine_leaves_no_listener():
    """The engine's thread goes on to put events, also when the reader's loop is gone."""
    stream = bare()

    async def main() -> None:
        async def read() -> None:
            async for _ in stream:
                pass

        task = asyncio.create_task(read())
        await asyncio.sleep(0.01)
        assert len(stream._listeners) == 1
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    assert stream._listeners == []
    feeder = Feeder(stream, iter([tokens(1), END]))
    feeder.run()
    assert feeder.failed is None
    assert stream.result(1.0) == END


def test_a_loop_that_ended_under_its_reader_harms_no_engine():
    """A listener may be called after its loop was closed."""
    stream = bare()
    loop = asyncio.new_event_loop()

    async def read() -> None:
        async for _ in stream:
            pass

    task = loop.create_task(read())
    loop.run_until_complete(asyncio.sleep(0.01))
    loop.close()
    stream.put(tokens(1))
    stream.put(END)
    assert stream.result(1.0) == END
    task._log_destroy_pending = False  # type: ignore[attr-defined]  # it was left on purpose


def test_a_stream_that_can_never_end_is_an_error():
    """Where an engine's clock stands still and the request is not over, no reader waits."""

    def new() -> Stream:
        return Stream(7, abort=lambda number: None, advance=lambda: False)

    async def read() -> None:
        async for _ in new():
            pass

    for wait in (lambda: new().result(), lambda: list(new()), lambda: asyncio.run(read())):
        with pytest.raises(RuntimeError, match="request 7 is not over"):
            wait()
