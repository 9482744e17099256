"""The thresholds of benchmarks/host.py."""

import pytest

from benchmarks import host as bench_host

FIGURES = {"segments_per_s": 180.0, "head_share_of_a_core": 0.6}


@pytest.mark.parametrize(
    ("least", "most", "words"),
    [
        (None, None, []),
        (180.0, 0.6, []),
        (200.0, None, ["180 segments/s are fewer than the 200"]),
        (None, 0.5, ["0.6 of a core, more than the 0.5"]),
        (200.0, 0.5, ["180 segments/s", "0.6 of a core"]),
        (float("nan"), None, ["180 segments/s"]),
    ],
)
def test_a_threshold_that_is_missed_is_a_sentence(least, most, words):
    """Without a threshold there is none; one that no figure reaches is always missed."""
    found = bench_host.missed(FIGURES, least_segments_per_s=least, most_core=most)
    assert len(found) == len(words)
    for sentence, part in zip(found, words, strict=True):
        assert part in sentence
