"""Control protocol and sockets refuse invalid messages, work both ways, and give reasons."""

import socket
import time

import pytest

from flowspec.cluster.device.report import measure_link
from flowspec.protocol.control import (
    MAX_MESSAGE_BYTES,
    Ask,
    Beat,
    ControlError,
    Echo,
    Hello,
    Turn,
    pack,
    unpack,
)
from flowspec.system.address import Address
from flowspec.transport.control_sockets import (
    NO_HANDSHAKE,
    WRONG_TOKEN,
    ControlClient,
    ControlServer,
    UnreachableError,
    why_unreachable,
)
from flowspec.transport.secure.token import derive_keys, new_token
from tests.support.ipv6 import HAS_IPV6, needs_ipv6

KEYS = derive_keys(new_token())


def test_messages_survive_the_wire():
    """This includes long messages with any text."""
    ask = Ask(version="1", id=3, turns=(Turn(role="user", content="ö\n" * 50_000),), stop=("x",))
    assert unpack(pack(ask)) == ask
    assert unpack(pack(Beat(sent_at=1.5))) == Beat(sent_at=1.5)


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\x80\x04\x95pickle",
        b"[]",
        b'{"kind": "nothing"}',
        b'{"kind": "beat", "sent_at": "soon"}',
        b'{"kind": "beat", "sent_at": -1}',
        b'{"kind": "beat", "sent_at": NaN}',
        b'{"kind": "beat", "sent_at": 1e999}',
        b'{"kind": "beat", "more": 1}',
        b'{"kind": "echo", "reply_bytes": 999999999}',
        b'{"kind": "ask", "version": "1", "id": 1, "turns": []}',
        b'{"kind": "ask", "version": "1", "id": 1, "turns": [{"role": "root", "content": ""}]}',
        b'{"kind": "bye", "why": "' + b"x" * 5000 + b'"}',
        b"x" * (MAX_MESSAGE_BYTES + 1),
        b"[" * 100_000,
        b"\xff\xfe",
    ],
)
def test_what_is_no_message_is_refused(frame):
    """Wrong kinds, types, sizes and keys all raise the same error."""
    with pytest.raises(ControlError):
        unpack(frame)


def test_mutated_messages_are_refused_or_are_messages():
    """Every single byte is changed or left out, and no other exception is raised."""
    frame = pack(Beat(sent_at=12.25, power_w=3.0))
    for at in range(len(frame)):
        for changed in (frame[:at] + frame[at + 1 :], frame[:at] + b"9" + frame[at + 1 :]):
            try:
                unpack(changed)
            except ControlError:
                continue


def test_hello_names_what_is_missing():
    """The author of another client sees why it is refused."""
    with pytest.raises(ControlError, match="hello"):
        unpack(b'{"kind": "hello"}')
    assert Hello.model_fields["protocol"].default >= 1


def receive(server: ControlServer) -> tuple[bytes, bytes]:
    """Return the next message and its peer."""
    end = time.monotonic() + 10.0
    while time.monotonic() < end:
        if messages := server.receive(0.5):
            return messages[0]
    raise AssertionError("nothing came")


def pump(server: ControlServer, client: ControlClient, *, until: float) -> list[bytes]:
    """Echo messages at the server; return what the client gets."""
    end = time.monotonic() + until
    while time.monotonic() < end:
        for peer, message in server.receive(0.02):
            server.send(peer, message)
        if got := client.receive(0.02):
            return got
    return []


def test_long_messages_travel_in_pieces_both_ways():
    """They are longer than what the sockets accept from a stranger."""
    server = ControlServer("127.0.0.1", 0, KEYS)
    client = ControlClient("127.0.0.1", server.port, KEYS)
    try:
        assert client.connect(10.0) == ""
        message = pack(Echo(payload="x" * 200_000))
        client.send(message)
        assert pump(server, client, until=10.0) == [message]
        with pytest.raises(UnreachableError):
            server.send(b"nobody", b"hello")
    finally:
        client.close()
        server.close()


