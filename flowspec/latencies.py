"""Latencies: quantiles of many times in little memory.

A histogram over logarithmic bins: a quantile is off by at most 1 % of its value, however many times
were counted (DDSketch: Masson, Rim and Lee, VLDB 2019). Times in seconds.
"""

from dataclasses import dataclass, field
from math import ceil, exp, log

ACCURACY = 0.01
SHORTEST_S = 1e-6  # what is shorter counts as 0
LONGEST_S = 1e6
_RATIO = log((1 + ACCURACY) / (1 - ACCURACY))


@dataclass(slots=True)
class Latencies:
    """How many times fell into each bin; at most about 1,400 bins."""

    bins: dict[int, int] = field(default_factory=dict)
    num_zero: int = 0
    count: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        """Something took `seconds`, `count` times."""
        self.count += count
        if seconds < SHORTEST_S:
            self.num_zero += count
            return
        index = ceil(log(min(seconds, LONGEST_S)) / _RATIO)
        self.bins[index] = self.bins.get(index, 0) + count

    def quantile(self, share: float) -> float:
        """The time that at least `share` (0 to 1) of all do not exceed; 0 where there are none."""
        assert 0.0 <= share <= 1.0
        seen, wanted = self.num_zero, max(1, ceil(share * self.count - 1e-9))
        if seen >= wanted or not self.count:
            return 0.0
        for index in sorted(self.bins):
            seen += self.bins[index]
            if seen >= wanted:
                break
        # of a bin's times none is further than ACCURACY from here
        return exp(index * _RATIO) * (1 - ACCURACY)
