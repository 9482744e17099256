"""A list of hosts and what to run on each over ssh: one device, one stage.

The token goes through ssh's standard input, never through a command line. Passwords have no place:
ssh is told to ask for none, so that keys must be set up.
"""

import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flowspec.plain_yaml import read_yaml

Word = Annotated[str, Field(min_length=1, max_length=200, pattern=r"^[A-Za-z0-9_.~/:@+-]+$")]
SSH = ("ssh", "-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=15")


class _Plain(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Host(_Plain):
    """One device. What is left out is the file's own default."""

    address: Word  # as ssh reaches it
    user: Word | None = None
    folder: Word | None = None  # of the project there
    device: Word = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0


class Hosts(_Plain):
    """A head and its devices."""

    head: Word  # this machine's address, as the devices reach it
    port: Annotated[int, Field(ge=1, le=65535)] = 7000
    user: Word | None = None
    folder: Word = "flowspec"
    hosts: Annotated[tuple[Host, ...], Field(min_length=1, max_length=256)]

    def command(self, host: Host) -> list[str]:
        """The ssh command that makes `host` a device of the cluster; it reads the token."""
        folder = host.folder or self.folder
        join = [
            *(f"{folder}/.venv/bin/flowspec", "join", f"{self.head}:{self.port}", "--once"),
            *("--name", host.address, "--device", host.device, "--threads", str(host.threads)),
        ]
        # a ~ at the front is the other side's home
        words = [word if word.startswith("~") else shlex.quote(word) for word in join]
        script = f"IFS= read -r FLOWSPEC_TOKEN && export FLOWSPEC_TOKEN && exec {' '.join(words)}"
        user = host.user or self.user
        return [*SSH, f"{user}@{host.address}" if user else host.address, script]


def read_hosts(path: Path) -> Hosts:
    """Raises ValueError naming file and key."""
    content = read_yaml(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold head: and hosts:, as in config/hosts.example.yaml")
    listed = content.get("hosts")
    if isinstance(listed, list):
        whole = [{"address": one} if isinstance(one, str) else one for one in listed]
        content = {**content, "hosts": tuple(whole)}
    try:
        return Hosts.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{path}: {where}: {first['msg']}") from None


def start(hosts: Hosts, token: str, logs: Path) -> list["subprocess.Popen[bytes]"]:
    """One ssh per host, its output in `logs`. Raises ValueError where there is no ssh."""
    logs.mkdir(parents=True, exist_ok=True)
    started = []
    for host in hosts.hosts:
        with (logs / f"{host.address.replace('/', '_')}.log").open("wb") as log:
            try:
                process = subprocess.Popen(
                    hosts.command(host),
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C is this process's to handle
                )
            except FileNotFoundError:
                raise ValueError("there is no ssh here; install openssh-client") from None
        assert process.stdin is not None
        process.stdin.write(f"{token}\n".encode())
        process.stdin.close()
        started.append(process)
    return started


def stop(processes: Sequence["subprocess.Popen[bytes]"], timeout_s: float) -> None:
    """Devices end by themselves when the head has; what is left after the time is ended here."""
    for process in processes:
        try:
            process.wait(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait(timeout=timeout_s)
