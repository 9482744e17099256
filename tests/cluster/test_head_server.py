"""The head as a server: its threads, and clients that ask too much, leave, or speak nonsense."""

import threading
import time
from collections import deque
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

import flowspec
from flowspec.cluster.controller.server import (
    CHARACTERS_PER_TOKEN,
    MAX_OPEN_PER_CLIENT,
    MAX_PIECE,
    MIN_CHARACTERS,
    HeadServer,
    request_of,
)
from flowspec.cluster.membership.membership import Phase
from flowspec.cluster.membership.roster import Halt
from flowspec.engine.engine import EngineStatus
from flowspec.engine.stream import Stream
from flowspec.protocol.control import (
    Ask,
    AskCounts,
    AskStatus,
    Counts,
    Done,
    Drop,
    Echo,
    Forget,
    Forgotten,
    Note,
    Piece,
    Refuse,
    Turn,
    pack,
    unpack,
)
from flowspec.request import (
    ClusterError,
    Failure,
    FailureKind,
    FinishReason,
    Request,
    RequestOutput,
    StageCounts,
    TokensOut,
)
from flowspec.tokenizer import PromptError
from flowspec.transport.control_sockets import UnreachableError
from tests.support.in_process import wait_for

VERSION = flowspec.__version__


def ask(number: int = 1, text: str = "hi", **fields: Any) -> Ask:
    """A client's question."""
    return Ask(id=number, version=VERSION, turns=(Turn(role="user", content=text),), **fields)


