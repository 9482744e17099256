"""Soak: many requests, or one very long answer, over real processes; the memory must stay flat.

    python -m tests.stress.soak --requests 1000
    python -m tests.stress.soak --tokens 10000 [--temperature 1] [--json FILE]

It runs the bundled model in processes on this machine. Every answer must be the target's own, which
another process computes before the measurement. It samples RssAnon, the memory that a process owns
alone, of the head (this process) and of each stage; glibc is told to return freed memory at once,
so that the figure is memory in use. Memory is flat if neither the line fitted through the last half
of the samples, nor the median of the last samples against that of the middle ones, grows by more
than --bound-mib. The exit code is 1 for a wrong answer or growing memory. Linux only.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch

from flowspec.bench.prompts import load_prompts
from flowspec.cli.common import BUNDLED
from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts, load_head_parts
from flowspec.engine.engine import generate
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.request import Request, SamplingParams, TokensOut
from flowspec.speculation.strategies import find_strategy
from flowspec.tokenizer import render_chat
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.load import load_whole
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import even_layers, plan_split

MIB = 1 << 20
MIN_SAMPLES = 12  # fewer are too few for a slope
NUM_SAMPLES = 100  # over a soak
ALONE_TIMEOUT_S = 3600.0
GIVE_BACK = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
}
AROUND = 5  # samples in each median
DTYPE = "float32"


@dataclass(frozen=True, slots=True)
class Sample:
    """RssAnon in bytes by process, after `done` requests or tokens, and the time."""

    done: int
    seconds: float
    memory: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Growth:
    """A process's MiB at start, middle and end, and its growth over the last half, in two ways."""

    process: str
    start: float
    middle: float
    end: float
    by_slope: float  # the fitted line's rise
    by_median: float  # last samples minus middle ones

    def is_flat(self, bound_mib: float) -> bool:
        """Whether neither of the two exceeds the bound."""
        return max(self.by_slope, self.by_median) <= bound_mib


def growth(samples: Sequence[Sample]) -> list[Growth]:
    """Return each process's memory over the last half. Raises ValueError for too few samples."""
    if len(samples) < MIN_SAMPLES:
        raise ValueError(f"{len(samples)} samples, at least {MIN_SAMPLES} needed; soak longer")
    half = len(samples) // 2
    done = np.array([sample.done for sample in samples], dtype=float)
    found = []
    for process in samples[0].memory:
        mib = np.array([sample.memory[process] / MIB for sample in samples])
        slope = float(np.polyfit(done[half:], mib[half:], 1)[0])
        middle = float(np.median(mib[half : half + AROUND]))
        end = float(np.median(mib[-AROUND:]))
        rise = slope * float(done[-1] - done[half])
        found.append(Growth(process, float(mib[0]), middle, end, rise, end - middle))
    return found


