"""Who counts as refused: strangers, and no member, though libzmq does not tell them apart."""

import logging
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from flowspec.transport.control_sockets import ControlClient, ControlServer
from flowspec.transport.secure import curve
from flowspec.transport.secure.curve import NO_HANDSHAKE, WRONG_KEY, WRONG_MEMBER, _Watch
from flowspec.transport.secure.tally import Tally
from flowspec.transport.secure.token import derive_keys, new_token

KEYS = derive_keys(new_token())
EVENTS = {
    "in": zmq.EVENT_ACCEPTED,
    "passed": zmq.EVENT_HANDSHAKE_SUCCEEDED,
    "denied": zmq.EVENT_HANDSHAKE_FAILED_AUTH,
    "broken": zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
    "silent": zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL,
    "out": zmq.EVENT_DISCONNECTED,
}
SOON_S = 10.0


class _Door:
    """Lets everybody in."""

    def entered(self, descriptor: int) -> None:
        """Nobody is kept out."""

    def left(self, descriptor: int) -> str:
        """Whose it was."""
        return f"peer {descriptor}"


def refused(story: str) -> dict[str, int]:
    """What is counted after these events; as libzmq tells them, only `in` and `out` say of whom."""
    tally = Tally(logging.getLogger("test"), "port")
    watch = _Watch(None, _Door(), tally)
    for words in story.split(", "):
        event, _, descriptor = words.partition(" ")
        watch._take(EVENTS[event], int(descriptor or 0))
    return tally.counts()


@pytest.mark.parametrize(
    ("story", "counts"),
    [
        ("in 1, passed, out 1", {}),
        ("in 1, passed, in 2, out 1, passed, out 2", {}),
        ("in 1, in 2, passed, passed, out 2, out 1", {}),
        ("in 1, in 2, passed, out 2, silent, out 1", {NO_HANDSHAKE: 1}),
        ("in 1, out 1", {WRONG_KEY: 1}),
        ("in 1, broken, out 1", {WRONG_KEY: 1}),
        ("in 1, passed, in 2, out 2, out 1", {WRONG_KEY: 1}),
        ("in 1, in 2, passed, out 1, out 2", {WRONG_KEY: 1}),
        ("in 1, in 2, passed, broken, out 1, in 3, out 3, out 2", {WRONG_KEY: 2}),
        ("in 1, denied, out 1", {WRONG_MEMBER: 1}),
        ("in 1, passed, in 2, denied, out 1, out 2", {WRONG_MEMBER: 1}),
        (
            "in 1, in 2, denied, broken, out 1, out 2, in 3, passed, out 3",
            {WRONG_KEY: 1, WRONG_MEMBER: 1},
        ),
    ],
)
def test_strangers_count_and_members_do_not(story: str, counts: dict[str, int]) -> None:
    """Whatever the order in which they come, show their keys and go."""
    assert refused(story) == counts


@given(st.lists(st.sampled_from(["member", "stranger"]), max_size=12), st.randoms())
def test_sums_are_right_in_any_order(kinds: list[str], chance) -> None:
    """Who is taken for whom may be open, how many were refused is not."""
    left = {
        number: [f"in {number}", *(["passed"] if kind == "member" else []), f"out {number}"]
        for number, kind in enumerate(kinds)
    }
    story = []
    while left:
        number = chance.choice(sorted(left))
        story.append(left[number].pop(0))
        if not left[number]:
            del left[number]
    strangers = kinds.count("stranger")
    assert refused(", ".join(story) if story else "in 0, passed") == (
        {WRONG_KEY: strangers} if strangers else {}
    )


def test_who_outlasts_the_handshake_is_a_member(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger who was taken for a member must not make that member a stranger for ever."""
    now = [0.0]
    monkeypatch.setattr(curve, "time", SimpleNamespace(monotonic=lambda: now[0]))
    tally = Tally(logging.getLogger("test"), "port")
    watch = _Watch(None, _Door(), tally)
    for event, descriptor in (("in", 1), ("in", 2), ("passed", 0), ("out", 1)):
        watch._take(EVENTS[event], descriptor)
    now[0] = curve.DOUBT_S + 1
    for event, descriptor in (("in", 3), ("out", 2), ("out", 3)):
        watch._take(EVENTS[event], descriptor)
    assert tally.counts() == {WRONG_KEY: 1}  # 3


@pytest.fixture
def server() -> Iterator[ControlServer]:
    """A head's control socket that sends everything back."""
    made, stop = ControlServer("127.0.0.1", 0, KEYS), threading.Event()

    def answer() -> None:
        while not stop.is_set():
            for peer, message in made.receive(0.05):
                made.send(peer, message)

    thread = threading.Thread(target=answer)
    thread.start()
    yield made
    stop.set()
    thread.join()
    made.close()


def visit(port: int, barrier: threading.Barrier | None = None) -> None:
    """What `flowspec status` does: connect, ask, hear, hang up."""
    client = ControlClient("127.0.0.1", port, KEYS)
    try:
        assert client.connect(SOON_S) == ""
        client.send(b"status")
        end = time.monotonic() + SOON_S
        while not client.receive(0.1):
            assert time.monotonic() < end
        if barrier:
            barrier.wait(SOON_S)
    finally:
        client.close()


def test_short_visits_are_no_refusals(server: ControlServer) -> None:
    """Beside a stranger who says nothing, and beside one another."""
    with socket.create_connection(("127.0.0.1", server.port)):
        visit(server.port)
        together = threading.Barrier(4)
        with ThreadPoolExecutor(4) as visitors:
            for done in [visitors.submit(visit, server.port, together) for _ in range(4)]:
                done.result()
    end = time.monotonic() + SOON_S
    while not server.guard.refusals.counts() and time.monotonic() < end:
        time.sleep(0.05)
    assert server.guard.refusals.counts() == {NO_HANDSHAKE: 1}
