"""Every transport keeps order, has two channels, bounded waits, and errors that name a device."""

import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache

import pytest
import torch
import zmq

from flowspec.protocol.codec import WireError
from flowspec.protocol.messages import (
    AddRequest,
    FinishRequest,
    Reroot,
    Segment,
    Started,
    WireMessage,
)
from flowspec.request import ClusterError, NodeId
from flowspec.transport import emulated, torch_dist, torch_link
from flowspec.transport import zmq as zmq_sockets
from flowspec.transport.base import Transport
from flowspec.transport.emulated import EmulatedTransport
from flowspec.transport.link_occupancy import Passage
from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.transport.torch_dist import TorchDistTransport, meet_in_folder
from flowspec.transport.zmq import ZmqTransport, local_addresses

MakePeer = Callable[[int], Transport]
SOON_S = 5.0


@pytest.fixture
def folder() -> Iterator[str]:
    """Return a short path: ipc paths are limited to about 100 bytes."""
    path = tempfile.mkdtemp(prefix="fs")
    yield path
    shutil.rmtree(path)


def fast_line(source: int, to: int, message: WireMessage) -> Passage:
    """Return an emulated line with nearly no delay."""
    del source, to, message
    return Passage(latency_s=1e-4, num_bytes=100, rate_out=1e9, rate_in=1e9)


KEYS = derive_keys(new_token())


@cache
def tcp_addresses(folder: str) -> dict[int, dict[str, str]]:
    """Return free ports of this machine, the same ones for one folder."""
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(6)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return {
        rank: {
            lane: f"tcp://127.0.0.1:{ports.pop()}"
            for lane in (zmq_sockets.CONTROL, zmq_sockets.DATA_LANE)
        }
        for rank in range(3)
    }


MAKERS: dict[str, Callable[[int, str], Transport]] = {
    "zmq": lambda rank, folder: ZmqTransport(rank, local_addresses(folder, 2)),
    "emulated": lambda rank, folder: EmulatedTransport(
        ZmqTransport(rank, local_addresses(folder, 2)), rank, fast_line
    ),
    "curve": lambda rank, folder: ZmqTransport(rank, tcp_addresses(folder), KEYS),
    "gloo": lambda rank, folder: TorchDistTransport(rank, 2, meet_in_folder(folder)),
}


@pytest.fixture(params=MAKERS)
def peer(request: pytest.FixtureRequest, folder: str) -> Iterator[MakePeer]:
    """Return a factory for rank 0, 1 or 2 of one cluster; all are closed at the end."""
    made: list[Transport] = []

    def make(rank: int) -> Transport:
        made.append(MAKERS[request.param](rank, folder))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


def segment(seq_no: int, hidden: torch.Tensor | None = None) -> Segment:
    """Return a data message that can be told from others."""
    rows = 0 if hidden is None else hidden.shape[0]
    nodes = tuple(NodeId(node) for node in range(rows))
    return Segment(
        request=1, seq_no=seq_no, nodes=nodes, parents=nodes, tokens=(0,) * rows, hidden=hidden
    )


def receive(transport: Transport, count: int) -> list[WireMessage]:
    """Return the next `count` messages, in order."""
    messages: list[WireMessage] = []
    end = time.monotonic() + SOON_S
    while len(messages) < count:
        assert time.monotonic() < end, f"{len(messages)} of {count} messages came"
        messages.extend(transport.receive(0.1))
    return messages


def settle(transport: Transport, send: Callable[[], None]) -> Sequence[WireMessage]:
    """Return the result of one `receive` once all sent messages have come."""
    send()
    time.sleep(0.3)
    return transport.receive(SOON_S)


def test_data_keeps_its_order(peer: MakePeer) -> None:
    """The messages of a request must not overtake each other."""
    head, stage = peer(0), peer(1)
    sent: list[WireMessage] = [AddRequest(request=1, capacity=2, context=3)]
    sent += [segment(seq_no) for seq_no in range(300)]
    sent.append(FinishRequest(request=1))
    for message in sent:
        head.send(1, message)
    assert receive(stage, len(sent)) == sent


def test_control_is_served_first(peer: MakePeer) -> None:
    """A verdict overtakes waiting segments, which makes in-flight pruning possible."""
    head, stage = peer(0), peer(1)
    head.send(1, Started(request=1, seq_no=0))  # the control lane is connected
    head.send(1, segment(0))
    receive(stage, 2)
    verdict = Reroot(request=1, position=4, parent=NodeId(3), token=2)

    def send() -> None:
        for seq_no in range(5):
            head.send(1, segment(seq_no))
        head.send(1, verdict)

    first, *rest = settle(stage, send)
    assert first == verdict
    assert [message.seq_no for message in rest if isinstance(message, Segment)] == list(range(5))


def test_both_directions_and_several_senders(peer: MakePeer) -> None:
    """Every rank has one inbox for all others."""
    head, one, two = peer(0), peer(1), peer(2)
    one.send(0, Started(request=1, seq_no=1))
    two.send(0, Started(request=1, seq_no=2))
    one.send(2, segment(3))
    got = receive(head, 2)
    assert {m.seq_no for m in got if isinstance(m, Started)} == {1, 2}
    assert [type(m) for m in receive(two, 1)] == [Segment]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_big_hidden_states_arrive_intact(peer: MakePeer, dtype: torch.dtype) -> None:
    """Megabytes are sent without a copy, and the tensor may be deleted right after."""
    head, stage = peer(0), peer(1)
    generator = torch.Generator().manual_seed(0)
    wanted = [torch.randn(512, 2048, generator=generator).to(dtype) for _ in range(3)]
    for seq_no, hidden in enumerate(wanted):
        head.send(1, segment(seq_no, hidden.clone()))
    for message, hidden in zip(receive(stage, 3), wanted, strict=True):
        assert isinstance(message, Segment)
        assert message.hidden is not None
        assert message.hidden.dtype == dtype
        assert torch.equal(message.hidden, hidden)