def private_bytes(pid: int) -> int:
    """Return RssAnon of a process. Raises ValueError when the system does not report it."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError as error:
        raise ValueError(f"memory of process {pid} cannot be read: {error}") from None
    raise ValueError("this system does not report RssAnon; the soak needs Linux")


class Watch:
    """Takes the samples of one soak."""

    def __init__(self, cluster: LocalEngine, expected: int) -> None:
        children = cluster.children.items()
        self.pids = {"head": os.getpid(), **{f"stage {rank}": c.pid for rank, c in children}}
        self.expected = expected
        self.every = max(1, expected // NUM_SAMPLES)
        self.start = time.monotonic()
        self.samples: list[Sample] = []

    def see(self, done: int) -> None:
        """Take a sample if one is due."""
        if self.samples and done < min(self.samples[-1].done + self.every, self.expected):
            return
        memory = {name: private_bytes(pid) for name, pid in self.pids.items()}
        self.samples.append(Sample(done, time.monotonic() - self.start, memory))

    def rates(self) -> tuple[float, float]:
        """Return units per second over the first and the last tenth of the samples."""
        tenth = max(1, len(self.samples) // 10)
        pairs = (self.samples[0], self.samples[tenth]), (self.samples[-1 - tenth], self.samples[-1])
        first, last = ((b.done - a.done) / (b.seconds - a.seconds) for a, b in pairs)
        return first, last


def soak_requests(
    cluster: LocalEngine, cases: Sequence[Request], answers: Sequence[Sequence[int]], count: int
) -> tuple[Watch, int]:
    """Send `count` requests, the cases in turn; return the samples and count of wrong answers."""
    watch, wrong = Watch(cluster, count), 0
    for number in range(count):
        case = number % len(cases)
        wrong += list(generate(cluster, cases[case]).tokens) != list(answers[case])
        watch.see(number + 1)
    return watch, wrong


def soak_tokens(cluster: LocalEngine, request: Request, answer: Sequence[int]) -> tuple[Watch, int]:
    """One long answer; the samples, and 1 if it was wrong."""
    watch, done = Watch(cluster, request.max_new_tokens), 0
    stream = cluster.submit(request)
    for event in stream:
        if isinstance(event, TokensOut):
            done += len(event.tokens)
            watch.see(done)
    return watch, int(list(stream.result().tokens) != list(answer))


@dataclass(frozen=True, slots=True)
class Alone:
    """The target's own answer to a request: its tokens, and tokens per second at start and end."""

    tokens: list[int]
    first_rate: float
    last_rate: float


def answers_alone(folder: Path, max_context: int, cases: Sequence[Request]) -> list[Alone]:
    """Compute the target's own answers in a process that ends afterwards."""
    with ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn")) as pool:
        job = pool.submit(_generate_alone, folder, max_context, cases)
        return job.result(timeout=ALONE_TIMEOUT_S)


