"""Ratios of speeds and how sure they are: a bootstrap over prompts, the same on every run.

Prompts are what a benchmark has drawn by chance, so they are drawn again, with all that was run on
each of them together (turns, seeds), both sides of the ratio from the same draw (paired). Intervals
are percentiles of the redrawn ratios (Efron, Annals of Statistics 7, 1979).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 4000
LEVEL = 0.95
SEED = 20260117  # any; fixed, so that the same records give the same interval


@dataclass(frozen=True, slots=True)
class Speed:
    """What one side generated on one prompt: tokens after the first, and the seconds they took."""

    tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its interval; `low` and `high` are None where a set has one prompt."""

    value: float
    low: float | None = None
    high: float | None = None


Array = npt.NDArray[np.float64]
Pairs = Sequence[tuple[Speed, Speed]]  # of one set: per prompt, what is judged and its baseline


def speed_ratio(sets: Sequence[Pairs], *, resamples: int = RESAMPLES) -> Interval:
    """Speed over the baseline's: all tokens by all seconds within a set, then the sets' mean.

    A set whose baseline or whose own side took no time is left out; raises ValueError if all are.
    """
    tables = [table for table in map(_table, sets) if _ratios(table.sum(axis=0)) is not None]
    if not tables:
        raise ValueError("no prompt was decoded by both sides for longer than one token")
    value = float(np.mean([_ratios(table.sum(axis=0)) for table in tables]))
    if min(map(len, tables)) < 2:  # one prompt says nothing of how prompts differ
        return Interval(value)
    random = np.random.default_rng(SEED)
    drawn = []
    for table in tables:
        picks = random.integers(len(table), size=(resamples, len(table)))
        ratios = _ratios(table[picks].sum(axis=1))
        assert ratios is not None
        drawn.append(ratios)
    tail = (1.0 - LEVEL) / 2
    low, high = np.nanquantile(np.mean(drawn, axis=0), [tail, 1.0 - tail])
    return Interval(value, float(low), float(high))


def _table(pairs: Pairs) -> Array:
    """[prompts, 4]: tokens and seconds of the one side, then of the other."""
    rows = [(own.tokens, own.seconds, base.tokens, base.seconds) for own, base in pairs]
    return np.array(rows, dtype=float).reshape(len(rows), 4)


def _ratios(sums: Array) -> Array | None:
    """Ratio of speeds [...] of sums [..., 4]; None where nothing at all is known."""
    own_tokens, own_s, base_tokens, base_s = np.moveaxis(sums, -1, 0)
    known = (own_s > 0) & (base_tokens > 0) & (base_s > 0)
    if not known.any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of empty answers alone
        ratios = (own_tokens / own_s) / (base_tokens / base_s)
    return np.where(known, ratios, np.nan)
