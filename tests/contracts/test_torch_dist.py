"""Properties of torch.distributed alone: broken connections, envelopes, no limit on idle time."""

import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from flowspec.protocol.codec import WireError, decode, encode_tensors
from flowspec.protocol.messages import AddRequest, Started
from flowspec.request import ClusterError
from flowspec.transport import torch_dist, torch_link
from flowspec.transport.torch_dist import TorchDistTransport, hear, meet_in_folder, tell
from flowspec.transport.torch_link import ENVELOPE_BYTES, Meeting, TorchLink, pack
from tests.contracts.test_transport import receive, segment

SOON_S = 5.0
MakeRank = Callable[[int], TorchDistTransport]


@pytest.fixture
def meeting() -> Iterator[Meeting]:
    """Return a folder where ranks meet."""
    folder = tempfile.mkdtemp(prefix="fs")
    yield meet_in_folder(folder)
    shutil.rmtree(folder)


@pytest.fixture
def rank(meeting: Meeting) -> Iterator[MakeRank]:
    """Return a factory for rank 0, 1 or 2 of one cluster."""
    made = []

    def make(number: int) -> TorchDistTransport:
        made.append(TorchDistTransport(number, 2, meeting))
        return made[-1]

    yield make
    for transport in made:
        transport.close()


def connected(rank: MakeRank, *numbers: int) -> list[TorchDistTransport]:
    """Return these ranks once each has heard from every other."""
    ranks = [rank(number) for number in numbers]
    for here in ranks:
        for there in ranks:
            if here is not there:
                here.send(there.rank, Started(request=1, seq_no=0))
    for here in ranks:
        receive(here, len(ranks) - 1)
    return ranks


def crash(transport: TorchDistTransport) -> None:
    """Close its connections silently, as the kernel does for a killed process."""
    for link in transport._links.values():
        if link._gloo is not None:
            torch_link._close_gloo(link._gloo, 1 - link._me)


def test_the_head_hears_of_a_lost_stage_after_its_last_words(rank):
    """The head needs to send nothing to notice, and it still receives the cause of the failure."""
    head, stage = connected(rank, 0, 1)
    stage.send(0, Started(request=1, seq_no=7))
    time.sleep(0.2)
    crash(stage)
    time.sleep(0.2)
    assert [message.seq_no for message in head.receive(SOON_S)] == [7]
    start = time.monotonic()
    with pytest.raises(ClusterError, match="stage 1: connection lost: ") as caught:
        head.receive(SOON_S)
    assert caught.value.where == "stage 1"
    assert time.monotonic() - start < SOON_S / 2
    with pytest.raises(ClusterError, match="stage 1: connection lost: "):
        head.send(1, segment(0))


def test_a_stage_hears_of_a_lost_head_but_of_other_stages_only_when_it_needs_them(rank):
    """The head knows best which stage is gone; a stage without its head has nothing to do."""
    head, one, two = connected(rank, 0, 1, 2)
    crash(two)
    assert list(one.receive(0.5)) == []
    with pytest.raises(ClusterError, match="stage 2: connection lost"):
        one.send(2, segment(0))
    crash(head)
    with pytest.raises(ClusterError, match="head: connection lost"):
        one.receive(SOON_S)


def test_other_connections_outlive_a_broken_one(rank):
    """Every pair of ranks has its own groups."""
    head, one, two = connected(rank, 0, 1, 2)
    two.close()
    one.send(0, Started(request=1, seq_no=3))
    time.sleep(0.2)
    assert [message.seq_no for message in head.receive(0.0)] == [3]
    head.send(1, segment(4))
    assert [message.seq_no for message in receive(one, 1)] == [4]
    with pytest.raises(ClusterError, match="stage 2: connection lost: it has left"):
        head.receive(SOON_S)


def test_a_peer_that_takes_nothing_is_named(rank, monkeypatch):
    """The peer exists but hangs: its queue is bounded, and so is the wait."""
    monkeypatch.setattr(torch_link, "SEND_TIMEOUT_S", 0.2)
    monkeypatch.setattr(torch_dist, "MAX_WAITING_MESSAGES", 10)
    head, stage = connected(rank, 0, 1)

    def send_many() -> None:
        for seq_no in range(1000):
            head.send(1, segment(seq_no))

    with pytest.raises(ClusterError, match="stage 1: took no Segment"):
        send_many()
    assert stage._inbox.qsize() <= 11


def test_idle_time_is_no_error(rank, monkeypatch):
    """Idle time may exceed the timeout of the groups, in both directions."""
    monkeypatch.setattr(torch_link, "CONNECT_TIMEOUT_S", 0.5)
    head, stage = connected(rank, 0, 1)
    assert list(head.receive(1.2)) == []
    head.send(1, segment(1))
    receive(stage, 1)
    stage.send(0, Started(request=1, seq_no=2))
    receive(head, 1)


def test_who_never_comes_is_named(rank, monkeypatch):
    """The wait for a peer that never starts is bounded."""
    monkeypatch.setattr(torch_link, "JOIN_TIMEOUT_S", 0.2)
    with pytest.raises(ClusterError, match=r"stage \d: not there after"):
        rank(0).receive(SOON_S)