class Control:
    """Clients that send what they are told to; `gone` take nothing any more."""

    host, port = "127.0.0.1", 1

    def __init__(self) -> None:
        self.frames = deque[tuple[bytes, bytes]]()
        self.gone = set[bytes]()
        self.sent: list[tuple[bytes, Any]] = []

    def say(self, peer: bytes, *messages: Any) -> None:
        """A client's messages."""
        self.frames.extend((peer, pack(message)) for message in messages)

    def told(self, peer: bytes, kind: type) -> list[Any]:
        """Messages of this kind that the peer has got."""
        return [message for to, message in self.sent if to == peer and isinstance(message, kind)]

    def receive(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        """All at once."""
        del timeout_s
        time.sleep(0.005)
        return [self.frames.popleft() for _ in range(len(self.frames))]

    def send(self, peer: bytes, message: bytes) -> None:
        """Raises UnreachableError for who is gone."""
        if peer in self.gone:
            raise UnreachableError("no route")
        self.sent.append((peer, unpack(message)))

    def wake(self) -> None:
        """It does not wait."""

    def close(self) -> None:
        """Nothing to close."""


class Engine:
    """Streams that the test fills."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.refusal: Exception | None = None
        self.streams: list[Stream] = []
        self.requests: list[Request] = []
        self.aborted: list[int] = []
        self.may_render = threading.Event()
        self.may_render.set()
        self.epoch_at = self.crossed_at = None
        self.epoch = 3
        self.parts = SimpleNamespace(max_context=100, drafters={}, draft_hash="", code_hash="")
        self.forgets: list[bool] = []

    def submit(self, request: Request) -> Stream:
        """It is open until the test ends it."""
        self.may_render.wait(10.0)
        if self.refusal is not None:
            raise self.refusal
        stream = Stream(len(self.streams) + 1, abort=self.aborted.append)
        self.requests.append(request)
        self.streams.append(stream)
        return stream

    def end(self, number: int, **fields: Any) -> None:
        """A request is over."""
        fields = {"reason": FinishReason.STOP, **fields}
        self.streams[number - 1].put(RequestOutput(request=number, **fields))

    def status(self) -> EngineStatus:
        """Nothing runs."""
        return EngineStatus(strategy="ar", max_context=100)

    def forget(self) -> None:
        """Refused as long as a stream is open."""
        if any(stream.output is None for stream in self.streams):
            raise ValueError("1 requests are open")
        self.forgets.append(True)

    def first_epoch(self, request: int) -> int:
        """All came in the second."""
        return 2 if request else 0

    def obey(self, order: object) -> None:
        """Nothing to do."""

    def start(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing to close."""


class Served:
    """A HeadServer between such a network and such an engine."""

    def __init__(self) -> None:
        self.control, self.engine = Control(), Engine()
        self.effects: list[Any] = []
        self.membership = SimpleNamespace(
            tick=self.tick,
            close=lambda why: [],
            unreachable=lambda peer, now: [],
            missing=lambda: "2 layers are held by nobody",
            gave_up=False,
            phase=Phase.SERVING,
            config=SimpleNamespace(give_up_s=120.0),
        )
        anything: Any = self
        self.server = HeadServer(
            anything.control,
            anything.membership,
            lambda tell: anything.engine,
            sizes=None,  # type: ignore[arg-type]
        )

    def tick(self, now: float, *, idle: bool) -> list[Any]:
        """What the test has prepared."""
        del now, idle
        effects, self.effects = self.effects, []
        for effect in effects:
            if isinstance(effect, Exception):
                raise effect
        return effects

    def asked(self, *messages: Any, peer: bytes = b"a") -> None:
        """Requests that have come to the engine."""
        count = len(self.engine.streams) + len(messages)
        self.control.say(peer, *messages)
        wait_for(lambda: len(self.engine.streams) == count)
        wait_for(lambda: all(call.stream is not None for call in self.server._calls))

    def answer(self, kind: type, *, peer: bytes = b"a", count: int = 1) -> Any:
        """The newest of so many messages of a kind to a client."""
        wait_for(lambda: len(self.control.told(peer, kind)) >= count, kind.__name__)
        return self.control.told(peer, kind)[-1]


@pytest.fixture
def head() -> Iterator[Served]:
    """It runs, and none of its threads fails."""
    served = Served()
    served.server.start()
    yield served
    served.server.close()
    served.server.check()


# Threads ----------------------------------------------------------------------------------------


def test_a_thread_that_fails_is_told_to_whoever_holds_the_head():
    """A head that does nothing any more must not look as if it served."""
    served = Served()
    served.server.check()
    served.effects = [RuntimeError("a bug")]
    served.server.start()
    wait_for(lambda: served.server.failure is not None)
    with pytest.raises(ClusterError, match="head: RuntimeError: a bug"):
        served.server.check()
    served.server.close()
    other = Served()
    other.engine.failure = ValueError("another bug")
    with pytest.raises(ClusterError, match="another bug"):
        other.server.check()


def test_a_long_prompt_does_not_keep_heartbeats_waiting(head):
    """It is rendered beside the control thread."""
    head.engine.may_render.clear()
    head.control.say(b"a", ask(1), ask(2), ask(3))
    head.control.say(b"b", Echo(reply_bytes=3))
    assert head.answer(Echo, peer=b"b").payload == "xxx"
    head.control.say(b"b", AskStatus(version=VERSION))
    assert head.answer(Refuse, peer=b"b"), "this membership has no status, and says so"
    assert not head.engine.streams
    head.engine.may_render.set()
    wait_for(lambda: len(head.engine.streams) == 3)


# Answers ----------------------------------------------------------------------------------------


def test_an_answer_goes_to_who_has_asked(head):
    """By the client's own number, in pieces that a message can hold, with figures at its end."""
    head.asked(ask(7, temperature=1.0, seed=5, max_new_tokens=9, exclusive=True))
    head.asked(ask(7), peer=b"b")
    request = head.engine.requests[0]
    assert (request.sampling.temperature, request.sampling.seed) == (1.0, 5)
    assert (request.max_new_tokens, request.exclusive, request.decoding) == (9, True, None)
    tokens = tuple(range(MAX_PIECE + 5))
    head.engine.streams[0].put(TokensOut(request=1, tokens=tokens, text="abc"))
    head.engine.end(1, tokens=tokens, num_prompt_tokens=4)
    done = head.answer(Done)
    pieces = head.control.told(b"a", Piece)
    assert [len(piece.tokens) for piece in pieces] == [MAX_PIECE, 5]
    assert "".join(piece.text for piece in pieces) == "abc"
    assert {piece.id for piece in pieces} == {done.id} == {7}
    assert (done.reason, done.failure, done.prompt_tokens) == (FinishReason.STOP, None, 4)
    assert (done.figures.first_epoch, done.figures.epoch) == (2, 3)
    assert not head.control.told(b"b", Done)


def test_a_failure_keeps_its_place_and_kind(head):
    """As data, not as text."""
    failure = Failure(cause="no memory", rank=2, device="bob")
    head.asked(ask())
    head.engine.end(1, reason=FinishReason.ERROR, error=failure)
    assert head.answer(Done).failure.failure() == failure


@pytest.mark.parametrize(
    ("refusal", "kind", "rank"),
    [
        (ValueError("unknown strategy"), FailureKind.REFUSED, None),
        (PromptError("no such role"), FailureKind.BAD_PROMPT, None),
        (ClusterError("head", "it is draining", rank=0), FailureKind.FAILED, 0),
        (KeyError("a bug"), FailureKind.FAILED, 0),
    ],
)
def test_what_the_engine_refuses_ends_that_request_alone(head, refusal, kind, rank):
    """Whatever it raises; the next one is served."""
    head.engine.refusal = refusal
    head.control.say(b"a", ask(1))
    done = head.answer(Done)
    assert (done.reason, done.failure.kind, done.failure.rank) == (FinishReason.ERROR, kind, rank)
    assert done.figures is None
    head.engine.refusal = None
    head.asked(ask(2))


def test_an_answer_that_cannot_be_told_ends_alone(head):
    """Text that no message can hold; the other client's answer goes on, and so does the thread."""
    head.asked(ask(1), ask(2))
    head.engine.streams[0].put(TokensOut(request=1, tokens=(7,), text="half of a pair: \ud83d"))
    done = head.answer(Done)
    assert (done.id, done.failure.kind, done.failure.rank) == (1, FailureKind.FAILED, 0)
    assert head.engine.aborted == [1]
    head.engine.streams[1].put(TokensOut(request=2, tokens=(7,), text="fine"))
    assert head.answer(Piece).text == "fine"


# Who asks too much, or leaves -------------------------------------------------------------------


def test_a_client_has_at_most_so_many_requests_open(head):
    """Another client has its own; one that ends makes room."""
    head.asked(*[ask(number) for number in range(1, MAX_OPEN_PER_CLIENT + 1)])
    head.control.say(b"a", ask(99))
    done = head.answer(Done)
    assert done.id == 99
    assert done.failure.cause == f"{MAX_OPEN_PER_CLIENT} requests of this client are open already"
    head.asked(ask(1), peer=b"b")
    head.engine.end(5)
    head.answer(Done, count=2)
    head.asked(ask(100))


def test_a_request_may_be_taken_back_before_its_prompt_is_rendered(head):
    """It never comes to the engine; one that is being rendered is aborted there."""
    head.engine.may_render.clear()
    head.control.say(b"a", *[ask(number) for number in (1, 2, 3)])
    head.control.say(b"a", *[Drop(id=number) for number in (1, 3)])
    wait_for(lambda: sum(call.is_dropped for call in head.server._calls) == 2)
    head.engine.may_render.set()
    wait_for(lambda: len(head.engine.aborted) == 1)
    done = head.answer(Done)
    assert (done.id, done.reason, done.failure) == (3, FinishReason.CANCELLED, None)
    assert len(head.engine.streams) == 2
    head.engine.end(head.engine.aborted[0], reason=FinishReason.CANCELLED)
    assert head.answer(Done, count=2).id == 1


def test_drop_ends_one_s_own_request_alone(head):
    """Another client's may have the same number."""
    head.asked(ask(1))
    head.asked(ask(1), peer=b"b")
    head.control.say(b"b", Drop(id=1), Drop(id=9))
    wait_for(lambda: head.engine.aborted)
    assert head.engine.aborted == [2]


def test_a_client_that_is_gone_takes_nobody_with_it(head):
    """Its requests are aborted; the others hear that their answers go on."""
    for peer in (b"here", b"gone", b"there"):
        head.asked(ask(1), peer=peer)
    head.control.gone.add(b"gone")
    head.effects = [Halt(1, Failure(cause="lost", rank=1, device="ada"))]
    for peer in (b"here", b"there"):
        note = head.answer(Note, peer=peer)
        assert note.text.startswith("stage 1 on ada: lost; the answer goes on when")
    assert head.engine.aborted == [2]
    assert len(head.server._calls) == 2


def test_who_asks_too_early_is_told_why_the_answer_waits(head):
    """And is answered later; once the head has given up, at once."""
    head.membership.phase = Phase.PREPARING
    head.asked(ask(1))
    assert head.answer(Note).text == (
        "not ready: 2 layers are held by nobody; the answer comes once it is"
    )
    head.membership.gave_up = True
    head.control.say(b"a", ask(2))
    assert head.answer(Done).failure.cause == "not ready: 2 layers are held by nobody"


def test_a_head_that_ends_finishes_what_is_open_and_takes_no_more(head):
    """Who comes meanwhile is told why."""
    head.asked(ask(1))
    drained: list[bool] = []
    thread = threading.Thread(
        target=lambda: drained.append(head.server.drain("it is shutting down", 60.0))
    )
    thread.start()
    wait_for(lambda: head.server._draining)
    head.control.say(b"b", ask(1))
    assert "it is shutting down" in head.answer(Done, peer=b"b").failure.cause
    assert not drained
    head.engine.end(1)
    thread.join(60.0)
    assert drained == [True]
    assert head.server.drain("again", 0.0)


def test_closing_tells_everybody_whose_request_is_open(head):
    """With why."""
    head.asked(ask(1))
    assert not head.server.drain("it was stopped", 0.05)
    head.server.close()
    assert head.answer(Done).failure.cause == "the head ends: it was stopped"


# Other questions --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message", [ask().model_copy(update={"version": "0.0"}), AskStatus(version="0.0")]
)
def test_a_client_of_another_version_is_refused_whatever_it_asks(head, message):
    """For good, in one way: a request is no more than a question about the cluster."""
    head.control.say(b"old", message)
    why = head.answer(Refuse, peer=b"old").why
    assert f"runs FlowSpec {VERSION}, this client 0.0" in why
    assert not head.engine.streams


