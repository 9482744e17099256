"""Network addresses: people write HOST:PORT, sockets take tcp://HOST:PORT.

An IPv6 address stands in brackets before a port: `[fd00::1]:7000`. A link-local address ends with
its zone, the interface that reaches it: `[fe80::1%eth0]:7000`. Only the machine itself knows its
zones, so the receiver of such an address replaces the zone with its own.
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
        """The address as tcp://HOST:PORT."""
        return f"tcp://{self}"


def bracketed(host: str) -> str:
    """Return the host as it is written before a port."""
    return f"[{host}]" if ":" in host else host


def parse_address(text: str, *, default_port: int) -> Address:
    """Parse `HOST` or `HOST:PORT`, an IPv6 address in brackets. Raises ValueError."""
    stripped = text.strip()
    if is_ipv6(stripped):
        raise ValueError(
            f"{text!r} is not an address: put an IPv6 address in brackets, so that its port can be "
            f"told from it; {_FORMS}"
        )
    host, port = _split(stripped)
    if not host or host == ALL_INTERFACES:
        raise ValueError(f"{text!r} is not an address; {_FORMS}")
    if port is None:
        port = str(default_port)
    if not (_is_port(port) and int(port)):
        raise ValueError(f"{text!r} is not an address: the port must be from 1 to 65535; {_FORMS}")
    return Address(_with_zone(host), int(port))


def parse_host(text: str) -> str:
    """Parse a host name or IP address without port; `*` means all interfaces. Raises ValueError."""
    host = text.strip()
    if host == ALL_INTERFACES:
        return host
    if host.startswith("[") and host.endswith("]") and is_ipv6(host[1:-1]):
        host = host[1:-1]
    if not (is_ipv6(host) or _NAME.fullmatch(host)):
        raise ValueError(
            f"{text!r} is not a host; write a name or address without a port, as in 192.168.1.10 "
            "or fd00::10"
        )
    return _with_zone(host)


def parse_url(url: str) -> Address:
    """Parse `tcp://HOST:PORT`. Raises ValueError for any other text."""
    kind, _, rest = url.partition("://")
    host, port = _split(rest)
    if kind != "tcp" or not host or port is None or not _is_port(port):
        raise ValueError(f"{url!r} is not an address; needed: tcp://HOST:PORT")
    return Address(host, int(port))


def is_ipv6(host: str) -> bool:
    """Whether the host is an IPv6 address, with or without a zone."""
    address, percent, zone = host.partition("%")
    try:
        ipaddress.IPv6Address(address)
    except ValueError:
        return False
    return not percent or _ZONE.fullmatch(zone) is not None


def is_loopback(host: str) -> bool:
    """Whether a machine reaches only itself at this address."""
    number = _number(host)
    return host == "localhost" if number is None else number.is_loopback


def is_link_local(host: str) -> bool:
    """Whether the host is an IPv6 address that needs a zone."""
    number = _number(host)
    return number is not None and number.version == 6 and number.is_link_local


def zone_of(host: str) -> str:
    """Return the interface after the %; empty when there is none."""
    return host.partition("%")[2]


def unmapped(host: str) -> str:
    """Return an IPv4-mapped IPv6 address as IPv4; other addresses are returned as given."""
    number = _number(host)
    mapped = number.ipv4_mapped if isinstance(number, ipaddress.IPv6Address) else None
    return str(mapped) if mapped else host


def as_seen_here(url: str, via: str, zone: str = "") -> str:
    """Rewrite an address that another machine reported, so that this machine can use it.

    `via` is the address at which this machine reaches the other one, or the head that both belong
    to; it replaces "all interfaces". `zone` (default: that of `via`) replaces the zone of the other
    machine. Text that is not an address is returned unchanged: connecting to it raises the error.
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
    """Return the numeric addresses of `host`, the preferred one first. Raises OSError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(numeric(entry[4]) for entry in found))


def numeric(sockaddr: Any) -> Address:
    """Return one end of a socket as an address, with its zone if it has one."""
    host, port, *more = sockaddr
    if len(more) > 1 and more[1]:
        flags = socket.NI_NUMERICHOST | socket.NI_NUMERICSERV
        host = socket.getnameinfo(sockaddr, flags)[0]
    return Address(str(host), int(port))


def local_address_towards(host: str, port: int) -> str:
    """Return this machine's own address on the route to `host`; empty when there is no route.

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
    """Return the host (empty if it is not one) and the text after its colon."""
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
    """Return the host. Raises ValueError for a link-local address without zone or a wrong zone."""
    if zone_of(host) and not is_link_local(host):
        raise ValueError(
            f"{host!r} has a zone, but zones belong to link-local addresses (fe80::/10): leave "
            f"out %{zone_of(host)}"
        )
    if is_link_local(host) and not zone_of(host):
        raise ValueError(
            f"{host} is a link-local address, which belongs to one interface: name the interface, "
            f"as in {host}%eth0"
        )
    return host


def _number(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None
