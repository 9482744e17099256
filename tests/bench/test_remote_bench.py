"""A benchmark on a cluster of devices: what it asks, what it keeps, what it cannot know."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from flowspec.bench import answering_remote
from flowspec.bench.aggregate import summarize
from flowspec.bench.answering_remote import LongPrompt, RemoteAnswer
from flowspec.bench.experiment import Plan
from flowspec.bench.plots import kinds
from flowspec.bench.plots.theme import drawing, find_theme
from flowspec.bench.records import SampleFile, read_samples
from flowspec.bench.report import csv_report, tables
from flowspec.bench.runner import RunOutcome, run_plan
from flowspec.cli.bench import _report
from flowspec.cli.bench_remote import assemble_remote, cluster_drafters, disturbances
from flowspec.cli.ui import bench_table
from flowspec.engine.remote import RemoteEngine
from flowspec.protocol.control import ModelCard
from flowspec.request import (
    ClusterError,
    Decoding,
    FailureKind,
    FinishReason,
    Request,
    SamplingParams,
)
from tests.support.in_process import TinyModel, cluster, tiny_model
from tests.support.measured import (
    COUNTS,
    DEVICES,
    PROMPTS,
    Reply,
    ScriptedHead,
    make_plan,
    measured,
    no_answer,
    run,
    stats,
)


def test_plain_decoding_is_the_truth_and_asked_once(tmp_path):
    """It comes first; its samples are those answers, and a second turn holds the first answer."""
    head = ScriptedHead()
    outcome = run(make_plan("streaming", "ar"), head, tmp_path)
    assert head.by_strategy == ["ar"] * 3 + ["streaming"] * 3
    assert head.words(2) == head.words(5) == ("what?", "answer to what?", "and then?")
    assert len(outcome.samples) == 6
    assert not any(sample.mismatch for sample in outcome.samples)


def test_the_head_learns_anew_before_each_set_under_each_strategy(tmp_path):
    """Requests name how they are decoded and run alone; other requests delay the measurement."""
    head = ScriptedHead()
    run(make_plan("streaming", "ar"), head, tmp_path / "one")
    assert head.done == ["forget", *["ar"] * 3, "forget", *["streaming"] * 3]
    plain, streaming = (head.asked[place].decoding for place in (0, 3))
    assert plain == Decoding(strategy="ar")
    assert (streaming.strategy, streaming.drafter) == ("streaming", "eagle")
    assert streaming.parameters["num_draft_tokens"] > 0
    assert all(one.exclusive for one in head.asked)


def test_a_head_that_never_becomes_idle_is_not_measured(tmp_path, monkeypatch):
    """It is tried again for a while, and the sentence says what to do."""
    monkeypatch.setattr(answering_remote, "AGAIN_S", 0.001)
    head = ScriptedHead(busy=3)
    assert len(run(make_plan("ar"), head, tmp_path / "one").samples) == 3
    assert head.busy == 0
    monkeypatch.setattr(answering_remote, "FORGET_S", 0.01)
    with pytest.raises(ClusterError, match="1 request is open: it serves others; measure it when"):
        run(make_plan("ar"), ScriptedHead(busy=10_000), tmp_path / "two")


def test_a_text_that_differs_from_it_is_a_mismatch(tmp_path):
    """Whether or not plain decoding is in the table."""
    head = ScriptedHead(wrong="streaming")
    outcome = run(make_plan("streaming"), head, tmp_path)
    assert head.by_strategy == ["ar"] * 3 + ["streaming"] * 3
    assert [(s.strategy, s.mismatch) for s in outcome.samples] == [("streaming", True)] * 3


def test_what_a_cluster_tells_and_what_not(tmp_path):
    """Shares of the decode time; no cause, no link, no bound."""
    sample = run(make_plan("ar"), ScriptedHead(), tmp_path).samples[0]
    assert (sample.decode_s, sample.ttft_s, sample.prompt_tokens) == (1.0, 1.0, 9)
    assert (sample.rows_sent, sample.rows_pruned, sample.rows_wasted) == (9, 2, 0)
    assert sample.stage_busy == (0.5, 0.25)
    assert sample.drafter_busy == pytest.approx(0.2)
    assert (sample.stage_idle, sample.link_bytes, sample.bound_share) == ((), {}, None)
    assert (sample.emulated, sample.warm, sample.devices) == (False, True, DEVICES)


def test_an_outage_is_no_decode_time(tmp_path):
    """The stages' totals are not known then."""
    broken = Reply(stats=stats(num_resumes=1, resume_s=0.5, num_prefills=2), counts=None)
    outcome = run(make_plan("ar"), ScriptedHead(answered=broken), tmp_path)
    sample = outcome.samples[0]
    assert (sample.resumes, sample.outage_s, sample.decode_s) == (1, 0.5, 0.5)
    assert sample.decode_tokens_per_s == pytest.approx(8.0)
    assert (sample.rows_pruned, sample.rows_wasted, sample.stage_busy) == (None, None, ())
    assert list(disturbances(outcome)) == [
        "3 of the answers continued after a device was lost; the outages are not part of the "
        "decode time"
    ]


