"""Aggregated records: sums worked out by hand, comparable samples, and refusals."""

from dataclasses import replace

import numpy as np
import pytest

from flowspec.bench.aggregate import MEAN, Row, summarize
from flowspec.bench.report import describe, tables
from flowspec.bench.settings import by_setting, sets_of, strategies_of
from flowspec.bench.tables import to_markdown
from tests.support.samples import sample


def rows(samples, **options) -> dict[tuple[str, str], Row]:
    """Return the rows of the one setting by strategy and set."""
    ((_, found),) = summarize(samples, **options).items()
    return {(row.strategy, row.dataset): row for row in found}


def ran(strategy: str, question: str, tokens: int, decode_s: float, **changes):
    """Return a sample with these times."""
    changes = {"strategy": strategy, "tokens": tokens, "decode_s": decode_s} | changes
    return sample(question=question, **changes)


def test_speed_is_all_tokens_by_all_seconds_and_the_mean_is_of_sets():
    """Each token after the first counts: long answers weigh more, sets with more answers do not."""
    found = rows(
        [
            ran("ar", "1", 11, 10.0),
            ran("ar", "2", 31, 30.0),
            ran("ar", "3", 11, 10.0),
            *(ran("ar", question, 5, 4.0, dataset="qa") for question in "789"),
            ran("streaming", "1", 11, 5.0),
            ran("streaming", "2", 31, 5.0),
            ran("streaming", "3", 11, 2.5),
            *(ran("streaming", question, 5, 1.0, dataset="qa") for question in "789"),
        ]
    )
    assert found["streaming", "gsm8k"].tokens_per_s == pytest.approx(50 / 12.5)
    assert found["streaming", "gsm8k"].speedup.value == pytest.approx(4.0)
    assert found["streaming", "qa"].speedup.value == pytest.approx(4.0)
    mean = found["streaming", MEAN]
    assert (mean.num_sets, mean.prompts, mean.tokens) == (2, 6, 68)
    assert mean.tokens_per_s == pytest.approx((4.0 + 4.0) / 2)
    assert found["ar", MEAN].speedup.value == found["ar", MEAN].speedup.low == 1.0
    assert (mean.paired, found["streaming", "qa"].paired) == (6, 3)
    assert mean.speedup.low < 4.0 < mean.speedup.high


def test_shares_of_time_weigh_by_time_and_tau_by_verdicts():
    """They are pooled, not averaged over answers."""
    found = rows(
        [
            ran("ar", "1", 11, 1.0, tau=1.0, stage_busy=(0.4,), bound_share=0.4, mismatch=True),
            ran("ar", "2", 31, 3.0, tau=3.0, stage_busy=(0.8, 0.2), bound_share=0.8),
        ]
    )["ar", "gsm8k"]
    assert found.stage_busy == (pytest.approx(0.7), pytest.approx(0.2))
    assert found.tau == pytest.approx(40 / (10 / 1.0 + 30 / 3.0))
    assert found.bound_share == pytest.approx(0.7)
    assert found.mismatches == 1
    assert found.stage_idle[0] == {"waiting for link": pytest.approx(0.2)}


def test_of_repeats_the_median_counts_with_the_lowest_and_the_highest():
    """An interrupted repeat has no speed of its own; a repeat is not another question."""
    samples = [
        ran(strategy, question, 11, seconds * factor, dataset=name, repeat=repeat)
        for strategy, factor in (("ar", 2.0), ("streaming", 1.0))
        for name in ("gsm8k", "qa")
        for question in "123"
        for repeat, seconds in enumerate((1.0, 5.0, 2.0))
    ]
    samples.append(ran("streaming", "1", 11, 0.001, repeat=3))
    found = rows(samples)
    for name in ("gsm8k", "qa", MEAN):
        row = found["streaming", name]
        assert row.tokens_per_s == pytest.approx(5.0)
        assert row.by_repeat == pytest.approx({0: 10.0, 1: 2.0, 2: 5.0})
    assert found["streaming", "qa"].speedup.value == pytest.approx(2.0)
    assert found["streaming", "qa"].speedup.low == pytest.approx(2.0)
    assert found["streaming", "qa"].paired == 3
    lines = to_markdown(tables(samples)).splitlines()
    assert any("5.00 2.00–10.00" in line for line in lines if line.startswith("| streaming"))
    assert "Medians of up to 3 repeats, with the lowest and the highest" in lines


def test_alpha_pools_the_runs_of_all_answers():
    """A short answer counts where it did not reach; the run that the end cut off did not fail."""
    samples = [
        # two misses and the end: 0, 3, and 1 cut off; tokens after the first are runs and misses
        ran("serial_pp", "1", 7, 1.0, runs=(0, 3, 1), mu_not_drafted=2 / 6),
        ran("serial_pp", "2", 4, 1.0, runs=(0, 1), mu_not_drafted=2 / 3),  # ends with a miss
        ran("serial_pp", "3", 6, 1.0, runs=(4,), mu_not_drafted=1 / 5, dataset="qa"),
    ]
    found = rows(samples, baseline="serial_pp")
    assert found["serial_pp", "gsm8k"].alpha == pytest.approx((3 / 5, 1 / 2, 1.0))
    assert found["serial_pp", "qa"].alpha == pytest.approx((1.0, 1.0, 1.0, 1.0))
    # sets alike: of a run of each set, 3/5 and 1 got to depth 1, 1/5 and 1 to depth 2 of 2/5 and 1
    mean = (8 / 10, (1 / 5 + 1) / (2 / 5 + 1), 1.0, 1 / (1 / 5 + 1))
    assert found["serial_pp", MEAN].alpha == pytest.approx(mean)


