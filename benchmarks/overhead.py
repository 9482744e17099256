"""What the engine adds to the bare forward per 32-row segment.

    python -m benchmarks.overhead [--segments 300] [--json FILE]

It uses a tiny random model (2 layers, hidden 256), so that the engine's time is visible. The bare
forward is the layers and the lm_head over 32 rows with a ready mask. "simulated": wall time of one
stage core's turn on a segment, minus the bare forward's median. "zmq", "gloo": the time from
sending a segment to a stage behind that transport (head and stage are threads of one process) to
its Exit, minus the same; the two take turns. "link": a segment with hidden states between two
processes and an Exit back, without a model. Median and 99th percentile are in milliseconds.
"""

import argparse
import json
import multiprocessing
import statistics
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.codec import summary
from flowspec.model.architecture import ModelConfig
from flowspec.model.backend import COMMITTED, RequestRows
from flowspec.model.stage_model import StageModel
from flowspec.protocol.messages import AddRequest, Exit, Message, Reroot, Segment, Stop
from flowspec.request import NodeId
from flowspec.runtime.event_loop import EventLoop
from flowspec.stage.stage import Stage
from flowspec.transport.by_name import local_transport

ROWS = 32
CONTEXT = (256, 0)  # committed rows and tree rows of the cache before each segment
TRANSPORTS = ("zmq", "gloo")
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=704,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    rms_norm_eps=1e-5,
    rope_theta=10000.0,
)
SILENCE_S = 300.0  # the other end has gone then


def make_stage() -> Stage:
    """Return the only stage of a random model, with an open request and a prompt of 256 tokens."""
    torch.manual_seed(0)
    model = StageModel(CONFIG, first_layer=0, last_layer=2, with_embedding=True, with_head=True)
    stage = Stage(1, 1, model.requires_grad_(False))
    feed(stage, AddRequest(request=1, capacity=1024, context=512, aux_hidden_state_layers=(-1,)))
    ids = tuple(NodeId(i) for i in range(256))
    parents = tuple(NodeId(i - 1) for i in range(256))
    prompt = Segment(
        request=1, seq_no=0, nodes=ids, parents=parents, tokens=(7,) * 256, prefix=True
    )
    feed(stage, prompt)
    return stage


def feed(stage: Stage, message: Message) -> float:
    """Give a message to the core and run the work that follows; return the milliseconds."""
    start = time.perf_counter()
    stage.handle(message, start)
    while (step := stage.poll(start)) is not None:
        if step.work is not None:
            step.work.run()
            step.work.finish(start, time.perf_counter() - start)
    return (time.perf_counter() - start) * 1e3


