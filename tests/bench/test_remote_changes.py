"""A benchmark on a cluster whose devices change, or whose head serves others in between."""

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from flowspec.bench.aggregate import summarize
from flowspec.bench.answering_remote import RemoteBench
from flowspec.bench.records import SampleFile, read_samples
from flowspec.bench.report import csv_report, tables
from flowspec.bench.runner import run_plan
from flowspec.cli.bench_remote import disturbances
from flowspec.engine.remote import Answer, RemoteCluster
from flowspec.protocol.control import Ask, Decoding, Done, Figures, Note, Piece
from flowspec.request import ClusterError, SamplingParams
from tests.bench.test_remote_bench import PROMPTS, STAGES, Client, Cluster, figures, make_plan, run
from tests.bench.test_remote_bench import told as printed
from tests.support.samples import sample


def device(name: str, rank: int, first: int, last: int) -> Any:
    """As the head tells of it."""
    layers = (first, last) if rank else None
    return SimpleNamespace(name=name, rank=rank, layers=layers, num_kv_tokens=0)


ADA_BOB = (device("ada", 1, 0, 4), device("bob", 2, 4, 8))
ADA_CYD = (device("ada", 1, 0, 4), device("cyd", 2, 4, 8))
ALL_THREE = (device("cyd", 3, 6, 8), device("ada", 1, 0, 3), device("bob", 2, 3, 6))
NONE = (device("ada", 0, 0, 0), device("bob", 0, 0, 0))


class Changing(Client):
    """A head; `course` has for each answer its figures, and its own epoch and devices after it."""

    def __init__(self, *course: tuple[Figures, int, Any]) -> None:
        super().__init__(devices=ADA_BOB)
        self.course = iter(course)

    def ask(self, ask: Ask) -> Iterator[Piece | Note | Done]:
        """The next answer."""
        told, epoch, devices = next(self.course)
        self.now |= {"epoch": epoch, "devices": devices}
        yield Piece(id=ask.id, tokens=(1, 2, 3, 4, 5), text="so")
        yield Done(id=ask.id, reason="length", prompt_tokens=7, figures=told)


def told(epoch: int, *, resumes: int = 0, **changes: Any) -> Figures:
    """Of an answer that ended in `epoch`."""
    found = figures(epoch=epoch, stages=None if resumes else STAGES)
    return found.model_copy(update={"num_resumes": resumes, **changes})


def connect(*course: tuple[Figures, int, Any]) -> RemoteCluster:
    """With ada and bob, in epoch 1."""
    return RemoteCluster(Changing(*course))  # type: ignore[arg-type]


def ask(cluster: RemoteCluster) -> Answer:
    """One question."""
    decoding = Decoding(strategy="ar", parameters={"draft_topk": 1}, run="1")
    question = [{"role": "user", "content": "who?"}]
    answer = cluster.ask(question, decoding, SamplingParams(), max_new_tokens=8)
    assert isinstance(answer, Answer)
    return answer


@pytest.mark.parametrize(
    ("course", "words"),
    [
        ((told(2, resumes=1), 2, ADA_CYD), "now: ada.*; cyd: layers 4 to 7;"),  # a spare
        ((told(2), 2, ALL_THREE), "now: ada.*; bob.*; cyd: layers 6 to 7;"),  # one came late
        ((told(2, resumes=1), 2, NONE), r"now: none.*\(2 are lost\)"),  # another loss just then
        ((told(2, resumes=1), 3, ADA_BOB), "built anew several times"),  # which ones ended it?
        ((told(3, resumes=2, first_epoch=1), 3, ADA_BOB), "several times"),  # there and back
        ((told(3, resumes=1, first_epoch=2), 3, ADA_BOB), "several times"),  # begun elsewhere
    ],
)
def test_no_sample_is_filed_under_the_key_of_other_devices(tmp_path, course, words):
    """Where the devices change, the benchmark ends; what they had answered stays."""
    cluster = connect((told(1), 1, ADA_BOB), course)
    cluster._client.now["why"] = "2 are lost"  # type: ignore[attr-defined]
    plan = make_plan("ar", datasets={"qa": PROMPTS}, stages=cluster.num_stages)
    with SampleFile(tmp_path) as file, pytest.raises(ClusterError, match=words) as failure:
        run_plan(plan, file, jobs=1, tell=lambda now: None, bench=RemoteBench(plan, cluster))
    text = str(failure.value)
    assert "the same command measures the devices that are there now" in text
    assert "\n" not in text
    (kept,) = read_samples(tmp_path)
    assert (kept.stages, kept.devices) == (2, ("ada: layers 0 to 3", "bob: layers 4 to 7"))


def test_the_same_devices_again_go_on(tmp_path):
    """An answer that was interrupted is kept, with what it lost."""
    back = told(2, resumes=1, resume_s=0.5, first_epoch=1), 2, ADA_BOB
    later = told(4, resumes=1, first_epoch=2), 4, ADA_BOB  # one epoch never came to serve
    cluster = connect(back, (told(2), 2, ADA_BOB), later)
    plan = make_plan("ar")
    with SampleFile(tmp_path) as file:
        found = run_plan(
            plan, file, jobs=1, tell=lambda now: None, bench=RemoteBench(plan, cluster)
        ).samples
    assert [(s.resumes, s.outage_s) for s in found] == [(1, 0.5), (0, 0.0), (1, 0.0)]
    assert {s.devices for s in found} == {tuple(cluster.devices)}


def test_an_answer_says_whether_the_cluster_was_built_anew():
    """Its time to the first token may hold the wait."""
    cluster = connect((told(1), 1, ADA_BOB), (told(3), 3, ADA_BOB), (told(3), 3, ADA_BOB))
    assert [ask(cluster).rebuilt for _ in range(3)] == [False, True, False]


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
    """The first answer of a set under a strategy is the only one with nothing learnt before it."""
    outcome = run(make_plan("ar", "streaming"), Cluster(answered=told(1, fresh=True)), tmp_path)
    assert [s.relearnt for s in outcome.samples] == [False, True, True] * 2
    assert list(disturbances(outcome)) == [
        "before 4 of the answers somebody else asked the head something: costs and scores of their "
        "sets were learnt anew from there"
    ]


def test_a_drafter_of_which_nobody_tells_is_not_idle(tmp_path, monkeypatch):
    """An answer without decode time says nothing of it; tables stay empty there."""
    short = figures().model_copy(update={"last_token_at": 1.0})
    plan = make_plan("ar", "streaming")
    outcome = run(plan, Cluster(answered=short), tmp_path)
    assert {s.drafter_busy for s in outcome.samples} == {None}
    assert not any("drafter busy" in table.columns for table in tables(outcome.samples))
    csv_report(outcome.samples)
    printed(monkeypatch, plan, outcome)
    busy = [replace(s, stage_busy=(0.5, 0.25)) for s in outcome.samples]
    assert "50 25" in printed(monkeypatch, plan, replace(outcome, samples=busy))
