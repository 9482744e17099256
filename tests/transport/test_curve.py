"""Encrypted ZeroMQ joins pieces, reconnects, and reports wrong keys and addresses."""

import logging
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowspec.protocol.codec import WireError
from flowspec.protocol.messages import Segment, Started, WireMessage
from flowspec.request import ClusterError, NodeId
from flowspec.system.address import parse_url
from flowspec.transport import zmq as zmq_sockets
from flowspec.transport.base import LostPeer
from flowspec.transport.secure.curve import MAX_PIECE_BYTES, WRONG_KEY
from flowspec.transport.secure.pieces import cut, join
from flowspec.transport.secure.tally import Tally
from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.transport.zmq import ZmqTransport

KEYS = derive_keys(new_token())
SOON_S = 10.0


def free(rank: int) -> dict[int, dict[str, str]]:
    """Return a rank at any free ports."""
    return {rank: {"control": "tcp://127.0.0.1:0", "data": "tcp://127.0.0.1:0"}}


def receive(transport: ZmqTransport) -> WireMessage:
    """Return the next message."""
    end = time.monotonic() + SOON_S
    while time.monotonic() < end:
        if messages := transport.receive(0.1):
            return messages[0]
    raise AssertionError("no message came")


@given(st.lists(st.binary(max_size=40), min_size=1, max_size=8), st.integers(1, 50))
def test_pieces_add_up(frames: list[bytes], piece_bytes: int) -> None:
    """Joining undoes cutting, and no piece is longer than allowed."""
    pieces = cut(frames, piece_bytes)
    assert all(len(piece) <= piece_bytes for piece in pieces[1:])
    assert [bytes(frame) for frame in join(pieces)] == frames


@given(st.lists(st.binary(max_size=24), min_size=1, max_size=6))
def test_pieces_of_anything_else_are_refused(pieces: list[bytes]) -> None:
    """Joining gives frames that are cut the same way again, or a WireError."""
    try:
        frames = join(pieces)
    except WireError:
        return
    assert b"".join(frames) == b"".join(pieces[1:])


def test_long_segments_pass_the_limit_of_a_frame() -> None:
    """Hidden states of any size travel in pieces; a rank at any free ports knows its ports."""
    stage = ZmqTransport(1, free(1), KEYS)
    head = ZmqTransport(0, {**free(0), 1: stage.bound}, KEYS)
    try:
        nodes = tuple(NodeId(k) for k in range(64))
        hidden = torch.randn(64, 4096)
        assert hidden.nbytes > 10 * MAX_PIECE_BYTES
        head.send(
            1, Segment(request=1, seq_no=1, nodes=nodes, parents=nodes, tokens=nodes, hidden=hidden)
        )
        message = receive(stage)
        assert isinstance(message, Segment)
        assert message.hidden is not None
        assert torch.equal(message.hidden, hidden)
    finally:
        head.close()
        stage.close()


def test_a_connection_that_breaks_is_told_to_the_sender() -> None:
    """Messages in flight are lost even if the peer is back, so nobody may wait for them."""
    stage = ZmqTransport(1, free(1), KEYS)
    book = {1: stage.bound}
    head = ZmqTransport(0, {**free(0), **book}, KEYS)
    try:
        head.send(1, Started(request=1, seq_no=1))
        receive(stage)
        stage.close()
        stage = ZmqTransport(1, book, KEYS)
        with pytest.raises(LostPeer, match="stage 1: connection lost: it broke"):
            receive(head)
    finally:
        head.close()
        stage.close()


def test_a_peer_that_is_not_there_yet_is_waited_for() -> None:
    """No connection has broken: messages arrive once somebody listens."""
    stage = ZmqTransport(1, free(1), KEYS)
    book = {1: stage.bound}
    stage.close()
    head = ZmqTransport(0, {**free(0), **book}, KEYS)
    try:
        head.send(1, Started(request=1, seq_no=1))
        assert not head.receive(0.5)
        stage = ZmqTransport(1, book, KEYS)
        assert isinstance(receive(stage), Started)
        assert not head.receive(0.1)
    finally:
        head.close()
        stage.close()


def test_an_address_in_use_is_told() -> None:
    """The error is one sentence, whatever was set up before."""
    stage = ZmqTransport(1, free(1), KEYS)
    try:
        with pytest.raises(ValueError, match="stage 2 cannot listen at tcp://127.0.0.1"):
            ZmqTransport(2, {2: stage.bound}, KEYS)
    finally:
        stage.close()


def send_many(transport: ZmqTransport) -> None:
    """Send more than a queue holds."""
    for seq_no in range(100):
        transport.send(1, Started(request=1, seq_no=seq_no))


def test_a_wrong_token_ends_in_an_error_and_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The caller's wait is bounded, and the listener counts one reason."""
    monkeypatch.setattr(zmq_sockets, "SEND_TIMEOUT_MS", 200)
    monkeypatch.setattr(zmq_sockets, "MAX_QUEUED_MESSAGES", 10)
    monkeypatch.setattr(zmq_sockets, "LINGER_MS", 0)
    stage = ZmqTransport(1, free(1), KEYS)
    head = ZmqTransport(0, {**free(0), 1: stage.bound}, derive_keys(new_token()))
    try:
        with pytest.raises(ClusterError, match="stage 1: took no Started"):
            send_many(head)
        end = time.monotonic() + SOON_S
        while WRONG_KEY not in stage.refusals() and time.monotonic() < end:
            assert not stage.receive(0.1)
        assert stage.refusals()[WRONG_KEY] > 0
    finally:
        head.close()
        stage.close()


@pytest.mark.parametrize("address", ["ipc:///tmp/x", "tcp://host", "tcp://:1", "tcp://h:99999", ""])
def test_what_is_no_address_is_told(address: str) -> None:
    """The error comes before a socket is made."""
    with pytest.raises(ValueError, match="is not an address; needed: tcp://HOST:PORT"):
        parse_url(address)


def test_a_flood_is_one_line_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """The first refusal of a kind is logged, then sums."""
    tally = Tally(logging.getLogger("test"), "port")
    with caplog.at_level(logging.WARNING):
        for number in range(1000):
            tally.add("a", f"from {number}")
        tally.add("b", "from 7")
    assert [record.getMessage() for record in caplog.records] == [
        "port: a, 1 new, 1 in all; the last: from 0",
        "port: b, 1 new, 1 in all; the last: from 7",
    ]
    assert tally.counts() == {"a": 1000, "b": 1}
