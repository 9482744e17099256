"""Ratios of speeds and how sure they are: a bootstrap over prompts, the same on every run.

Prompts are what a benchmark has drawn by chance, so they are drawn again, with all that was run on
each of them together (turns, seeds), both sides of the ratio from the same draw (paired). Intervals
are percentiles of the redrawn ratios (Efron, Annals of Statistics 7, 1979), expanded for few
prompts (Hesterberg, The American Statistician 69, 2015): a redrawn set of n prompts varies too
little by sqrt((n-1)/n), and how much it varies is itself a guess, so that Student's t takes the
place of the normal, with Welch's degrees of freedom over the sets. Both on the logarithm, since
ratios have no negative values.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri, stdtrit

RESAMPLES = 4000
LEVEL = 0.95
MIN_PROMPTS = 3  # of a set; two say next to nothing of how prompts differ
SEED = 20260117  # any; fixed, so that the same records give the same interval


@dataclass(frozen=True, slots=True)
class Speed:
    """What one side generated on one prompt: tokens after the first, and the seconds they took."""

    tokens: float
    seconds: float


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its interval; `low` and `high` are None where a set has too few prompts."""

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
    if min(map(len, tables)) < MIN_PROMPTS:
        return Interval(value)
    random = np.random.default_rng(SEED)
    drawn = np.array([_redrawn(table, random, resamples) for table in tables])
    spreads = np.nanvar(drawn, axis=1)
    if not spreads.any():  # every prompt has the same ratio
        return Interval(value, value, value)
    freedom = spreads.sum() ** 2 / sum(
        spread**2 / (len(table) - 1) for spread, table in zip(spreads, tables, strict=True)
    )
    tail = (1.0 - LEVEL) / 2
    # Student's t and the normal, both at the upper end of the interval
    widen = float(stdtrit(freedom, 1.0 - tail) / ndtri(1.0 - tail))
    logs = np.log(drawn.mean(axis=0) / value)
    low, high = value * np.exp(widen * np.nanquantile(logs, [tail, 1.0 - tail]))
    return Interval(value, float(low), float(high))


def _redrawn(table: Array, random: np.random.Generator, resamples: int) -> Array:
    """Ratios of a set's draws [resamples], varying as much as the set does; NaN: of no time."""
    picks = random.integers(len(table), size=(resamples, len(table)))
    own, ratios = _ratios(table.sum(axis=0)), _ratios(table[picks].sum(axis=1))
    assert own is not None
    assert ratios is not None
    return own * np.exp(math.sqrt(len(table) / (len(table) - 1)) * np.log(ratios / own))


def _table(pairs: Pairs) -> Array:
    """[prompts, 4]: tokens and seconds of the one side, then of the other."""
    rows = [(own.tokens, own.seconds, base.tokens, base.seconds) for own, base in pairs]
    return np.array(rows, dtype=float).reshape(len(rows), 4)


def _ratios(sums: Array) -> Array | None:
    """Ratio of speeds [...] of sums [..., 4]; None where nothing at all is known."""
    own_tokens, own_s, base_tokens, base_s = np.moveaxis(sums, -1, 0)
    known = (own_tokens > 0) & (own_s > 0) & (base_tokens > 0) & (base_s > 0)
    if not known.any():
        return None
    with np.errstate(divide="ignore", invalid="ignore"):  # a draw of empty answers alone
        ratios = (own_tokens / own_s) / (base_tokens / base_s)
    return np.where(known, ratios, np.nan)
