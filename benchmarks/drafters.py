"""Compares drafters: accepted length and streaming speed on an emulated cluster.

    python -m benchmarks.drafters [--drafters eagle,eagle+merge,ngram] [--prompts FILE|FOLDER]
        [--limit 3] [--draft NAME=FOLDER ...] [--cluster NAME|FILE] [--model NAME|FILE]
        [--json FILE]

A drafter is its name, with `+merge` and `+calibrate` where these are to be on. All forwards are
really computed (bundled model); time is virtual, that of the emulated model on the emulated
cluster, where each kind of drafter has its own cost. tau: tokens per verdict of serial_pp, one
verdict per round. tokens/s: streaming, all tokens after each prompt's first divided by their time.
Every text must be the same for all drafters; the exit code is 1 if one is not.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from flowspec.bench.prompts import load_prompts
from flowspec.cli.common import BUNDLED, draft_folder, split_folder
from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import Emulation, load_emulation
from flowspec.engine.build import HeadParts, build_stage, load_head_parts
from flowspec.engine.engine import generate
from flowspec.engine.simulated import SimulatedEngine, emulated_engine
from flowspec.request import DecodeStats, Request, SamplingParams
from flowspec.speculation.drafters import parse_drafter
from flowspec.tokenizer import render_chat

DEFAULT = "eagle,eagle+merge,eagle+calibrate,eagle+merge+calibrate,ngram,ngram+calibrate"


@dataclass(slots=True)
class Row:
    """Sums over the prompts of one drafter at one temperature."""

    drafter: str
    temperature: float
    tokens: int = 0
    verdicts: int = 0
    seconds: float = 0.0
    rows: int = 0
    prompts: int = 0

    def count(self, serial: DecodeStats, streaming: DecodeStats) -> None:
        """Add one prompt's two runs."""
        self.prompts += 1
        self.tokens += serial.num_tokens - 1
        self.verdicts += serial.num_verdicts
        self.seconds += streaming.finished_at - streaming.first_token_at
        self.rows += streaming.num_rows_sent

    def figures(self) -> dict[str, str | float]:
        """Return the reported figures."""
        return {
            "drafter": self.drafter,
            "T": self.temperature,
            "prompts": self.prompts,
            "tokens": self.tokens,
            "tau": round(self.tokens / max(self.verdicts, 1), 3),
            "tokens_per_s": round(self.tokens / max(self.seconds, 1e-9), 2),
            "rows_per_token": round(self.rows / max(self.tokens, 1), 1),
        }


def requests(parts: HeadParts, options: argparse.Namespace, temperature: float) -> list[Request]:
    """Return the prompts that leave room for the answer; the seed is the prompt's position."""
    found = []
    for seed, prompt in enumerate(load_prompts(options.prompts, limit=options.limit), start=1):
        ids = render_chat(parts.tokenizer, [{"role": "user", "content": prompt.turns[0]}])
        if len(ids) + options.max_tokens <= parts.max_context:
            sampling = SamplingParams(temperature=temperature, seed=seed)
            found.append(
                Request(
                    id=seed,
                    prompt=ids,
                    sampling=sampling,
                    max_new_tokens=options.max_tokens,
                    eos_token_ids=parts.eos_token_ids,
                )
            )
    return found


def cluster_of(config: EngineConfig, parts: HeadParts, emulation: Emulation) -> SimulatedEngine:
    """A fresh emulated cluster: what it learns of costs and scores is its own."""
    stages = [
        build_stage(parts.folder, rank)[0] for rank in range(1, emulation.cluster.num_stages + 1)
    ]
    return emulated_engine(config, parts, stages, emulation)


def run(
    name: str, options: argparse.Namespace, texts: dict[tuple[float, int], tuple[int, ...]]
) -> Iterator[Row]:
    """Yield a row per temperature; `texts` holds the first drafter's answers."""
    drafter, decode = parse_drafter(name)
    folders = dict(pair.split("=", 1) for pair in options.draft)
    emulation = load_emulation(
        options.cluster, options.model, drafter=drafter, stages=options.stages
    )
    stages = emulation.cluster.num_stages
    config = EngineConfig(drafter=drafter, draft=folders.get(drafter, ""), stages=stages)
    config = config.changed(draft=draft_folder(config), decode=decode)
    parts = load_head_parts(config, split_folder(config))
    for temperature in options.temperatures:
        row = Row(name, temperature)
        runs = []
        for strategy in ("serial_pp", "streaming"):
            # coupled drafting for both: tau is then of the same drafts
            chosen = config.changed(strategy=strategy, decode={**decode, "coupled_drafting": True})
            runs.append(cluster_of(chosen, parts, emulation))
        for asked in requests(parts, options, temperature):
            answers = [generate(cluster, asked) for cluster in runs]
            for answer in answers:
                same = texts.setdefault((temperature, asked.id), answer.tokens)
                if answer.tokens != same:
                    sys.exit(f"error: {name}, prompt {asked.id}, T={temperature}: another text")
            row.count(answers[0].stats, answers[1].stats)
        yield row


def main() -> None:
    """Print the table of all drafters."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--drafters", default=DEFAULT)
    parser.add_argument("--prompts", type=Path, default=BUNDLED / "prompts.jsonl")
    parser.add_argument("--limit", type=int, default=3, help="prompts per file")
    parser.add_argument("--draft", action="append", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--cluster", default="jetson-5")
    parser.add_argument("--model", default="vicuna-7b")
    parser.add_argument("--stages", type=int, default=None)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    options.temperatures = [float(value) for value in options.temperatures.split(",")]
    torch.set_num_threads(1)
    texts: dict[tuple[float, int], tuple[int, ...]] = {}
    rows = []
    print("| drafter | T | prompts | tokens | tau | tokens/s | rows per token |")
    print("|---|---|---|---|---|---|---|")
    for name in options.drafters.split(","):
        for row in run(name, options, texts):
            rows.append(row.figures())
            print("| " + " | ".join(str(value) for value in rows[-1].values()) + " |", flush=True)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
