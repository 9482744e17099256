"""Hostile peers against a real process cause a counted log line, and nothing else."""

import ipaddress
import socket
import sys
from collections.abc import Iterator

import pytest

from flowspec.protocol.codec import PROTOCOL_VERSION, encode
from flowspec.protocol.messages import Started
from flowspec.transport.secure import door as door_module  # noqa: E402
from flowspec.transport.secure.door import EVERYBODY, Door  # noqa: E402
from tests.stress.hostile import Stand, judge, stand
from tests.stress.hostile_attacks import MEMBERS, STRANGERS, Target, record_member
from tests.support.ipv6 import needs_ipv6

pytestmark = pytest.mark.slow

SECONDS = 0.4
MAX_GROWTH_MB = 30.0
linux_only = pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux, for addresses of 127.0.0.0/8 and socket filters"
)


@pytest.fixture(scope="module")
def victim() -> Iterator[Stand]:
    """Run one process that all attacks hit in turn."""
    with stand() as made:
        yield made


@linux_only
@pytest.mark.parametrize("attack", [*STRANGERS, *MEMBERS])
def test_an_attack_is_counted_and_nothing_else(victim: Stand, attack: str) -> None:
    """It lives, does not grow and logs a few lines; old and new members are served meanwhile."""
    outcome = victim.suffer(attack, SECONDS, seed=1)
    assert judge(outcome, MAX_GROWTH_MB, SECONDS) == "", outcome


def test_nothing_readable_travels(victim: Stand) -> None:
    """A recorded connection shows no message: neither how they begin nor what they say."""
    port = int(victim.addresses["data"].rpartition(":")[2])
    said = record_member(Target(host="127.0.0.1", port=port, keys=victim.keys))
    assert len(said) > 300
    for readable in (b"FS" + bytes([PROTOCOL_VERSION]), b"started", b"seq_no", b":666"):
        assert any(readable in frame for frame in encode(Started(request=0, seq_no=666)))
        assert readable not in said


def knock(door: Door, source: str) -> bool:
    """Return whether a connection from `source` is let in."""
    with socket.socket(socket.AF_INET6 if ":" in source else socket.AF_INET) as raw:
        raw.settimeout(0.3)
        raw.bind((source, 0))
        try:
            raw.connect(("::1" if ":" in source else "127.0.0.1", door.port))
        except OSError:
            return False
        return True


@linux_only
def test_who_comes_too_often_is_kept_out_and_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel blocks them for a while; members that are connected stay."""
    monkeypatch.setattr(door_module, "MAX_PER_ADDRESS", 2)
    now = [0.0]
    door = Door("127.0.0.1", 0, clock=lambda: now[0])
    inside: list[socket.socket] = []

    def enter(source: str) -> str | None:
        raw = socket.socket()
        raw.bind((source, 0))
        raw.connect((door.host, door.port))
        near, _ = door._socket.accept()
        inside.extend((raw, near))
        return door.entered(near.fileno())

    try:
        assert [enter("127.0.0.5") for _ in range(3)] == [None, None, "127.0.0.5"]
        assert not knock(door, "127.0.0.5")
        assert knock(door, "127.0.0.6")
        inside[0].sendall(b"x")
        assert inside[1].recv(1) == b"x"
        now[0] = door_module.SHUT_S + 1
        door.reopen()
        assert knock(door, "127.0.0.5")
        monkeypatch.setattr(door_module, "MAX_OPEN", 3)
        assert enter("127.0.0.7") == EVERYBODY
        assert not knock(door, "127.0.0.6")
        now[0] += door_module.ALL_SHUT_S
        door.reopen()
        assert knock(door, "127.0.0.6")
    finally:
        for raw in inside:
            raw.close()
        door.close()


@linux_only
@needs_ipv6
@pytest.mark.parametrize("often", ["::1", "127.0.0.5"])
def test_each_family_is_kept_out_by_its_own_addresses(
    monkeypatch: pytest.MonkeyPatch, often: str
) -> None:
    """On one socket for both, the filter finds the whole address in either header."""
    monkeypatch.setattr(door_module, "MAX_PER_ADDRESS", 0)
    door = Door("*", 0)
    near_misses = [str(ipaddress.IPv6Address(1 << 96 | 1)), "::2", "::1:0:0:1", "127.0.1.5"]
    door._shut = dict.fromkeys([*near_misses, *(f"fd00::{k:x}" for k in range(50))], 1e12)
    door._filter()
    raw = socket.socket(socket.AF_INET6 if ":" in often else socket.AF_INET)
    try:
        raw.bind((often, 0))
        raw.connect(("::1" if ":" in often else "127.0.0.1", door.port))
        near, _ = door._socket.accept()
        with near:
            assert door.entered(near.fileno()) == often
        assert not knock(door, often)
        assert knock(door, "127.0.0.6")
        assert knock(door, "::1") is (often != "::1")
    finally:
        raw.close()
        door.close()