@pytest.mark.parametrize(("rows", "size"), [(1, 8), (128, 1000), (128, 1024), (4096, 64)])
def test_frames_of_every_size_arrive(rank, rows, size):
    """Frames below, around and above the size of an envelope arrive."""
    head, stage = connected(rank, 0, 1)
    sent = segment(1, torch.arange(float(size * rows)).view(rows, size))
    head.send(1, sent)
    head.send(1, segment(2))
    first, second = receive(stage, 2)
    assert torch.equal(first.hidden, sent.hidden)
    assert first.nodes == sent.nodes
    assert second == segment(2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hidden_states_stay_tensors_where_they_lie(dtype):
    """nccl sends the memory itself, not a copy on the host."""
    sent = segment(1, torch.arange(12.0).view(4, 3).to(dtype))
    *_, hidden = frames = encode_tensors(sent)
    assert hidden.data_ptr() == sent.hidden.data_ptr()
    received = decode(frames)
    assert received.hidden.dtype == dtype
    assert torch.equal(received.hidden, sent.hidden)
    with pytest.raises(WireError, match="frame of 11 bytes"):
        decode([*frames[:-1], hidden[:11]])


def test_an_envelope_is_full_to_the_last_byte():
    """Frames that do not fit follow on their own; the table counts towards the size."""
    table = 2 + 2 * 5
    for size, follows in ((ENVELOPE_BYTES - table - 3, 0), (ENVELOPE_BYTES - table - 2, 1)):
        envelope, following = pack([b"abc", bytes(size)])
        assert envelope.numel() <= ENVELOPE_BYTES
        assert len(following) == follows


def raw(*numbers: int) -> torch.Tensor:
    """Send bytes that no honest peer sends."""
    return torch.tensor(numbers, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("envelope", "message"),
    [
        (pack([b"hello there, who are you?"])[0], "not a FlowSpec frame"),
        (pack([b""])[0], "truncated"),
        (pack([b"x"] * 200)[0], "frames"),
        (raw(255, 255, 0, 0), "65535 frames, at most"),
        (raw(1, 0, 255, 255, 255, 255, torch_link.BY_GLOO), "4294967295 bytes, at most"),
        (raw(1, 0, 1, 0, 0, 0, torch_link.BY_NCCL), "not an envelope"),
        (raw(1, 0, 0, 0, 8, 0, torch_link.INSIDE), "not an envelope"),
        (raw(1, 0, 1, 0, 0, 0, 77), "not an envelope"),
    ],
)
def test_bad_envelopes_are_refused_by_name(rank, meeting, envelope, message):
    """They are checked before anything is allocated, and the error names the receiver."""
    stage = rank(2)
    stranger = TorchLink(1, 2, meeting, meeting.make_device(), lambda frames: None, lambda *_: None)
    end = time.monotonic() + SOON_S
    while stranger._gloo is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    # waited for: a send that is let go of before it is done may never arrive
    assert stranger._gloo.send([envelope], 1, torch_link.ENVELOPE).wait()

    def hear_it() -> None:
        end = time.monotonic() + SOON_S
        while time.monotonic() < end:  # the link itself may wake the stage first
            stage.receive(0.5)

    with pytest.raises(WireError, match=message):
        hear_it()
    stranger.hang_up(0.0)


def test_a_word_for_all_is_heard_in_time(meeting):
    """The head announces what it has prepared; a rank that hears nothing gives up in time."""
    assert hear(meeting, "split", 0.2) is None
    later = threading.Timer(0.2, lambda: tell(meeting, "split", "out/here"))
    later.start()
    assert hear(meeting, "split", SOON_S) == "out/here"
    later.join()


def test_what_torch_lacks_is_said(monkeypatch):
    """Some boards have builds of torch without it."""
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    with pytest.raises(ValueError, match="without nccl; use --transport"):
        meet_in_folder("anywhere", gpu="cuda:0")
    monkeypatch.setattr(dist, "is_available", lambda: False)
    with pytest.raises(ValueError, match="use --transport zmq"):
        meet_in_folder("anywhere")


@pytest.mark.skipif(
    torch.cuda.device_count() < 2 or not dist.is_nccl_available(),
    reason="needs two CUDA devices and a torch with nccl",
)
def test_nccl_keeps_hidden_states_on_the_gpu(meeting):
    """Hidden states go from device to device, without a copy on the host."""
    ranks = [
        TorchDistTransport(number, 1, replace(meeting, gpu=f"cuda:{number}")) for number in range(2)
    ]
    try:
        hidden = torch.arange(64.0, device="cuda:0").view(8, 8)
        ranks[0].send(1, AddRequest(request=1, capacity=2, context=3))
        ranks[0].send(1, segment(1, hidden))
        _, message = receive(ranks[1], 2)
        assert message.hidden.device == torch.device("cuda:1")
        assert torch.equal(message.hidden.cpu(), hidden.cpu())
    finally:
        for transport in ranks:
            transport.close()
