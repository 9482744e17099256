"""Compares virtual and real time: one emulated cluster in the simulator and as real processes.

    python -m benchmarks.realtime [--cluster jetson-5] [--model vicuna-7b] [--drafter eagle]
        [--strategies ar,...] [--prompts FILE] [--limit 2] [--tokens 48] [--repeats 3]
        [--slowdown 1] [--json FILE]

In real time the head and the stages are processes of this machine that compute and send for
real, each thing padded to its modelled time (EngineConfig.emulate). tokens/s: all tokens after each
prompt's first over their time; of real time the median of the repeats, lowest and highest. With
--slowdown F both clocks emulate a cluster F times as slow, tokens/s are given times F: a machine
too busy or too small to keep the pace then still can. Every text is compared with `ar`'s in the
simulator. Exit code 1 where a text differs or a strategy is more than 5 % apart.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path

import torch

from flowspec.bench.prompts import load_prompts
from flowspec.cli.common import BUNDLED, draft_folder, split_folder
from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import read_emulation
from flowspec.engine.build import HeadParts, build_stage, decoding_of, load_head_parts
from flowspec.engine.engine import Engine, generate
from flowspec.engine.local import LocalEngine
from flowspec.engine.simulated import emulated_engine
from flowspec.request import Request, SamplingParams
from flowspec.speculation.strategies import STRATEGIES
from flowspec.tokenizer import render_chat

MOST_APART = 0.05


class Bench:
    """One split of the bundled model, on both clocks."""

    def __init__(self, options: argparse.Namespace) -> None:
        names = f"{options.cluster}:{options.model}"
        self.slowdown: float = options.slowdown
        self.emulation = read_emulation(names, drafter=options.drafter, slowdown=self.slowdown)
        config = EngineConfig(
            stages=self.emulation.cluster.num_stages,
            drafter=options.drafter,
            emulate=names,
            emulate_slowdown=self.slowdown,
            timeout_s=600.0,
        )
        self.config = config.changed(draft=draft_folder(config))
        self.parts: HeadParts = load_head_parts(self.config, split_folder(self.config))
        self.prompts = [
            render_chat(self.parts.tokenizer, [{"role": "user", "content": prompt.turns[0]}])
            for prompt in load_prompts(options.prompts, limit=options.limit)
        ]
        self.num_tokens: int = options.tokens
        self.texts: dict[int, tuple[int, ...]] = {}
        self.mismatches = 0
        self.next_id = 0

    def tokens_per_s(self, engine: Engine, strategy: str) -> float:
        """Ask all prompts once, one after the other."""
        engine.forget()
        decoding = decoding_of(self.config.changed(strategy=strategy))
        tokens, seconds = 0, 0.0
        for seed, prompt in enumerate(self.prompts, start=1):
            self.next_id += 1
            asked = Request(
                id=self.next_id,
                prompt=prompt,
                sampling=SamplingParams(seed=seed),
                max_new_tokens=self.num_tokens,
                decoding=decoding,
            )
            answer = generate(engine, asked)
            self.mismatches += self.texts.setdefault(seed, answer.tokens) != answer.tokens
            tokens += answer.stats.num_tokens - 1
            seconds += answer.stats.finished_at - answer.stats.first_token_at
        return tokens / seconds * self.slowdown

    def virtual(self, strategy: str) -> float:
        """Measure on the simulator's clock; the result is always the same."""
        self.next_id = 0
        stages = [
            build_stage(self.parts.folder, rank)
            for rank in range(1, self.emulation.cluster.num_stages + 1)
        ]
        config = self.config.changed(kept_prefixes=0)
        engine = emulated_engine(config, self.parts, [s[0] for s in stages], self.emulation)
        return self.tokens_per_s(engine, strategy)

    def real(self, strategy: str, repeats: int) -> list[float]:
        """Measure on this machine's clock."""
        self.next_id = 0
        with LocalEngine(self.config.changed(kept_prefixes=0), self.parts) as engine:
            return sorted(self.tokens_per_s(engine, strategy) for _ in range(repeats))


def main() -> None:
    """Print the table; exit with 1 if a text or a speed differs too much."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cluster", default="jetson-5")
    parser.add_argument("--model", default="vicuna-7b")
    parser.add_argument("--drafter", default="eagle")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--prompts", type=Path, default=BUNDLED / "prompts.jsonl")
    parser.add_argument("--limit", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--slowdown", type=float, default=1.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options)
    rows = []
    print("| strategy | virtual tokens/s | real tokens/s | lowest | highest | real / virtual |")
    print("|---|---|---|---|---|---|")
    for strategy in options.strategies.split(","):
        virtual = bench.virtual(strategy)
        runs = bench.real(strategy, options.repeats)
        middle = statistics.median(runs)
        figures = (virtual, middle, runs[0], runs[-1])
        row = [strategy, *(f"{value:.2f}" for value in figures), f"{middle / virtual:.3f}"]
        print("| " + " | ".join(row) + " |", flush=True)
        rows.append({"strategy": strategy, "virtual": virtual, "real": runs})
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    apart = [
        row["strategy"]
        for row in rows
        if abs(statistics.median(row["real"]) / row["virtual"] - 1) > MOST_APART
    ]
    if bench.mismatches:
        sys.exit(f"error: {bench.mismatches} answers differ in text")
    if apart:
        sys.exit(f"error: more than {MOST_APART:.0%} apart: {', '.join(apart)}")


if __name__ == "__main__":
    main()
