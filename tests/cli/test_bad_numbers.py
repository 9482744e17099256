"""Numbers that no command can use: one sentence that names the option, exit code 2."""

import logging
import sys

import pytest

from flowspec.cli.main import main

TOKEN = "--token=x"  # never looked at


def refusal(words: list[str], monkeypatch, capsys) -> str:
    """What `flowspec WORDS` says on its way out."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the handlers outlive the command
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # so does serve's
    monkeypatch.setattr(sys, "argv", ["flowspec", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    assert ended.value.code == 2, printed
    assert "Traceback" not in printed.err
    assert not printed.out
    return next(line for line in printed.err.splitlines() if line.lower().startswith("error"))


@pytest.mark.parametrize(
    ("words", "option", "value"),
    [
        (["join", "head:7000", TOKEN, "--threads", "-1"], "--threads", "-1"),
        (["join", "head:7000", TOKEN, "--port", "99999"], "--port", "99999"),
        (["serve", "--port", "99999"], "--port", "99999"),
        (["serve", "--devices", "-1"], "--devices", "-1"),
        (["serve", "--spares", "-1"], "--spares", "-1"),
        (["serve", "--context", "-1"], "context", "-1"),
        (["serve", "--kv-memory-mb", "-1"], "--kv-memory-mb", "-1"),
        (["serve", "--reserve-mb", "-1"], "--reserve-mb", "-1"),
        (["serve", "--settle", "-1"], "--settle", "-1"),
        (["serve", "--settle", "nan"], "--settle", "nan"),
        (["serve", "--dead-after", "0"], "--dead-after", "0"),
        (["serve", "--rejoin-wait", "-2"], "--rejoin-wait", "-2"),
        (["serve", "--give-up", "inf"], "--give-up", "inf"),
        (["serve", "--max-num-seqs", "0"], "max_num_seqs", "0"),
        (["generate", "--head", "h", "hi", "--max-tokens", "0"], "--max-tokens", "0"),
        (["generate", "--head", "h", "--prompts", "f", "--limit", "0"], "--limit", "0"),
        (["chat", "h", "--max-tokens", "0"], "--max-tokens", "0"),
        (["plan", "--cluster", "jetson-5", "--context", "0"], "--context", "0"),
        (["plan", "--cluster", "jetson-5", "--requests", "0"], "--requests", "0"),
        (["plan", "--cluster", "jetson-5", "--reserve-mb", "-1"], "--reserve-mb", "-1"),
        (["plan", "--cluster", "jetson-5", "--tokens", "-1"], "--tokens", "-1"),
        (["split", "models/demo/target", "--stages", "0"], "--stages", "0"),
        (["verify", "--limit", "0"], "--limit", "0"),
        (["verify", "--max-tokens", "0"], "--max-tokens", "0"),
        (["verify", "--stages", "0"], "--stages", "0"),
        (["verify", "--requests", "0"], "max_num_seqs", "0"),
        (["verify", "--temperatures", "-1"], "temperature", "-1"),
        (["reliability", "--stages", "0"], "--stages", "0"),
        (["reliability", "--max-tokens", "0"], "--max-tokens", "0"),
        (["check-head", "m", "h", "--limit", "0"], "--limit", "0"),
        (["bench", "--max-tokens", "1"], "--max-tokens", "1"),
        (["bench", "--limit", "0"], "--limit", "0"),
        (["bench", "--temperatures", "-1"], "temperature", "-1"),
        (["bench", "--seeds", "-1"], "seed", "-1"),
        (["simulate", "--vary", "draft_topk=4", "--temperature", "-1"], "temperature", "-1"),
        (["simulate", "--vary", "draft_topk=4", "--seed", "-1"], "seed", "-1"),
        (["run", "--max-tokens", "0"], "max_new_tokens", "0"),
        (["run", "--stages", "0"], "stages", "0"),
        (
            ["run", "--set", "draft_topk=\uff18"],
            "--set: draft_topk: needed: a whole number",
            r"'\uff18'",
        ),
        (["run", "--set", "segment_size=0"], "--set: segment_size must be at least 1, not 0", "0"),
        (["run", "--kv-memory-mb", "-1"], "kv_memory_mb", "-1"),
        (["run", "--context", "-1"], "context", "-1"),
        (["run", "--context", "20000000"], "context", "20000000"),
        (["serve", "--context", "20000000"], "context", "20000000"),
        (["verify", "--context", "-1"], "context", "-1"),
        (["bench", "--context", "-1"], "--context", "-1"),
    ],
)
def test_it_is_told_by_the_option_s_name(words, option, value, tmp_path, monkeypatch, capsys):
    """Before anything is loaded, listened at or written."""
    monkeypatch.chdir(tmp_path)
    error = refusal(words, monkeypatch, capsys)
    assert option in error
    assert value in error or "Invalid value for" in error  # in the words of the option parser
    assert list(tmp_path.iterdir()) == []
