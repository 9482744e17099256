"""Checks emulated clusters against a closed form and the published testbed.

    python -m benchmarks.emulation [--checks closed_form,ratios,bandwidth]
        [--prompts FILE|FOLDER] [--limit 2] [--tokens 96] [--temperatures 0,1]
        [--cluster jetson-5] [--model vicuna-7b] [--strategies naive_pp,pipedec,flowspec]

It uses the bundled models, the EAGLE head, the virtual clock, and the main table of
config/eval.yaml. closed_form: seconds per token of plain decoding, run and computed
(cost_model/emulation.py: ar_seconds_per_token). ratios: strategies on one cluster, by default the
reference testbed with Vicuna-7B; tokens/s from the submission to the last token, as the publication
counts them, and their ratio to naive_pp; means over the sets. bandwidth: the same at 125 to 1000
Mbit/s, on the set named mt_bench, else the first. Prompts that leave no room for the answer are
left out.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import torch

from flowspec.bench.experiment import read_table
from flowspec.bench.prompts import Prompt, load_prompts
from flowspec.cli.bench import TABLES
from flowspec.cli.common import BUNDLED, draft_folder, split_folder
from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import Emulation, load_emulation
from flowspec.engine.build import HeadParts, build_stage, load_head_parts
from flowspec.engine.engine import generate
from flowspec.engine.simulated import emulated_engine
from flowspec.request import Request, RequestOutput, SamplingParams
from flowspec.stage.stage import Stage
from flowspec.tokenizer import render_chat

CLOSED_FORM = (
    ("jetson-5", "vicuna-7b"),
    ("jetson-5", "vicuna-13b-4bit"),
    ("jetson-5-125mbit", "vicuna-7b"),
    ("jetson-9", "vicuna-7b"),
    ("mixed-5", "llama-3.1-8b"),
    ("home-5", "qwen3-8b-4bit"),
    ("wifi-5", "llama-2-7b"),
    ("pi-5", "llama-3.1-8b-4bit"),
    ("agx-5", "llama-3.1-70b"),
)
STRATEGIES = ("ar", "naive_pp", "pipedec", "flowspec", "serial_pp", "streaming")
SWEEP = ("jetson-5-125mbit", "jetson-5-250mbit", "jetson-5-500mbit", "jetson-5")
Sets = Mapping[str, Sequence[Request]]


@cache
def loaded(num_stages: int) -> tuple[EngineConfig, HeadParts, tuple[Stage, ...]]:
    """The bundled model in so many stages."""
    config = EngineConfig(stages=num_stages, kept_prefixes=0)
    config = config.changed(draft=draft_folder(config))
    parts = load_head_parts(config, split_folder(config))
    stages = [build_stage(parts.folder, rank)[0] for rank in range(1, num_stages + 1)]
    return config, parts, tuple(stages)


def answers(
    emulation: Emulation, strategy: str, requests: Sequence[Request]
) -> list[RequestOutput]:
    """One after the other on a fresh cluster."""
    config, parts, stages = loaded(emulation.cluster.num_stages)
    tuned = read_table(TABLES, "main").get(strategy, {})
    config = config.changed(strategy=strategy, decode=tuned)
    cluster = emulated_engine(config, parts, stages, emulation)
    return [generate(cluster, request) for request in requests]


def speed(completions: Sequence[RequestOutput]) -> float:
    """Tokens/s, prefill included."""
    tokens = sum(c.stats.num_tokens for c in completions)
    return tokens / sum(c.stats.finished_at - c.stats.submitted_at for c in completions)


def request_of(prompt: Prompt, number: int, tokens: int, temperature: float) -> Request:
    """Make a request that ignores end tokens, so that every answer has the same length."""
    _, parts, _ = loaded(4)
    ids = render_chat(parts.tokenizer, [{"role": "user", "content": prompt.turns[0]}])
    sampling = SamplingParams(temperature=temperature, seed=number)
    return Request(id=number, prompt=ids, sampling=sampling, max_new_tokens=tokens)


def sets_of(prompts: Sequence[Prompt], tokens: int, temperature: float) -> Sets:
    """Group requests by the name of their set."""
    _, parts, _ = loaded(4)
    found: dict[str, list[Request]] = {}
    for number, prompt in enumerate(prompts, start=1):
        asked = request_of(prompt, number, tokens, temperature)
        if len(asked.prompt) + tokens <= parts.max_context:
            found.setdefault(prompt.source, []).append(asked)
    return found


def check_closed_form(prompt: Prompt) -> None:
    """Print measured and computed seconds per token."""
    print("\n| cluster | model | layers | run, s/token | closed form | difference |")
    print("|---|---|---|---|---|---|")
    for cluster, model in CLOSED_FORM:
        emulation = load_emulation(cluster, model, drafter="eagle")
        asked = request_of(prompt, 1, 33, 0.0)
        (answer,) = answers(emulation, "ar", [asked])
        stats = answer.stats
        run = (stats.finished_at - stats.first_token_at) / (stats.num_tokens - 1)
        computed = emulation.ar_seconds_per_token(len(asked.prompt) + stats.num_tokens // 2)
        layers = "+".join(str(count) for count in emulation.layers)
        figures = f"{run:.4f} | {computed:.4f} | {run / computed - 1:+.2%}"
        print(f"| {cluster} | {model} | {layers} | {figures} |", flush=True)


def check_ratios(
    sets: Sets, temperature: float, emulation: Emulation, strategies: Sequence[str]
) -> None:
    """Print tokens/s per set and the mean ratio to naive_pp."""
    print(f"\n| T = {temperature:g}, tokens/s | {' | '.join(sets)} | mean | over naive_pp | tau |")
    print("|---" * (len(sets) + 4) + "|")
    means: dict[str, float] = {}
    for strategy in strategies:
        done = {name: answers(emulation, strategy, requests) for name, requests in sets.items()}
        speeds = [speed(completions) for completions in done.values()]
        means[strategy] = statistics.mean(speeds)
        stats = [c.stats for completions in done.values() for c in completions]
        tau = sum(s.num_tokens - 1 for s in stats) / max(1, sum(s.num_verdicts for s in stats))
        over = means[strategy] / means["naive_pp"] if "naive_pp" in means else float("nan")
        row = [strategy, *(f"{s:.2f}" for s in (*speeds, means[strategy], over, tau))]
        print(f"| {' | '.join(row)} |", flush=True)


def check_bandwidth(sets: Sets) -> None:
    """Print tokens/s per link rate."""
    name = "mt_bench" if "mt_bench" in sets else next(iter(sets))
    print(f"\n| {name}, T = 0, tokens/s | {' | '.join(SWEEP)} |")
    print("|---" * (len(SWEEP) + 1) + "|")
    for strategy in ("flowspec", "pipedec", "naive_pp", "streaming"):
        speeds = [
            speed(answers(load_emulation(c, "vicuna-7b", drafter="eagle"), strategy, sets[name]))
            for c in SWEEP
        ]
        print(f"| {strategy} | {' | '.join(f'{s:.2f}' for s in speeds)} |", flush=True)


def main() -> None:
    """Run the checks and print their tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--checks", default="closed_form,ratios,bandwidth")
    parser.add_argument("--prompts", type=Path, default=BUNDLED / "prompts.jsonl")
    parser.add_argument("--limit", type=int, default=2, help="prompts per file")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--cluster", default="jetson-5", help="of the ratios")
    parser.add_argument("--model", default="vicuna-7b", help="of the ratios")
    parser.add_argument("--strategies", default=",".join(STRATEGIES), help="of the ratios")
    options = parser.parse_args()
    torch.set_num_threads(1)
    prompts = load_prompts(options.prompts, limit=options.limit)
    checks = options.checks.split(",")
    if "closed_form" in checks:
        check_closed_form(prompts[0])
    temperatures = [float(value) for value in options.temperatures.split(",")]
    for temperature in temperatures if "ratios" in checks else ():
        emulation = load_emulation(options.cluster, options.model, drafter="eagle")
        sets = sets_of(prompts, options.tokens, temperature)
        check_ratios(sets, temperature, emulation, options.strategies.split(","))
    if "bandwidth" in checks:
        check_bandwidth(sets_of(prompts, options.tokens, 0.0))


if __name__ == "__main__":
    main()
