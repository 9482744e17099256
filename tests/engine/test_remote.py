"""A client of a head elsewhere: what it sends, and what it makes of silence, nonsense and loss."""

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import flowspec
from flowspec.engine import remote as remote_module
from flowspec.engine.engine import generate
from flowspec.engine.remote import FORGOTTEN_AFTER, RemoteEngine, ask_of
from flowspec.engine.stream import Notice
from flowspec.protocol.control import (
    MAX_ASK_BYTES,
    MAX_MESSAGE_BYTES,
    Ask,
    AskCounts,
    AskStatus,
    ClusterStatus,
    Control,
    ControlError,
    Counts,
    DecodingSpec,
    Done,
    Drop,
    FailureReport,
    Forget,
    Forgotten,
    ModelCard,
    ModelSizes,
    Note,
    Piece,
    Refuse,
    StageFigures,
    figures_of,
    pack,
    stats_of,
    unpack,
)
from flowspec.request import (
    ClusterError,
    DecodeStats,
    Decoding,
    Failure,
    FinishReason,
    RefusedError,
    Request,
    SamplingParams,
    TokensOut,
)
from flowspec.transport.control_sockets import MAX_PIECES
from flowspec.transport.secure.curve import MAX_PIECE_BYTES
from flowspec.transport.secure.token import derive_keys, new_token
from tests.support.in_process import SOON_S, TinyModel, cluster, tiny_model, wait_for


def ask(prompt: Any = "hi", **fields: Any) -> Request:
    """A short question."""
    return Request(prompt=prompt, **{"max_new_tokens": 8, **fields})


def status(*, active: int = 0, waiting: int = 0) -> ClusterStatus:
    """Of a healthy cluster with so many requests."""
    sizes = dict.fromkeys(ModelSizes.model_fields, 1)
    return ClusterStatus(
        version=flowspec.__version__,
        healthy=True,
        why="",
        epoch=1,
        model=ModelCard(model_id="m", model_hash="h"),
        sizes=ModelSizes(**sizes),
        strategy="ar",
        drafter="none",
        uptime_s=1.0,
        probe_age_s=None,
        requests_active=active,
        requests_waiting=waiting,
        requests_done=0,
        requests_failed=0,
        devices=(),
    )


class Head:
    """A connection to a head that answers each message as `answers` says, by its kind."""

    def __init__(self) -> None:
        self.is_connected = True
        self.answers: dict[type, Callable[[Any], list[Control | bytes]]] = {}
        self.heard: list[Any] = []
        self._ready: list[bytes] = []
        self._woken = threading.Event()

    def connect(self, timeout_s: float) -> str:
        """At once."""
        del timeout_s
        return ""

    def send(self, frame: bytes) -> None:
        """The client says it."""
        message = unpack(frame)
        self.heard.append(message)
        answer = self.answers.get(type(message), lambda message: [])
        self.say(*answer(message))

    def say(self, *messages: Control | bytes) -> None:
        """To the client."""
        self._ready += [one if isinstance(one, bytes) else pack(one) for one in messages]
        self._woken.set()

    def receive(self, timeout_s: float) -> list[bytes]:
        """What the head has said."""
        self._woken.wait(min(timeout_s, 0.005))
        self._woken.clear()
        ready, self._ready = self._ready, []
        return ready

    def wake(self) -> None:
        """The client has something to say."""
        self._woken.set()

    def close(self) -> None:
        """Nothing to close."""

    def count(self, kind: type) -> int:
        """Messages of this kind that the client has sent."""
        return sum(isinstance(message, kind) for message in self.heard)


@pytest.fixture
def head(monkeypatch: pytest.MonkeyPatch) -> Head:
    """Whoever connects gets to it."""
    made = Head()
    monkeypatch.setattr(remote_module, "ControlClient", lambda host, port, keys: made)
    return made


@pytest.fixture
def client(head: Head) -> Iterator[RemoteEngine]:
    """Connected to it."""
    keys: Any = None
    with RemoteEngine("here", 1, keys) as engine:
        yield engine


# Silence ----------------------------------------------------------------------------------------