def test_every_turn_is_kept_when_it_is_finished(tmp_path):
    """A head that goes away ends the run; the same command goes on with the set, nothing twice."""
    plan = make_plan("ar", "streaming")
    with pytest.raises(ClusterError, match="connection lost"):
        run(plan, ScriptedHead(fails_at=5), tmp_path)
    assert len(read_samples(tmp_path)) == 4
    again = ScriptedHead()
    outcome = run(plan, again, tmp_path)
    assert (len(outcome.samples), outcome.num_run) == (6, 2)
    assert again.by_strategy == ["ar"] * 3 + ["streaming"] * 3  # the truth is not in the file
    assert len((tmp_path / "samples.jsonl").read_text().splitlines()) == 6
    idle = ScriptedHead()
    assert run(plan, idle, tmp_path).num_run == 0
    assert idle.asked == []


def test_repeats_share_one_truth(tmp_path):
    """So that a repeat of plain decoding that differs is noticed."""
    head = ScriptedHead()
    outcome = run(make_plan("ar", "streaming", repeats=2), head, tmp_path)
    assert head.by_strategy == [*["ar"] * 3, *["streaming"] * 3] * 2
    assert [sample.repeat for sample in outcome.samples] == [0] * 6 + [1] * 6


def test_a_conversation_that_is_refused_is_left_out_from_its_later_turn(tmp_path):
    """A first turn ends the benchmark: the file is to be mended, whose line is named."""
    outcome = run(make_plan("ar"), ScriptedHead(refused=["and then?"]), tmp_path)
    assert [(s.question, s.turn) for s in outcome.samples] == [("1", 0), ("2", 0)]
    assert [(one.turn, one.reason) for one in outcome.too_long] == [(1, "the template says no")]
    first = replace(PROMPTS[0], where="ask.jsonl:3")
    plan = make_plan("ar", datasets={"qa": (first,)})
    with pytest.raises(ValueError, match=r"ask\.jsonl:3: the template says no"):
        run(plan, ScriptedHead(refused=["who?"]), tmp_path / "other")


def test_a_turn_that_is_too_long_is_left_out(tmp_path):
    """With those after it, and counted once."""
    head = ScriptedHead(too_long=["and then?"])
    outcome = run(make_plan("ar", "streaming"), head, tmp_path)
    assert len(outcome.samples) == 4
    ((one,), (line,)) = outcome.too_long, (tmp_path / "left_out.jsonl").read_text().splitlines()
    assert (one.question, one.turn, one.num_turns, one.prompt_tokens) == ("2", 1, 1, 4000)
    assert json.loads(line)["key"] == one.key


def test_devices_models_and_truth_are_part_of_a_sample_s_key():
    """Records of other ones are not taken for these."""
    plan = make_plan("ar")
    others = [
        replace(plan, remote={**(plan.remote or {}), "devices": ["ada", "cyd"]}),
        replace(plan, remote={**(plan.remote or {}), "dtype": "float32"}),
        replace(plan, sources={**plan.sources, "target": "another"}),
        replace(plan, remote=None),
    ]
    keys = {
        key
        for one in (plan, *others)
        for group in one.groups()
        for key in one.keys(one.cases[0], group).values()
    }
    assert len(keys) == 5 * 3


