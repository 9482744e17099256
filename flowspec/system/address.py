"""Network addresses: HOST:PORT as people write it, tcp://HOST:PORT as sockets take it.

An IPv6 address stands in brackets where a port follows it: `[fd00::1]:7000`. A link-local one ends
with its zone, the interface by which it is reached: `[fe80::1%eth0]:7000`. A zone is known to its
own machine alone, so whoever receives such an address replaces the zone with its own.
"""

import ipaddress
import re
import socket
from typing import Any, NamedTuple

ALL_INTERFACES = "*"  # IPv4 and IPv6; 0.0.0.0 is IPv4 alone
WILDCARDS = (ALL_INTERFACES, "0.0.0.0", "::")
_NAME = re.compile(r"[^\s/\[\]%@:-][^\s/\[\]%@:]*")
_HOST_AND_PORT = re.compile(r"(?:\[(?P<literal>[^\]]*)\]|(?P<name>[^\[\]:]*))(?::(?P<port>.*))?")
_ZONE = re.compile(r"[^\s/\[\]%:]+")
_FORMS = "write HOST:PORT, as in 192.168.1.10:7000 or [fd00::10]:7000"


class Address(NamedTuple):
    """A host, by name or by number and without brackets, and a port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"{bracketed(self.host)}:{self.port}"

    @property
    def url(self) -> str:
        """As sockets take it."""
        return f"tcp://{self}"


def bracketed(host: str) -> str:
    """The host as it is written before a port."""
    return f"[{host}]" if ":" in host else host


def parse_address(text: str, *, default_port: int) -> Address:
    """`HOST` or `HOST:PORT`, an IPv6 address in brackets. Raises ValueError."""
    stripped = text.strip()
    if is_ipv6(stripped):
        raise ValueError(
            f"{text!r} is no address: an IPv6 address stands in brackets, so that its port can be "
            f"told from it; {_FORMS}"
        )
    host, port = _split(stripped)
    if not host or host == ALL_INTERFACES:
        raise ValueError(f"{text!r} is no address; {_FORMS}")
    if port is None:
        port = str(default_port)
    if not (_is_port(port) and int(port)):
        raise ValueError(f"{text!r} is no address: needed: a port from 1 to 65535; {_FORMS}")
    return Address(_with_zone(host), int(port))


def parse_host(text: str) -> str:
    """A name or an IP address without a port, brackets or none; `*`: all. Raises ValueError."""
    host = text.strip()
    if host == ALL_INTERFACES:
        return host
    if host.startswith("[") and host.endswith("]") and is_ipv6(host[1:-1]):
        host = host[1:-1]
    if not (is_ipv6(host) or _NAME.fullmatch(host)):
        raise ValueError(
            f"{text!r} is no host; write a name or an address without a port, as in 192.168.1.10 "
            "or fd00::10"
        )
    return _with_zone(host)


def parse_url(url: str) -> Address:
    """Host and port of `tcp://HOST:PORT`; ValueError where it is anything else."""
    kind, _, rest = url.partition("://")
    host, port = _split(rest)
    if kind != "tcp" or not host or port is None or not _is_port(port):
        raise ValueError(f"{url!r} is no address; needed: tcp://HOST:PORT")
    return Address(host, int(port))


def is_ipv6(host: str) -> bool:
    """Whether it is an IPv6 address, with or without a zone."""
    address, percent, zone = host.partition("%")
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return not percent or _ZONE.fullmatch(zone) is not None


def is_loopback(host: str) -> bool:
    """Whether it is an address at which a machine reaches itself alone."""
    number = _number(host)
    return host == "localhost" if number is None else number.is_loopback


def is_link_local(host: str) -> bool:
    """Whether it is an IPv6 address that needs a zone."""
    number = _number(host)
    return number is not None and number.version == 6 and number.is_link_local


def zone_of(host: str) -> str:
    """The interface after the %; empty where there is none."""
    return host.partition("%")[2]


def unmapped(host: str) -> str:
    """The IPv4 address of a caller by IPv4 on a socket for both, where it is written as IPv6."""
    number = _number(host)
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return str(mapped) if mapped else host


def as_seen_here(url: str, via: str, zone: str = "") -> str:
    """An address that another machine has told of itself, as this one must write it.

    `via` is how this machine reaches that one, or the head that both belong to: it stands in for
    all interfaces. `zone` (that of `via` by default) takes the place of the zone there. What is no
    address stays: whoever connects to it says so.
    """
    try:
        host, port = parse_url(url)
    except ValueError:
        return url
    if host in WILDCARDS:
        return Address(via, port).url
    if is_link_local(host) and (zone := zone or zone_of(via)):
        return Address(f"{host.partition('%')[0]}%{zone}", port).url
    return url


def resolve(host: str, port: int) -> list[Address]:
    """The addresses of `host` as numbers, the preferred one first. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(numeric(entry[4]) for entry in found))


def numeric(sockaddr: Any) -> Address:
    """What a socket says of either of its ends, with the zone where there is one."""
    host, port, *more = sockaddr
    if len(more) > 1 and more[1]:
        flags = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        host = socket.getnameinfo(sockaddr, flags)[0]
    return Address(str(host), int(port))


def local_address_towards(host: str, port: int) -> str:
    """This machine's own address on the way to `host`; empty where there is no route.

    Nothing is sent: connecting a datagram socket only looks up the route.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
    except OSError:
        return ""
    for family, kind, protocol, _, address in found:
        try:
            with socket.socket(family, kind, protocol) as probe:
                probe.connect(address)
                return numeric(probe.getsockname()).host
        except OSError:
            continue
    return ""


def _split(text: str) -> tuple[str, str | None]:
    """The host, empty where it can be none, and what stands after its colon."""
    found = _HOST_AND_PORT.fullmatch(text)
    if found is None:
        return "", None
    literal, name, port = found["literal"], found["name"], found["port"]
    if literal is not None:
        return (literal if is_ipv6(literal) else ""), port
    return (name if name == ALL_INTERFACES or _NAME.fullmatch(name) else ""), port


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 5 and int(text) < 65536


def _with_zone(host: str) -> str:
    """The host itself. Raises ValueError where a link-local address has no zone, or another one."""
    if zone_of(host) and not is_link_local(host):
        raise ValueError(
            f"{host!r} has a zone, which belongs to link-local addresses (fe80::/10) alone: leave "
            f"out %{zone_of(host)}"
        )
    if is_link_local(host) and not zone_of(host):
        raise ValueError(
            f"{host} is a link-local address, which every interface has of its own: say by which "
            f"one, as in {host}%eth0"
        )
    return host


def _number(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
