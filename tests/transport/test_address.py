"""Addresses as people write them, as sockets take them, and as other machines report them."""

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.system.address import (
    Address,
    as_seen_here,
    is_ipv6,
    is_link_local,
    is_loopback,
    local_address_towards,
    numeric,
    parse_address,
    parse_host,
    parse_url,
    resolve,
    unmapped,
)


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10.0.0.1", "10.0.0.1", 7),
        (" a.local:80\n", "a.local", 80),
        ("[::1]:7000", "::1", 7000),
        ("[fd00::1]", "fd00::1", 7),
        ("[fe80::1%eth0.10]:65535", "fe80::1%eth0.10", 65535),
    ],
)
def test_addresses_are_read_and_written(text, host, port):
    """A written address can be read again."""
    address = parse_address(text, default_port=7)
    assert address == (host, port)
    assert parse_address(str(address), default_port=7) == address
    assert parse_url(address.url) == address


@pytest.mark.parametrize(
    "text",
    ["", ":80", "a:b", "a:0", "a:99999", "a:1:2", "[::1", "[::1]x7", "[::1]:", "[a]:7", "*:7"]
    + ["-oX:7", "a b:7", "u@h:7", "[::1%]:7", "a:" + "9" * 5000],
)
def test_what_is_no_address_is_refused(text):
    """The error shows both valid forms."""
    with pytest.raises(ValueError, match=r"HOST:PORT, as in 192.168.1.10:7000 or \[fd00::10\]"):
        parse_address(text, default_port=7)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("::1", "in brackets"),
        ("fd00::1:7000", "in brackets"),
        ("[fe80::1]:7", "as in fe80::1%eth0"),
        ("[fd00::2%eth0]:7000", "belong to link-local addresses .* leave out %eth0"),
        ("[::1%lo]", "belong to link-local addresses .* leave out %lo"),
    ],
)
def test_an_ipv6_address_that_is_not_whole_is_told_what_it_lacks(text, words):
    """`fd00::1:7000` would be another address; a link-local one needs an interface."""
    with pytest.raises(ValueError, match=words):
        parse_address(text, default_port=7)


def test_a_host_has_no_port():
    """--host takes names and addresses with or without brackets, and `*`."""
    for text, host in (("::1", "::1"), ("[::1]", "::1"), ("*", "*"), ("a.b", "a.b")):
        assert parse_host(text) == host
    for text in ("[::1]:7", "a:7", "", "-x"):
        with pytest.raises(ValueError, match="is not a host"):
            parse_host(text)
    for text in ("fd00::2%eth0", "[::1%lo]"):
        with pytest.raises(ValueError, match="belong to link-local addresses"):
            parse_host(text)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_a_value_error(text):
    """No other error is raised, and an accepted address is written as it was."""
    try:
        address = parse_address(text, default_port=7)
    except ValueError:
        return
    assert parse_address(str(address), default_port=7) == address


@pytest.mark.parametrize(
    ("url", "seen"),
    [
        ("tcp://0.0.0.0:5", "tcp://[fe80::1%wlan0]:5"),
        ("tcp://[::]:5", "tcp://[fe80::1%wlan0]:5"),
        ("tcp://[fe80::2%eth0]:5", "tcp://[fe80::2%wlan0]:5"),
        ("tcp://[fe80::2]:5", "tcp://[fe80::2%wlan0]:5"),
        ("tcp://[fd00::2]:5", "tcp://[fd00::2]:5"),
        ("tcp://10.0.0.2:5", "tcp://10.0.0.2:5"),
        ("nonsense", "nonsense"),
    ],
)
def test_what_another_machine_says_of_itself_is_translated(url, seen):
    """Its wildcard becomes the address this machine used, its zone becomes this machine's."""
    assert as_seen_here(url, "fe80::1%wlan0") == seen
    assert as_seen_here(url, "fe80::1", "wlan0") == seen.replace("fe80::1%wlan0", "fe80::1")


def test_kinds_of_addresses():
    """Numeric addresses are classified with and without a zone."""
    assert [is_loopback(h) for h in ("127.3.0.1", "::1", "localhost", "10.0.0.1")] == [
        *(True, True, True, False),
    ]
    assert is_link_local("fe80::1%eth0")
    assert not is_link_local("169.254.0.1")  # IPv4's needs no zone
    assert is_ipv6("fe80::1%eth0")
    assert not is_ipv6("fe80::1%")
    assert unmapped("::ffff:10.0.0.1") == "10.0.0.1"
    assert unmapped("fd00::1") == "fd00::1"


def test_sockets_tell_their_addresses():
    """They give numeric addresses, and this machine's own address on the route."""
    assert Address("127.0.0.1", 7) in resolve("127.0.0.1", 7)
    assert local_address_towards("127.0.0.1", 7) == "127.0.0.1"
    assert local_address_towards("no.such.host.invalid", 7) == ""
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert numeric(server.getsockname()) == ("127.0.0.1", server.getsockname()[1])
    assert numeric(("fe80::1", 7, 0, socket.if_nametoindex("lo"))).host == "fe80::1%lo"
