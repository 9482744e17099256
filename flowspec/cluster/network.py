"""This machine's addresses, ordered by how likely other devices can reach them."""

import ipaddress
import re
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from pathlib import Path

from flowspec.protocol.control import Interface
from flowspec.system.address import (
    WILDCARDS,
    is_ipv6,
    is_link_local,
    is_loopback,
    local_address_towards,
)

MAX_INTERFACES = 32
_LOOPBACKS = ("127.0.0.1", "::1")
_SYSFS, _PROC = Path("/sys/class/net"), Path("/proc/net")
# l4tbr0 is the USB network of a Jetson board: the same address on every board
_VIRTUAL = re.compile(
    r"docker|br-[0-9a-f]{8}|virbr|veth|vnet|vmnet|vboxnet|cni|flannel|cali|cilium|podman|lxc|lxd"
    r"|incus|kube|weave|dummy|ifb|l4tbr"
)
_TUNNEL = re.compile(r"tailscale|wg|tun|tap|zt|ppp|ipsec|utun|nordlynx")
_TUNNEL_TYPES = ("512", "768", "769", "776", "778", "65534")  # PPP, IP in IP, SIT, GRE, none
_ROUTE_REJECTS = 0x0200
_TEMPORARY, _DAD_FAILED, _DEPRECATED = 0x01, 0x08, 0x20  # flags of an IPv6 address


class Kind(IntEnum):
    """The kind of an interface; a lower one more likely leads to other devices."""

    DEFAULT = 0  # the default route uses it
    DIRECT = 1  # a card, or a bond, VLAN or bridge over one
    TUNNEL = 2  # a VPN
    VIRTUAL = 3  # of containers and virtual machines on this machine
    LOOPBACK = 4


def interfaces() -> list[Interface]:
    """Return the addresses of active interfaces, those that others most likely reach first."""
    found = list(_addresses())
    names = {one.name for one in found}
    return order(found, {name: kind_of(name) for name in names}, default_routes())[:MAX_INTERFACES]


def order(
    found: Sequence[Interface],
    kinds: Mapping[str, Kind],
    routes: Mapping[tuple[str, bool], int],
) -> list[Interface]:
    """Sort by kind, then by the metric of the default route: IPv4 before IPv6, link-local last.

    `routes` has the metric of the default route by interface and whether it is IPv6's.
    """

    def key(one: Interface) -> tuple[int, int, bool, bool]:
        kind = kinds.get(one.name, Kind.DIRECT)
        if is_loopback(one.address):
            kind = Kind.LOOPBACK
        elif (one.name, is_ipv6(one.address)) in routes and kind is not Kind.TUNNEL:
            kind = Kind.DEFAULT
        # an interface has one place for both families: IPv4's if it has both
        metric = routes.get((one.name, False), routes.get((one.name, True), 0))
        return kind, metric, is_link_local(one.address), is_ipv6(one.address)

    return sorted(found, key=key)


def reached_at(host: str, bound: str) -> list[Interface]:
    """Return the addresses that reach a process listening at `bound`, the likeliest first.

    `host` is what the user asked for, which may be the name of `bound`. Loopback and link-local
    addresses are returned only if there are no others.
    """
    every = interfaces()
    if bound not in WILDCARDS:
        name = next((one.name for one in every if one.address == bound), "")
        return [Interface(name=name, address=host)]
    usable = [one for one in every if bound != "0.0.0.0" or not is_ipv6(one.address)]
    outside = [one for one in usable if not is_loopback(one.address)]
    routed = [one for one in outside if not is_link_local(one.address)]
    return routed or outside or usable or [Interface(name="lo", address=own_host(bound, 0))]


def own_host(bound: str, port: int) -> str:
    """Return the address at which this machine itself reaches a process listening at `bound`."""
    if bound not in WILDCARDS:
        return bound
    return next((h for h in _LOOPBACKS if local_address_towards(h, port)), _LOOPBACKS[0])


def kind_of(name: str, sysfs: Path = _SYSFS) -> Kind:
    """Return an interface's kind, from the kernel's data and from common name patterns."""
    if name == "lo":
        return Kind.LOOPBACK
    if _VIRTUAL.match(name):
        return Kind.VIRTUAL
    about = sysfs / name
    if _TUNNEL.match(name) or _read(about / "type").strip() in _TUNNEL_TYPES:
        return Kind.TUNNEL
    return Kind.DIRECT if not about.exists() or _is_physical(about) else Kind.VIRTUAL


def default_routes(proc: Path = _PROC) -> dict[tuple[str, bool], int]:
    """Return the metric of the default route by interface and whether it is IPv6's."""
    found: dict[tuple[str, bool], int] = {}
    for line in _read(proc / "route").splitlines()[1:]:
        name, target, _, flags, _, _, metric, mask, *_ = line.split()
        if int(target, 16) == int(mask, 16) == 0 and not int(flags, 16) & _ROUTE_REJECTS:
            _keep_least(found, (name, False), int(metric))
    for line in _read(proc / "ipv6_route").splitlines():
        target, length, _, _, _, metric, _, _, flags, name = line.split()
        if int(target, 16) == int(length, 16) == 0 and not int(flags, 16) & _ROUTE_REJECTS:
            _keep_least(found, (name, True), int(metric, 16))
    return found


def _addresses() -> Iterator[Interface]:
    """Yield the active interfaces, without expired IPv6 addresses; temporary ones come last."""
    import psutil

    states, flags = psutil.net_if_stats(), _ipv6_flags()
    temporary = []
    for name, addresses in psutil.net_if_addrs().items():
        state = states.get(name)
        if state is None or not state.isup:
            continue
        rate = state.speed if 0 < state.speed < 1_000_000 else 0
        for address in addresses:
            if address.family.name not in ("AF_INET", "AF_INET6"):
                continue
            one = Interface(name=name, address=address.address, rate_mbps=rate)
            flag = flags.get(one.address.partition("%")[0], 0)
            if flag & _TEMPORARY:
                temporary.append(one)
            elif not flag & (_DAD_FAILED | _DEPRECATED):
                yield one
    yield from temporary


def _ipv6_flags(proc: Path = _PROC) -> dict[str, int]:
    """Return the kernel's flags of each IPv6 address."""
    found = {}
    for line in _read(proc / "if_inet6").splitlines():
        number, _, _, _, flags, _ = line.split()
        found[str(ipaddress.IPv6Address(int(number, 16)))] = int(flags, 16)
    return found


def _is_physical(about: Path) -> bool:
    """Whether a card is behind the interface that sysfs describes at `about`."""
    if (about / "device").exists():
        return True
    return any(_is_physical(lower.resolve()) for lower in about.glob("lower_*"))


def _keep_least(found: dict[tuple[str, bool], int], key: tuple[str, bool], metric: int) -> None:
    found[key] = min(metric, found.get(key, metric))


def _read(file: Path) -> str:
    """Return the content; empty if there is none, as on systems other than Linux."""
    try:
        return file.read_text()
    except OSError:
        return ""
