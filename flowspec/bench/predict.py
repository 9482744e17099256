"""Predicts the speed of a cluster: the bundled model stands in for the emulated one."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import Emulation
from flowspec.engine.build import HeadParts
from flowspec.engine.engine import generate
from flowspec.engine.simulated import emulated_engine
from flowspec.request import Request, SamplingParams
from flowspec.stage.stage import Stage
from flowspec.weights.load import load_stage_range
from flowspec.weights.split_plan import even_layers


def stand_in_stages(folder: Path, num_layers: int, num_stages: int) -> list[Stage]:
    """Build `num_stages` stages from the bundled model's layers (each a shard of `folder`).

    Raises ValueError when it has fewer layers.
    """
    stages, first = [], 0
    for rank, count in enumerate(even_layers(num_layers, num_stages), start=1):
        model = load_stage_range(folder, first, first + count, verify=False)
        stages.append(Stage(rank, num_stages, model))
        first += count
    return stages


def predict_speeds(
    config: EngineConfig,
    parts: HeadParts,
    stages: Sequence[Stage],
    emulation: Emulation,
    strategies: Sequence[str],
    prompts: Sequence[str],
    *,
    num_tokens: int,
) -> Mapping[str, float]:
    """Return tokens/s after the first token, by strategy; greedy, all prompts together."""
    speeds = {}
    for strategy in strategies:
        cluster = emulated_engine(config.changed(strategy=strategy), parts, stages, emulation)
        tokens = seconds = 0.0
        for number, prompt in enumerate(prompts, start=1):
            request = Request(
                id=number,
                prompt=parts.prompt_of([{"role": "user", "content": prompt}]),
                sampling=SamplingParams(temperature=0.0),
                # end tokens are ignored, so all answers have the same length
                max_new_tokens=num_tokens,
            )
            stats = generate(cluster, request).stats
            tokens += stats.num_tokens - 1
            seconds += stats.finished_at - stats.first_token_at
        speeds[strategy] = tokens / seconds
    return speeds
