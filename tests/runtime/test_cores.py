"""Tests the number of segments that one machine keeps in flight."""

import os

import pytest

from flowspec.engine.cores import segments_at_once
from flowspec.protocol.messages import Segment
from tests.support.clusters import run_watched
from tests.support.scripted import drafter_named
from tests.support.tiny import request


@pytest.mark.parametrize(
    ("cores", "stages", "threads", "wanted"),
    [(1, 4, 1, 1), (2, 4, 1, 1), (4, 4, 1, 3), (5, 4, 1, 0), (64, 4, 1, 0), (8, 4, 2, 3)],
)
def test_a_core_for_the_head_and_one_for_each_segment(
    cores: int, stages: int, threads: int, wanted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """0 means that every stage has its own cores, and the pipeline's own limit applies."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    assert segments_at_once(stages, threads=threads) == wanted


def test_the_known_token_takes_guesses_along_where_nothing_may_follow_it() -> None:
    """This holds for one segment in flight; with two, the token goes before its guesses."""

    def sizes(max_in_flight: int) -> list[int]:
        setup = {"num_stages": 3, "drafter": drafter_named("mixed")}
        _, watches = run_watched({**setup, "max_in_flight": max_in_flight}, request())
        return [
            len(one.nodes) for one in watches[1].seen if isinstance(one, Segment) and not one.prefix
        ]

    alone, followed = sizes(1), sizes(2)
    assert min(alone[:-1]) > 1
    assert min(followed[:-1]) == 1
