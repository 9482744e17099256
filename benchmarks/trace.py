"""The cost of tracing: an event loop's turn, and whole runs, each with tracing off and on.

    python -m benchmarks.trace [--pairs 5] [--json FILE]

"turn": processor time of an event loop that takes a segment in, runs no model and sends it on; the
least of many repeats, to exclude other programs on the machine. "run": `streaming` on the bundled
model, two stage processes, with and without a trace in turn; tokens per second of each, and the
median of the pairs' ratios.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from flowspec.cli.common import draft_folder, split_folder
from flowspec.config import EngineConfig, override
from flowspec.engine.build import load_head_parts
from flowspec.engine.engine import generate
from flowspec.engine.local import LocalEngine
from flowspec.protocol.messages import Message, Segment
from flowspec.request import NodeId, Request
from flowspec.runtime.core import Send, Step, Work
from flowspec.runtime.event_loop import EventLoop
from flowspec.runtime.recorder import OFF, Recorder, Trace
from flowspec.tokenizer import render_chat

ROWS = 32
PROMPT = "Anna has 3 boxes with 12 apples in each box. How many apples does Anna have?"


class Echo:
    """A core that runs no model and sends every segment on."""

    rank = 1

    def __init__(self) -> None:
        self.waiting: list[Message] = []

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Keep the message for the next turn."""
        self.waiting.append(message)
        return ()

    def poll(self, now: float) -> Step | None:
        """Return one piece of work per segment."""
        if not self.waiting:
            return None
        message = self.waiting.pop()
        about = {"segments": (message,)}
        work = Work("forward", ROWS, 0, _nothing, lambda now, elapsed: [Send(2, message)], about)
        return Step(work=work)


def _nothing() -> None:
    """Run no model."""


class Loop:
    """A transport that delivers the same segment again and again."""

    def __init__(self, segment: Segment) -> None:
        self.segment = segment

    def send(self, to: int, message: Message) -> None:
        """Drop the message."""

    def receive(self, timeout_s: float) -> Sequence[Segment]:
        """Return a segment if there is time to wait for one."""
        return [self.segment] if timeout_s else []

    def close(self) -> None:
        """Do nothing: no socket is open."""


def turn_us(trace: Trace, count: int = 2000, repeats: int = 30) -> float:
    """Return microseconds of processor time per segment: one turn that waits, one that works."""
    nodes = tuple(NodeId(i) for i in range(ROWS))
    segment = Segment(
        request=1,
        seq_no=1,
        nodes=nodes,
        parents=nodes,
        tokens=tuple(range(ROWS)),
        hidden=torch.zeros(ROWS, 256),
    )
    driver = EventLoop(Echo(), Loop(segment), 2, trace)  # type: ignore[arg-type]
    least = float("inf")
    for _ in range(repeats):
        start = time.process_time()
        for _ in range(count):
            driver.turn(1.0)
            driver.turn(1.0)
        least = min(least, (time.process_time() - start) / count)
    return least * 1e6


def bench_runs(pairs: int) -> list[tuple[float, float]]:
    """Tokens per second without and with a trace, the two clusters in turn."""
    config = EngineConfig(stages=2)
    config = override(config, {"draft": draft_folder(config)}, where="draft")
    torch.set_num_threads(1)
    parts = load_head_parts(config, split_folder(config))
    prompt = render_chat(parts.tokenizer, [{"role": "user", "content": PROMPT}])
    speeds: list[tuple[float, float]] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        LocalEngine(config, parts) as plain,
        LocalEngine(config, parts, Path(folder)) as traced,
    ):
        for number in range(1, pairs + 2):
            request = Request(id=number, prompt=prompt, max_new_tokens=150)
            pair = [generate(cluster, request).stats for cluster in (plain, traced)]
            speeds.append((pair[0].tokens_per_s, pair[1].tokens_per_s))
    return speeds[1:]  # the first pair is the warm-up


def main() -> None:
    """Run both and print a line each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        recorder = Recorder(1, path=Path(folder) / "rank", max_records=10**9)
        turns = {"off": turn_us(OFF), "on": turn_us(recorder, repeats=5)}
    for name, cost in turns.items():
        print(f"turn, tracing {name:4s} {cost:.2f} us per segment")
    speeds = bench_runs(arguments.pairs)
    ratios = [traced / plain for plain, traced in speeds]
    for plain, traced in speeds:
        print(f"run: {plain:.1f} tokens/s without, {traced:.1f} with, ratio {traced / plain:.3f}")
    print(f"median ratio with / without {statistics.median(ratios):.3f}")
    if arguments.json:
        results = {"turn_us": turns, "tokens_per_s": speeds, "ratio": statistics.median(ratios)}
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
