"""Options of `flowspec bench --real --head`, left-out turns, and the hashes of the sources."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowspec.bench.answering_remote import LongPrompt
from flowspec.bench.experiment import Plan
from flowspec.bench.provenance import code_hash, revision
from flowspec.cli.bench_remote import assemble_remote, other_code
from flowspec.cli.main import app
from flowspec.request import ClusterError, FailureKind
from tests.bench.test_remote_bench import ask, question, served_with
from tests.bench.test_remote_bench import told as printed
from tests.support.measured import ScriptedHead, device, make_plan, measured, no_answer, run


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--jobs", "2"], "--jobs are processes of this machine"),
        (
            ["--cluster", "agx-5"],
            "--head names the cluster that answers, --cluster an emulated one",
        ),
        (
            ["--emulated-model", "vicuna-7b"],
            "--head names the cluster that answers, --emulated-model an emulated",
        ),
        (["--stages", "3"], "--stages is the cluster's own: `flowspec serve`"),
        (["--draft", "eagle"], "--draft is the cluster's own: `flowspec serve`"),
    ],
)
def test_what_a_running_cluster_has_of_its_own_is_refused(tmp_path, monkeypatch, flags, words):
    """The error comes before any question is asked."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "--real", "--head", "127.0.0.1:1", *flags])
    assert isinstance(done.exception, ValueError)
    assert words in str(done.exception)
    assert not Path("out").exists()


def assembled(cluster: Any, *, max_tokens: int = 8) -> Plan:
    """Make a plan without questions."""
    asked: dict[str, Any] = {"datasets": {}, "temperatures": (0.0,), "seeds": (1,)}
    asked |= {"head": "here", "table": "main", "target": None}
    return assemble_remote((), cluster, max_tokens=max_tokens, **asked)


def test_answers_that_no_question_leaves_room_for_are_refused_at_once():
    """A prompt has at least one token."""
    assert assembled(served_with("eagle"), max_tokens=99).max_tokens == 99
    with pytest.raises(ValueError, match=r"--max-tokens 100: .* holds 100 tokens"):
        assembled(served_with("eagle"), max_tokens=100)


def test_samples_have_the_hash_of_the_head_s_sources():
    """They lack this machine's revision if the sources differ."""
    plan = assembled(served_with("eagle", code="another"))
    assert (plan.sources["code"], plan.sources["revision"]) == ("another", "")
    assert "the head runs other sources, another, than this machine" in other_code(plan)
    same = assembled(served_with("eagle", code=code_hash()))
    assert (same.sources["code"], same.sources["revision"]) == (code_hash(), revision())
    assert other_code(same) == ""


def test_what_the_devices_memory_cannot_hold_is_left_out(tmp_path, monkeypatch, capsys):
    """A turn left out under one strategy is left out under all, with its later turns and reason."""
    plan = make_plan("ar", "streaming", "serial_pp")
    head = ScriptedHead(too_large=[("streaming", "what?")])
    outcome = run(plan, head, tmp_path)
    assert [(s.strategy, s.question) for s in outcome.samples] == [
        ("ar", "1"), ("streaming", "1"), ("serial_pp", "1")
    ]  # fmt: skip
    (one,) = outcome.too_long
    assert (one.question, one.turn, one.num_turns, one.reason) == ("2", 0, 2, "it needs 90 rows")
    assert head.by_strategy == ["ar"] * 3 + ["streaming"] * 2 + ["serial_pp"]
    printed(monkeypatch, plan, outcome)
    assert "left out: qa, question 2, turn 1: it needs 90 rows" in capsys.readouterr().err
    again = ScriptedHead()
    assert len(run(plan, again, tmp_path).samples) == 3
    assert again.asked == []
    more = run(replace(plan, num_kv_tokens=500), ScriptedHead(), tmp_path)  # other devices' memory
    assert (len(more.samples), more.too_long) == (9, [])


def test_plain_decoding_may_be_too_large_already(tmp_path):
    """Then nothing else is asked."""
    head = ScriptedHead(too_large=[("ar", "and then?")])
    outcome = run(make_plan("ar", "streaming"), head, tmp_path)
    assert [(s.question, s.turn) for s in outcome.samples] == [("1", 0), ("2", 0)] * 2
    assert head.by_strategy == ["ar"] * 3 + ["streaming"] * 2


def test_of_two_turns_that_do_not_fit_the_earlier_one_counts(tmp_path):
    """The second turn exceeds the context, the first the memory under another strategy."""
    head = ScriptedHead(too_long=["and then?"], too_large=[("streaming", "what?")])
    outcome = run(make_plan("ar", "streaming"), head, tmp_path)
    assert [(s.strategy, s.question) for s in outcome.samples] == [("ar", "1"), ("streaming", "1")]
    assert [(one.turn, one.num_turns) for one in outcome.too_long] == [(0, 2)]
    again = ScriptedHead()
    assert len(run(make_plan("ar", "streaming"), again, tmp_path).samples) == 2
    assert again.asked == []


def test_a_head_says_that_its_devices_cannot_hold_it():
    """The refusal is about the devices of the plan."""
    end = no_answer("it needs 90 rows", FailureKind.TOO_LARGE)
    assert ask(end) == LongPrompt(9, "it needs 90 rows")
    head = ScriptedHead(replies=[end], now={"devices": [device("ada", 1, 0, 8, 80)]})
    cluster = measured(head)
    assert cluster.num_kv_tokens == 80
    head.now["devices"] = []
    with pytest.raises(ClusterError, match="other devices answer now"):
        cluster.ask(question(9))
