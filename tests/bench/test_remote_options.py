"""Options of `flowspec bench --real --head`, left-out turns, and the hashes of the sources."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from flowspec.bench.experiment import Plan
from flowspec.bench.provenance import code_hash, revision
from flowspec.cli.bench_remote import assemble_remote, other_code
from flowspec.cli.main import app
from flowspec.engine.remote import LongPrompt, RemoteCluster
from flowspec.protocol.control import Decoding, Done
from flowspec.request import ClusterError, SamplingParams
from tests.bench.test_remote_bench import Client, Cluster, ask, make_plan, run, served_with
from tests.bench.test_remote_bench import told as printed


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
    cluster = Cluster(too_large=[("streaming", "what?")])
    outcome = run(plan, cluster, tmp_path)
    assert [(s.strategy, s.question) for s in outcome.samples] == [
        ("ar", "1"), ("streaming", "1"), ("serial_pp", "1")
    ]  # fmt: skip
    (one,) = outcome.too_long
    assert (one.question, one.turn, one.num_turns, one.reason) == ("2", 0, 2, "it needs 90 rows")
    assert cluster.by_strategy == ["ar"] * 3 + ["streaming"] * 2 + ["serial_pp"]
    printed(monkeypatch, plan, outcome)
    assert "left out: qa, question 2, turn 1: it needs 90 rows" in capsys.readouterr().err
    again = Cluster()
    assert len(run(plan, again, tmp_path).samples) == 3
    assert again.asked == []
    more = run(replace(plan, num_kv_tokens=500), Cluster(), tmp_path)  # other devices' memory
    assert (len(more.samples), more.too_long) == (9, [])


def test_plain_decoding_may_be_too_large_already(tmp_path):
    """Then nothing else is asked."""
    cluster = Cluster(too_large=[("ar", "and then?")])
    outcome = run(make_plan("ar", "streaming"), cluster, tmp_path)
    assert [(s.question, s.turn) for s in outcome.samples] == [("1", 0), ("2", 0)] * 2
    assert cluster.by_strategy == ["ar"] * 3 + ["streaming"] * 2


def test_of_two_turns_that_do_not_fit_the_earlier_one_counts(tmp_path):
    """The second turn exceeds the context, the first the memory under another strategy."""
    cluster = Cluster(too_long=["and then?"], too_large=[("streaming", "what?")])
    outcome = run(make_plan("ar", "streaming"), cluster, tmp_path)
    assert [(s.strategy, s.question) for s in outcome.samples] == [("ar", "1"), ("streaming", "1")]
    assert [(one.turn, one.num_turns) for one in outcome.too_long] == [(0, 2)]
    again = Cluster()
    assert len(run(make_plan("ar", "streaming"), again, tmp_path).samples) == 2
    assert again.asked == []


def test_a_head_says_that_its_devices_cannot_hold_it():
    """The refusal is about the devices of the plan."""
    end = Done(id=1, reason="error", error="it needs 90 rows", prompt_tokens=9, too_large=True)
    assert ask(Client(end)) == LongPrompt(9, "it needs 90 rows")
    client = Client(
        end, devices=[SimpleNamespace(name="ada", rank=1, layers=(0, 8), num_kv_tokens=80)]
    )
    assert RemoteCluster(client).num_kv_tokens == 80  # type: ignore[arg-type]
    cluster, client.now["devices"] = RemoteCluster(client), []  # type: ignore[arg-type]
    decoding = Decoding(strategy="ar", parameters={}, run="1")
    with pytest.raises(ClusterError, match="other devices answer now"):
        cluster.ask(
            [{"role": "user", "content": "?"}], decoding, SamplingParams(), max_new_tokens=9
        )
