"""Finding a head on the local network by mDNS: a convenience; explicit addresses always work.

What is announced is an address and a version, never the token: who finds the head still has to
prove that it knows it.
"""

import contextlib
import ipaddress
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import flowspec

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
    """Announce a head while inside; gives why that is impossible, empty where it is not."""
    from zeroconf import Error as ZeroconfError
    from zeroconf import ServiceInfo, Zeroconf  # here: only who uses mDNS needs it

    info = ServiceInfo(
        SERVICE,
        f"{name}-{port}.{SERVICE}",
        addresses=[ipaddress.IPv4Address(address).packed for address in addresses],
        port=port,
        properties={"version": flowspec.__version__, "model": model},
    )
    try:
        network = Zeroconf(interfaces=list(addresses))
    except OSError as error:
        yield f"mDNS cannot be used here: {error.strerror or error}"
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
    """Heads that answer within the time, by name. Raises ValueError where mDNS cannot be used."""
    from zeroconf import ServiceBrowser, ServiceListener, Zeroconf

    found: dict[str, FoundHead] = {}

    class Listener(ServiceListener):
        """Called by the browser's thread."""

        def add_service(self, zc: Any, type_: str, name: str) -> None:
            """A head has answered."""
            info = zc.get_service_info(type_, name, timeout=int(timeout_s * 1e3))
            addresses = info.parsed_addresses() if info is not None else []
            if addresses:
                model = (info.properties.get(b"model") or b"").decode(errors="replace")
                head = name.removesuffix(f".{SERVICE}")
                found[name] = FoundHead(head, addresses[0], info.port, model)

        update_service = add_service

        def remove_service(self, zc: Any, type_: str, name: str) -> None:
            """A head has left."""
            del zc, type_
            found.pop(name, None)

    try:
        network = Zeroconf()
    except OSError as error:
        raise ValueError(
            f"mDNS cannot be used here ({error.strerror or error}); give the head's HOST:PORT"
        ) from None
    try:
        ServiceBrowser(network, SERVICE, Listener())
        time.sleep(timeout_s)
    finally:
        network.close()
    return sorted(found.values(), key=lambda head: head.name)


def choose_head(heads: Sequence[FoundHead]) -> FoundHead:
    """The only one. Raises ValueError where there is none, or a choice."""
    if not heads:
        raise ValueError(
            "no head was found on this network: mDNS may be filtered, or switched off there; give "
            "its address, as in flowspec join 192.168.1.10:7000"
        )
    if len(heads) > 1:
        list_ = ", ".join(f"{head.host}:{head.port} ({head.model})" for head in heads)
        raise ValueError(f"several heads were found: {list_}; name one of them")
    return heads[0]