def told(monkeypatch: pytest.MonkeyPatch, plan: Plan, outcome: RunOutcome) -> str:
    """What the command prints."""
    console = Console(width=120, record=True)
    monkeypatch.setattr(bench_table, "Console", lambda width: console)
    _report(plan, outcome, Path("out"), None)
    return console.export_text()


@pytest.mark.parametrize("stages", [COUNTS, None])
def test_tables_reports_and_plots_leave_out_what_is_not_known(
    tmp_path, monkeypatch, capsys, stages
):
    """No made-up 0, no traceback."""
    plan = make_plan("ar", "streaming")
    outcome = run(plan, ScriptedHead(answered=Reply(counts=stages)), tmp_path)
    table = told(monkeypatch, plan, outcome)
    assert "big on here:7000, 2 stages, table main (measured on a cluster of devices)" in table
    assert "0 differ from plain decoding on the cluster" in capsys.readouterr().out
    assert "waiting for" not in table
    assert ("each stage busy" in table) is (stages is not None)
    columns = {column for one in tables(outcome.samples) for column in one.columns}
    assert ("pruned" in columns) is ("stages busy %" in columns) is (stages is not None)
    assert not columns & {"waiting for link", "upstream busy", "of the bound"}
    csv_report(outcome.samples)
    ((_, rows),) = summarize(outcome.samples).items()
    assert {row.rows_pruned is None for row in rows} == {stages is None}
    theme = find_theme("light")
    with drawing(theme):
        kinds.speedup(outcome.samples, theme, "ar")
        if stages is None:
            with pytest.raises(ValueError, match="no record says what its stages did"):
                kinds.time(outcome.samples, theme, "ar")
        else:
            kinds.time(outcome.samples, theme, "ar")
        with pytest.raises(ValueError, match="do not say link_mbps"):
            kinds.PLOTS["bandwidth"](outcome.samples, theme, "ar")


def question(max_new_tokens: int = 50) -> Request:
    """A request as the benchmark makes it."""
    return Request(
        prompt=[{"role": "user", "content": "who?"}],
        sampling=SamplingParams(seed=3),
        max_new_tokens=max_new_tokens,
        decoding=Decoding(strategy="ar"),
    )


def ask(reply: Reply, **now: Any) -> RemoteAnswer | LongPrompt:
    """Ask one question of a head that gives this reply."""
    return measured(ScriptedHead(replies=[reply], now=now)).ask(question())


def test_an_answer_comes_with_the_reason_for_which_it_waited():
    """Its time to the first token is no measurement then."""
    said: list[str] = []
    head = ScriptedHead(replies=[Reply(notices=["bob is lost"], num_prompt_tokens=7), Reply()])
    cluster = measured(head, said.append)
    answer, later = cluster.ask(question()), cluster.ask(question())
    assert isinstance(answer, RemoteAnswer)
    assert isinstance(later, RemoteAnswer)
    assert (answer.output.tokens, answer.output.text) == ((1, 2, 3, 4, 5), "so")
    assert (answer.output.num_prompt_tokens, answer.counts) == (7, COUNTS)
    assert said == ["bob is lost"]
    assert (answer.has_waited, later.has_waited) == (True, False)


def test_what_a_head_refuses_is_told_in_its_words():
    """A prompt that is too long is no failure, whether the head cuts the answer or refuses it."""
    failed = no_answer("IndexError: boom", FailureKind.FAILED, rank=2)
    with pytest.raises(ClusterError, match="head at here:7000: stage 2: IndexError: boom"):
        ask(failed)
    with pytest.raises(ClusterError, match="head at here:7000: connection lost"):
        ask(no_answer("connection lost", FailureKind.FAILED, rank=0))
    with pytest.raises(ClusterError, match="head at here:7000: 512 requests are waiting already"):
        ask(no_answer("512 requests are waiting already", FailureKind.REFUSED))
    assert ask(Reply(num_prompt_tokens=51)) == LongPrompt(51)
    assert isinstance(ask(Reply(num_prompt_tokens=50)), RemoteAnswer)
    long = no_answer("the prompt has 100 tokens", FailureKind.REFUSED, num_prompt=100)
    assert ask(long) == LongPrompt(100)
    refused = no_answer("the template says no", FailureKind.BAD_PROMPT, num_prompt=0)
    assert ask(refused) == LongPrompt(0, "the template says no", is_refused=True)
    with pytest.raises(ClusterError, match="ended early: cancelled"):
        ask(Reply(reason=FinishReason.CANCELLED))
    with pytest.raises(ClusterError, match="not healthy: 2 of 8 layers"):
        ask(Reply(), healthy=False, why="2 of 8 layers are nobody's")