def test_alpha_of_many_answers_is_the_chance_that_a_draft_is_accepted():
    """This holds at every depth for short answers; a mean over answers would rise with depth."""
    random = np.random.default_rng(3)
    samples = []
    for number in range(400):
        runs, left = [], 24
        while left > 0:
            run = int(random.geometric(0.4)) - 1
            runs.append(min(run, left))
            left -= run + 1
        missed = 24 - sum(runs)
        assert missed in (len(runs), len(runs) - 1)
        samples.append(
            ran("streaming", str(number), 25, 1.0, runs=tuple(runs), mu_not_drafted=missed / 24)
        )
    found = rows(samples, baseline="streaming")["streaming", "gsm8k"].alpha
    assert found[:6] == pytest.approx([0.6] * 6, abs=0.06)


def test_only_what_both_ran_is_compared():
    """Question, turn and seed must match; repeats count once; unmatched samples are left out."""
    found = rows(
        [
            ran("ar", "1", 11, 10.0, seed=1, key="a"),
            ran("ar", "1", 11, 20.0, seed=1, key="b"),  # a repeat: 15 s between them
            ran("ar", "3", 11, 1.0),
            ran("streaming", "1", 11, 5.0, seed=1),
            ran("streaming", "1", 11, 0.1, seed=2),
            ran("streaming", "2", 11, 0.1),
        ]
    )["streaming", "gsm8k"]
    assert found.paired == 1
    assert found.speedup.value == pytest.approx(3.0)
    assert found.speedup.low is None
    assert (found.prompts, found.samples) == (2, 3)


def test_nothing_in_common_is_no_speedup():
    """The speed-up is neither 1 nor 0."""
    found = rows([ran("ar", "1", 11, 10.0), ran("streaming", "2", 11, 1.0)])
    assert found["streaming", "gsm8k"].speedup is None


def test_emulated_and_real_never_meet_nor_do_settings():
    """Each setting has its own rows and baseline."""
    samples = [
        ran(strategy, "1", 11, 1.0, **changes)
        for strategy in ("ar", "streaming")
        for changes in ({}, {"emulated": False}, {"temperature": 1.0}, {"cluster": "wifi"})
    ]
    assert len(summarize(samples)) == 4
    missing = [s for s in samples if s.emulated or s.strategy != "ar"]
    with pytest.raises(ValueError, match=r"baseline ar on testbed.*there are: streaming"):
        summarize(missing)


@pytest.mark.parametrize(
    ("field", "what"),
    [
        ("code", "the sources they ran"),
        ("target", "the model that computed"),
        ("draft", "the draft model"),
        ("emulation", "the emulated cluster"),
    ],
)
@pytest.mark.parametrize("strategy", ["ar", "streaming"])
def test_what_no_title_shows_is_not_averaged(field, what, strategy):
    """A record of other code is no repeat and no baseline; the error suggests the newest."""
    samples = [ran("ar", "1", 11, 1.0, drafter="none", draft=""), ran("streaming", "1", 11, 1.0)]
    later = "2026-01-02T00:00:00+00:00"
    (old,) = (one for one in samples if one.strategy == strategy)
    new = replace(old, **{field: "feed"}, key="new", started_at=later)
    with pytest.raises(ValueError, match=f"differ in {field} .*{what}.*--only {field}=feed,?$"):
        summarize([*samples, new])


def test_a_draft_model_is_told_apart_within_its_drafter():
    """Each drafter has its own draft model, and `ar` has none."""
    samples = [
        ran("ar", "1", 11, 10.0, drafter="none", draft=""),
        ran("streaming", "1", 11, 5.0, drafter="eagle", draft="a"),
        ran("streaming", "1", 11, 4.0, drafter="eagle3", draft="b"),
    ]
    assert {setting.draft for setting in summarize(samples)} == {"a", "b"}


def test_warm_and_cold_are_settings_of_their_own():
    """They also have different titles."""
    samples = [ran(name, "1", 11, 1.0, warm=w) for name in ("ar", "flowspec") for w in (0, 1)]
    cold, warm = summarize(samples)
    assert describe(warm) == f"{describe(cold)}, warm"


def test_what_drafts_nothing_is_everybodys_baseline():
    """`ar` need not run once for each drafter."""
    samples = [
        ran("ar", "1", 11, 10.0, drafter="none"),
        ran("streaming", "1", 11, 5.0, drafter="eagle"),
        ran("streaming", "1", 11, 4.0, drafter="eagle3", table="all"),
    ]
    found = summarize(samples)
    assert {setting.drafter for setting in found} == {"eagle", "eagle3"}
    assert all({row.strategy for row in own} == {"ar", "streaming"} for own in found.values())


def test_parameters_that_differ_are_told_apart():
    """Two trees are two rows, whatever else they share; ar has no tree."""
    sizes = [
        replace(sample(), parameters={"num_draft_tokens": n, "draft_topk": 4}) for n in (60, 80)
    ]
    base = [replace(one, strategy="ar") for one in sizes]
    ((_, own),) = by_setting([*sizes, *base]).items()
    assert strategies_of(own) == [
        "ar",
        "streaming num_draft_tokens=60",
        "streaming num_draft_tokens=80",
    ]


def test_sets_and_strategies_come_in_their_usual_order():
    """They have the papers' order; new ones come last."""
    names = ("zebra", "qa", "mt_bench")
    assert sets_of(sample(dataset=name) for name in names) == ["mt_bench", "qa", "zebra"]
    names = ("streaming", "newest", "ar")
    assert strategies_of(sample(strategy=n) for n in names) == ["ar", "streaming", "newest"]


def test_no_records_are_refused():
    """An empty table would look like a result."""
    with pytest.raises(ValueError, match="no records"):
        summarize([])
