"""Calibration: drafters' log-probabilities become true acceptance probabilities, learnt online.

A drafter's log-probability of a child is a forecast: "if its parent is true, so is the child, with
probability p". Every verdict settles the forecasts on the true path. Forecasts fall into bins by
source, depth, rank and log-odds. Each bin learns by how much its log-odds are off (an intercept per
bin, after Platt's scaling; Naeini et al., AAAI 2015, bin in the same way). Without evidence nothing
changes. Within a bin the order of siblings stays. A probability stays below 1, so a child never
scores above its parent.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from math import exp, log, log1p
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flowspec.request import NodeId
from flowspec.speculation.tree import Node

MAX_LOGIT = 9.0  # a forecast above this is taken for a probability of 0.99988
NUM_BINS = 10  # one per unit of log-odds, from -5 to 5; the outer ones hold everything beyond
MAX_EVIDENCE = 2048.0  # outcomes per bin; beyond, the older ones count half
# Weight of the prior, in forecasts: so many outcomes count as much as the prior.
PRIOR_COARSE = 24.0
PRIOR_FINE = 96.0
_OCTAVES = np.array([0, 0, 1, 2, 2, 3, 3, 3, 3, 4])  # 1, 2, 3 to 4, 5 to 8, more: as 0 to 4
_NUM_OCTAVES = 5


class Forecast(NamedTuple):
    """A drafter's forecast of one child: its source and place. `depth` 1 is the root's child."""

    source: str
    depth: int
    rank: int  # among its siblings, 0 the best
    logprob: float


class NodeForecast(NamedTuple):
    """The forecasts of a node's children, made at once; `depth` is that of the children."""

    node: NodeId
    depth: int
    children: Sequence[tuple[int, float]]  # (token, log-probability), the best first
    sources: Sequence[str] = ()  # of each child; empty: the drafter


class SettledForecast(NamedTuple):
    """One forecast whose outcome is known."""

    source: str
    raw: float  # raw and calibrated log-probability
    calibrated: float
    happened: bool


class PathForecast(NamedTuple):
    """A forecast that the tokens after `position` are `tokens`."""

    position: int
    tokens: tuple[int, ...]
    raw: float  # log-probabilities of the whole path
    calibrated: float


class _Bins:
    """Counts of similar forecasts by bin, and the correction of log-odds that follows from them."""

    def __init__(self, prior: float) -> None:
        self.prior = prior
        self.shifts = np.zeros(0)
        self._counts: list[float] = []
        self._hits: list[float] = []
        self._expected: list[float] = []  # sums of the probabilities that were forecast

    def grow(self, size: int) -> None:
        """Add empty bins until there are at least `size`."""
        more = [0.0] * max(0, size - len(self.shifts))
        self.shifts = np.append(self.shifts, more)
        for sums in (self._counts, self._hits, self._expected):
            sums.extend(more)

    def record(self, place: int, logit: float, happened: bool) -> None:
        """Count one forecast of this bin that was right or wrong."""
        if self._counts[place] >= MAX_EVIDENCE:
            for sums in (self._counts, self._hits, self._expected):
                sums[place] /= 2
        self._counts[place] += 1.0
        self._hits[place] += happened
        self._expected[place] += exp(-_softplus(-max(logit, -MAX_LOGIT)))
        count = self._counts[place]
        mean = self._expected[place] / count
        rate = (self._hits[place] + self.prior * mean) / (count + self.prior)
        self.shifts[place] = log(rate / (1.0 - rate)) - log(mean / (1.0 - mean))


