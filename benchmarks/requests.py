"""Gain of sharing one pipeline between several requests (virtual clock, emulated cluster).

    python -m benchmarks.requests [--requests 1,2,4,8] [--strategies streaming,serial_pp,ar]
        [--temperatures 0,1] [--tokens 96] [--prompts FILE]
        [--cluster NAME|FILE] [--model NAME|FILE] [--json FILE]

The bundled models really run and are charged the times of an emulated cluster, by default the
reference testbed with Vicuna-7B (config/clusters/jetson-5.yaml). End tokens are ignored, so every
answer has the same length. Each group of R prompts is decoded at the same time; "alone" is the same
requests in turn, on the same clock. Total: tokens of the group divided by the time from its
submission to its last token. Slowest: the smallest ratio of a request's decode speed to its own
alone. Every text is compared with its text alone.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch

from flowspec.bench.prompts import load_prompts
from flowspec.cli.common import BUNDLED, draft_folder, split_folder
from flowspec.config import EngineConfig, override
from flowspec.cost_model.emulation import Emulation, load_emulation
from flowspec.engine.build import HeadParts, build_stage, load_head_parts
from flowspec.engine.engine import generate_all
from flowspec.engine.simulated import SimulatedEngine, emulated_engine
from flowspec.request import Request, RequestOutput, SamplingParams
from flowspec.tokenizer import render_chat


class Bench:
    """One split of the bundled model, loaded once."""

    def __init__(self, config: EngineConfig, emulation: Emulation) -> None:
        self.config, self.emulation = config, emulation
        folder = split_folder(config)
        self.parts: HeadParts = load_head_parts(config, folder)
        ranks = range(1, len(self.parts.manifest.layers) + 1)
        self.stages = [build_stage(folder, rank)[0] for rank in ranks]
        self.alone: dict[tuple[str, float, int], RequestOutput] = {}

    def cluster(self, strategy: str) -> SimulatedEngine:
        """Fresh cores over the loaded models."""
        config = override(self.config, {"strategy": strategy}, where="bench")
        return emulated_engine(config, self.parts, self.stages, self.emulation)

    def requests(self, prompts: Sequence[str], temperature: float, tokens: int) -> list[Request]:
        """Make requests of equal answer length; the seed is the prompt's position."""
        return [
            Request(
                id=number,
                prompt=render_chat(self.parts.tokenizer, [{"role": "user", "content": text}]),
                sampling=SamplingParams(temperature=temperature, seed=number),
                max_new_tokens=tokens,
            )
            for number, text in enumerate(prompts, start=1)
        ]

    def completion_alone(self, strategy: str, request: Request) -> RequestOutput:
        """The request with the cluster to itself."""
        key = (strategy, request.sampling.temperature, request.id)
        if key not in self.alone:
            (self.alone[key],) = generate_all(self.cluster(strategy), [request])
        return self.alone[key]

    def row(self, strategy: str, requests: Sequence[Request], size: int) -> dict[str, object]:
        """Serve `requests` in groups of `size`."""
        gains, slowest, totals, wrong = [], [], [], 0
        for start in range(0, len(requests) - size + 1, size):
            group = requests[start : start + size]
            alone = [self.completion_alone(strategy, one) for one in group]
            together = generate_all(self.cluster(strategy), group)
            wrong += sum(a.tokens != b.tokens for a, b in zip(alone, together, strict=True))
            begin = min(c.stats.submitted_at for c in together)
            took = max(c.stats.finished_at for c in together) - begin
            one_by_one = sum(c.stats.finished_at - c.stats.submitted_at for c in alone)
            totals.append(sum(c.stats.num_tokens for c in together) / took)
            gains.append(one_by_one / took)
            slowest += [
                b.stats.tokens_per_s / a.stats.tokens_per_s
                for a, b in zip(alone, together, strict=True)
            ]
        return {
            "strategy": strategy,
            "temperature": requests[0].sampling.temperature,
            "requests": size,
            "groups": len(gains),
            "total_tokens_per_s": round(statistics.mean(totals), 2),
            "gain_over_one_by_one": round(statistics.mean(gains), 3),
            "gain_min": round(min(gains), 3),
            "gain_max": round(max(gains), 3),
            "speed_of_each_median": round(statistics.median(slowest), 3),
            "speed_of_slowest": round(min(slowest), 3),
            "mismatches": wrong,
        }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", default="1,2,4,8")
    parser.add_argument("--strategies", default="streaming")
    parser.add_argument("--drafter", default="eagle")
    parser.add_argument("--cluster", default="jetson-5")
    parser.add_argument("--model", default="vicuna-7b")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--prompts", type=Path, default=BUNDLED / "prompts.jsonl")
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    emulation = load_emulation(options.cluster, options.model, drafter=options.drafter)
    stages = emulation.cluster.num_stages
    config = EngineConfig(stages=stages, drafter=options.drafter, max_num_seqs=16)
    bench = Bench(override(config, {"draft": draft_folder(config)}, where="bench"), emulation)
    prompts = [p.turns[0] for p in load_prompts(options.prompts, limit=options.limit)]
    rows = []
    for strategy in options.strategies.split(","):
        for temperature in (float(t) for t in options.temperatures.split(",")):
            requests = bench.requests(prompts, temperature, options.tokens)
            for size in (int(n) for n in options.requests.split(",")):
                rows.append(bench.row(strategy, requests, size))
                print("  ".join(f"{name} {value}" for name, value in rows[-1].items()), flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