def test_a_request_that_the_head_has_forgotten_is_not_waited_for(head, client, monkeypatch):
    """It says again and again that nobody is served."""
    monkeypatch.setattr(remote_module, "SILENCE_S", 0.02)
    head.answers[AskStatus] = lambda message: [status()]
    output = client.submit(ask()).result(SOON_S)
    assert "serves nobody now" in output.error.cause
    assert head.count(AskStatus) == FORGOTTEN_AFTER
    with pytest.raises(ClusterError, match="head at here:1: it serves nobody now"):
        client.submit(ask())


@pytest.mark.parametrize("busy", [{"active": 1}, {"waiting": 1}])
def test_a_request_that_is_served_or_waits_may_take_long(head, client, monkeypatch, busy):
    """However often the head is asked."""
    monkeypatch.setattr(remote_module, "SILENCE_S", 0.02)
    words = [status(), status(), *[status(**busy)] * 9, status(), status()]
    done = Done(id=1, reason=FinishReason.STOP)
    head.answers[AskStatus] = lambda message: [words.pop(0) if words else done]
    assert client.submit(ask()).result(SOON_S).reason is FinishReason.STOP
    assert not words


def test_a_status_that_a_person_asks_for_says_nothing_of_open_requests(head, client):
    """The head may not have counted them yet: their prompts are being rendered."""
    head.answers[AskStatus] = lambda message: [status()]
    stream = client.submit(ask())
    for _ in range(3 * FORGOTTEN_AFTER):
        assert client.status().num_running == 0
    assert stream.output is None
    head.say(Done(id=stream.request, reason=FinishReason.STOP))
    assert stream.result(SOON_S).error is None


def test_a_head_that_says_nothing_at_all_is_given_up(head, client, monkeypatch):
    """After it was asked once; what has come of the answer stays."""
    monkeypatch.setattr(remote_module, "SILENCE_S", 0.1)
    stream = client.submit(ask())
    head.say(Piece(id=stream.request, tokens=(4,), text="a"))
    output = stream.result(SOON_S)
    assert (output.tokens, output.text, output.reason) == ((4,), "a", FinishReason.ERROR)
    assert output.error.cause.startswith("no word from it for")
    assert head.count(AskStatus) == 1


def test_an_idle_client_asks_nothing(head, client, monkeypatch):
    """Silence is nothing to it."""
    monkeypatch.setattr(remote_module, "SILENCE_S", 0.01)
    time.sleep(0.1)
    assert not head.heard
    assert client.submit(ask()).output is None


def test_a_question_that_is_not_answered_has_an_end(head, client, monkeypatch):
    """The next one does not take the answer that comes too late for its own."""
    monkeypatch.setattr(remote_module, "ANSWER_TIMEOUT_S", 0.05)
    with pytest.raises(ClusterError, match="no answer within"):
        client.forget()
    late = next(message for message in head.heard if isinstance(message, Forget))
    head.answers[Forget] = lambda message: [
        Forgotten(id=late.id, why="too late"),
        Forgotten(id=message.id),
    ]
    client.forget()


# Nonsense and loss ------------------------------------------------------------------------------


@pytest.mark.parametrize("garbage", [b"", b"\xff\x00", b'{"kind":"done","id":-1}', b"[]"])
def test_a_head_that_sends_nonsense_is_given_up(head, client, garbage):
    """With the tokens that had come; whoever asks afterwards hears why."""
    stream = client.submit(ask())
    head.say(Piece(id=stream.request, tokens=(4,), text="a"), garbage)
    output = stream.result(SOON_S)
    assert (output.tokens, output.reason) == ((4,), FinishReason.ERROR)
    assert "what this client cannot read" in output.error.cause
    for refused in (lambda: client.submit(ask()), client.status, client.forget):
        with pytest.raises(ClusterError, match="cannot read"):
            refused()
    assert stream.stage_stats(timeout_s=SOON_S) is None