class Calibration:
    """Bins that all requests of a head share, a fixed number per source.

    There are two stages. A bin per source and log-odds learns fast; then a bin per depth and rank
    as well learns what is left. If `outcomes` and `paths` are lists, every settled outcome and
    every forecast path is appended to them, for a reliability plot.
    """

    def __init__(self) -> None:
        self._sources: dict[str, int] = {}
        self._coarse, self._fine = _Bins(PRIOR_COARSE), _Bins(PRIOR_FINE)
        self.outcomes: list[SettledForecast] | None = None
        self.paths: list[PathForecast] | None = None

    @property
    def num_bins(self) -> int:
        """Number of bins in both stages."""
        return len(self._coarse.shifts) + len(self._fine.shifts)

    def apply(self, children: Sequence[Forecast]) -> list[float]:
        """Return calibrated log-probabilities, all below 0."""
        found: list[float] = self.apply_to(self._columns(children)).tolist()
        return found

    def apply_to(self, columns: "Columns") -> NDArray[np.float64]:
        """Return calibrated log-probabilities of children in columns, shaped as `logprobs`."""
        logits, coarse, fine = _place(columns)
        logits += self._coarse.shifts[coarse]
        logits += self._fine.shifts[fine]
        return -np.logaddexp(0.0, -np.minimum(logits, MAX_LOGIT))

    def record(self, outcomes: Sequence[tuple[Forecast, bool]]) -> None:
        """Learn from forecasts whose parents are true: each was right or wrong."""
        columns = self._columns([child for child, _ in outcomes])
        self.record_from(columns, {place: right for place, (_, right) in enumerate(outcomes)})

    def record_from(self, columns: "Columns", happened: Mapping[int, bool]) -> None:
        """Learn from forecasts in columns: those at the places (row by row) in `happened`."""
        logits, coarse, fine = (array.ravel().tolist() for array in _place(columns))
        for place, right in happened.items():
            between = logits[place] + float(self._coarse.shifts[coarse[place]])
            self._fine.record(fine[place], between, right)
            self._coarse.record(coarse[place], logits[place], right)

    def number(self, source: str) -> int:
        """Return the number of a source, and give it bins if it is new."""
        if source not in self._sources:
            self._sources[source] = len(self._sources)
            self._coarse.grow(len(self._sources) * NUM_BINS)
            self._fine.grow(len(self._sources) * NUM_BINS * _NUM_OCTAVES**2)
        return self._sources[source]

    def _columns(self, children: Sequence[Forecast]) -> "Columns":
        return Columns(
            np.array([self.number(child.source) for child in children], dtype=np.int64),
            np.array([child.depth for child in children], dtype=np.int64),
            np.array([child.rank for child in children], dtype=np.int64),
            np.array([child.logprob for child in children]),
        )


class Columns(NamedTuple):
    """Many forecasts as arrays that broadcast to the shape of `logprobs`, [n] or [n, m]."""

    sources: NDArray[np.int64]  # by number
    depths: NDArray[np.int64]
    ranks: NDArray[np.int64]
    logprobs: NDArray[np.float64]


def _place(
    columns: Columns,
) -> tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]:
    """Return log-odds (at most MAX_LOGIT) and each child's two bins, shaped as `logprobs`."""
    said = np.minimum(columns.logprobs, -exp(-MAX_LOGIT))
    logits = np.minimum(said - np.log1p(-np.exp(said)), MAX_LOGIT)
    # For arrays as small as these np.clip takes longer than both calls.
    where = np.maximum(np.minimum(logits + NUM_BINS / 2, NUM_BINS - 1.0), 0.0).astype(np.int64)
    coarse = columns.sources * NUM_BINS + where
    depths = _OCTAVES[np.minimum(columns.depths, len(_OCTAVES) - 1)]
    ranks = _OCTAVES[np.minimum(columns.ranks + 1, len(_OCTAVES) - 1)]
    return logits, coarse, coarse * _NUM_OCTAVES**2 + (depths * _NUM_OCTAVES + ranks)