def _generate_alone(folder: Path, max_context: int, cases: Sequence[Request]) -> list[Alone]:
    torch.set_num_threads(1)
    target = LocalTarget(load_whole(folder, dtype=DTYPE), max_context)
    found = []
    for case in cases:
        tokens, times = [], [time.monotonic()]
        for token, _ in target.stream(case):
            tokens.append(token)
            times.append(time.monotonic())
            if token in (case.eos_token_ids or ()) or len(tokens) == case.max_new_tokens:
                break
        tenth = max(1, len(tokens) // 10)
        first, last = times[1 + tenth] - times[1] if len(tokens) > tenth else 1.0, times[-1]
        found.append(Alone(tokens, tenth / first, tenth / (last - times[-1 - tenth])))
    return found


def short_cases(parts: HeadParts, max_new_tokens: int) -> list[Request]:
    """Return the bundled prompts, each greedy and sampled."""
    prompts = [prompt.turns[0] for prompt in load_prompts(BUNDLED / "prompts.jsonl")]
    return [
        Request(
            prompt=render_chat(parts.tokenizer, [{"role": "user", "content": prompt}]),
            sampling=SamplingParams(temperature=temperature, seed=seed),
            max_new_tokens=max_new_tokens,
            eos_token_ids=parts.eos_token_ids,
        )
        for seed, prompt in enumerate(prompts)
        for temperature in (0.0, 1.0)
    ]


def long_case(parts: HeadParts, max_new_tokens: int, temperature: float) -> Request:
    """Return one prompt whose answer no end token ends."""
    return replace(
        short_cases(parts, max_new_tokens)[0],
        sampling=SamplingParams(temperature=temperature, seed=1),
        eos_token_ids=(),
    )


def split_demo(folder: Path, stages: int, context: int) -> Path:
    """Split the bundled target in `folder`, with its context limit raised to at least `context`.

    RoPE continues beyond the trained positions: the text there is nonsense, but the target's own.
    """
    copy = folder / "target"
    shutil.copytree(BUNDLED / "target", copy)
    config = json.loads((copy / "config.json").read_text())
    config["max_position_embeddings"] = max(context, config["max_position_embeddings"])
    (copy / "config.json").write_text(json.dumps(config))
    checkpoint = open_checkpoint(copy)
    layers = even_layers(checkpoint.config.num_layers, stages)
    run_split(plan_split(checkpoint, layers=layers, dtype=None), folder / "split", model_id="soak")
    return folder / "split"


@contextmanager
def _parts(options: argparse.Namespace) -> Iterator[tuple[EngineConfig, HeadParts]]:
    with tempfile.TemporaryDirectory(prefix="flowspec-soak-") as name:
        split = split_demo(Path(name), options.stages, context=options.tokens + 256)
        config = EngineConfig(
            model=str(split),
            draft=str(BUNDLED / "eagle"),
            strategy=options.strategy,
            dtype=DTYPE,
        )
        yield config, load_head_parts(config, split)


def _report(watch: Watch, unit: str, wrong: int, bound_mib: float) -> bool:
    first, last = watch.rates()
    print(f"{unit}: {watch.samples[-1].done} in {watch.samples[-1].seconds:.0f} s, {wrong} wrong")
    print(f"{first:.1f} {unit}/s over the first tenth, {last:.1f} over the last")
    print("RssAnon in MiB    start   middle      end   growth of the last half (line, median)")
    flat = True
    for found in growth(watch.samples):
        verdict = "" if found.is_flat(bound_mib) else f"  GROWS by more than {bound_mib} MiB"
        flat = flat and not verdict
        print(
            f"  {found.process:12} {found.start:8.2f} {found.middle:8.2f} {found.end:8.2f}"
            f"   {found.by_slope:+.3f} {found.by_median:+.3f}{verdict}"
        )
    return flat and not wrong


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--requests", type=int, default=0, help="short requests, one by one")
    parser.add_argument("--tokens", type=int, default=0, help="length of one long answer")
    parser.add_argument("--max-new-tokens", type=int, default=16, help="of a short answer [16]")
    parser.add_argument("--temperature", type=float, default=0.0, help="T of the long answer [0]")
    parser.add_argument("--strategy", default="streaming", help="[streaming]")
    parser.add_argument("--stages", type=int, default=2, help="stage processes [2]")
    parser.add_argument("--bound-mib", type=float, default=4.0, help="growth allowed, MiB [4]")
    parser.add_argument("--json", type=Path, help="write every sample to this file")
    options = parser.parse_args()
    if options.requests < 1 and options.tokens < 1:
        parser.error("give --requests, --tokens or both")
    return options


def main() -> int:
    """Soak as the options say; return 0 if every answer was right and the memory flat."""
    options = _options()
    find_strategy(options.strategy)
    if not os.environ.keys() >= GIVE_BACK.keys():  # glibc reads it when a process starts
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **GIVE_BACK})
    torch.set_num_threads(1)
    good, samples = True, {}
    with _parts(options) as (config, parts):
        if options.requests:
            cases = short_cases(parts, options.max_new_tokens)
            alone = answers_alone(parts.folder, parts.max_context, cases)
            with LocalEngine(config, parts) as cluster:
                answers = [one.tokens for one in alone]
                watch, wrong = soak_requests(cluster, cases, answers, options.requests)
            samples["requests"] = watch.samples
            good = _report(watch, "requests", wrong, options.bound_mib) and good
        if options.tokens:
            case = long_case(parts, options.tokens, options.temperature)
            (alone_long,) = answers_alone(parts.folder, parts.max_context, [case])
            with LocalEngine(config, parts) as cluster:
                watch, wrong = soak_tokens(cluster, case, alone_long.tokens)
            samples["tokens"] = watch.samples
            good = _report(watch, "tokens", wrong, options.bound_mib) and good
            rates = f"{alone_long.first_rate:.1f} and {alone_long.last_rate:.1f}"
            print(f"the target alone: {rates} tokens/s over its first and last tenth")
    if options.json:
        content = {name: [asdict(sample) for sample in taken] for name, taken in samples.items()}
        options.json.write_text(json.dumps(content))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
