"""Reliability of a drafter's probabilities, before and after calibration.

Forecasts are of children (given that their parent is true) and of whole paths from the root. Each
is recorded as it was made, before its outcome was known. Expected calibration error: the mean
distance between forecast and outcome, over equal-width bins (Naeini et al., AAAI 2015). Brier
score: the mean squared error of single forecasts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import exp

from flowspec.head.calibration import PathForecast, SettledForecast

NUM_BINS = 20


@dataclass(frozen=True, slots=True)
class Bin:
    """Forecasts of about the same probability."""

    predicted: float  # mean of the forecasts
    happened: float  # share that came true
    count: int


@dataclass(frozen=True, slots=True)
class Reliability:
    """The reliability of one set of forecasts."""

    bins: tuple[Bin, ...]  # those with forecasts in them, least probable first
    brier: float

    @property
    def count(self) -> int:
        """Forecasts."""
        return sum(b.count for b in self.bins)

    @property
    def error(self) -> float:
        """Return the expected calibration error."""
        off = sum(b.count * abs(b.predicted - b.happened) for b in self.bins)
        return off / self.count if self.count else 0.0

    def as_json(self) -> dict[str, object]:
        """Return all figures as plain data."""
        return {
            "count": self.count,
            "expected_calibration_error": round(self.error, 6),
            "brier_score": round(self.brier, 6),
            "bins": [
                {
                    "predicted": round(b.predicted, 6),
                    "happened": round(b.happened, 6),
                    "count": b.count,
                }
                for b in self.bins
            ],
        }


def reliability(forecasts: Iterable[tuple[float, bool]]) -> Reliability:
    """Compute the reliability of (log-probability, whether it came true) pairs."""
    members: list[list[tuple[float, bool]]] = [[] for _ in range(NUM_BINS)]
    for logprob, happened in forecasts:
        p = exp(logprob)
        members[min(int(p * NUM_BINS), NUM_BINS - 1)].append((p, happened))
    everyone = [forecast for bin_ in members for forecast in bin_]
    squares = sum((p - happened) ** 2 for p, happened in everyone)
    return Reliability(
        bins=tuple(
            Bin(sum(p for p, _ in m) / len(m), sum(h for _, h in m) / len(m), len(m))
            for m in members
            if m
        ),
        brier=squares / len(everyone) if everyone else 0.0,
    )


def settled(paths: Iterable[PathForecast], text: Sequence[int]) -> list[SettledForecast]:
    """Return the outcomes of path forecasts in `text` (prompt and answer), except beyond it."""
    outcomes = []
    for path in paths:
        start = path.position + 1
        true = tuple(text[start : start + len(path.tokens)])
        if len(true) == len(path.tokens) or true != path.tokens[: len(true)]:
            outcomes.append(SettledForecast("path", path.raw, path.calibrated, true == path.tokens))
    return outcomes


def before_and_after(outcomes: Sequence[SettledForecast]) -> tuple[Reliability, Reliability]:
    """Return the reliability of the drafter's raw probabilities, and of the calibrated ones."""
    return (
        reliability((outcome.raw, outcome.happened) for outcome in outcomes),
        reliability((outcome.calibrated, outcome.happened) for outcome in outcomes),
    )