def test_a_wrong_token_and_a_closed_port_are_told_apart():
    """These are the two most common problems."""
    server = ControlServer("127.0.0.1", 0, KEYS)
    stranger = ControlClient("127.0.0.1", server.port, derive_keys(new_token()))
    try:
        assert WRONG_TOKEN in stranger.connect(10.0)
    finally:
        stranger.close()
        server.close()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    late = ControlClient("127.0.0.1", port, KEYS)
    try:
        assert f"refuses port {port}" in late.connect(10.0)
    finally:
        late.close()


def test_a_handshake_that_does_not_end_is_not_the_tokens_fault():
    """The network may break in the middle of it, so trying again may help."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = ControlClient("127.0.0.1", mute.getsockname()[1], KEYS)
        try:
            assert NO_HANDSHAKE in client.connect(0.5)
        finally:
            client.close()


def test_one_broken_handshake_is_tried_again():
    """A head may restart at that moment, although the token is right."""
    with socket.create_server(("127.0.0.1", 0)) as dying:
        port = dying.getsockname()[1]
        client = ControlClient("127.0.0.1", port, KEYS)
        dying.settimeout(10.0)
        dying.accept()[0].close()
    server = ControlServer("127.0.0.1", port, KEYS)
    try:
        assert client.connect(10.0) == ""
    finally:
        client.close()
        server.close()


@pytest.mark.parametrize(
    ("host", "bound", "ways"),
    [
        ("*", "::", ("127.0.0.1", "::1", "localhost")),
        ("::", "::", ("127.0.0.1", "::1")),
        ("::1", "::1", ("::1",)),
        ("0.0.0.0", "0.0.0.0", ("127.0.0.1",)),
        ("localhost", "127.0.0.1", ("127.0.0.1", "localhost")),
    ],
)
def test_a_server_is_there_by_the_families_that_it_listens_at(host, bound, ways):
    """Without a host it listens at both; it knows the address of each peer that has sent."""
    if ":" in bound and not HAS_IPV6:
        pytest.skip("this machine has no ::1")
    server = ControlServer(host, 0, KEYS)
    clients = []
    try:
        assert server.host == bound
        for way in ways:
            clients.append(client := ControlClient(way, server.port, KEYS))
            assert client.connect(10.0) == ""
            client.send(way.encode())
            peer, message = receive(server)
            assert message == way.encode()
            assert server.host_of(peer) == client.host == {"localhost": "127.0.0.1"}.get(way, way)
            server.send(peer, b"back")
            assert client.receive(10.0) == [b"back"]
    finally:
        for client in clients:
            client.close()
        server.close()


@needs_ipv6
def test_the_next_address_of_a_name_is_tried(monkeypatch):
    """A name may have an address at which the head does not listen."""
    server = ControlServer("127.0.0.1", 0, KEYS)
    both = [Address(host, server.port) for host in ("::1", "127.0.0.2", "127.0.0.1")]
    monkeypatch.setattr("flowspec.transport.control_sockets.resolve", lambda host, port: both)
    client = ControlClient("head.test", server.port, KEYS)
    try:
        assert client.connect(10.0) == ""
        assert client.host == "127.0.0.1"
        client.send(b"hello")
        assert receive(server)[1] == b"hello"
    finally:
        client.close()
        server.close()


def test_a_listener_without_an_address_says_what_to_choose():
    """It needs another port if that is taken, or another host if it is not this machine's."""
    server = ControlServer("127.0.0.1", 0, KEYS)
    try:
        with pytest.raises(ValueError, match="another `flowspec serve` running"):
            ControlServer("127.0.0.1", server.port, KEYS)
        with pytest.raises(ValueError, match="a --host that this machine has"):
            ControlServer("2001:db8::1", 0, KEYS)
    finally:
        server.close()


def test_a_name_without_an_address_is_told():
    """The error says what to give instead."""
    assert "no address is known" in why_unreachable("no.such.host.invalid", 7000)


def test_links_are_measured_in_bounded_time(monkeypatch):
    """A head that does not answer leaves zeros."""
    monkeypatch.setattr("flowspec.cluster.device.report._LINK_TIMEOUT_S", 0.05)
    server = ControlServer("127.0.0.1", 0, KEYS)
    client = ControlClient("127.0.0.1", server.port, KEYS)
    try:
        assert client.connect(10.0) == ""
        link = measure_link(client)
        assert (link.latency_s, link.up_bytes_per_s) == (0.0, 0.0)
    finally:
        client.close()
        server.close()
