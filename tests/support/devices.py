"""A head and devices that join it, as processes over the loopback."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from flowspec.transport.secure.token import new_token
from tests.support.spawned import spawn

CONTEXT = 600  # most tokens of a request; the tiny model allows more
START_S = 120.0  # far more than needed: this machine may be busy


@dataclass
class Processes:
    """A head and devices in a folder of their own."""

    folder: Path
    checkpoint: Path
    token: str
    port: int = 0
    running: dict[str, ForkServerProcess] = field(default_factory=dict)

    def start(self, name: str, *arguments: str) -> None:
        """Start `flowspec ...` with its output in a file."""
        environment = {
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            "FLOWSPEC_TOKEN": self.token,
        }
        log = self.folder / f"{name}.log"
        self.running[name] = spawn(arguments, log, self.folder, environment)

    def serve(self) -> None:
        """Start the head; port 0 the first time, the same port again afterwards."""
        target, eagle = (str(self.checkpoint / name) for name in ("target", "eagle"))
        options = ["--host", "127.0.0.1", "--port", str(self.port), "--layers", "1+1"]
        options += ["--settle", "0.1", "--dead-after", "2", "--reserve-mb", "50"]
        options += ["--context", str(CONTEXT)]
        self.start("head", "serve", target, "--draft", eagle, *options)
        line = self.wait_for("head", r"flowspec join 127\.0\.0\.1:(\d+) --token")
        self.port = int(line[1])

    def join(self, name: str) -> None:
        """Start a device; it replaces one of the same name."""
        self.start(name, "join", f"127.0.0.1:{self.port}", "--name", name, "--threads", "1")

    def log(self, name: str) -> str:
        """Return the output of a process."""
        log = self.folder / f"{name}.log"
        return log.read_text() if log.exists() else ""

    def wait_for(self, name: str, pattern: str, *, count: int = 1) -> re.Match[str]:
        """Wait until the log holds the pattern `count` times; return its last occurrence."""
        end = time.monotonic() + START_S
        while True:
            found = list(re.finditer(pattern, self.log(name)))
            if len(found) >= count:
                return found[-1]
            code = self.running[name].exitcode
            assert code is None, f"{name} ended with {code}:\n{self.log(name)}"
            assert time.monotonic() < end, f"{name} said no {pattern!r}:\n{self.log(name)}"
            time.sleep(0.05)

    def stages(self) -> list[str]:
        """Return the names of the devices that serve, from the head's last line about them."""
        line = self.wait_for("head", r"serving: layers (.*)")
        return [part.split()[0] for part in line[1].split(", ")]

    def close(self) -> None:
        """End all processes."""
        for process in self.running.values():
            process.kill()
            process.join(timeout=10)


@contextmanager
def two_devices(folder: Path, checkpoint: Path) -> Iterator[Processes]:
    """Yield a head and the two devices that it needs, ready to answer."""
    processes = Processes(folder, checkpoint, str(new_token()))
    try:
        processes.serve()
        for name in ("ada", "bob"):
            processes.join(name)
        processes.wait_for("head", r"serving: layers")
        yield processes
    finally:
        processes.close()
