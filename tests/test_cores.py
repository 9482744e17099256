"""How many segments one machine keeps in flight."""

import os

import pytest

from flowspec.cluster.cores import segments_at_once


@pytest.mark.parametrize(
    ("cores", "stages", "threads", "wanted"),
    [(1, 4, 1, 1), (2, 4, 1, 1), (4, 4, 1, 3), (5, 4, 1, 0), (64, 4, 1, 0), (8, 4, 2, 3)],
)
def test_a_core_for_the_head_and_one_for_each_segment(
    cores: int, stages: int, threads: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0: every stage has cores of its own, and the pipeline's own limit is enough."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert segments_at_once(stages, threads=threads) == wanted
