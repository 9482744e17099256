"""The cost of encryption per segment: one hop of 32 x 4096 fp16 between two processes, on and off.

    python -m benchmarks.encryption [--trips 500] [--rows 32] [--hidden 4096] [--json FILE]

A hop is half of a round trip, including encoding and decoding: over ipc:// as in a local run, over
tcp:// without encryption, and over tcp:// with CURVE. All take turns on the machine. Median, 90th
and 99th percentile are in milliseconds, without the first tenth.
"""

import argparse
import json
import multiprocessing
import socket
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from flowspec.protocol.messages import Segment, Stop
from flowspec.request import NodeId
from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.transport.zmq import CONTROL, DATA_LANE, ZmqTransport, local_addresses

WAYS = ("ipc", "tcp", "tcp+curve")
LIMIT_S = 60.0
Book = dict[int, dict[str, str]]
SILENCE_S = 300.0  # the other end has gone then


def open_transport(way: str, rank: int, book: Book, token: str) -> ZmqTransport:
    """Open one end of a connection of this kind."""
    return ZmqTransport(rank, book, derive_keys(token) if way == "tcp+curve" else None)


def echo(way: str, book: Book, token: str) -> None:
    """Send every segment back until told to stop, or nothing comes for SILENCE_S."""
    there = open_transport(way, 1, book, token)
    heard_at = time.monotonic()
    while time.monotonic() - heard_at < SILENCE_S:
        for message in there.receive(5.0):
            heard_at = time.monotonic()
            if isinstance(message, Stop):
                there.close()
                return
            there.send(0, message)


def addresses(way: str, folder: str) -> Book:
    """Return the addresses of the two ends."""
    if way == "ipc":
        return local_addresses(folder, 1)
    held = [socket.create_server(("127.0.0.1", 0)) for _ in range(4)]
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    lanes = (CONTROL, DATA_LANE)
    return {r: {lane: f"tcp://127.0.0.1:{ports.pop()}" for lane in lanes} for r in range(2)}


def trip_ms(here: ZmqTransport, segment: Segment) -> float:
    """Return the milliseconds of one round trip."""
    start = time.perf_counter()
    here.send(1, segment)
    while not here.receive(1.0):
        if time.perf_counter() - start > LIMIT_S:
            raise RuntimeError("no answer")
    return (time.perf_counter() - start) * 1e3


def summary(trips: Sequence[float]) -> dict[str, float]:
    """Return percentiles of half a round trip."""
    hops = sorted(ms / 2 for ms in trips[len(trips) // 10 :])
    parts = statistics.quantiles(hops, n=100)
    return {"p50_ms": parts[49], "p90_ms": parts[89], "p99_ms": parts[98]}


def main() -> None:
    """Measure all kinds of connections and print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--trips", type=int, default=500)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    nodes = tuple(NodeId(k) for k in range(options.rows))
    hidden = torch.randn(options.rows, options.hidden).half()
    segment = Segment(request=1, seq_no=1, nodes=nodes, parents=nodes, tokens=nodes, hidden=hidden)
    context, token = multiprocessing.get_context("spawn"), str(new_token())
    trips: dict[str, list[float]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="fs") as folder:
        books = {way: addresses(way, folder) for way in WAYS}
        processes = [
            context.Process(target=echo, args=(way, books[way], token), daemon=True) for way in WAYS
        ]
        for process in processes:
            process.start()
        ends = {way: open_transport(way, 0, books[way], token) for way in WAYS}
        for _ in range(options.trips):
            for way, here in ends.items():
                trips[way].append(trip_ms(here, segment))
        for here in ends.values():
            here.send(1, Stop())
            here.close()
        for process in processes:
            process.join(timeout=5.0)
    results = {way: summary(times) for way, times in trips.items()}
    size = options.rows * options.hidden * 2
    for way, result in results.items():
        figures = ", ".join(f"{name[:3]} {ms:.3f} ms" for name, ms in result.items())
        print(f"{way:10s} {size // 1024} KiB: {figures}")
    cost = results["tcp+curve"]["p50_ms"] - results["tcp"]["p50_ms"]
    print(f"encryption costs a hop {cost:.3f} ms (p50)")
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