def test_a_client_of_another_protocol_is_refused(head):
    """It could not read the answer."""
    head.control.say(b"old", ask().model_copy(update={"protocol": 1}))
    assert "this client 1" in head.answer(Refuse, peer=b"old").why


def test_what_is_no_message_changes_nothing(head):
    """Nor what no client says."""
    head.control.frames += [(b"a", b"\xff"), (b"a", pack(Counts(id=1, stages=None)))]
    head.asked(ask())


def test_a_question_that_fails_is_refused_alone(head):
    """This membership has no status to tell."""
    head.control.say(b"a", AskStatus(version=VERSION))
    assert "head: AttributeError" in head.answer(Refuse).why
    head.asked(ask())


def test_what_stages_did_is_told_once_they_have_said_so(head):
    """However long that takes, nobody else waits for it."""
    head.asked(ask(1), ask(2))
    head.engine.end(1)
    head.engine.end(2)
    head.answer(Done, count=2)
    head.control.say(b"a", *[AskCounts(id=1)] * 5, AskCounts(id=2), Echo())
    head.answer(Echo)
    assert not head.control.told(b"a", Counts)
    counts = StageCounts(num_rows_run=5, num_rows_pruned=1, busy_s=0.5)
    head.engine.streams[0].put_counts({1: counts})
    told = head.answer(Counts)
    assert (told.id, told.stages[0].rows_run, told.stages[0].busy_s) == (1, 5, 0.5)
    head.engine.streams[1].put_counts(None)
    told = head.answer(Counts, count=2)
    assert (told.id, told.stages) == (2, None)
    assert not head.server._counts_due


