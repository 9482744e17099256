"""What serve and join do on made-up networks; test_addresses.py runs this in namespaces.

It prints one JSON object. The first network has no IPv4 at all, not even 127.0.0.1: the head's
interface is lan0, that of one device eth0, of another wlan0, and a switch connects them. The second
is one machine alone, with a Docker bridge that is older than its card, as after an interface was
replaced.
"""

import json
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from flowspec.transport.secure.token import new_token
from tests.stress.netns_cluster import (
    INSIDE,
    enter_and_run,
    new_namespace,
    run_inside,
    tool,
)

ROOT, CHECKPOINT = Path(sys.argv[1]), Path(sys.argv[2])
START_S = 120.0  # far more than needed: this machine may be busy
HEAD, NAME, PORT = "fd00:f1::1", "head.test", 7000
PROMPT = "the quick brown fox"


class Machine:
    """A network namespace and its processes."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.path = f"/proc/{os.getpid()}/fd/{new_namespace()}"
        self.ip("link", "set", "lo", "up")

    def ip(self, *words: str) -> None:
        """Run `ip ...` in it."""
        tool("nsenter", f"--net={self.path}", "ip", *words)

    def start(self, what: str, *arguments: str) -> ForkServerProcess:
        """Start `flowspec ...` in it, with its output in a file."""
        environment = {
            "XDG_CACHE_HOME": str(self.folder / self.name),
            "XDG_STATE_HOME": str(self.folder),
            "FLOWSPEC_TOKEN": TOKEN,
        }
        log = str(self.log(what))
        process = CONTEXT.Process(
            target=enter_and_run, args=(self.path, arguments, log, environment), daemon=True
        )
        process.start()
        return process

    def run(self, *commands: Sequence[str]) -> list[tuple[int | None, str]]:
        """Run `flowspec ...` commands in it at the same time; return exit codes and outputs."""
        names = [f"{number}-{command[0]}" for number, command in enumerate(commands)]
        started = [self.start(name, *one) for name, one in zip(names, commands, strict=True)]
        for process in started:
            process.join(START_S)
        codes = [process.exitcode for process in started]
        return [(code, self.log(n).read_text()) for code, n in zip(codes, names, strict=True)]

    def log(self, what: str) -> Path:
        """Return the log of a command."""
        return self.folder / f"{self.name}-{what}.log"


def wait_for(log: Path, pattern: str, process: ForkServerProcess) -> str:
    """Wait until the log has the pattern."""
    end = time.monotonic() + START_S
    while not (found := re.search(pattern, log.read_text() if log.exists() else "")):
        said = log.read_text() if log.exists() else ""
        assert process.is_alive(), f"{log.name}: ended without {pattern!r}:\n{said}"
        assert time.monotonic() < end, f"{log.name}: no {pattern!r}:\n{said}"
        time.sleep(0.05)
    return found[0]


def ipv6_only(folder: Path) -> dict[str, Machine]:
    """Connect three machines to a switch, with only IPv6 addresses."""
    tool("ip", "link", "set", "lo", "up")
    tool("ip", "link", "add", "switch", "type", "bridge", "mcast_snooping", "0")
    tool("ip", "link", "set", "switch", "up")
    machines = {}
    for number, (name, card) in enumerate((("head", "lan0"), ("ada", "eth0"), ("bob", "wlan0")), 1):
        one = machines[name] = Machine(name, folder)
        tool("ip", "link", "add", f"v{number}", "type", "veth", "peer", "name", card)
        tool("ip", "link", "set", card, "netns", one.path)
        tool("ip", "link", "set", f"v{number}", "master", "switch", "up")
        one.ip("address", "del", "127.0.0.1/8", "dev", "lo")
        one.ip("link", "set", card, "addrgenmode", "none")
        one.ip("link", "set", card, "up")
        for address in (f"fd00:f1::{number}/64", f"fe80::{number}/64"):
            one.ip("address", "add", address, "dev", card, "nodad")
    return machines


def cluster(folder: Path) -> dict[str, object]:
    """Run a head, a device that finds it by mDNS, and one that joins by a link-local address."""
    machines = ipv6_only(folder)
    head, ada, bob = machines.values()
    serving = head.start("serve", "serve", *MODEL, "--port", str(PORT))
    line = wait_for(head.log("serve"), r"flowspec join .*", serving)
    joining = [
        ada.start("join", "join", "--name", "ada", "--threads", "1"),
        bob.start("join", "join", "[fe80::1%wlan0]:7000", "--name", "bob", "--threads", "1"),
    ]
    wait_for(head.log("serve"), r"serving: layers", serving)
    assert all(process.is_alive() for process in joining)
    asked, first = ada.run(
        ["generate", "--head", NAME, "--max-tokens", "12", PROMPT],
        ["doctor", f"[{HEAD}]:{PORT}", "--json"],
    )
    second, status, no_such_interface, closed = bob.run(
        ["doctor", "[fe80::1%wlan0]", "--json"],
        ["status", f"[{HEAD}]", "--json"],
        ["status", "[fe80::1%eth7]:7000"],
        ["status", f"[{HEAD}]:7009"],
    )
    return {
        "line": line,
        "log": head.log("serve").read_text(),
        "generate": asked,
        "doctors": [
            (code, json.loads(said[said.index("[{") :].splitlines()[0]))
            for code, said in (first, second)
        ],
        "status": status,
        "no_such_interface": no_such_interface,
        "closed": closed,
    }


def behind_docker(folder: Path) -> dict[str, object]:
    """Run `serve` on a machine whose card has a higher index than Docker's bridge."""
    box = Machine("box", folder)
    for number, (bridge, address) in enumerate(
        (("docker0", "172.17"), ("br-0a1b2c3d4e5f", "172.18"))
    ):
        box.ip("link", "add", bridge, "type", "bridge")
        box.ip("link", "add", f"veth{number}", "type", "veth", "peer", "name", f"inner{number}")
        box.ip("link", "set", f"veth{number}", "master", bridge, "up")
        box.ip("link", "set", f"inner{number}", "up")
        box.ip("link", "set", bridge, "up")
        box.ip("address", "add", f"{address}.0.1/16", "dev", bridge)
    box.ip("link", "add", "tailscale0", "type", "veth", "peer", "name", "vpn")
    box.ip("link", "add", "eth0", "type", "veth", "peer", "name", "cable")
    for name, address in (("tailscale0", "100.64.0.7/10"), ("eth0", "10.9.0.5/24")):
        box.ip("link", "set", "vpn" if name == "tailscale0" else "cable", "up")
        box.ip("link", "set", name, "up")
        box.ip("address", "add", address, "dev", name)
    box.ip("address", "add", "fd00:9::5/64", "dev", "eth0", "nodad")
    box.ip("route", "add", "default", "via", "10.9.0.1")
    serving = box.start("serve", "serve", *MODEL, "--no-mdns", "--port", str(PORT))
    wait_for(box.log("serve"), r"devices and health", serving)
    both = box.run(["status", "127.0.0.1"], ["status", "[::1]"])
    return {"log": box.log("serve").read_text(), "status": [said for _, said in both]}


if __name__ == "__main__":
    if INSIDE not in os.environ:
        sys.exit(run_inside(sys.orig_argv[1:]))
    TOKEN = str(new_token())
    MODEL = [str(CHECKPOINT / "target"), "--draft", str(CHECKPOINT / "eagle"), "--layers", "1+1"]
    MODEL += ["--settle", "0.1", "--reserve-mb", "50"]
    work = Path(os.environ[INSIDE])
    (work / "hosts").write_text(f"10.255.255.1 {NAME}\n{HEAD} {NAME}\n")
    tool("mount", "--bind", str(work / "hosts"), "/etc/hosts")
    os.environ["OMP_NUM_THREADS"] = "1"  # also so that a device's speed is measured only once
    CONTEXT = multiprocessing.get_context("forkserver")
    CONTEXT.set_forkserver_preload(["flowspec.cli.serve", "flowspec.cli.join", "transformers"])
    os.chdir(work)
    sys.stdout.write(json.dumps({"ipv6": cluster(work), "docker": behind_docker(work)}))
