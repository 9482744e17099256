"""The records of a made-up benchmark, in which strategies differ as in a real one."""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flowspec.bench.datasets import DATASETS
from flowspec.bench.records import Sample
from tests.support.samples import sample

SPEEDS = {"ar": 1.0, "serial_pp": 2.9, "naive_pp": 1.8, "pipedec": 2.2, "flowspec": 2.6}
SPEEDS |= {"pruned_pp": 2.1, "streaming": 4.6}


def benchmark(
    strategies: Iterable[str] = tuple(SPEEDS),
    datasets: Sequence[str] = DATASETS,
    *,
    questions: int = 4,
    temperatures: Sequence[float] = (0.0,),
    **changes: Any,
) -> Iterator[Sample]:
    """Yield a sample for each combination; `changes` apply to all."""
    for temperature in temperatures:
        for strategy in strategies:
            for place, dataset in enumerate(datasets):
                for question in range(questions):
                    random = np.random.default_rng([place, question, len(strategy)])
                    shared = np.random.default_rng([place, question])
                    yield _sample(strategy, place, random, shared.gamma(8.0, 1.0), temperature)(
                        dataset=dataset, question=str(question), **changes
                    )


def _sample(
    strategy: str, place: int, random: np.random.Generator, hardness: float, temperature: float
) -> Any:
    gain = SPEEDS.get(strategy, 2.0)
    speed = 3.3 * (1 + (gain - 1) * (1 - 0.12 * place) * (1 - 0.2 * temperature)) ** 1.0
    speed *= float(random.normal(1.0, 0.05)) * (0.8 + hardness / 40)
    tokens = 96
    busy = np.clip(0.25 * gain / (1 + 0.05 * np.arange(4)) ** 0.5, 0.05, 0.9)
    idle = 1.0 - busy
    shares = {"ar": (0.0, 0.93, 0.05, 0.02)}.get(strategy, (0.35, 0.3, 0.2, 0.15))
    causes = ("head drafting", "nothing alive to run", "waiting for link", "host overhead")
    runs: Sequence[int] = ()
    if strategy != "ar":
        runs = tuple(int(n) for n in np.minimum(random.geometric(0.22, size=21) - 1, 14))

    def build(**changes: Any) -> Sample:
        values: dict[str, Any] = {
            "strategy": strategy,
            "temperature": temperature,
            "stages": 4,
            "tokens": tokens,
            "decode_s": (tokens - 1) / speed,
            "runs": runs,
            "tau": 1.0 if strategy == "ar" else 3.1,
            "alpha": () if strategy == "ar" else (0.78, 0.71, 0.66, 0.6, 0.5),
            "drafter_busy": 0.0 if strategy == "ar" else 0.45,
            "stage_busy": tuple(float(b) for b in busy),
            "stage_idle": tuple(
                {c: float(i * s) for c, s in zip(causes, shares, strict=True)} for i in idle
            ),
            "bound_share": 0.8 if strategy == "streaming" else None,
        }
        return sample(**(values | changes))

    return build


def write(path: Path, samples: Iterable[Sample]) -> Path:
    """Write the samples as a benchmark does."""
    path.write_text("".join(json.dumps(asdict(one)) + "\n" for one in samples))
    return path