@pytest.mark.parametrize("number", [1, 9])
def test_counts_of_an_open_request_or_somebody_else_s_are_not_told(head, number):
    """At once."""
    head.asked(ask(1))
    head.control.say(b"b", AskCounts(id=number))
    assert head.answer(Counts, peer=b"b").stages is None


def test_impossible_counts_are_not_told(head):
    """A device says whatever it says."""
    head.asked(ask(1))
    head.engine.end(1)
    head.engine.streams[0].put_counts({1: StageCounts(busy_s=float("nan"))})
    head.answer(Done)
    head.control.say(b"a", AskCounts(id=1))
    assert head.answer(Counts).stages is None


def test_forget_is_refused_while_requests_are_open(head):
    """With the engine's own words."""
    head.asked(ask(1))
    head.control.say(b"b", Forget(id=4))
    assert head.answer(Forgotten, peer=b"b") == Forgotten(id=4, why="1 requests are open")
    head.engine.end(1)
    head.answer(Done)
    head.control.say(b"b", Forget(id=5))
    assert head.answer(Forgotten, peer=b"b", count=2) == Forgotten(id=5)
    assert head.engine.forgets == [True]


@pytest.mark.slow
def test_what_is_remembered_of_requests_that_are_over_is_bounded(head):
    """A head lives for months."""
    for number in range(1, 301):
        head.engine.streams.clear()
        head.asked(ask(number))
        head.engine.end(1)
        head.answer(Done, count=number)
    assert not head.server._calls
    assert len(head.server._over) == 256
    head.control.say(b"a", AskCounts(id=1))
    assert head.answer(Counts).stages is None


# Requests ---------------------------------------------------------------------------------------


def test_text_beyond_any_context_is_not_made_into_tokens():
    """It would take the tokenizer for minutes."""
    most = max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * 400)
    assert request_of(ask(text="x" * most), 400).prompt
    with pytest.raises(ValueError, match=f"{most + 1:,} characters, at most {most:,} are taken"):
        request_of(ask(text="x" * (most + 1)), 400)


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"top_p": 0.0}, "top_p"), ({"temperature": 1e6}, "temperature"), ({"stop": ("",)}, "stop")],
)
def test_what_cannot_be_sampled_is_a_value_error(fields, words):
    """The message's own limits are wider."""
    with pytest.raises(ValueError, match=words):
        request_of(ask(**fields), 400)
