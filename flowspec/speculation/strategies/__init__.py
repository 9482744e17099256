"""The decoding strategies by name. Adding one: one file here, one row in the table."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from flowspec.config import DecodeConfig, new_name
from flowspec.speculation.strategies.ablations import (
    Apart,
    Draining,
    Eager,
    FixedSize,
    Queued,
    Ticking,
    Without,
)
from flowspec.speculation.strategies.ar import Ar
from flowspec.speculation.strategies.base import Strategy
from flowspec.speculation.strategies.flowspec import FlowSpec
from flowspec.speculation.strategies.naive_pp import NaivePp
from flowspec.speculation.strategies.pipedec import PipeDec
from flowspec.speculation.strategies.pruned_pp import PrunedPp
from flowspec.speculation.strategies.serial_pp import SerialPp
from flowspec.speculation.strategies.streaming import Streaming


@dataclass(frozen=True, slots=True)
class StrategySpec:
    """A strategy, its defaults, whether it needs a drafter, and what it takes from the pipeline.

    `ignores`: the parameters of a DecodeConfig that change nothing for it.
    """

    make: Callable[[], Strategy]
    defaults: DecodeConfig
    about: str
    drafts: bool = True
    without: Without | None = None
    ignores: frozenset[str] = frozenset()


_ALL = tuple(field.name for field in fields(DecodeConfig))
_STREAMED = frozenset({"draft_width", "max_in_flight"})  # streaming alone has a use for these

STRATEGIES: dict[str, StrategySpec] = {
    "ar": StrategySpec(
        Ar,
        DecodeConfig(),
        "plain pipeline, one token per trip",
        drafts=False,
        ignores=frozenset(_ALL) - {"chunked_prefill_size"},
    ),
    "serial_pp": StrategySpec(
        SerialPp,
        DecodeConfig(num_draft_tokens=60),
        "whole tree in one segment, round by round",
        ignores=_STREAMED | {"segment_size"},
    ),
    "naive_pp": StrategySpec(
        NaivePp,
        DecodeConfig(num_draft_tokens=80),
        "tree in chunks, one verdict per round",
        ignores=_STREAMED | {"segment_size"},
    ),
    "pruned_pp": StrategySpec(
        PrunedPp,
        DecodeConfig(num_draft_tokens=80, segment_size=16, refresh=False),
        "segments by score, pruned with every verdict, no growth",
        ignores=_STREAMED,
    ),
    "pipedec": StrategySpec(
        PipeDec,
        DecodeConfig(num_draft_tokens=256, segment_size=16, draft_topk=16, refresh=False),
        "one tree level per tick (PipeDec)",
        ignores=_STREAMED | {"num_draft_steps"},
    ),
    "flowspec": StrategySpec(
        FlowSpec,
        DecodeConfig(num_draft_tokens=80, segment_size=16),
        "the published FlowSpec: prune and expand, drain on a miss",
        ignores=_STREAMED,
    ),
    "streaming": StrategySpec(
        Streaming,
        DecodeConfig(
            segment_size=80,
            num_draft_tokens=800,
            draft_topk=20,
            min_score=0.001,
            coupled_drafting=True,
            calibrate=True,
        ),
        "asynchronous best-first streaming without a drain",
        ignores=frozenset({"num_draft_steps"}),
    ),
}
DEFAULT_STRATEGY = "streaming"


def _streaming(
    about: str,
    make: Callable[[], Strategy] = Streaming,
    without: Without | None = None,
    **defaults: Any,
) -> StrategySpec:
    spec = STRATEGIES[DEFAULT_STRATEGY]
    defaults_then = replace(spec.defaults, **defaults)
    return replace(spec, make=make, defaults=defaults_then, about=about, without=without)


# streaming without one of its mechanisms each; found by name, in no list to choose from
ABLATIONS: dict[str, StrategySpec] = {
    "streaming-ticking": _streaming("with a barrier", Ticking),
    "streaming-queued": _streaming("with a segment waiting before the first stage", Queued),
    "streaming-draining": _streaming("with a drain after a miss", Draining),
    "streaming-eager": _streaming("without just-in-time choice", Eager),
    "streaming-fixed-size": _streaming("without knee-sized segments", FixedSize),
    "streaming-apart": _streaming("with true rows and guesses in forwards of their own", Apart),
    "streaming-stale": _streaming("without feature refresh", refresh=False),
    "streaming-uncalibrated": _streaming("without calibrated scores", calibrate=False),
    "streaming-uncoupled": _streaming("without the shared noise", coupled_drafting=False),
    "streaming-narrow": _streaming("with four nodes a drafter forward", draft_width=4),
    "streaming-merged": _streaming("with n-gram branches", merge=True),
    "streaming-unpruned": _streaming("without in-flight pruning", without=Without.PRUNING),
    "streaming-head-verdict": _streaming(
        "with the verdict on the head", without=Without.LAST_STAGE_VERDICT
    ),
}


def find_strategy(name: str) -> StrategySpec:
    """The row of the table. Raises ValueError listing the known names."""
    name = new_name(name)
    if name in ABLATIONS:
        return ABLATIONS[name]
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def check_taken(name: str, parameters: Iterable[str], *, where: str) -> None:
    """Raise ValueError for a parameter that changes nothing for strategy `name`."""
    ignores = find_strategy(name).ignores
    for parameter in parameters:
        if parameter in ignores:
            takes = ", ".join(key for key in _ALL if key not in ignores)
            raise ValueError(
                f"{where}: {parameter} changes nothing for strategy {name}; it takes: {takes}"
            )


def check_runs_for_real(name: str) -> None:
    """Raise ValueError for a strategy that is unknown, or lacks what every real pipeline has."""
    without = find_strategy(name).without
    if without is not None:
        raise ValueError(
            f"strategy {name} runs on an emulated cluster alone (`flowspec bench` without --real): "
            f"no real pipeline can be had without {without.value}"
        )
