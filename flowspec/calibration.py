"""Calibration: drafters' log-probabilities become true acceptance probabilities, learnt online.

A drafter's word on a child is a forecast: "if its parent is true, so is it, with probability p".
Every verdict settles those on the true path. Forecasts fall into bins by source, depth and rank,
and log-odds; each bin learns by how much its log-odds are off (an intercept per bin, after Platt's
scaling; Naeini et al., AAAI 2015, bin in the same way). Without evidence nothing changes, within a
bin the order of siblings stays, and a probability stays below 1: a child never scores above its
parent.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from math import exp, floor, log, log1p
from typing import NamedTuple

from flowspec.request import NodeId
from flowspec.tree import Node

MAX_LOGIT = 9.0  # the surest forecast is taken for 0.99988
NUM_BINS = 10  # one per unit of log-odds, from -5 to 5; what lies outside is in the outer ones
MAX_EVIDENCE = 2048.0  # outcomes per bin; then the older ones count for half
# Forecasts of the prior: how many outcomes it takes to believe a bin as much as what was known.
PRIOR_COARSE = 24.0
PRIOR_FINE = 96.0


class Child(NamedTuple):
    """What a drafter says of a child: who says it, and where. `depth` 1 is the root's child."""

    source: str
    depth: int
    rank: int  # among its siblings, 0 the best
    logprob: float


class Outcome(NamedTuple):
    """One settled forecast."""

    source: str
    raw: float  # log-probabilities
    calibrated: float
    happened: bool


class PathForecast(NamedTuple):
    """The tokens after `position` are forecast to be `tokens`."""

    position: int
    tokens: tuple[int, ...]
    raw: float  # log-probabilities of the whole path
    calibrated: float


@dataclass(slots=True)
class _Bin:
    """Outcomes of alike forecasts, and the correction of log-odds that follows from them."""

    prior: float
    count: float = 0.0
    hits: float = 0.0
    expected: float = 0.0  # sum of the probabilities that were forecast
    shift: float = 0.0

    def record(self, logit: float, happened: bool) -> None:
        if self.count >= MAX_EVIDENCE:
            self.count, self.hits, self.expected = self.count / 2, self.hits / 2, self.expected / 2
        self.count += 1.0
        self.hits += happened
        self.expected += exp(_logprob(max(logit, -MAX_LOGIT)))
        mean = self.expected / self.count
        rate = (self.hits + self.prior * mean) / (self.count + self.prior)
        self.shift = log(rate / (1.0 - rate)) - log(mean / (1.0 - mean))


class Calibration:
    """Bins shared by all requests of a head; a fixed number per source.

    Two stages: a bin per source and log-odds learns fast, then one per depth and rank as well
    learns what is left. `outcomes` and `paths`, where they are lists, receive all that is settled
    or forecast, for a reliability plot.
    """

    def __init__(self) -> None:
        self._bins: dict[tuple[str | int, ...], _Bin] = {}
        self.outcomes: list[Outcome] | None = None
        self.paths: list[PathForecast] | None = None

    def apply(self, child: Child) -> float:
        """The calibrated log-probability, below 0."""
        logit = _logit(child.logprob)
        coarse, fine = self._keys(child, logit)
        logit += self._shift(coarse)
        return _logprob(logit + self._shift(fine))

    def record(self, child: Child, happened: bool) -> None:
        """The forecast was right or wrong, its parent true."""
        raw = _logit(child.logprob)
        coarse, fine = self._keys(child, raw)
        between = raw + self._shift(coarse)
        self._bin(fine, PRIOR_FINE).record(between, happened)
        self._bin(coarse, PRIOR_COARSE).record(raw, happened)

    def _shift(self, key: tuple[str | int, ...]) -> float:
        found = self._bins.get(key)
        return found.shift if found else 0.0

    def _bin(self, key: tuple[str | int, ...], prior: float) -> _Bin:
        return self._bins.setdefault(key, _Bin(prior))

    def _keys(
        self, child: Child, logit: float
    ) -> tuple[tuple[str | int, ...], tuple[str | int, ...]]:
        where = floor(min(max(logit + NUM_BINS / 2, 0.0), NUM_BINS - 1.0))
        coarse = (child.source, where)
        return coarse, (*coarse, _octave(child.depth), _octave(child.rank + 1))


class Forecasts:
    """One request's open forecasts, by the node whose child they are about."""

    def __init__(self, calibration: Calibration, *, sampled: bool) -> None:
        self.calibration = calibration
        self._suffix = "/sampled" if sampled else ""  # other texts, other odds
        self._open: dict[NodeId, dict[tuple[int, str, int], tuple[Child, float]]] = {}

    def enter(self, parent: NodeId, token: int, child: Child) -> float:
        """Remember a forecast until it is settled; its calibrated log-probability."""
        child = child._replace(source=child.source + self._suffix)
        about = self._open.setdefault(parent, {})
        key = token, child.source, child.depth
        about.pop(key, None)  # said again: the newest is last
        calibrated = self.calibration.apply(child)
        about[key] = child, calibrated
        return calibrated

    def settle(
        self, path: Sequence[NodeId], tokens: Sequence[int], alive: Container[NodeId]
    ) -> None:
        """Behind node path[i] came tokens[i]; of all other nodes only `alive` ones matter still."""
        log_to = self.calibration.outcomes
        for node, true in zip(path, tokens, strict=True):
            for (token, _, _), (child, calibrated) in self._open.pop(node, {}).items():
                if log_to is not None:
                    log_to.append(Outcome(child.source, child.logprob, calibrated, token == true))
                self.calibration.record(child, token == true)
        self._open = {node: found for node, found in self._open.items() if node in alive}

    def log_paths(self, path: Sequence[Node], children: Iterable[tuple[int, float]]) -> None:
        """Log what has just been forecast of `children` of the last node of `path` as paths.

        Each child is (token, calibrated log-probability), `path` the nodes from the root down.
        """
        assert self.calibration.paths is not None, "nobody asked for a log"
        root, last = path[0], path[-1]
        steps = zip(path[:-1], path[1:], strict=True)
        raw = sum(self._newest(above.id, below.token).logprob for above, below in steps)
        tokens = tuple(node.token for node in path[1:])
        for token, calibrated in children:
            self.calibration.paths.append(
                PathForecast(
                    position=root.position,
                    tokens=(*tokens, token),
                    raw=raw + self._newest(last.id, token).logprob,
                    calibrated=last.score + calibrated,
                )
            )

    def _newest(self, parent: NodeId, token: int) -> Child:
        return next(
            child
            for (about, _, _), (child, _) in reversed(self._open[parent].items())
            if about == token
        )


def _octave(number: int) -> int:
    """1, 2, 3 to 4, 5 to 8, more: as 0 to 4."""
    return min((number - 1).bit_length(), 4)


def _logit(logprob: float) -> float:
    """log(p / (1 - p)), at most MAX_LOGIT."""
    if logprob >= -exp(-MAX_LOGIT):
        return MAX_LOGIT
    return logprob - log1p(-exp(logprob))


def _logprob(logit: float) -> float:
    """The inverse, below 0."""
    logit = min(logit, MAX_LOGIT)
    return logit - log1p(exp(logit)) if logit < 0 else -log1p(exp(-logit))
