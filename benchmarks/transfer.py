"""Compares weight transfer (encrypted, hashed, written) with raw TCP over the same link.

    python -m benchmarks.transfer [--link loopback|namespaces] [--mbit 1000] [--workers 1,4]

Raw TCP is plain sockets that discard what they receive, as iperf3 does, with one stream per worker.
Both run in turns on the machine; the median of the runs is printed. `namespaces` (root, Linux) puts
the workers behind a veth pair that `tc tbf` shapes to --mbit in both directions. Every worker gets
--mb of random weights into an empty cache in --folder: put that in memory (/dev/shm) to measure
only the network, or on a disk to measure a real device. Processor seconds per GB show how fast a
link one core could fill; they do not depend on other programs.
"""

import argparse
import contextlib
import ctypes
import json
import multiprocessing
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.weights.manifest import (
    HEAD_FOLDER,
    WEIGHTS_NAME,
    FileRecord,
    Manifest,
    file_sha256,
    model_hash,
    stage_folder,
    write_manifest,
)
from flowspec.weights.transfer.cache import ShardCache
from flowspec.weights.transfer.shards import ShardServer, fetch_shards

NUM_SHARDS = 8
CLONE_NEWNET = 0x40000000
LIMIT_S = 600.0  # for each wait: a transfer takes far less
BUFFER_BYTES = 1 << 20
HERE, THERE = "10.199.0.1", "10.199.0.2"
INSIDE = "FLOWSPEC_BENCH_INSIDE"
SPAWN = multiprocessing.get_context("spawn")


def make_split(folder: Path, num_bytes: int) -> Manifest:
    """Write a split of random weights in equal shards."""
    files = {}
    for part in (HEAD_FOLDER, *(stage_folder(k + 1) for k in range(NUM_SHARDS))):
        (folder / part).mkdir(parents=True)
        with (folder / part / WEIGHTS_NAME).open("wb") as file:
            left = 0 if part == HEAD_FOLDER else num_bytes // NUM_SHARDS
            while left:
                left -= file.write(os.urandom(min(left, BUFFER_BYTES)))
        (folder / part / "config.json").write_text("{}")
        for name in (f"{part}/{WEIGHTS_NAME}", f"{part}/config.json"):
            path = folder / name
            files[name] = FileRecord(sha256=file_sha256(path), bytes=path.stat().st_size)
    layers = (1,) * NUM_SHARDS
    about: dict[str, Any] = {"architecture": "random", "dtype": "float16", "layers": layers}
    digest = model_hash(files, **about)
    manifest = Manifest(model_id="random", files=files, source="", model_hash=digest, **about)
    write_manifest(folder, manifest)
    return manifest


def enter(pid: int | None) -> None:
    """Enter the network namespace of process `pid`."""
    if pid is not None:
        handle = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY)
        if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        os.close(handle)


def raw_worker(host: str, port: int, pid: int | None, ready: Any, go: Any) -> None:
    """Read a stream to its end and discard it."""
    enter(pid)
    buffer = bytearray(BUFFER_BYTES)
    ready.release()
    if not go.wait(LIMIT_S):
        raise SystemExit("no sign to begin has come")
    with socket.create_connection((host, port), timeout=LIMIT_S) as stream:
        while stream.recv_into(buffer):
            pass


