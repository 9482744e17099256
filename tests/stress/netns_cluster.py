"""A cluster of `flowspec serve` and `flowspec join` in network namespaces, and faults on it.

benchmarks/cluster.py uses it. The script runs in its own namespaces for network, mounts and
processes (`run_inside`): whenever it ends, the kernel ends all processes in them and removes all
links. Every device is in a network namespace behind a veth pair, shaped by `tc tbf` in both
directions, and all pairs end in one bridge. The faults:

    kill        SIGKILL
    stop        SIGSTOP: the process hangs, its sockets stay open
    link down   the cable: the bridge's end of the pair goes down
    half-open   the bridge forwards nothing any more; links are up and nobody is notified
"""

import ctypes
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

import psutil

from flowspec.engine.remote import RemoteEngine
from flowspec.protocol.control import ClusterStatus
from flowspec.request import ClusterError
from flowspec.transport.secure.token import derive_keys, new_token, write_token
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("kill", "stop", "link down", "half-open")
CLONE_NEWNET = 0x40000000
INSIDE = "FLOWSPEC_NETNS_INSIDE"
BRIDGE, SUBNET, HEAD_ADDRESS, PORT = "fs-bridge", "10.213.0", "10.213.0.1", 7000
START_S = 120.0  # far more than needed: the machine may be busy
POLL_S = 0.02
NO_END_TOKEN = 3  # never sampled, so answers have the requested length
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["flowspec.cli.serve", "flowspec.cli.join", "transformers"])


def missing() -> str:
    """Return why namespaces are not possible here; empty if they are."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    lacking = [name for name in ("ip", "tc", "unshare", "nsenter") if not shutil.which(name)]
    if lacking:
        return f"network namespaces need {', '.join(lacking)}; install iproute2 and util-linux"
    probe = [
        "unshare",
        "--net",
        "--mount",
        "--pid",
        "--fork",
        "ip",
        "link",
        "add",
        "type",
        "bridge",
    ]
    done = subprocess.run(probe, capture_output=True, text=True, check=False)
    return f"no namespaces here: {done.stderr.strip()}" if done.returncode else ""


def run_inside(arguments: Sequence[str]) -> int:
    """Run this script again in its own namespaces and temporary folder; return its exit code."""

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        raise SystemExit(128 + number)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, end)
    with tempfile.TemporaryDirectory(prefix="flowspec-netns-") as folder:
        command = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        command += [sys.executable, *arguments]
        child = subprocess.Popen(command, env={**os.environ, INSIDE: folder})
        try:
            return child.wait()
        finally:
            child.kill()
            child.wait()


def new_namespace() -> int:
    """Make a network namespace that lives as long as the returned descriptor."""
    made: list[int] = []

    def make() -> None:
        if not ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
            made.append(os.open("/proc/thread-self/ns/net", os.O_RDONLY))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if not made:
        raise OSError("a network namespace could not be made")
    return made[0]


def tool(*command: str) -> None:
    """Run a command. Raises RuntimeError with its output if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")


