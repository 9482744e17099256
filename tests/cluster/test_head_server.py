"""The head as a server: its threads, and clients that leave."""

import time
from types import SimpleNamespace
from typing import Any

import pytest
from flowspec.cluster.controller.epochs import CancelTicket, HeadEngine, MoreText, NewRequest

import flowspec
from flowspec.cluster.controller.server import HeadServer
from flowspec.cluster.membership.membership import Phase
from flowspec.cluster.membership.roster import Halt
from flowspec.protocol.control import Ask, AskStatus, Done, Note, Refuse, Turn, pack, unpack
from flowspec.request import ClusterError
from flowspec.transport.control_sockets import UnreachableError

SOON_S = 10.0
ASK = Ask(id=1, version=flowspec.__version__, turns=(Turn(role="user", content="hi"),))


class Control:
    """Clients that send what they are told to; `gone` take nothing any more."""

    def __init__(self, *frames: tuple[bytes, bytes]) -> None:
        self.frames, self.gone = [*frames], set[bytes]()
        self.sent: list[tuple[bytes, object]] = []

    def receive(self, timeout_s: float) -> list[tuple[bytes, bytes]]:
        """All at once."""
        del timeout_s
        time.sleep(0.01)
        frames, self.frames = self.frames, []
        return frames

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
    """Notes what it is asked for."""

    def __init__(self) -> None:
        self.failure: Exception | None = None
        self.posted: list[object] = []

    def post(self, command: object) -> None:
        """Noted."""
        self.posted.append(command)

    def start(self) -> None:
        """Nothing runs."""

    def close(self) -> None:
        """Nothing to close."""


def server(control: Any, *ticks: Any) -> tuple[HeadServer, Any]:
    """A head whose membership says what each of `ticks` gives, and then nothing."""
    left = [*ticks]

    def tick(now: float, *, idle: bool) -> list[object]:
        del now, idle
        return left.pop(0)() if left else []

    membership = SimpleNamespace(
        tick=tick,
        close=lambda why: [],
        unreachable=lambda peer, now: [],
        missing=lambda: "nothing",
        gave_up=False,
        phase=Phase.SERVING,
        config=SimpleNamespace(give_up_s=120.0),
    )
    engine = Engine()

    def new_engine(tell: object) -> HeadEngine:
        del tell
        return engine  # type: ignore[return-value]

    return HeadServer(control, membership, new_engine, sizes=None), engine  # type: ignore[arg-type]


def wait_for(is_true: Any) -> None:
    """Until it is."""
    end = time.monotonic() + SOON_S
    while not is_true():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def test_a_thread_that_fails_is_told_to_whoever_holds_the_head() -> None:
    """A head that does nothing any more must not look as if it served."""

    def fail() -> list[object]:
        raise RuntimeError("a bug")

    head, engine = server(Control(), fail)
    head.check()
    head.start()
    wait_for(lambda: head.failure is not None)
    with pytest.raises(ClusterError, match="head: RuntimeError: a bug"):
        head.check()
    head.close()
    other, engine = server(Control())
    engine.failure = ValueError("another bug")
    with pytest.raises(ClusterError, match="another bug"):
        other.check()


def test_a_client_that_is_gone_when_an_epoch_ends_takes_nobody_with_it() -> None:
    """Its request is cancelled; the others hear that their answers go on."""
    ask = [(peer, pack(ASK)) for peer in (b"here", b"gone", b"there")]
    control = Control(*ask)
    head, engine = server(control, lambda: [], lambda: [])
    head.start()
    wait_for(lambda: sum(isinstance(one, NewRequest) for one in engine.posted) == 3)
    control.gone.add(b"gone")
    head.membership.tick = lambda now, *, idle: [Halt(1, ClusterError("stage 1", "lost"))]
    wait_for(
        lambda: {peer for peer, m in control.sent if isinstance(m, Note)} == {b"here", b"there"}
    )
    head.membership.tick = lambda now, *, idle: []
    head.close()
    head.check()


@pytest.mark.parametrize(
    "message", [ASK.model_copy(update={"version": "0.0"}), AskStatus(version="0.0")]
)
def test_a_client_of_another_version_is_refused_whatever_it_asks(message: Any) -> None:
    """For good, in one way: a request is no more than a question about the cluster."""
    control = Control((b"old", pack(message)))
    head, engine = server(control)
    head.start()
    wait_for(lambda: control.sent)
    head.close()
    peers, (refusal, *others) = zip(*control.sent, strict=True)
    assert set(peers) == {b"old"}
    assert all(isinstance(other, Done) and "client 0.0" in other.error for other in others)
    assert isinstance(refusal, Refuse)
    assert f"runs FlowSpec {flowspec.__version__}, this client 0.0" in refusal.why
    assert not any(isinstance(one, NewRequest) for one in engine.posted)


def test_an_answer_that_cannot_be_told_ends_alone() -> None:
    """Text that no message can hold; the other client's answer goes on, and so does the thread."""
    control = Control((b"a", pack(ASK)), (b"b", pack(ASK)))
    head, engine = server(control)
    head.start()
    wait_for(lambda: len(engine.posted) == 2)
    head._hear(MoreText(1, (7,), "half of a pair: \ud83d"))
    head._hear(MoreText(2, (7,), "fine"))
    wait_for(lambda: len(control.sent) == 2)
    (_, end), (_, piece) = control.sent
    assert isinstance(end, Done)
    assert end.error.startswith("head: ")
    assert not end.refused
    assert (piece.text, head.failure) == ("fine", None)
    assert CancelTicket(1) in engine.posted
    head.close()


def test_a_question_about_the_cluster_that_fails_is_refused_alone() -> None:
    """The engine here has no status to tell."""
    control = Control((b"a", pack(AskStatus(version=flowspec.__version__))))
    head, _ = server(control)
    head.start()
    wait_for(lambda: control.sent)
    assert isinstance(control.sent[0][1], Refuse)
    assert head.failure is None
    control.frames.append((b"a", pack(ASK)))
    wait_for(lambda: head._callers)
    head.close()
