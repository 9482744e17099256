"""The decoding strategies by name. Adding one: one file here, one row in the table."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from flowspec.config import DecodeConfig
from flowspec.strategies.ablations import Draining, Eager, FixedSize, Ticking, Without
from flowspec.strategies.ar import Ar
from flowspec.strategies.base import Strategy
from flowspec.strategies.flowspec import FlowSpec
from flowspec.strategies.naive_pp import NaivePp
from flowspec.strategies.pipedec import PipeDec
from flowspec.strategies.pruned_pp import PrunedPp
from flowspec.strategies.serial_pp import SerialPp
from flowspec.strategies.streaming import Streaming


@dataclass(frozen=True, slots=True)
class StrategySpec:
    """A strategy, its defaults, whether it needs a drafter, and what it takes from the pipeline."""

    make: Callable[[], Strategy]
    defaults: DecodeConfig
    about: str
    drafts: bool = True
    without: Without | None = None


STRATEGIES: dict[str, StrategySpec] = {
    "ar": StrategySpec(Ar, DecodeConfig(), "plain pipeline, one token per trip", drafts=False),
    "serial_pp": StrategySpec(
        SerialPp, DecodeConfig(tree_size=60), "whole tree in one segment, round by round"
    ),
    "naive_pp": StrategySpec(
        NaivePp, DecodeConfig(tree_size=80), "tree in chunks, one verdict per round"
    ),
    "pruned_pp": StrategySpec(
        PrunedPp,
        DecodeConfig(tree_size=80, segment_size=16, refresh=False),
        "segments by score, pruned with every verdict, no growth",
    ),
    "pipedec": StrategySpec(
        PipeDec,
        DecodeConfig(tree_size=256, segment_size=16, topk=16, refresh=False),
        "one tree level per tick (PipeDec)",
    ),
    "flowspec": StrategySpec(
        FlowSpec,
        DecodeConfig(tree_size=80, segment_size=16),
        "the published FlowSpec: prune and expand, drain on a miss",
    ),
    "streaming": StrategySpec(
        Streaming,
        DecodeConfig(
            segment_size=80,
            tree_size=800,
            topk=20,
            min_score=0.001,
            coupled_drafting=True,
            calibrate=True,
        ),
        "asynchronous best-first streaming without a drain",
    ),
}
DEFAULT_STRATEGY = "streaming"
_STREAMING = STRATEGIES[DEFAULT_STRATEGY].defaults
# streaming without one of its mechanisms each; found by name, in no list to choose from
ABLATIONS: dict[str, StrategySpec] = {
    "streaming-ticking": StrategySpec(Ticking, _STREAMING, "with a barrier"),
    "streaming-draining": StrategySpec(Draining, _STREAMING, "with a drain after a miss"),
    "streaming-eager": StrategySpec(Eager, _STREAMING, "without just-in-time choice"),
    "streaming-fixed-size": StrategySpec(FixedSize, _STREAMING, "without knee-sized segments"),
    "streaming-stale": StrategySpec(
        Streaming, replace(_STREAMING, refresh=False), "without feature refresh"
    ),
    "streaming-uncalibrated": StrategySpec(
        Streaming, replace(_STREAMING, calibrate=False), "without calibrated scores"
    ),
    "streaming-uncoupled": StrategySpec(
        Streaming, replace(_STREAMING, coupled_drafting=False), "without the shared noise"
    ),
    "streaming-narrow": StrategySpec(
        Streaming, replace(_STREAMING, draft_width=4), "with four nodes a drafter forward"
    ),
    "streaming-grafted": StrategySpec(
        Streaming, replace(_STREAMING, graft=True), "with n-gram branches"
    ),
    "streaming-unpruned": StrategySpec(
        Streaming, _STREAMING, "without in-flight pruning", without=Without.PRUNING
    ),
    "streaming-head-verdict": StrategySpec(
        Streaming, _STREAMING, "with the verdict on the head", without=Without.LAST_STAGE_VERDICT
    ),
}


def find_strategy(name: str) -> StrategySpec:
    """The row of the table. Raises ValueError listing the known names."""
    if name in ABLATIONS:
        return ABLATIONS[name]
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def check_runs_for_real(name: str) -> None:
    """Raise ValueError for a strategy that is unknown, or lacks what every real pipeline has."""
    without = find_strategy(name).without
    if without is not None:
        raise ValueError(
            f"strategy {name} runs on an emulated cluster alone (`flowspec bench` without --real): "
            f"no real pipeline can be had without {without.value}"
        )