def test_a_bug_in_the_connection_s_thread_ends_every_stream(head, client, monkeypatch):
    """Nobody waits for what will never come."""
    streams = [client.submit(ask()) for _ in range(3)]

    def broken(message: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr(client, "_piece", broken)
    head.say(Piece(id=1, tokens=(1,), text=""))
    for stream in streams:
        assert "KeyError: 'a bug'" in stream.result(SOON_S).error.cause
    with pytest.raises(ClusterError, match="a bug"):
        client.submit(ask())


def test_a_connection_that_breaks_ends_what_is_open(head, client):
    """And whoever asks afterwards is told."""
    stream = client.submit(ask())
    head.is_connected = False
    assert stream.result(SOON_S).error.cause == "connection lost"
    with pytest.raises(ClusterError, match="head at here:1: connection lost"):
        client.submit(ask())
    assert client.drain(SOON_S)


def test_messages_about_requests_that_are_over_are_ignored(head, client):
    """They crossed on the line."""
    stream = client.submit(ask())
    done = Done(id=stream.request, reason=FinishReason.STOP)
    head.say(done, Piece(id=1, tokens=(1,), text="x"), Note(id=1, text="x"), done)
    head.say(Counts(id=99, stages=None), Done(id=77, reason=FinishReason.STOP))
    assert stream.result(SOON_S).tokens == ()
    head.answers[AskStatus] = lambda message: [status()]
    assert client.status().healthy


def test_a_refused_question_ends_no_request(head, client):
    """A head may fail to tell its status and serve all the same."""
    head.answers[AskStatus] = lambda message: [Refuse(why="head: KeyError")]
    stream = client.submit(ask())
    with pytest.raises(RefusedError, match="head: KeyError"):
        client.status()
    head.say(Done(id=stream.request, reason=FinishReason.STOP))
    assert stream.result(SOON_S).error is None


def test_a_client_of_another_version_is_told_so(head, client):
    """Every request of it ends."""
    head.answers[Ask] = lambda message: [Refuse(why="the head runs FlowSpec 9, this client 0")]
    assert "runs FlowSpec 9" in client.submit(ask()).result(SOON_S).error.cause
    with pytest.raises(RefusedError, match="runs FlowSpec 9"):
        client.submit(ask())


# Requests ---------------------------------------------------------------------------------------


def test_an_answer_comes_with_all_that_the_head_says_of_it(head, client):
    """Notices, pieces, statistics, the place of a failure, and what the stages did."""
    failure = Failure(cause="gone", rank=2, device="bob")
    report = FailureReport(cause="gone", rank=2, device="bob")
    stats = DecodeStats(submitted_at=5.0, num_verdicts=7, finished_at=9.0)
    head.answers[Ask] = lambda asked: [
        Note(id=asked.id, text="it waits"),
        Piece(id=asked.id, tokens=(1, 2), text="ab"),
        Piece(id=asked.id, tokens=(3,), text="c"),
        Done(
            id=asked.id,
            reason=FinishReason.ERROR,
            failure=report,
            prompt_tokens=4,
            figures=figures_of(stats, epoch=3, first_epoch=2),
        ),
    ]
    figures = StageFigures(rank=1, rows_run=9, rows_pruned=2, busy_s=0.5)
    head.answers[AskCounts] = lambda asked: [Counts(id=asked.id, stages=(figures,))]
    stream = client.submit(ask())
    events = list(stream)
    assert events[0] == Notice(text="it waits")
    assert "".join(event.text for event in events if isinstance(event, TokensOut)) == "abc"
    output = stream.result()
    assert (output.tokens, output.text, output.num_prompt_tokens) == ((1, 2, 3), "abc", 4)
    assert (output.error, output.stats.num_verdicts) == (failure, 7)
    assert output.stats.finished_at == 4.0
    assert client.epochs[stream.request] == (2, 3)
    assert stream.stage_stats()[1].num_rows_run == 9
    stream.stage_stats()
    assert head.count(AskCounts) == 1


def test_streams_that_run_at_once_are_kept_apart(head, client):
    """By their numbers, which several threads take at once."""
    streams = [client.submit(ask()) for _ in range(4)]
    assert len({stream.request for stream in streams}) == 4
    for turn in range(3):
        head.say(*[Piece(id=one.request, tokens=(one.request, turn), text="") for one in streams])
    head.say(*[Done(id=one.request, reason=FinishReason.STOP) for one in reversed(streams)])
    for one in streams:
        tokens = one.result(SOON_S).tokens
        assert tokens == (one.request, 0, one.request, 1, one.request, 2)


def test_closing_takes_back_what_is_open(head, client):
    """The head need not find out by itself."""
    streams = [client.submit(ask()) for _ in range(2)]
    wait_for(lambda: head.count(Ask) == 2)
    client.close()
    assert sorted(m.id for m in head.heard if isinstance(m, Drop)) == [1, 2]
    for stream in streams:
        assert stream.result(1.0).error.cause == "this client has hung up"
    client.close()


def test_a_draining_client_takes_no_more(head, client):
    """The head does, from others."""
    stream = client.submit(ask())
    assert not client.drain(0.02)
    with pytest.raises(ClusterError, match="takes no more requests: it is draining"):
        client.submit(ask())
    head.say(Done(id=stream.request, reason=FinishReason.STOP))
    assert client.drain(SOON_S)


def test_what_is_remembered_of_requests_that_are_over_is_bounded(head, client):
    """A page in front of a head is a client for months."""
    done = figures_of(DecodeStats(), epoch=1)
    head.answers[Ask] = lambda asked: [Done(id=asked.id, reason=FinishReason.STOP, figures=done)]
    for _ in range(300):
        client.submit(ask()).result(SOON_S)
    assert not client._open
    assert len(client._over) == len(client.epochs) == 256
    assert client.submit(ask()).result(SOON_S)
    head.say(*[status()] * 100)
    head.answers[AskStatus] = lambda message: [status(active=3)]
    wait_for(lambda: client.status().num_running == 3)


# What travels -----------------------------------------------------------------------------------


def test_all_of_a_request_travels():
    """Nothing is left to a default of the head's."""
    request = Request(
        prompt=[{"role": "system", "content": "short"}, {"role": "user", "content": "hi"}],
        sampling=SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, seed=8),
        max_new_tokens=7,
        stop=("x",),
        eos_token_ids=(4,),
        decoding=Decoding(strategy="ar", parameters={}, drafter="eagle"),
        exclusive=True,
    )
    sent = unpack(pack(ask_of(request, 5)))
    assert isinstance(sent, Ask)
    assert [turn.content for turn in sent.turns] == ["short", "hi"]
    assert (sent.id, sent.max_new_tokens, sent.stop, sent.end_ids) == (5, 7, ("x",), (4,))
    assert (sent.temperature, sent.top_k, sent.top_p, sent.min_p, sent.seed) == (
        *(0.5, 3, 0.9, 0.1),
        8,
    )
    assert sent.exclusive
    assert sent.decoding.decoding() == request.decoding
    assert ask_of(ask((1, 2)), 1).prompt == (1, 2)
    assert ask_of(ask(), 1).decoding is None


