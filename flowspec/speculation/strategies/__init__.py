"""The table of decoding strategies. A new one takes one file here and one row in the table."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from flowspec.config import override
from flowspec.head.request_state import RequestState
from flowspec.request import Decoding
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
from flowspec.speculation.strategies.flowspec import FlowSpec, FlowSpecConfig
from flowspec.speculation.strategies.naive_pp import NaivePp, NaivePpConfig
from flowspec.speculation.strategies.pipedec import PipeDec, PipeDecConfig
from flowspec.speculation.strategies.pruned_pp import PrunedPp, PrunedPpConfig
from flowspec.speculation.strategies.serial_pp import SerialPp
from flowspec.speculation.strategies.streaming import Streaming, StreamingConfig
from flowspec.speculation.strategy import (
    DraftingConfig,
    ResolvedDecoding,
    RoundConfig,
    Strategy,
    StrategyConfig,
)


@dataclass(frozen=True, slots=True)
class StrategySpec:
    """A row of the table: how a strategy is made, and its default parameters.

    `without` names what an ablation takes away from the pipeline itself.
    """

    make: Callable[[Any], Strategy[RequestState]]  # takes a config of the defaults' type
    defaults: StrategyConfig
    about: str
    without: Without | None = None
    takes_pushed: bool = False  # whether it works with a drafter that pushes

    @property
    def drafts(self) -> bool:
        """Whether the strategy has a draft tree, and so needs a drafter."""
        return isinstance(self.defaults, DraftingConfig)

    @property
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters that it takes."""
        return tuple(type(self.defaults).model_fields)


STRATEGIES: dict[str, StrategySpec] = {
    "ar": StrategySpec(Ar, StrategyConfig(), "plain pipeline, one token per trip"),
    "serial_pp": StrategySpec(SerialPp, RoundConfig(), "whole tree in one segment, round by round"),
    "naive_pp": StrategySpec(NaivePp, NaivePpConfig(), "tree in chunks, one verdict per round"),
    "pruned_pp": StrategySpec(
        PrunedPp, PrunedPpConfig(), "segments by score, pruned with every verdict, no growth"
    ),
    "pipedec": StrategySpec(PipeDec, PipeDecConfig(), "one tree level per tick (PipeDec)"),
    "flowspec": StrategySpec(
        FlowSpec, FlowSpecConfig(), "the published FlowSpec: prune and expand, drain on a miss"
    ),
    "streaming": StrategySpec(
        Streaming,
        StreamingConfig(),
        "asynchronous best-first streaming without a drain",
        takes_pushed=True,
    ),
}
DEFAULT_STRATEGY = "streaming"


def _streaming(
    about: str,
    make: Callable[[StreamingConfig], Strategy[RequestState]] = Streaming,
    without: Without | None = None,
    **defaults: Any,
) -> StrategySpec:
    return StrategySpec(make, StreamingConfig(**defaults), about, without)


# Ablations of streaming lack one mechanism each; they are found by name and listed nowhere.
ABLATIONS: dict[str, StrategySpec] = {
    "streaming-ticking": _streaming("with a barrier", Ticking),
    "streaming-queued": _streaming("with a segment waiting before the first stage", Queued),
    "streaming-draining": _streaming("with a drain after a miss", Draining),
    "streaming-eager": _streaming("without just-in-time choice", Eager),
    "streaming-fixed-size": _streaming("without knee-sized segments", FixedSize),
    "streaming-apart": _streaming("with true rows and guesses in forwards of their own", Apart),
    "streaming-stale": _streaming("without hidden state refresh", refresh=False),
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
    """Return a row of the table. Raises ValueError listing the known names."""
    if name in ABLATIONS:
        return ABLATIONS[name]
    if name not in STRATEGIES:
        raise ValueError(f"unknown strategy {name!r}; known: {', '.join(STRATEGIES)}")
    return STRATEGIES[name]


def check_parameter(name: str, parameter: str, *, where: str) -> None:
    """Raise ValueError, with the valid names, if strategy `name` does not take `parameter`."""
    spec = find_strategy(name)
    if parameter not in spec.parameters:
        takes = ", ".join(spec.parameters) or "nothing"
        raise ValueError(
            f"{where}: {parameter} is no parameter of strategy {name}; it takes: {takes}"
        )


def strategy_config(name: str, parameters: Mapping[str, Any], *, where: str) -> StrategyConfig:
    """Return the defaults of strategy `name` with `parameters` set.

    Raises ValueError naming `where`, the parameter, and what the strategy takes.
    """
    for parameter in parameters:
        check_parameter(name, parameter, where=where)
    return override(find_strategy(name).defaults, parameters, where=where)


def resolve_decoding(
    decoding: Decoding, drafters: Mapping[str, object], *, where: str = "decoding"
) -> ResolvedDecoding:
    """Return `decoding` with its defaults set; the first of `drafters` is the default.

    Raises ValueError for an unknown strategy or parameter, or a drafter that is not loaded.
    """
    spec = find_strategy(decoding.strategy)
    config = strategy_config(decoding.strategy, decoding.parameters, where=where)
    if not spec.drafts:
        return ResolvedDecoding(decoding.strategy, config, "none")
    loaded = [name for name in drafters if name != "none"]
    drafter = decoding.drafter or (loaded[0] if loaded else "none")
    if drafter == "none":
        raise ValueError(
            f"strategy {decoding.strategy} needs a drafter and none is loaded; load one with "
            "--drafter, or ask for strategy ar"
        )
    if drafter not in loaded:
        raise ValueError(f"drafter {drafter} is not loaded; loaded: {', '.join(loaded) or 'none'}")
    if getattr(drafters[drafter], "pushes", False) and not spec.takes_pushed:
        able = ", ".join(name for name, one in STRATEGIES.items() if one.takes_pushed)
        raise ValueError(
            f"drafter {drafter} drafts by itself, strategy {decoding.strategy} draws up each round "
            f"itself; ask for strategy {able}"
        )
    return ResolvedDecoding(decoding.strategy, config, drafter)


def check_runs_for_real(name: str) -> None:
    """Raise ValueError for a strategy that is unknown or runs on an emulated pipeline only."""
    without = find_strategy(name).without
    if without is not None:
        raise ValueError(
            f"strategy {name} runs on an emulated cluster alone (`flowspec bench` without --real): "
            f"no real pipeline can be had without {without.value}"
        )
