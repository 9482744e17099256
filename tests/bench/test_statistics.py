"""Ratios of speeds and their bootstrap intervals."""

import numpy as np
import pytest

from flowspec.bench.statistics import Speed, speed_ratio


def test_a_set_counts_by_its_tokens_and_sets_count_alike():
    """Within a set the long answers weigh more; between sets nothing does."""
    long_set = [(Speed(90, 9), Speed(90, 90)), (Speed(10, 4), Speed(10, 4))]
    short_set = [(Speed(5, 1), Speed(5, 2))]
    assert speed_ratio([long_set]).value == pytest.approx((100 / 13) / (100 / 94))
    both = speed_ratio([long_set, short_set])
    assert both.value == pytest.approx(((100 / 13) / (100 / 94) + 2.0) / 2)


def test_pairing_takes_out_what_prompts_have_in_common():
    """Twice as fast on every prompt is twice as fast for sure, however prompts differ."""
    pairs = [(Speed(50, s), Speed(50, 2 * s)) for s in (1.0, 7.0, 30.0, 2.5)]
    found = speed_ratio([pairs])
    assert (found.low, found.high) == (pytest.approx(2.0), pytest.approx(2.0))


@pytest.mark.parametrize(("num_sets", "prompts"), [(1, 3), (1, 4), (1, 30), (6, 4)])
def test_the_interval_holds_the_truth_as_often_as_it_says(num_sets, prompts):
    """95 %, give or take what 300 repeats can tell: percentiles alone do at 3 prompts in 71 %."""
    random = np.random.default_rng(5)
    held = 0
    for _ in range(300):
        sets = []
        for _ in range(num_sets):
            base = random.gamma(4.0, 1.0, size=prompts)
            factors = random.gamma(25.0, 3.0 / 25.0, size=prompts)  # of the time: 3 on average
            pairs = zip(base, base * factors, strict=True)
            sets.append([(Speed(10, own), Speed(10, theirs)) for own, theirs in pairs])
        found = speed_ratio(sets, resamples=400)
        assert found.low is not None
        assert found.high is not None
        held += found.low <= 3.0 <= found.high
    assert 0.90 <= held / 300 <= 0.99


def test_the_same_records_give_the_same_interval():
    """No chance from run to run."""
    pairs = [(Speed(10, s), Speed(10, 3.0)) for s in (1.0, 2.0, 4.0)]
    assert speed_ratio([pairs]) == speed_ratio([pairs])


@pytest.mark.parametrize("prompts", [1, 2])
def test_few_prompts_have_no_interval_and_none_is_refused(prompts):
    """Rather than an interval that holds the truth by chance; also where another set has enough."""
    few = [(Speed(10, 1), Speed(10, 3))] * prompts
    found = speed_ratio([few, []])
    assert (found.value, found.low, found.high) == (pytest.approx(3.0), None, None)
    assert speed_ratio([few, few * 5]).low is None
    with pytest.raises(ValueError, match="no prompt"):
        speed_ratio([[(Speed(0, 0.0), Speed(0, 0.0))]])


def test_draws_of_empty_answers_alone_do_not_spoil_the_interval():
    """An answer of one token has no decode time."""
    pairs = [*[(Speed(0, 0.0), Speed(0, 0.0))] * 2, (Speed(10, 1.0), Speed(10, 2.0))]
    found = speed_ratio([pairs])
    assert (found.low, found.high) == (pytest.approx(2.0), pytest.approx(2.0))
