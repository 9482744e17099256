"""Control protocol and sockets: what is no message is refused, both ways work, reasons are told."""

import socket
import time

import pytest

from flowspec.cluster.device import measure_link
from flowspec.cluster.messages import (
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
from flowspec.cluster.token import derive_keys, new_token
from flowspec.transport.control import (
    NO_HANDSHAKE,
    WRONG_TOKEN,
    ControlClient,
    ControlServer,
    UnreachableError,
    parse_address,
    why_unreachable,
)

KEYS = derive_keys(new_token())


def test_messages_survive_the_wire():
    """Also long ones with any text."""
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
    """Wrong kinds, types, sizes, keys: one error, whatever it was."""
    with pytest.raises(ControlError):
        unpack(frame)


def test_mutated_messages_are_refused_or_are_messages():
    """Every single byte changed or left out: no other exception."""
    frame = pack(Beat(sent_at=12.25, power_w=3.0))
    for at in range(len(frame)):
        for changed in (frame[:at] + frame[at + 1 :], frame[:at] + b"9" + frame[at + 1 :]):
            try:
                unpack(changed)
            except ControlError:
                continue


def test_hello_names_what_is_missing():
    """Whoever writes another client sees why it is not let in."""
    with pytest.raises(ControlError, match="hello"):
        unpack(b'{"kind": "hello"}')
    assert Hello.model_fields["protocol"].default >= 1


def pump(server: ControlServer, client: ControlClient, *, until: float) -> list[bytes]:
    """Echo what comes to the server; what the client gets."""
    end = time.monotonic() + until
    while time.monotonic() < end:
        for peer, message in server.receive(0.02):
            server.send(peer, message)
        if got := client.receive(0.02):
            return got
    return []


def test_long_messages_travel_in_pieces_both_ways():
    """Longer than what the sockets take from a stranger."""
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
    """The two things that go wrong most."""
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
    """A network that breaks up in the middle of it: trying again may help."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        client = ControlClient("127.0.0.1", mute.getsockname()[1], KEYS)
        try:
            assert NO_HANDSHAKE in client.connect(0.5)
        finally:
            client.close()


def test_one_broken_handshake_is_tried_again():
    """A head that is restarted at that moment; the token is right."""
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


def test_addresses_and_reasons():
    """Typing errors and names without an address."""
    assert parse_address("10.0.0.1", default_port=7) == ("10.0.0.1", 7)
    assert parse_address("a.local:80", default_port=7) == ("a.local", 80)
    for wrong in ("", ":80", "a:b", "a:0", "a:99999", "::1"):
        with pytest.raises(ValueError, match="HOST:PORT"):
            parse_address(wrong, default_port=7)
    assert "no address is known" in why_unreachable("no.such.host.invalid", 7000)


def test_links_are_measured_in_bounded_time(monkeypatch):
    """A head that does not answer leaves zeros."""
    monkeypatch.setattr("flowspec.cluster.device._LINK_TIMEOUT_S", 0.05)
    server = ControlServer("127.0.0.1", 0, KEYS)
    client = ControlClient("127.0.0.1", server.port, KEYS)
    try:
        assert client.connect(10.0) == ""
        link = measure_link(client)
        assert (link.latency_s, link.up_bytes_per_s) == (0.0, 0.0)
    finally:
        client.close()
        server.close()