def served_with(drafter: str, *, code: str = "", **card: str) -> Any:
    """A cluster as the command sees it."""
    values = {"model_id": "big", "model_hash": "b" * 64, "stored_dtype": "x", **card}
    status = SimpleNamespace(drafter=drafter, draft_hash="d", model=ModelCard(**values))
    status.max_context, status.code_hash = 100, code
    return SimpleNamespace(status=status, devices=["ada"], num_stages=1, num_kv_tokens=0)


def test_the_drafter_is_the_cluster_s():
    """Switches are free."""
    cluster = served_with("eagle3")
    assert cluster_drafters((), ("streaming",), cluster) == ("eagle3",)
    assert cluster_drafters(("eagle3+merge",), ("streaming",), cluster) == ("eagle3+merge",)
    assert cluster_drafters(("eagle3+graft",), ("streaming",), cluster) == ("eagle3+merge",)
    with pytest.raises(ValueError, match="served with eagle3; give --drafter eagle3.*serve MODEL"):
        cluster_drafters(("eagle",), ("streaming",), cluster)
    assert cluster_drafters((), ("ar",), served_with("none")) == ("none",)
    with pytest.raises(ValueError, match="served without a drafter.*flowspec serve MODEL"):
        cluster_drafters((), ("ar", "streaming"), served_with("none"))


def test_another_target_than_the_cluster_s_is_refused(tmp_path, monkeypatch):
    """With both hashes."""
    from tests.support.checkpoints import save_checkpoint

    monkeypatch.chdir(tmp_path)
    target = save_checkpoint(tmp_path / "tiny", num_layers=2) / "target"
    asked: dict[str, Any] = {"datasets": {}, "temperatures": (0.0,), "seeds": (1,)}
    asked |= {"head": "here", "max_tokens": 8, "table": "main"}
    with pytest.raises(ValueError, match=r"not the model of this cluster, big: .*bbbbbbbbbbbbbbbb"):
        assemble_remote((), served_with("eagle"), target=str(target), **asked)
    plan = assemble_remote((), served_with("eagle"), target=None, **asked)
    assert (plan.cluster, plan.target, plan.sources["eagle"]) == ("here:7000", None, "d")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A model that loads fast."""
    return tiny_model(tmp_path_factory.mktemp("model"))


def test_a_real_head_and_its_devices_are_measured(model, tmp_path):
    """The answers are those of plain decoding, and every figure of a stage is known."""
    with cluster(model, "ada", "bob") as running, running.client() as client:
        assert isinstance(client, RemoteEngine)
        plan = make_plan("ar", "streaming", context=client.cluster_status().max_context)
        bench = answering_remote.RemoteBench(plan, answering_remote.MeasuredCluster(client))
        with SampleFile(tmp_path) as file:
            found = run_plan(plan, file, jobs=1, tell=lambda now: None, bench=bench)
    assert [s.strategy for s in found.samples] == [*["ar"] * 3, *["streaming"] * 3]
    for sample in found.samples:
        assert not sample.mismatch
        assert sample.rows_sent > 0
        assert sample.rows_pruned is not None
        assert (len(sample.stage_busy), sample.ttft_s > 0) == (2, True)
        assert (sample.rebuilt, sample.relearnt, sample.resumes) == (False, False, 0)
    assert list(disturbances(found)) == []


def test_other_clients_requests_are_noticed(model, tmp_path):
    """They come between the benchmark's; what the head learns of costs is of them too."""
    with cluster(model, "ada", "bob") as running, running.client() as client:
        measuring = answering_remote.MeasuredCluster(client)
        measuring.forget()
        first, second = measuring.ask(question(4)), measuring.ask(question(4))
        with running.client() as other:
            assert other.submit(replace(question(4), decoding=None)).result(30.0).tokens
        third, fourth = measuring.ask(question(4)), measuring.ask(question(4))
    answers = [one for one in (first, second, third, fourth) if isinstance(one, RemoteAnswer)]
    assert [one.has_company for one in answers] == [False, False, True, False]