def bare_forward_ms(count: int) -> float:
    """Return the median milliseconds of layers and lm_head over 32 rows after 256."""
    stage = make_stage()
    cache = stage.requests[1].cache
    tokens = torch.full((ROWS,), 7)
    parents = [COMMITTED, *((i - 1) // 2 for i in range(1, ROWS))]
    rows = RequestRows(cache, positions=range(256, 256 + ROWS), parents=parents)
    times = []
    for _ in range(count):
        start = time.perf_counter()
        hidden, _ = stage.model.run([rows], tokens)
        stage.model.logits(hidden)
        times.append((time.perf_counter() - start) * 1e3)
        cache.reroot([], [])
    return statistics.median(times)


def tree_segment(number: int, tip: int, token: int) -> tuple[Segment, int]:
    """Return 32 rows below the newest accepted node, all of them wrong, and the next id."""
    first = 1000 + number * ROWS
    nodes = tuple(NodeId(first + i) for i in range(ROWS))
    # a true root, then a comb of guesses below it
    parents = (NodeId(tip), *(NodeId(first + (i - 1) // 2) for i in range(1, ROWS)))
    tokens = (token, *(4000 + i for i in range(1, ROWS)))
    segment = Segment(request=1, seq_no=number, nodes=nodes, parents=parents, tokens=tokens)
    return segment, first


def bench_simulated(count: int, bare_ms: float) -> list[float]:
    """Return the milliseconds that a core spends on a segment besides its forward."""
    stage = make_stage()
    state = stage.requests[1]
    overheads = []
    for number in range(1, count + 1):
        state.cache.cut_back(CONTEXT)  # the context stays the same length
        segment, _ = tree_segment(number, int(state.tip), int(state.next_token or 0))
        overheads.append(feed(stage, segment) - bare_ms)
    return overheads


class Served:
    """A stage behind a transport, in its own thread, and the head's end of the transport."""

    def __init__(self, transport: str, folder: str, bare_ms: float) -> None:
        self.stage, self.bare_ms = make_stage(), bare_ms
        self.here, there = (
            local_transport(transport, rank, num_stages=1, folder=folder, device="cpu")
            for rank in range(2)
        )
        driver = EventLoop(self.stage, there, 1)

        def serve() -> None:
            while not driver.stopped:
                driver.turn(1.0)
            there.close()

        self.thread = threading.Thread(target=serve, daemon=True)
        self.thread.start()
        self.tip, self.token = 255, int(self.stage.requests[1].next_token or 0)

    def overhead_ms(self, number: int) -> float:
        """Return milliseconds from sending segment `number` to its Exit, minus the forward's."""
        self.stage.requests[1].cache.cut_back(CONTEXT)
        segment, _ = tree_segment(number, self.tip, self.token)
        start = time.perf_counter()
        self.here.send(1, segment)
        left = None
        while left is None:
            for message in self.here.receive(5.0):
                if isinstance(message, Reroot):
                    self.tip, self.token = message.parent, message.token
                if isinstance(message, Exit):
                    left = message
        return (time.perf_counter() - start) * 1e3 - self.bare_ms

    def stop(self) -> None:
        """End the thread."""
        self.here.send(1, Stop())
        self.thread.join(timeout=5.0)
        self.here.close()


def bench_transports(count: int, bare_ms: float) -> dict[str, list[float]]:
    """Return milliseconds per segment behind each transport; they take turns on the machine."""
    with tempfile.TemporaryDirectory() as folder:
        served = {name: Served(name, folder, bare_ms) for name in TRANSPORTS}
        overheads: dict[str, list[float]] = {name: [] for name in TRANSPORTS}
        for number in range(1, count + 1):
            for name, stage in served.items():
                overheads[name].append(stage.overhead_ms(number))
        for stage in served.values():
            stage.stop()
    return overheads


def echo(transport: str, folder: str) -> None:
    """Answer every segment with an Exit until told to stop, or nothing comes for SILENCE_S."""
    there = local_transport(transport, 1, num_stages=1, folder=folder, device="cpu")
    heard_at = time.monotonic()
    while time.monotonic() - heard_at < SILENCE_S:
        for message in there.receive(5.0):
            heard_at = time.monotonic()
            if isinstance(message, Stop):
                there.close()
                return
            there.send(0, Exit(request=1, seq_no=0, rows=0, slowest_rows=0, slowest_ms=0.0))


def bench_links(count: int) -> dict[str, list[float]]:
    """Return milliseconds of a round trip of two processes, by transport and hidden bytes."""
    times: dict[str, list[float]] = {}
    segment, _ = tree_segment(1, 0, 1)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        peers = {}
        for name in TRANSPORTS:
            process = context.Process(target=echo, args=(name, folder), daemon=True)
            process.start()
            here = local_transport(name, 0, num_stages=1, folder=folder, device="cpu")
            peers[name] = (process, here)
        for hidden_size in (256, 4096):
            loaded = replace(segment, hidden=torch.randn(ROWS, hidden_size).half())
            for _ in range(count):
                for name, (_, here) in peers.items():
                    start = time.perf_counter()
                    here.send(1, loaded)
                    while not here.receive(60.0):
                        pass
                    kib = ROWS * hidden_size * 2 // 1024
                    took_ms = (time.perf_counter() - start) * 1e3
                    times.setdefault(f"{name} link {kib} KiB", []).append(took_ms)
        for process, here in peers.values():
            here.send(1, Stop())
            here.close()
            process.join(timeout=5.0)
    return times


def main() -> None:
    """Run all measurements and print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--segments", type=int, default=300)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bare_ms = bare_forward_ms(arguments.segments)
    print(f"bare forward         median {bare_ms:.3f} ms")
    behind = bench_transports(arguments.segments, bare_ms)
    results = {
        "simulated overhead": summary(bench_simulated(arguments.segments, bare_ms)),
        **{f"{name} overhead": summary(times) for name, times in behind.items()},
        **{name: summary(times) for name, times in bench_links(arguments.segments).items()},
    }
    for name, result in results.items():
        print(f"{name:20s} median {result['median_ms']:.3f} ms, p99 {result['p99_ms']:.3f} ms")
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