def raw_sender(listener: socket.socket, num_bytes: int) -> None:
    """Send to every client that connects."""
    listener.settimeout(LIMIT_S)
    connection, _ = listener.accept()
    content = memoryview(os.urandom(BUFFER_BYTES))
    connection.settimeout(LIMIT_S)
    with connection:
        for _ in range(num_bytes // BUFFER_BYTES):
            connection.sendall(content)


def ship_worker(
    address: str, token: str, manifest: Manifest, cache: str, pid: int | None, meet: Any
) -> None:
    """Fetch all shards into an empty cache; put processor seconds into the queue."""
    ready, go, used = meet
    enter(pid)
    keys, store = derive_keys(token), ShardCache(Path(cache))
    ready.release()
    if not go.wait(LIMIT_S):
        raise SystemExit("no sign to begin has come")
    before = time.process_time()
    shards = range(1, NUM_SHARDS + 1)
    fetch_shards(address, keys, manifest, shards, store, timeout_s=60.0)
    used.put(time.process_time() - before)


def timed(workers: list[Any], ready: Any, go: Any) -> float:
    """Return seconds from the start of the transfer to the end of the last worker."""
    for worker in workers:
        worker.start()
    for _ in workers:
        if not ready.acquire(timeout=120):
            raise RuntimeError("a worker did not start")
    start = time.perf_counter()
    go.set()
    for worker in workers:
        worker.join(LIMIT_S)
        if worker.exitcode is None:
            worker.kill()
            raise RuntimeError(f"a worker did not end within {LIMIT_S:.0f} s")
        if worker.exitcode:
            raise RuntimeError(f"a worker ended with exit code {worker.exitcode}")
    return time.perf_counter() - start


def raw_run(host: str, count: int, num_bytes: int, pid: int | None) -> float:
    """Return megabytes per second of raw TCP, all streams together."""
    ready, go = SPAWN.Semaphore(0), SPAWN.Event()
    fork = multiprocessing.get_context("fork")
    with socket.create_server((host, 0)) as listener:
        senders = [
            fork.Process(target=raw_sender, args=(listener, num_bytes)) for _ in range(count)
        ]
        for sender in senders:
            sender.start()
        port = listener.getsockname()[1]
        workers = [
            SPAWN.Process(target=raw_worker, args=(host, port, pid, ready, go))
            for _ in range(count)
        ]
        took_s = timed(workers, ready, go)
        for sender in senders:
            sender.join(LIMIT_S)
    return count * num_bytes / took_s / 1e6


def ship_run(
    host: str, count: int, split: Path, manifest: Manifest, folder: Path, pid: int | None
) -> tuple[float, float, float]:
    """Return megabytes/s of all transfers together, and processor seconds per GB: head, worker."""
    ready, go, token = SPAWN.Semaphore(0), SPAWN.Event(), str(new_token())
    used = SPAWN.Queue()
    server = ShardServer(split, f"tcp://{host}:0", derive_keys(token))
    caches = [folder / f"cache_{k}" for k in range(count)]
    try:
        workers = [
            SPAWN.Process(
                target=ship_worker,
                args=(server.address, token, manifest, str(cache), pid, (ready, go, used)),
            )
            for cache in caches
        ]
        before = time.process_time()
        took_s = timed(workers, ready, go)
        head_s, worker_s = (
            time.process_time() - before,
            sum(used.get(timeout=LIMIT_S) for _ in workers),
        )
    finally:
        server.close()
        for cache in caches:
            shutil.rmtree(cache, ignore_errors=True)
    num_bytes = sum(record.bytes for record in manifest.files.values())
    shipped_gb = count * num_bytes / 1e9
    return shipped_gb * 1e3 / took_s, head_s / shipped_gb, worker_s / shipped_gb


@contextlib.contextmanager
def other_end(mbit: int) -> Iterator[int]:
    """Start a process in a network namespace behind a shaped link; yield its id."""
    with subprocess.Popen(["unshare", "-n", "sleep", "3600"]) as there:
        try:
            time.sleep(0.5)
            inside = f"nsenter -t {there.pid} -n"
            rate = f"root tbf rate {mbit}mbit burst 256kb latency 20ms"
            for command in (
                "ip link set lo up",
                "ip link add near type veth peer name far",
                f"ip link set far netns {there.pid}",
                f"ip addr add {HERE}/24 dev near",
                "ip link set near up",
                f"{inside} ip addr add {THERE}/24 dev far",
                f"{inside} ip link set far up",
                f"tc qdisc add dev near {rate}",
                f"{inside} tc qdisc add dev far {rate}",
            ):
                subprocess.run(command.split(), check=True)
            yield there.pid
        finally:
            there.kill()


def bench(options: argparse.Namespace, host: str, pid: int | None) -> dict[str, Any]:
    """Measure all counts of workers, in turns; print a line each."""
    results: dict[str, Any] = {"link": options.link, "mb": options.mb, "repeat": options.repeat}
    options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="bench-ship-", dir=options.folder))
    num_bytes = options.mb << 20
    try:
        manifest = make_split(folder / "split", num_bytes)
        for count in (int(text) for text in options.workers.split(",")):
            raw, runs = [], []
            for _ in range(options.repeat):
                raw.append(raw_run(host, count, num_bytes, pid))
                runs.append(ship_run(host, count, folder / "split", manifest, folder, pid))
            ship, head_s, worker_s = (list(column) for column in zip(*runs, strict=True))
            share = statistics.median(ship) / statistics.median(raw)
            results[f"{count} workers"] = {"raw_mb_s": raw, "ship_mb_s": ship, "share": share}
            results[f"{count} workers"]["cpu_s_per_gb"] = {"head": head_s, "worker": worker_s}
            print(
                f"{options.link}, {count} worker(s): raw TCP {statistics.median(raw):.0f} MB/s, "
                f"shipped {statistics.median(ship):.0f} MB/s, {100 * share:.0f} % "
                f"(median of {options.repeat}); processor seconds per GB: head "
                f"{statistics.median(head_s):.2f}, worker {statistics.median(worker_s):.2f}"
            )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return results


def main() -> int:
    """Measure as the options say."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--link", choices=("loopback", "namespaces"), default="loopback")
    parser.add_argument("--mbit", type=int, default=1000, help="rate of the shaped link [1000]")
    parser.add_argument("--mb", type=int, default=512, help="MiB per worker [512]")
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--workers", default="1,4", help="workers at the same time [1,4]")
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.link == "namespaces":
        if os.geteuid() != 0 or not shutil.which("unshare") or not shutil.which("tc"):
            print("error: --link namespaces needs root, unshare and tc", file=sys.stderr)
            return 2
        if INSIDE not in os.environ:  # leave this machine's own network unchanged
            return subprocess.run(
                ["unshare", "-n", sys.executable, *sys.orig_argv[1:]],
                env={**os.environ, INSIDE: "1"},
            ).returncode
        with other_end(options.mbit) as pid:
            results = bench(options, HERE, pid)
    else:
        results = bench(options, "127.0.0.1", None)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