def enter_and_run(
    namespace: str, arguments: Sequence[str], log: str, environment: Mapping[str, str]
) -> None:
    """Run `flowspec *arguments` in a forked process."""
    handle = os.open(namespace, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")
    os.close(handle)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(output, number)
    os.environ.update(environment)
    sys.argv = ["flowspec", *arguments]
    from flowspec.__main__ import main

    main()


class Network:
    """Namespaces by name behind one bridge."""

    def __init__(self, rate_mbit: float) -> None:
        self.rate_mbit = rate_mbit
        self.paths: dict[str, str] = {}
        tool("ip", "link", "set", "lo", "up")
        tool("ip", "link", "add", BRIDGE, "type", "bridge")
        tool("ip", "addr", "add", f"{SUBNET}.254/24", "dev", BRIDGE)
        tool("ip", "link", "set", BRIDGE, "up")

    def add(self, name: str, address: str) -> None:
        """Add a namespace with a shaped link to the bridge."""
        path = self.paths[name] = f"/proc/{os.getpid()}/fd/{new_namespace()}"
        inside = ("nsenter", f"--net={path}")
        shape = ("root", "tbf", "rate", f"{self.rate_mbit}mbit", "burst", "256kb")
        shape = (*shape, "latency", "20ms")
        near = f"v-{name}"
        tool("ip", "link", "add", near, "type", "veth", "peer", "name", "far")
        tool("ip", "link", "set", "far", "netns", path)
        tool("ip", "link", "set", near, "master", BRIDGE)
        tool("ip", "link", "set", near, "up")
        tool("tc", "qdisc", "add", "dev", near, *shape)
        tool(*inside, "ip", "link", "set", "lo", "up")
        tool(*inside, "ip", "addr", "add", f"{address}/24", "dev", "far")
        tool(*inside, "ip", "link", "set", "far", "up")
        tool(*inside, "tc", "qdisc", "add", "dev", "far", *shape)

    def cut(self, name: str, kind: str) -> None:
        """Cut a link: `link down` or `half-open`."""
        state = ("down",) if kind == "link down" else ("nomaster",)
        tool("ip", "link", "set", f"v-{name}", *state)

    def restore(self, name: str) -> None:
        """Restore the link."""
        tool("ip", "link", "set", f"v-{name}", "master", BRIDGE, "up")


class NetnsCluster:
    """A head and workers `w1`, `w2`, ...; their logs, caches and the token are in `folder`."""

    def __init__(self, folder: Path, num_workers: int, rate_mbit: float) -> None:
        self.folder = folder
        self.names = [f"w{number}" for number in range(1, num_workers + 1)]
        self.network = Network(rate_mbit)
        self.network.add("head", HEAD_ADDRESS)
        for number, name in enumerate(self.names):
            self.network.add(name, f"{SUBNET}.{10 + number}")
        token = new_token()
        self.keys = derive_keys(token)
        write_token(folder / "token", token)
        self.pids: dict[str, int] = {}
        self._num_serving = 0  # number of stages in the head's last report
        self._children: list[object] = []  # handles, so that ended children are reaped
        self._save_model()

    def _save_model(self) -> None:
        """Save the bundled target, one shard per layer, without its end token."""
        model = self.folder / "model"
        shutil.copytree(ROOT / "models" / "demo" / "target", model)
        for name in ("config.json", "generation_config.json"):
            settings = json.loads((model / name).read_text())
            (model / name).write_text(json.dumps({**settings, "eos_token_id": NO_END_TOKEN}))
        checkpoint = open_checkpoint(model)
        self.num_layers = checkpoint.config.num_layers
        plan = plan_split(checkpoint, layers=(1,) * self.num_layers, dtype=None)
        self.split = self.folder / "split"
        run_split(plan, self.split, model_id="demo")
        self.draft = ROOT / "models" / "demo" / "eagle"

    def serve(self, stages: int, *, fresh: bool = False) -> None:
        """Start the head and wait until it listens; `stages` workers share its layers."""
        self._num_serving = stages
        base, more = divmod(self.num_layers, stages)
        layers = "+".join(str(base + (rank < more)) for rank in range(stages))
        (self.folder / "head.log").unlink(missing_ok=True)
        options = ["--no-mdns", "--layers", layers, "--host", HEAD_ADDRESS, "--settle", "0.1"]
        options += ["--reserve-mb", "50"]
        self._start(
            "head", ["serve", str(self.split), "--draft", str(self.draft), *options], fresh=fresh
        )
        self.wait_for("head", r"flowspec join [\d.]+:\d+")

    def join(self, name: str, *, fresh: bool = False) -> None:
        """Start a worker; `fresh` starts a new command, which imports everything."""
        options = ["--name", name, "--threads", "1"]
        self._start(name, ["join", f"{HEAD_ADDRESS}:{PORT}", *options], fresh=fresh)

    def _start(self, name: str, arguments: list[str], *, fresh: bool) -> None:
        arguments += ["--token-file", str(self.folder / "token")]
        environment = {
            "XDG_CACHE_HOME": str(self.cache(name)),
            "XDG_STATE_HOME": str(self.folder / "state"),
            "OMP_NUM_THREADS": "1",
        }
        log = self.folder / f"{name}.log"
        path = self.network.paths[name]
        if fresh:
            command = ["nsenter", f"--net={path}", sys.executable, "-m", "flowspec", *arguments]
            with log.open("ab") as file:
                child = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                    env={**os.environ, **environment},
                )
            self.pids[name] = child.pid
            self._children.append(child)
            return
        process = _CONTEXT.Process(
            target=enter_and_run, args=(path, arguments, str(log), environment)
        )
        process.start()
        assert process.pid is not None
        self.pids[name] = process.pid
        self._children.append(process)

    def cache(self, name: str) -> Path:
        """Return a device's cache folder."""
        return self.folder / "caches" / name

    def log(self, name: str) -> str:
        """Return the output of a process."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait_for(self, name: str, pattern: str, *, count: int = 1) -> float:
        """Wait until the log holds the pattern `count` times; return the time.

        Raises RuntimeError.
        """

        def has_said() -> bool:
            return len(re.findall(pattern, self.log(name))) >= count

        if not wait_until(lambda: has_said() or not self.is_alive(name)) or not has_said():
            raise RuntimeError(f"{name} did not log {pattern!r}:\n{self.log(name)[-3000:]}")
        return time.monotonic()

    def client(self) -> RemoteEngine:
        """Connect a client that is at the bridge."""
        return RemoteEngine(HEAD_ADDRESS, PORT, self.keys)

    def status(self) -> ClusterStatus:
        """Return the head's status. Raises ClusterError."""
        with self.client() as client:
            return client.cluster_status()

    def stages(self) -> list[str]:
        """Return the names of the workers that serve, by rank."""
        serving = [one for one in self.status().devices if one.state == "serving"]
        return [one.name for one in sorted(serving, key=lambda one: one.rank)]

    def wait_whole(self, timeout_s: float = START_S) -> bool:
        """Wait for all workers and a token that has passed the stages; return whether in time."""

        def is_whole() -> bool:
            with suppress(ClusterError):
                status = self.status()
                here = [one for one in status.devices if one.state in ("serving", "spare")]
                return status.healthy and len(here) == len(self.names)
            return False

        return wait_until(is_whole, timeout_s, 0.1)

    def is_alive(self, name: str) -> bool:
        """Whether the process of that name runs."""
        return is_running(self.pids[name])

    def strike(self, name: str, kind: str) -> float:
        """Cause one fault now; return its time."""
        if kind in ("kill", "stop"):
            with suppress(ProcessLookupError):
                os.kill(self.pids[name], signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
        else:
            self.network.cut(name, kind)
        return time.monotonic()

    def heal(self, name: str, kind: str) -> None:
        """Undo the fault; a killed device is started again."""
        if kind == "stop":
            with suppress(ProcessLookupError):
                os.kill(self.pids[name], signal.SIGCONT)
        elif kind == "kill":
            wait_until(lambda: not self.is_alive(name))
            if name == "head":
                self.serve(self._num_serving)
            else:
                self.join(name)
        else:
            self.network.restore(name)

    def stop(self, timeout_s: float = 20.0) -> list[str]:
        """Send SIGTERM to all; return the names of those that had to be killed."""
        for name in [*self.names, "head"]:
            if name in self.pids and self.is_alive(name):
                os.kill(self.pids[name], signal.SIGTERM)
        wait_until(lambda: not any(map(self.is_alive, self.pids)), timeout_s)
        left = [name for name in self.pids if self.is_alive(name)]
        for name in left:
            os.kill(self.pids[name], signal.SIGKILL)
        self.pids.clear()
        return left


def count_others() -> int:
    """Count the processes in this process namespace, except this one and its servers."""
    own = {os.getpid()}
    for one in psutil.process_iter():
        with suppress(psutil.Error):
            # Python's own processes, from which others are forked
            if "multiprocessing" in " ".join(one.cmdline()) and one.ppid() == os.getpid():
                own.add(one.pid)
    return sum(is_running(pid) for pid in psutil.pids() if pid not in own)


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_until(
    is_true: Callable[[], bool], timeout_s: float = START_S, poll_s: float = POLL_S
) -> bool:
    """Wait until the condition is true; return whether that was in time."""
    end = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > end:
            return False
        time.sleep(poll_s)
    return True
