"""A benchmark on a cluster whose devices change, or whose head serves others in between."""

from dataclasses import replace
from typing import Any

import pytest

from flowspec.bench.aggregate import summarize
from flowspec.bench.answering_remote import RemoteAnswer
from flowspec.bench.records import read_samples
from flowspec.bench.report import csv_report, tables
from flowspec.cli.bench_remote import disturbances
from flowspec.request import ClusterError
from tests.bench.test_remote_bench import question
from tests.bench.test_remote_bench import told as printed
from tests.support.measured import (
    ADA_BOB,
    COUNTS,
    DEVICES,
    PROMPTS,
    Reply,
    ScriptedHead,
    device,
    make_plan,
    measured,
    run,
    stats,
)
from tests.support.samples import sample

ADA_CYD = (device("ada", 1, 0, 4), device("cyd", 2, 4, 8))
ALL_THREE = (device("cyd", 3, 6, 8), device("ada", 1, 0, 3), device("bob", 2, 3, 6))
NONE = (device("ada", 0, 0, 0), device("bob", 0, 0, 0))


def course(
    last: int, epoch: int, devices: Any, *, first: int | None = None, resumes: int = 0
) -> Reply:
    """An answer from epoch `first` to `last`; afterwards the head has `devices` in `epoch`."""
    return Reply(
        stats=stats(num_resumes=resumes, resume_s=0.5 * resumes, num_prefills=1 + resumes),
        counts=None if resumes else COUNTS,
        epochs=(last if first is None else first, last),
        status={"epoch": epoch, "devices": devices},
    )


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (course(2, 2, ADA_CYD, resumes=1), "now: ada.*; cyd: layers 4 to 7;"),  # a spare
        (course(2, 2, ALL_THREE), "now: ada.*; bob.*; cyd: layers 6 to 7;"),  # one came late
        (course(2, 2, NONE, resumes=1), r"now: none.*\(2 are lost\)"),  # another loss just then
        (course(2, 3, ADA_BOB, resumes=1), "built anew several times"),  # which ones ended it?
        (course(3, 3, ADA_BOB, resumes=2, first=1), "several times"),  # there and back
        (course(3, 3, ADA_BOB, resumes=1, first=2), "several times"),  # begun elsewhere
    ],
)
def test_no_sample_is_filed_under_the_key_of_other_devices(tmp_path, reply, words):
    """Where the devices change, the benchmark ends; what they had answered stays."""
    head = ScriptedHead(replies=[course(1, 1, ADA_BOB), reply], now={"why": "2 are lost"})
    with pytest.raises(ClusterError, match=words) as failure:
        run(make_plan("ar", datasets={"qa": PROMPTS}), head, tmp_path)
    text = str(failure.value)
    assert "the same command measures the devices that are there now" in text
    assert "\n" not in text
    (kept,) = read_samples(tmp_path)
    assert (kept.stages, kept.devices) == (2, DEVICES)


def test_the_same_devices_again_go_on(tmp_path):
    """An answer that was interrupted is kept, with what it lost."""
    replies = [
        course(2, 2, ADA_BOB, resumes=1, first=1),
        course(2, 2, ADA_BOB),
        course(4, 4, ADA_BOB, resumes=1, first=2),  # one epoch never came to serve
    ]
    outcome = run(make_plan("ar"), ScriptedHead(replies=replies), tmp_path)
    assert [(s.resumes, s.outage_s) for s in outcome.samples] == [(1, 0.5), (0, 0.0), (1, 0.5)]
    assert {s.devices for s in outcome.samples} == {DEVICES}


def test_an_answer_says_whether_the_cluster_was_built_anew(tmp_path):
    """Its time to the first token may hold the wait, so tables leave it out."""
    replies = [course(1, 1, ADA_BOB), course(3, 3, ADA_BOB), course(3, 3, ADA_BOB)]
    cluster = measured(ScriptedHead(replies=replies))
    answers = [cluster.ask(question(8)) for _ in replies]
    assert [isinstance(one, RemoteAnswer) and one.has_waited for one in answers] == [
        *(False, True, False)
    ]
    outcome = run(make_plan("ar"), ScriptedHead(replies=replies), tmp_path)
    assert [s.rebuilt for s in outcome.samples] == [False, True, False]
    assert list(disturbances(outcome)) == [
        "1 of the answers waited for devices or for requests of other clients; tables leave out "
        "their times to the first token"
    ]


def test_a_time_to_the_first_token_that_may_hold_an_outage_is_in_no_table():
    """Of answers that were resumed, and of those that came after the cluster was built anew."""
    changes: list[dict[str, Any]] = [{"ttft_s": 1.0}, {"ttft_s": 90.0, "resumes": 1}]
    changes += [{"ttft_s": 80.0, "rebuilt": True}]
    answers = [sample(strategy="ar", question=str(n), **one) for n, one in enumerate(changes)]
    ((_, rows),) = summarize(answers).items()
    assert [row.ttft_s for row in rows] == [1.0, 1.0]
    ((_, rows),) = summarize(answers[1:]).items()
    assert [row.ttft_s for row in rows] == [None, None]
    assert not any("first token s" in table.columns for table in tables(answers[1:]))
    csv_report(answers[1:])


def test_who_asks_in_between_is_noticed(tmp_path):
    """Each answer before which the head served others is counted."""
    outcome = run(make_plan("ar", "streaming"), ScriptedHead(num_others=2), tmp_path)
    assert all(s.relearnt for s in outcome.samples)
    assert list(disturbances(outcome)) == [
        "before 6 of the answers the head served requests of other clients; it may have learnt "
        "costs and scores from them too"
    ]
    quiet = run(make_plan("ar", "streaming"), ScriptedHead(), tmp_path / "quiet")
    assert not any(s.relearnt for s in quiet.samples)


def test_a_drafter_of_which_nobody_tells_is_not_idle(tmp_path, monkeypatch):
    """An answer without decode time says nothing of it; tables stay empty there."""
    short = Reply(stats=stats(last_token_at=1.0))
    plan = make_plan("ar", "streaming")
    outcome = run(plan, ScriptedHead(answered=short), tmp_path)
    assert {s.drafter_busy for s in outcome.samples} == {None}
    assert not any("drafter busy" in table.columns for table in tables(outcome.samples))
    csv_report(outcome.samples)
    printed(monkeypatch, plan, outcome)
    busy = [replace(s, stage_busy=(0.5, 0.25)) for s in outcome.samples]
    assert "50 25" in printed(monkeypatch, plan, replace(outcome, samples=busy))
