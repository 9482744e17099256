"""A list of hosts, and the ssh command that makes each one a device of the cluster.

The token goes through ssh's standard input, never through a command line. ssh is told not to ask
for passwords, so keys must be set up.
"""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    model_validator,
)

from flowspec.config import read_yaml
from flowspec.system.address import Address, is_ipv6, parse_address, parse_host
from flowspec.system.bundled import find_bundled

# none begins with a dash, which ssh would take as an option
Word = Annotated[
    str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.~/:@+][A-Za-z0-9_.~/:@+-]*$")
]
Place = Annotated[
    str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.:\[][A-Za-z0-9_.:@%+\[\]-]*$")
]
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Host(_Plain):
    """One device; missing fields use the file's defaults."""

    address: Place  # [USER@]HOST[:PORT] as ssh reaches it; an IPv6 address with a port in brackets
    user: Word | None = None
    folder: Word | None = None  # of the project on that host
    device: Word = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0

    @property
    def name(self) -> str:
        """Return its host alone, by name or by number."""
        return self._where().host

    def destination(self, user: str | None) -> list[str]:
        """Return ssh's arguments for it; `user` applies if the entry names none."""
        host, port = self._where()
        own, _, _ = self.address.rpartition("@")
        user = own or self.user or user
        words = ["-p", str(port)] if port else []
        return [*words, f"{user}@{host}" if user else host]

    @model_validator(mode="after")
    def _check(self) -> "Host":
        self._where()
        return self

    def _where(self) -> Address:
        """Return host and port; port 0 leaves it to ssh. Raises ValueError."""
        _, _, place = self.address.rpartition("@")
        if is_ipv6(place) or ":" not in place.rpartition("]")[2]:
            return Address(parse_host(place), 0)
        return parse_address(place, default_port=0)


class Hosts(_Plain):
    """A head and its devices."""

    head: Annotated[Place, AfterValidator(parse_host)]  # address of this machine for the devices
    port: Annotated[int, Field(ge=1, le=65535)] = 7000
    user: Word | None = None
    folder: Word = "flowspec"
    hosts: Annotated[tuple[Host, ...], Field(min_length=1, max_length=256)]

    def command(self, host: Host) -> list[str]:
        """Return the ssh command that makes `host` a device of the cluster; it reads the token."""
        folder = host.folder or self.folder
        join = [
            *(f"{folder}/.venv/bin/flowspec", "join", str(Address(self.head, self.port)), "--once"),
            *("--name", host.name, "--device", host.device, "--threads", str(host.threads)),
        ]
        # a leading ~ is the home folder on that host
        words = [word if word.startswith("~") else shlex.quote(word) for word in join]
        script = f"IFS= read -r FLOWSPEC_TOKEN && export FLOWSPEC_TOKEN && exec {' '.join(words)}"
        return [*SSH, *host.destination(self.user), script]


def read_hosts(path: Path) -> Hosts:
    """Read and check the file. Raises ValueError that names file and key."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        example = find_bundled("config/hosts.example.yaml")
        raise ValueError(f"{path} must hold head: and hosts:, as in {example}")
    listed = content.get("hosts")
    if isinstance(listed, list):
        whole = [{"address": one} if isinstance(one, str) else one for one in listed]
        content = {**content, "hosts": tuple(whole)}
    try:
        return Hosts.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        why = first["msg"].removeprefix("Value error, ")
        raise ValueError(f"{path}: {where}: {why}") from None


def start(hosts: Hosts, token: str, logs: Path) -> list["subprocess.Popen[bytes]"]:
    """Start one ssh per host, its output in `logs`. Raises ValueError when ssh is missing."""
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for host in hosts.hosts:
        with (logs / f"{host.name}.log").open("wb") as log:
            try:
                process = subprocess.Popen(
                    hosts.command(host),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # only this process handles Ctrl-C
                )
            except FileNotFoundError:
                raise ValueError("ssh is not installed here; install openssh-client") from None
        assert process.stdin is not None
        process.stdin.write(f"{token}\n".encode())
        process.stdin.close()
        started.append(process)
    return started


def stop(processes: Sequence["subprocess.Popen[bytes]"], timeout_s: float) -> None:
    """Wait until the devices end, as they do after the head; kill the rest after the time."""
    for process in processes:
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(timeout=timeout_s)
