"""Quantiles come from a histogram of bounded size."""

import numpy as np
import pytest

from flowspec.request import ACCURACY, LONGEST_S, SHORTEST_S, Latencies


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.95, 0.99, 1.0])
def test_quantiles_are_off_by_at_most_a_hundredth(spread, share):
    """They are compared with NumPy's quantiles of the complete list."""
    times = np.random.default_rng(3).lognormal(-3.0, spread, size=5000)
    found = Latencies()
    for time in times:
        found.add(float(time))
    exact = np.quantile(times, share, method="inverted_cdf")
    exact = exact if exact >= SHORTEST_S else 0.0
    assert found.quantile(share) == pytest.approx(exact, rel=ACCURACY * 1.0001)


def test_tokens_that_come_together_count():
    """Nine of ten tokens come together with another one."""
    found = Latencies()
    found.add(0.0, 9)
    found.add(0.25)
    assert found.quantile(0.5) == found.quantile(0.9) == 0.0
    assert found.quantile(0.95) == pytest.approx(0.25, rel=ACCURACY)


def test_memory_does_not_grow_with_what_is_counted():
    """Ten thousand values cover twelve orders of magnitude and more."""
    found = Latencies()
    for time in np.geomspace(SHORTEST_S / 10, LONGEST_S * 10, 10_000):
        found.add(float(time))
    assert len(found.bins) < 1500
    assert found.count == 10_000
    assert found.quantile(1.0) <= LONGEST_S * 1.02


def test_nothing_has_no_latency():
    """This is the case for an answer of one token."""
    assert Latencies().quantile(0.99) == 0.0
