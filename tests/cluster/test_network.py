"""This machine's addresses come in the order in which others are likely to reach them."""

from pathlib import Path

import pytest

from flowspec.cluster import network
from flowspec.cluster.network import Kind, default_routes, kind_of, order, own_host, reached_at
from flowspec.protocol.control import Interface

ROUTES = """Iface Destination Gateway Flags RefCnt Use Metric Mask MTU Window IRTT
docker0 000011AC 00000000 0001 0 0 0 0000FFFF 0 0 0
wlan0 00000000 0101A8C0 0003 0 0 600 00000000 0 0 0
eth0 00000000 0101A8C0 0003 0 0 100 00000000 0 0 0
eth0 00000000 0101A8C0 0003 0 0 900 00000000 0 0 0
lo 00000000 00000000 0201 0 0 0 00000000 0 0 0
"""
ZEROS = "0" * 32
ROUTES_6 = f"""fd00{"0" * 28} 40 {ZEROS} 00 {ZEROS} 00000100 00000001 00000000 00000001 eth0
{ZEROS} 00 {ZEROS} 00 fe80{"0" * 28} 00000400 00000002 00000000 00000003 wlan0
{ZEROS} 00 {ZEROS} 00 {ZEROS} ffffffff 00000001 00000000 00200200 lo
"""


def at(name: str, address: str) -> Interface:
    """Return an active interface."""
    return Interface(name=name, address=address)


def test_default_routes_are_read(tmp_path: Path) -> None:
    """Each interface has its least metric, without rejecting routes."""
    (tmp_path / "route").write_text(ROUTES)
    assert default_routes(tmp_path) == {("eth0", False): 100, ("wlan0", False): 600}
    (tmp_path / "ipv6_route").write_text(ROUTES_6)
    assert default_routes(tmp_path)[("wlan0", True)] == 0x400
    assert len(default_routes(tmp_path)) == 3
    assert default_routes(tmp_path / "nothing") == {}


def test_the_default_route_comes_first_and_what_is_virtual_last() -> None:
    """This holds for any order of their indices."""
    ordered = [
        at("eth0", "192.168.1.2"),
        at("wlan0", "192.168.1.3"),
        at("wlan0", "fd00::3"),
        at("eth1", "10.0.0.2"),
        at("eth0", "fd00::2"),
        at("eth0", "fe80::2%eth0"),
        at("tailscale0", "100.64.0.1"),
        at("docker0", "172.17.0.1"),
        at("docker0", "fe80::9%docker0"),
        at("lo", "127.0.0.1"),
        at("lo", "::1"),
    ]
    kinds = {"docker0": Kind.VIRTUAL, "tailscale0": Kind.TUNNEL, "lo": Kind.LOOPBACK}
    routes = {
        ("eth0", False): 100,
        ("wlan0", False): 600,
        ("wlan0", True): 50,  # less than IPv4's, which goes first nevertheless
        ("tailscale0", False): 0,  # a VPN that takes all traffic leads to no device here
    }
    for shuffled in (ordered[::-1], sorted(ordered, key=lambda one: one.address)):
        assert [(o.name, o.address) for o in order(shuffled, kinds, routes)] == [
            (o.name, o.address) for o in ordered
        ]


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lo", Kind.LOOPBACK),
        ("eth0", Kind.DIRECT),
        ("bond0", Kind.DIRECT),
        ("br0", Kind.DIRECT),
        ("docker0", Kind.VIRTUAL),
        ("br-0a1b2c3d4e5f", Kind.VIRTUAL),
        ("virbr0", Kind.VIRTUAL),
        ("mybridge", Kind.VIRTUAL),
        ("l4tbr0", Kind.VIRTUAL),
        ("wg0", Kind.TUNNEL),
        ("company-vpn", Kind.TUNNEL),
        ("not-in-sysfs", Kind.DIRECT),
    ],
)
def test_kinds_of_interfaces(tmp_path: Path, name: str, kind: Kind) -> None:
    """A card makes the interfaces on it physical; others are known by type or name."""
    for one in ("eth0", "bond0", "br0", "mybridge", "company-vpn", "l4tbr0", "rndis0"):
        (tmp_path / one).mkdir()
        (tmp_path / one / "type").write_text("65534\n" if one == "company-vpn" else "1\n")
    for card in ("eth0", "rndis0"):
        (tmp_path / card / "device").mkdir()
    for upper, lower in (("bond0", "eth0"), ("br0", "bond0"), ("l4tbr0", "rndis0")):
        (tmp_path / upper / f"lower_{lower}").symlink_to(tmp_path / lower)
    assert kind_of(name, tmp_path) is kind


def test_a_listener_is_reached_at_what_it_listens_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """It has all addresses of the family, or one address under the name that was given."""
    every = [at("eth0", "10.0.0.2"), at("eth0", "fd00::2"), at("eth0", "fe80::2%eth0")]
    every.append(at("lo", "127.0.0.1"))
    monkeypatch.setattr(network, "interfaces", lambda: every)
    assert reached_at("*", "::") == every[:2]
    assert reached_at("0.0.0.0", "0.0.0.0") == every[:1]
    assert reached_at("head.local", "10.0.0.2") == [at("eth0", "head.local")]
    del every[:2]
    assert reached_at("*", "::") == [at("eth0", "fe80::2%eth0")]
    del every[:1]
    assert reached_at("*", "::") == [at("lo", "127.0.0.1")]
    every.clear()
    assert reached_at("*", "0.0.0.0") == [at("lo", "127.0.0.1")]


def test_the_prompt_of_serve_reaches_its_own_head() -> None:
    """This also holds if --host is a single address."""
    assert own_host("192.168.1.2", 7000) == "192.168.1.2"
    assert own_host("::", 7000) == "127.0.0.1"
