"""Finds a head on the local network by mDNS; explicit addresses always work.

The head announces an address and a version, never the token: a device that finds the head must
still prove that it knows the token.
"""

import contextlib
import ipaddress
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flowspec
from flowspec.cluster.network import interfaces
from flowspec.system.address import Address, is_link_local, local_address_towards

SERVICE = "_flowspec._tcp.local."
BROWSE_S = 3.0


@dataclass(frozen=True, slots=True)
class FoundHead:
    """A head that has announced itself."""

    name: str
    host: str
    port: int
    model: str


@contextlib.contextmanager
def announced(name: str, addresses: Sequence[str], port: int, model: str) -> Iterator[str]:
    """Announce a head inside the block; yield why that is impossible, or an empty text."""
    from zeroconf import Error as ZeroconfError
    from zeroconf import ServiceInfo, Zeroconf  # imported here: only users of mDNS need it

    info = ServiceInfo(
        SERVICE,
        f"{name}-{port}.{SERVICE}",
        addresses=[ipaddress.ip_address(a.partition("%")[0]).packed for a in addresses],
        port=port,
        properties={"version": flowspec.__version__, "model": model},
    )
    try:
        network = Zeroconf(interfaces=list(addresses))
    except (OSError, RuntimeError) as error:  # RuntimeError when an address has just gone
        yield f"mDNS cannot be used here: {getattr(error, 'strerror', None) or error}"
        return
    why = ""
    try:
        network.register_service(info)
    except (ZeroconfError, OSError) as error:
        why = f"mDNS cannot be used here: {error}"
    try:
        yield why
    finally:
        with contextlib.suppress(ZeroconfError, OSError):
            network.unregister_service(info)
        network.close()


def find_heads(timeout_s: float = BROWSE_S) -> list[FoundHead]:
    """Return the heads that answer in time, by name. Raises ValueError when mDNS cannot be used."""
    from zeroconf import ServiceBrowser, ServiceListener, Zeroconf

    found: dict[str, FoundHead] = {}

    class Listener(ServiceListener):
        """Receives the events of the browser's thread."""

        def add_service(self, zc: Any, type_: str, name: str) -> None:
            """Add a head that has answered."""
            info = zc.get_service_info(type_, name, timeout=int(timeout_s * 1e3))
            if info is None:
                return
            host = choose_host(info.parsed_scoped_addresses(), info.port)
            if host:
                model = (info.properties.get(b"model") or b"").decode(errors="replace")
                head = name.removesuffix(f".{SERVICE}")
                found[name] = FoundHead(head, host, info.port, model)

        update_service = add_service

        def remove_service(self, zc: Any, type_: str, name: str) -> None:
            """Remove a head that has left."""
            del zc, type_
            found.pop(name, None)

    own = [one.address for one in interfaces()]
    if not own:
        raise ValueError("mDNS cannot be used here (no interface is up): connect to a network")
    try:
        network = Zeroconf(interfaces=own)
    except (OSError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"mDNS cannot be used here ({why}); give the head's HOST:PORT") from None
    try:
        ServiceBrowser(network, SERVICE, Listener())
        time.sleep(timeout_s)
    finally:
        network.close()
    return sorted(found.values(), key=lambda head: head.name)


def choose_host(addresses: Sequence[str], port: int) -> str:
    """Return the first of a head's addresses that this device has a route to; empty if none.

    Link-local addresses come last: they reach no further than one cable.
    """
    ordered = sorted(addresses, key=is_link_local)
    return next((host for host in ordered if local_address_towards(host, port)), "")


def choose_head(heads: Sequence[FoundHead]) -> FoundHead:
    """Return the only head. Raises ValueError when there is none, or more than one."""
    if not heads:
        raise ValueError(
            "no head was found on this network: mDNS may be filtered, or switched off there; give "
            "its address, as in flowspec join 192.168.1.10:7000"
        )
    if len(heads) > 1:
        list_ = ", ".join(f"{Address(head.host, head.port)} ({head.model})" for head in heads)
        raise ValueError(f"several heads were found: {list_}; name one of them")
    return heads[0]