def test_views_of_hidden_states_arrive_intact(peer: MakePeer) -> None:
    """The living rows of a segment, or a column slice, are not contiguous."""
    head, stage = peer(0), peer(1)
    hidden = torch.arange(600.0).view(20, 30)
    for seq_no, view in enumerate((hidden[::2], hidden[:, 3:9], hidden.t(), hidden[5:5])):
        head.send(1, segment(seq_no, view))
        (message,) = receive(stage, 1)
        assert isinstance(message, Segment)
        assert message.hidden is not None
        assert torch.equal(message.hidden, view)


def test_receiving_waits_no_longer_than_asked(peer: MakePeer) -> None:
    """An idle process wakes by itself, and one in a hurry does not wait at all."""
    stage = peer(1)
    for timeout_s, least, most in ((0.0, 0.0, 0.1), (0.3, 0.28, 1.5)):
        start = time.monotonic()
        assert list(stage.receive(timeout_s)) == []
        assert least <= time.monotonic() - start < most


def test_a_message_ends_the_wait(peer: MakePeer) -> None:
    """The latency is that of the link, not of a poll interval."""
    head, stage = peer(0), peer(1)
    head.send(1, Started(request=1, seq_no=0))
    receive(stage, 1)
    sender = threading.Timer(0.2, lambda: head.send(1, Started(request=1, seq_no=1)))
    sender.start()
    start = time.monotonic()
    assert len(stage.receive(SOON_S)) == 1
    assert time.monotonic() - start < SOON_S / 2
    sender.join()


@pytest.mark.parametrize(
    "frames",
    [[b"hello"], [b""], [b"FS\x63" + b"\0" * 9], [b"x"] * 5, [b"\xff" * 100_000]],
    ids=["noise", "empty", "version", "frames", "long"],
)
@pytest.mark.parametrize("lane", [zmq_sockets.CONTROL, zmq_sockets.DATA_LANE])
def test_bad_frames_name_the_device(folder: str, frames: list[bytes], lane: str) -> None:
    """A peer of another protocol is refused, and the error names the receiver."""
    addresses = local_addresses(folder, 2)
    stage = ZmqTransport(2, addresses)
    context = zmq.Context()
    stranger = context.socket(zmq.PUSH)
    try:
        stranger.connect(addresses[2][lane])
        stranger.send_multipart(frames)
        with pytest.raises(WireError, match="stage 2"):
            stage.receive(SOON_S)
    finally:
        context.destroy(linger=0)
        stage.close()


@pytest.mark.parametrize("was_alive", [False, True])
def test_a_dead_peer_is_noticed(
    peer: MakePeer, monkeypatch: pytest.MonkeyPatch, was_alive: bool
) -> None:
    """Sending to a hanging peer ends within the time limit, in one error that names it."""
    monkeypatch.setattr(zmq_sockets, "SEND_TIMEOUT_MS", 200)
    monkeypatch.setattr(torch_link, "SEND_TIMEOUT_S", 0.2)
    for module in (zmq_sockets, torch_link):
        monkeypatch.setattr(module, "MAX_QUEUED_MESSAGES", 10)
    monkeypatch.setattr(emulated, "MAX_HELD", 10)
    monkeypatch.setattr(zmq_sockets, "LINGER_MS", 0)
    monkeypatch.setattr(torch_dist, "LINGER_S", 0.1)
    head = peer(0)
    if was_alive:
        stage = peer(1)
        head.send(1, segment(0))
        receive(stage, 1)
        stage.close()
    start = time.monotonic()

    def send_many() -> None:
        for seq_no in range(1000):
            head.send(1, segment(seq_no))

    with pytest.raises(ClusterError, match=r"stage 1: (took no Segment|connection lost)") as caught:
        send_many()
    assert caught.value.where == "stage 1"
    assert time.monotonic() - start < 2.0


def test_a_late_peer_gets_what_was_sent(peer: MakePeer) -> None:
    """Processes may start in any order."""
    head = peer(0)
    head.send(1, segment(4))
    (message,) = receive(peer(1), 1)
    assert isinstance(message, Segment)
    assert message.seq_no == 4


def test_closing_delivers_first(peer: MakePeer) -> None:
    """A stage's last messages must reach the head."""
    head, stage = peer(0), peer(1)
    stage.send(0, Started(request=1, seq_no=8))
    stage.close()
    assert len(receive(head, 1)) == 1


def test_closing_does_not_hang_on_the_dead(peer: MakePeer) -> None:
    """Closing ends within about a second, even with messages for a peer that never came."""
    head = peer(0)
    head.send(1, segment(0))
    start = time.monotonic()
    head.close()
    assert time.monotonic() - start < 3.0


def test_another_thread_ends_a_wait(peer: MakePeer):
    """Each wake ends at most one wait; later messages are received as usual."""
    stage, head = peer(1), peer(0)
    waker = threading.Timer(0.05, head.wake)
    waker.start()
    start = time.monotonic()
    assert head.receive(SOON_S * 4) == []
    assert time.monotonic() - start < SOON_S
    waker.join()
    stage.send(0, Started(request=1, seq_no=2))
    assert receive(head, 1) == [Started(request=1, seq_no=2)]
