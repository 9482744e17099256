"""A benchmark's rows agree with those worked out by hand."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from flowspec.bench.aggregate import summarize
from flowspec.bench.summary import as_json, line_of, rows_of_run, time_shares
from tests.support.samples import sample

KEYS = """cluster model drafter strategy dataset temperature stages prompts samples tokens
tokens_per_s repeats lowest highest speedup_over_ar ci_low ci_high tau mismatches bound_share
emulated"""


def pair(question: str, ar_s: float, own_s: float, *, dataset: str = "gsm8k", **changes):
    """Return the same answer by ar and by streaming, with their decode times."""
    common = {"dataset": dataset, "question": question, **changes}
    return [
        sample(strategy="ar", drafter="none", decode_s=ar_s, tau=1.0, **common),
        sample(decode_s=own_s, **common),
    ]


def rows_of(samples):
    """Return the output of `--json`, by strategy and set."""
    rows = [SimpleNamespace(**as_json(row)) for row in rows_of_run(samples)]
    return {(row.strategy, row.dataset): row for row in rows}


def test_the_keys_are_those_that_are_promised():
    """They come in this order."""
    (row, mean) = rows_of_run([sample()])
    assert list(as_json(row)) == list(as_json(mean)) == KEYS.split()
    assert (row.dataset, mean.dataset) == ("gsm8k", "mean")


def test_a_set_is_all_its_tokens_by_all_its_time_and_sets_count_alike():
    """There are three questions of one set, and three of another that is decoded faster."""
    samples = [
        *pair("1", ar_s=10.0, own_s=2.0),
        *pair("2", ar_s=10.0, own_s=3.0, tokens=41),
        *pair("3", ar_s=10.0, own_s=2.5, tokens=31),
        *(one for name in "123" for one in pair(name, ar_s=5.0, own_s=1.0, dataset="qa")),
    ]
    rows = rows_of(samples)
    own = rows["streaming", "gsm8k"]
    assert own.tokens_per_s == pytest.approx((20 + 40 + 30) / (2 + 3 + 2.5))
    assert own.speedup_over_ar == pytest.approx(30 / 7.5)
    assert (own.prompts, own.tokens) == (3, 21 + 41 + 31)
    assert rows["ar", "gsm8k"].tokens_per_s == pytest.approx(90 / 30)
    assert rows["ar", "gsm8k"].speedup_over_ar == pytest.approx(1.0)
    mean = rows["streaming", "mean"]
    assert mean.tokens_per_s == pytest.approx((12 + 20) / 2)
    assert mean.speedup_over_ar == pytest.approx((4 + 5) / 2)
    assert mean.ci_low is not None
    assert mean.ci_high is not None
    assert mean.ci_low <= 4.5 <= mean.ci_high
    assert (rows["streaming", "qa"].ci_low, rows["streaming", "qa"].ci_high) == (
        pytest.approx(5.0),
        pytest.approx(5.0),
    )
    assert mean.prompts == 6
    assert mean.tokens == sum(row.tokens for key, row in rows.items() if key[0] != "ar") // 2


def test_a_single_question_has_no_interval():
    """Nothing is known about how questions differ."""
    row = rows_of(pair("1", 10.0, 2.0))["streaming", "mean"]
    assert (row.speedup_over_ar, row.ci_low, row.ci_high) == (pytest.approx(5.0), None, None)


def test_only_what_both_have_run_is_compared():
    """A turn or seed that one side lacks is left out; without ar there is no speed-up."""
    samples = [
        *pair("1", 10.0, 2.0),
        sample(question="1", turn=1, decode_s=100.0),
        sample(question="1", seed=2, decode_s=100.0),
        sample(question="2", decode_s=100.0),
    ]
    assert rows_of(samples)["streaming", "gsm8k"].speedup_over_ar == pytest.approx(5.0)
    alone = rows_of([sample()])["streaming", "mean"]
    assert (alone.speedup_over_ar, alone.ci_low) == (None, None)
    assert alone.tokens_per_s == pytest.approx(10.0)


def test_temperatures_and_drafters_are_lines_of_their_own():
    """Each temperature has its own baseline."""
    samples = [*pair("1", 10.0, 2.0), *pair("1", 30.0, 3.0, temperature=1.0)]
    samples.append(sample(question="1", drafter="eagle3", decode_s=1.0))
    rows = [row for row in rows_of_run(samples) if row.strategy == "streaming"]
    found = [(*line_of(row)[1:], row.dataset, row.speedup.value) for row in rows]
    assert found == [
        ("eagle", 0.0, "gsm8k", pytest.approx(5.0)),
        ("eagle", 0.0, "mean", pytest.approx(5.0)),
        ("eagle", 1.0, "gsm8k", pytest.approx(10.0)),
        ("eagle", 1.0, "mean", pytest.approx(10.0)),
        ("eagle3", 0.0, "gsm8k", pytest.approx(10.0)),
        ("eagle3", 0.0, "mean", pytest.approx(10.0)),
    ]


def test_mismatches_and_tau_are_of_all_answers():
    """tau is tokens by verdicts, not a mean of means."""
    samples = [
        sample(question="1", tokens=21, tau=2.0, mismatch=True),
        sample(question="2", tokens=41, tau=4.0),
        sample(question="3", tokens=1, tau=0.0, decode_s=0.0),
    ]
    row = rows_of(samples)["streaming", "gsm8k"]
    assert row.mismatches == 1
    assert row.tau == pytest.approx((20 + 40) / (10 + 10))
    assert row.tokens_per_s == pytest.approx(60 / 4)


def test_the_share_of_the_bound_is_of_the_whole_time():
    """The bound's time is divided by the real time, over every sample or none.

    An answer of one token takes no time and has no share.
    """
    samples = [
        sample(question="1", decode_s=4.0, bound_tokens_per_s=10.0, bound_share=0.5),
        sample(question="2", decode_s=1.0, bound_tokens_per_s=20.0, bound_share=1.0),
    ]
    row = rows_of(samples)["streaming", "mean"]
    assert row.bound_share == pytest.approx((2 + 1) / (4 + 1))
    nothing = sample(question="4", tokens=1, decode_s=0.0, bound_tokens_per_s=0.0)
    at_once = rows_of([*samples, nothing, replace(nothing, dataset="qa", key="other")])
    assert at_once["streaming", "gsm8k"].bound_share == pytest.approx((2 + 1) / (4 + 1))
    assert at_once["streaming", "qa"].bound_share is None
    assert at_once["streaming", "mean"].bound_share == pytest.approx((2 + 1) / (4 + 1))
    without = rows_of([*samples, sample(question="3")])["streaming", "mean"]
    assert without.bound_share is None


def test_time_shares_weigh_by_decode_time_within_a_set_and_sets_alike():
    """Busy and idle shares of all stages add up to 1 and agree with `flowspec report`."""
    samples = [
        sample(decode_s=3.0, drafter_busy=0.4),
        sample(
            decode_s=1.0,
            stage_busy=(1.0, 0.5),
            stage_idle=({}, {"upstream busy": 0.1, "host overhead": 0.4}),
            drafter_busy=0.0,
        ),
    ]
    other = sample(decode_s=9.0, dataset="qa", stage_busy=(0.25, 0.25), stage_idle=({}, {}))
    own, _, mean = rows_of_run([*samples, other])
    assert time_shares(mean).busy == pytest.approx((0.75 + 0.25) / 2)
    ((_, reported),) = summarize([*samples, other], baseline="streaming").items()
    assert reported[-1].stage_busy == mean.stage_busy
    assert reported[-1].stage_idle == mean.stage_idle
    found = time_shares(own)
    assert found.by_stage == (pytest.approx(0.85), pytest.approx(0.65))
    assert found.busy == pytest.approx(0.75)
    assert found.idle["upstream busy"] == pytest.approx((0.75 * 0.3 + 0.25 * 0.1) / 2)
    assert found.busy + sum(found.idle.values()) == pytest.approx(1.0)
    assert found.drafter_busy == pytest.approx(0.3)
