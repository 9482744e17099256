"""What `flowspec bench --real --head` takes, and what it knows of the head's sources."""

from pathlib import Path
from typing import Any

import pytest
from test_remote_bench import served_with
from typer.testing import CliRunner

from flowspec.cli.bench_remote import assemble_remote, other_code
from flowspec.cli.main import app
from flowspec.eval.plan import Plan
from flowspec.eval.provenance import code_hash, revision


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--jobs", "2"], "--jobs are processes of this machine"),
        (
            ["--cluster", "agx-5"],
            "--head names the cluster that answers, --cluster an emulated one",
        ),
        (["--model", "vicuna-7b"], "--head names the cluster that answers, --model an emulated"),
        (["--stages", "3"], "--stages is the cluster's own: `flowspec serve`"),
        (["--draft", "eagle"], "--draft is the cluster's own: `flowspec serve`"),
    ],
)
def test_what_a_running_cluster_has_of_its_own_is_refused(tmp_path, monkeypatch, flags, words):
    """Before anybody is asked anything."""
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["bench", "--real", "--head", "127.0.0.1:1", *flags])
    assert isinstance(done.exception, ValueError)
    assert words in str(done.exception)
    assert not Path("out").exists()


def assembled(cluster: Any, *, max_tokens: int = 8) -> Plan:
    """Of nothing."""
    asked: dict[str, Any] = {"datasets": {}, "temperatures": (0.0,), "seeds": (1,)}
    asked |= {"head": "here", "table": "main", "target": None}
    return assemble_remote((), cluster, max_tokens=max_tokens, **asked)


def test_answers_that_no_question_leaves_room_for_are_refused_at_once():
    """A prompt has a token at least."""
    assert assembled(served_with("eagle"), max_tokens=99).max_tokens == 99
    with pytest.raises(ValueError, match=r"--max-tokens 100: .* holds 100 tokens"):
        assembled(served_with("eagle"), max_tokens=100)


def test_samples_have_the_hash_of_the_head_s_sources():
    """And no revision of this machine's, where those are others."""
    plan = assembled(served_with("eagle", code="another"))
    assert (plan.sources["code"], plan.sources["revision"]) == ("another", "")
    assert "the head runs other sources, another, than this machine" in other_code(plan)
    same = assembled(served_with("eagle", code=code_hash()))
    assert (same.sources["code"], same.sources["revision"]) == (code_hash(), revision())
    assert other_code(same) == ""
