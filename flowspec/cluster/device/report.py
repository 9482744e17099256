"""A device's report: its hardware and measured speeds, in bytes, seconds, and per second."""

import hashlib
import json
import logging
import platform
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from flowspec.cluster.device.memory import available_bytes, total_bytes
from flowspec.cluster.network import interfaces
from flowspec.protocol.control import DeviceReport, Echo, Link, pack, unpack
from flowspec.transport.control_sockets import ControlClient
from flowspec.weights.manifest import write_json

log = logging.getLogger(__name__)
DEVICE_TREE_MODEL = Path("/proc/device-tree/model")
_BENCH_BYTES = 256 << 20
_BENCH_ROWS, _BENCH_SIZE = 64, 2048  # size of the matrix product, like a segment through a 7B layer
_BENCH_S = 0.25  # seconds of each measurement
_PING_ROUNDS = 10
_RATE_BYTES, _RATE_ROUNDS = 192 << 10, 12
_LINK_TIMEOUT_S = 5.0


def report_device(
    torch_device: str, dtype: str, cache: Path, *, bench: bool = True
) -> DeviceReport:
    """Report this device now. The two speeds are measured once and kept in the folder `cache`."""
    device = torch.device(torch_device)
    speeds = _speeds(device, dtype, cache) if bench else (0.0, 0.0)
    return DeviceReport(
        hostname=platform.node()[:200] or "unknown",
        kind=device_kind()[:200],
        machine=platform.machine(),
        torch_device=torch_device,
        memory_available_bytes=available_bytes(device),
        memory_total_bytes=total_bytes(device),
        unified_memory=is_unified(device),
        disk_free_bytes=disk_free(cache),
        power_mode=power_mode()[:200],
        bandwidth_bytes_per_s=speeds[0],
        flops=speeds[1],
        interfaces=tuple(interfaces()),
        python=platform.python_version(),
        torch=torch.__version__,
    )


def device_kind(device_tree: Path = DEVICE_TREE_MODEL) -> str:
    """Return the board's name if it has one, else the processor's."""
    try:
        return device_tree.read_bytes().rstrip(b"\0").decode(errors="replace")
    except OSError:
        pass
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def is_jetson(release: str = "") -> bool:
    """Whether the kernel is NVIDIA's for Jetson boards."""
    return "tegra" in (release or platform.release())


def is_unified(device: torch.device) -> bool:
    """Whether CPU and GPU share one memory, so that its MemAvailable counts for both."""
    if device.type != "cuda":
        return False
    return bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))


def disk_free(folder: Path) -> int:
    """Return the free bytes on the disk that holds, or would hold, `folder`."""
    for path in (folder, *folder.absolute().parents):
        try:
            return shutil.disk_usage(path).free
        except OSError:  # it does not exist, or this user may not see it
            continue
    return 0


def why_not_computed(torch_device: str, dtype: str) -> str:
    """Return torch's error for a small product in `dtype` on the device; empty if it works."""
    try:
        one = torch.ones(8, 8, device=torch_device, dtype=getattr(torch, dtype))
        float((one @ one).sum())
    except (RuntimeError, OSError, AttributeError, TypeError) as error:
        return str(error).partition("\n")[0]
    return ""


def power_mode() -> str:
    """Return the mode of `nvpmodel -q` on a Jetson, else the CPU governor; may be empty."""
    if is_jetson() and (program := shutil.which("nvpmodel")):
        try:
            done = subprocess.run([program, "-q"], capture_output=True, text=True, timeout=5.0)
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return next(
            (line.partition(":")[2].strip() for line in done.stdout.splitlines() if ":" in line), ""
        )
    try:
        governor = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text()
    except OSError:
        return ""
    return f"governor {governor.strip()}"


def measure_link(client: ControlClient) -> Link:
    """Measure latency and rate both ways to the head, over the encrypted control socket itself.

    Returns zeros when the head does not answer within a few seconds.
    """
    trips: list[float] = []
    for _ in range(_PING_ROUNDS):
        trips.append(_echo(client, Echo()))
        if not trips[-1]:
            return Link()
    latency_s = min(trips) / 2
    # A rate needs several messages in flight; one at a time would measure only the latency.
    up = _rate(client, Echo(payload="x" * _RATE_BYTES))
    down = _rate(client, Echo(reply_bytes=_RATE_BYTES))
    return Link(latency_s=latency_s, up_bytes_per_s=up, down_bytes_per_s=down)


def _echo(client: ControlClient, message: Echo) -> float:
    """Return the seconds of one round trip; 0.0 without an answer."""
    start = time.monotonic()
    client.send(pack(message))
    return time.monotonic() - start if _await_echoes(client, 1) else 0.0


def _rate(client: ControlClient, message: Echo) -> float:
    start = time.monotonic()
    for _ in range(_RATE_ROUNDS):
        client.send(pack(message))
    if not _await_echoes(client, _RATE_ROUNDS):
        return 0.0
    return _RATE_ROUNDS * _RATE_BYTES / (time.monotonic() - start)


def _await_echoes(client: ControlClient, count: int) -> bool:
    end = time.monotonic() + _LINK_TIMEOUT_S
    while count and time.monotonic() < end:
        count -= sum(isinstance(unpack(m), Echo) for m in client.receive(min(0.5, _LINK_TIMEOUT_S)))
    return count <= 0


def _speeds(device: torch.device, dtype: str, cache: Path) -> tuple[float, float]:
    """Return (memory bytes/s, operations/s), from the cache if nothing has changed."""
    about = [platform.node(), device_kind(), power_mode(), torch.__version__, str(device), dtype]
    about.append(str(torch.get_num_threads()))
    key = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:16]
    path = cache / f"speed-{key}.json"
    try:
        known = json.loads(path.read_text())
        return float(known["bandwidth_bytes_per_s"]), float(known["flops"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    bandwidth, flops = measure_bandwidth(device), measure_flops(device, dtype)
    try:
        cache.mkdir(parents=True, exist_ok=True)
        write_json(path, {"bandwidth_bytes_per_s": bandwidth, "flops": flops})
    except OSError as error:
        log.warning("cannot keep the measured speeds in %s: %s", path, error)
    return bandwidth, flops


def measure_bandwidth(device: torch.device) -> float:
    """Return the bytes/s of reading memory in a matrix-vector product, as in decoding."""
    columns = 4096
    rows = min(_BENCH_BYTES, max(1 << 22, available_bytes(device) // 8)) // (4 * columns)
    weights = torch.ones(rows, columns, device=device)
    vector = torch.ones(columns, device=device)
    return weights.nbytes * _per_second(lambda: weights @ vector, device)


def measure_flops(device: torch.device, dtype: str) -> float:
    """Return the operations/s of a product of few rows with a square matrix, in the run's dtype."""
    kind = getattr(torch, dtype)
    rows = torch.ones(_BENCH_ROWS, _BENCH_SIZE, device=device, dtype=kind)
    weights = torch.ones(_BENCH_SIZE, _BENCH_SIZE, device=device, dtype=kind)
    return 2 * _BENCH_ROWS * _BENCH_SIZE**2 * _per_second(lambda: rows @ weights, device)


def _per_second(run: Callable[[], Any], device: torch.device) -> float:
    """Return how often per second `run` is done: the best of several tries."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    run()
    finish()
    best_s, end = float("inf"), time.monotonic() + _BENCH_S
    while time.monotonic() < end:
        start = time.perf_counter()
        run()
        finish()
        best_s = min(best_s, time.perf_counter() - start)
    return 1.0 / best_s


def default_name() -> str:
    """Return a device's default name."""
    return (platform.node() or "device").partition(".")[0][:64]