@pytest.mark.parametrize("value", ["9", None, [1], float("inf"), float("nan")])
def test_a_parameter_is_a_number_or_a_switch(value):
    """Nothing else travels."""
    with pytest.raises(ValueError, match="draft_topk"):
        DecodingSpec(strategy="ar", parameters={"draft_topk": value})


def test_statistics_come_back_as_they_were():
    """Counted from when the request came; as long as they get, they fit a message."""
    stats = DecodeStats(submitted_at=100.0, runs=[0, 3] * 20_000, num_verdicts=7, resume_s=0.5)
    for number in range(1, 60_000):
        stats.count_tokens(1, 100.0 + 1.1 ** (number % 150))
    stats.finished_at = stats.last_token_at
    figures = figures_of(stats, epoch=3)
    frame = pack(Done(id=1, reason=FinishReason.LENGTH, figures=figures))
    assert len(frame) < MAX_MESSAGE_BYTES
    done = unpack(frame)
    assert isinstance(done, Done)
    assert done.figures == figures
    back = stats_of(figures)
    assert back.inter_token == stats.inter_token
    assert back.time_to_first_token_s == pytest.approx(stats.time_to_first_token_s)
    assert (back.runs, back.num_verdicts, back.resume_s) == (stats.runs, 7, 0.5)
    assert back.last_token_at == pytest.approx(stats.last_token_at - 100.0)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        (
            {"prompt": "x" * (MAX_ASK_BYTES + 1)},
            "16,777,217 bytes, at most 16,777,216 can be sent",
        ),
        (
            {"prompt": "\N{SNOWMAN}" * (MAX_ASK_BYTES // 2)},
            "can be sent to the head; shorten it",
        ),
        ({"stop": ("x",) * 17}, "17 stop strings are given, at most 16 can be"),
        ({"stop": ("x" * 201,)}, "a stop string has 201 characters, at most 200 are possible"),
        ({"prompt": "cut \ud83d here"}, "half of a surrogate pair"),
        ({"max_new_tokens": 10**7}, "max_new_tokens cannot be 10000000"),
        ({"prompt": [{"role": "wizard", "content": "hi"}]}, "role cannot be 'wizard'"),
        ({"prompt": [{"role": "user", "content": "x"}] * 1001}, "has 1001 messages, at most 1000"),
    ],
)
def test_what_cannot_be_sent_is_said_in_a_sentence(client, head, fields, said):
    """A ValueError, before anything goes over the line."""
    with pytest.raises(ValueError, match=said) as caught:
        client.submit(ask(**{"prompt": "a", **fields}))
    assert "should have" not in str(caught.value)
    assert not head.heard
    assert not client._open