class Forecasts:
    """One request's open forecasts, by the node whose children they are about."""

    def __init__(self, calibration: Calibration, source: str, *, sampled: bool) -> None:
        self.calibration = calibration
        self._source = source  # of proposals that name no source
        self._suffix = "/sampled" if sampled else ""  # sampled texts are calibrated apart
        # each node's forecasts, with their calibrated values
        self._open: dict[NodeId, list[tuple[NodeForecast, Sequence[float]]]] = {}

    def enter(self, forecasts: Sequence[NodeForecast]) -> list[Sequence[float]]:
        """Remember forecasts until they are settled; return their calibrated log-probabilities."""
        if not forecasts:
            return []
        rows = self.calibration.apply_to(self._columns(forecasts)).tolist()
        found: list[Sequence[float]] = []
        for forecast, row in zip(forecasts, rows, strict=True):
            found.append(row[: len(forecast.children)])
            self._open.setdefault(forecast.node, []).append((forecast, found[-1]))
        return found

    def settle(
        self, path: Sequence[NodeId], tokens: Sequence[int], alive: Container[NodeId]
    ) -> None:
        """Settle the forecasts of `path`: tokens[i] followed path[i]. Drop those of dead nodes."""
        for node, true in zip(path, tokens, strict=True):
            if node in self._open:
                self._settle_node(self._open.pop(node), true)
        self._open = {node: found for node, found in self._open.items() if node in alive}

    def _settle_node(self, said: Sequence[tuple[NodeForecast, Sequence[float]]], true: int) -> None:
        columns = self._columns([forecast for forecast, _ in said])
        width = columns.logprobs.shape[1]
        happened: dict[int, bool] = {}
        newest: dict[tuple[int, str, int], int] = {}  # the newest place of each repeated forecast
        log_to = self.calibration.outcomes
        for row, (forecast, _) in enumerate(said):
            for rank, (token, source) in enumerate(zip(*self._tokens(forecast), strict=True)):
                key = token, source, forecast.depth
                happened.pop(newest.get(key, -1), None)
                newest[key] = row * width + rank
                happened[row * width + rank] = token == true
        if log_to is not None:
            names = {place: source for (_, source, _), place in newest.items()}
            for place, right in happened.items():
                forecast, scores = said[place // width]
                raw = forecast.children[place % width][1]
                log_to.append(SettledForecast(names[place], raw, scores[place % width], right))
        self.calibration.record_from(columns, happened)

    def _columns(self, forecasts: Sequence[NodeForecast]) -> Columns:
        """Return the forecasts as columns; row i has the padded children of forecasts[i]."""
        width = max(len(forecast.children) for forecast in forecasts)
        number, own = self.calibration.number, self._source + self._suffix
        rows = [[logprob for _, logprob in forecast.children] for forecast in forecasts]
        if any(forecast.sources for forecast in forecasts):
            sources = [[number(n) for n in self._tokens(w)[1]] for w in forecasts]
            _pad(sources, width, 0)
        else:
            sources = [[number(own)]]
        _pad(rows, width, -MAX_LOGIT)
        return Columns(
            np.array(sources),
            np.array([[forecast.depth] for forecast in forecasts]),
            np.arange(width),
            np.array(rows),
        )

    def log_paths(self, path: Sequence[Node], children: Iterable[tuple[int, float]]) -> None:
        """Log the forecasts that were just made of `children`, as paths.

        `path` has the nodes from the root down, and the children are those of its last node. Each
        child is (token, calibrated log-probability).
        """
        assert self.calibration.paths is not None, "nobody asked for a log"
        root, last = path[0], path[-1]
        steps = zip(path[:-1], path[1:], strict=True)
        raw = sum(self._newest(above.id, below.token) for above, below in steps)
        tokens = tuple(node.token for node in path[1:])
        for token, calibrated in children:
            self.calibration.paths.append(
                PathForecast(
                    position=root.position,
                    tokens=(*tokens, token),
                    raw=raw + self._newest(last.id, token),
                    calibrated=last.score + calibrated,
                )
            )

    def _newest(self, parent: NodeId, token: int) -> float:
        """Return the log-probability that was forecast last for a child."""
        for forecast, _ in reversed(self._open[parent]):
            for said_of, logprob in forecast.children:
                if said_of == token:
                    return logprob
        raise AssertionError(f"no forecast of token {token} below node {parent}")

    def _tokens(self, forecast: NodeForecast) -> tuple[Sequence[int], Sequence[str]]:
        """Return the children's tokens and the source of each."""
        sources = [
            s + self._suffix for s in forecast.sources or (self._source,) * len(forecast.children)
        ]
        return [token for token, _ in forecast.children], sources


def _pad(rows: Sequence[list[Any]], width: int, value: Any) -> None:
    for row in rows:
        row.extend([value] * (width - len(row)))


def _softplus(logit: float) -> float:
    """Return log(1 + exp(logit)); -_softplus(-logit) is the log-probability of these log-odds."""
    return max(logit, 0.0) + log1p(exp(-abs(logit)))