def test_a_prompt_may_be_as_long_as_a_long_context():
    """Far beyond 262,144 characters."""
    sent = ask_of(ask("a fox " * 70_000), 1)
    assert unpack(pack(sent)) == sent


def test_only_a_question_may_be_long():
    """Every other message keeps its limit, whatever it calls itself further on."""
    piece = pack(Piece(id=1, tokens=(), text="x"))
    with pytest.raises(ControlError, match="at most 1048576"):
        unpack(piece + b" " * MAX_MESSAGE_BYTES)
    with pytest.raises(ControlError, match="at most 1048576"):
        unpack(b'{"id":1,' + b" " * MAX_MESSAGE_BYTES + b'"kind":"ask"}')
    with pytest.raises(ControlError, match="at most 16777216"):
        unpack(pack(ask_of(ask(), 1)) + b" " * MAX_ASK_BYTES)
    assert MAX_PIECES * MAX_PIECE_BYTES == MAX_ASK_BYTES


# A real head ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Two stages."""
    return tiny_model(tmp_path_factory.mktemp("remote"))


@pytest.mark.slow
def test_a_head_that_ends_in_mid_answer_is_told_and_its_successor_is_asked_anew(model):
    """The old connection is over; devices come back by themselves."""
    keys = derive_keys(new_token())
    with cluster(model, "ada", "bob", keys=keys) as running:
        port = running.port
        client = running.client()
        stream = client.submit(ask("a quick fox", max_new_tokens=300))
        first = next(event for event in stream if isinstance(event, TokensOut))
    output = stream.result(SOON_S)
    assert output.reason is FinishReason.ERROR
    assert output.error.cause == "the head ends: it was stopped"
    assert len(output.tokens) >= len(first.tokens)
    wait_for(lambda: client._error is not None)
    with pytest.raises(ClusterError, match="connection lost"):
        client.submit(ask())
    client.close()
    with cluster(model, "ada", "bob", keys=keys, port=port) as running, running.client() as again:
        assert running.port == port
        assert generate(again, ask()).error is None


def test_a_client_that_vanishes_leaves_nothing_open(model):
    """Neither what runs nor what waits behind it."""
    with cluster(model, "ada", "bob") as running:
        client = running.client()
        running_stream = client.submit(ask(max_new_tokens=300, exclusive=True))
        client.submit(ask(max_new_tokens=300))
        next(event for event in running_stream if isinstance(event, TokensOut))
        client._drop = lambda request: None  # type: ignore[method-assign]  # it says no word
        client.close()
        with running.client() as other:
            assert generate(other, ask()).error is None
            wait_for(lambda: not running.server._calls)
            now = other.status()
        assert (now.num_running, now.num_waiting) == (0, 0)


def test_a_waiting_request_is_taken_back_at_once(model):
    """Without a device, nobody else would ever end it."""
    with cluster(model) as running, running.client() as client:
        stream = client.submit(ask())
        notice = next(iter(stream))
        assert isinstance(notice, Notice)
        assert notice.text.startswith("not ready: ")
        now = client.status()
        assert (now.healthy, now.num_stages, now.num_waiting) == (False, 0, 1)
        stream.abort()
        assert stream.result(SOON_S).reason is FinishReason.CANCELLED
        wait_for(lambda: client.status().num_waiting == 0)
