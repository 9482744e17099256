"""Asking a head: what cannot be asked is told before it is; what the head says is told once."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from flowspec.cli import generate as generate_module
from flowspec.cli.chat import ChatOptions, chat_loop
from flowspec.cli.main import main
from flowspec.request import FailureKind
from flowspec.transport.secure.token import new_token
from tests.support.clients import AnsweringClient, failing

CAUSE = "the prompt has 9000 tokens, the context 2048"
NO_ROOM = failing(CAUSE, FailureKind.REFUSED)


class Answering(AnsweringClient):
    """Answers, after it has said why it waits."""

    text = "two words"
    notices = ("bob is lost",)


def ends(words: list[str], monkeypatch: Any, capsys: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `flowspec generate`."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the handlers outlive the command
    monkeypatch.setattr(sys, "argv", ["flowspec", "generate", "--head", "127.0.0.1:1", *words])
    monkeypatch.setenv("FLOWSPEC_TOKEN", new_token())
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


def questions(folder: Path) -> list[str]:
    """Return the flags that name a file with one question."""
    file = folder / "questions.txt"
    file.write_text("hi\n")
    return ["--prompts", str(file)]


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--temperature", "-1"], "temperature must be between 0 and 100, not -1"),
        (["--top-p", "3"], "top_p must be above 0"),
        (["--min-p", "nan"], "min_p must be at least 0"),
        (["--top-k", "-2"], "top_k must be 0"),
        (["--seed", "-1"], "seed must be between"),
        (["--stop", "x" * 500], "a stop string has 500 characters, at most 200 are possible"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence(flags, names, monkeypatch, capsys):
    """The user's mistake, exit code 2."""
    monkeypatch.setattr(generate_module, "RemoteEngine", AnsweringClient)
    code, out, err = ends(["hi", *flags], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert names in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_answer_is_printed_with_why_it_waited(flags, monkeypatch, capsys):
    """The text goes to stdout, as it is or in an object; notes and figures go to stderr."""
    monkeypatch.setattr(generate_module, "RemoteEngine", Answering)
    code, out, err = ends(["hi", *flags], monkeypatch, capsys)
    assert code == 0
    assert err.splitlines()[0] == "[bob is lost]"
    if flags:
        found = json.loads(out)
        assert (found["prompt"], found["text"], found["tokens"]) == ("hi", "two words", [0, 1])
        assert (found["reason"], found["error"], found["refused"]) == ("stop", "", False)
    else:
        assert out == "two words\n"
        assert err.splitlines()[1].startswith("[stop, ")


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_refusal_of_the_head_is_told_once(flags, monkeypatch, capsys):
    """It is the user's mistake, exit code 2, and no empty line stands in place of an answer."""
    monkeypatch.setattr(generate_module, "RemoteEngine", NO_ROOM)
    code, out, err = ends(["hi", *flags], monkeypatch, capsys)
    assert code == 2
    assert err == f"error: {CAUSE}\n"
    assert not out or flags
    if flags:
        found = json.loads(out)
        assert (found["error"], found["refused"], found["too_large"]) == (CAUSE, True, False)


def test_a_refusal_names_the_question_s_file(monkeypatch, capsys, tmp_path):
    """The head does not know which file a prompt is from."""
    monkeypatch.setattr(generate_module, "RemoteEngine", NO_ROOM)
    code, _, err = ends(questions(tmp_path), monkeypatch, capsys)
    assert code == 2
    assert err == f"error: {tmp_path}/questions.txt: {CAUSE}\n"


@pytest.mark.parametrize(
    ("client", "told"),
    [
        (failing("IndexError: boom", rank=1, device="ada"), "stage 1 on ada: {}IndexError: boom"),
        (failing("Broken: it broke", rank=0), "head: {}Broken: it broke"),
        (failing("not ready: waiting for devices"), "head: {}not ready: waiting for devices"),
    ],
)
@pytest.mark.parametrize("from_file", [False, True])
def test_a_failure_has_one_place_and_the_question_s_file(
    client, told, from_file, monkeypatch, capsys, tmp_path
):
    """The device's where a device has failed, else the head's."""
    monkeypatch.setattr(generate_module, "RemoteEngine", client)
    words = questions(tmp_path) if from_file else ["hi"]
    code, _, err = ends(words, monkeypatch, capsys)
    assert code == 3
    where = f"{tmp_path}/questions.txt: " if from_file else ""
    assert err == f"error: {told.format(where)}\n"


def test_a_conversation_goes_on_after_an_error(capsys):
    """There it is told by the loop, once."""
    lines = iter(["hi", "and?", "/quit"])
    client = NO_ROOM()
    chat_loop(client, ChatOptions(), about="", read=lambda prompt: next(lines))
    assert capsys.readouterr().err.split("\n") == ["", *[f"error: {CAUSE}"] * 2, ""]
    assert [one.prompt[-1]["content"] for one in client.asked] == ["hi", "and?"]
    assert len(client.asked[1].prompt) == 1  # what was not answered is no part of it


def test_a_conversation_keeps_what_was_answered(capsys):
    """The next question comes with the turns before it, until /new."""
    lines = iter(["hi", "and?", "/new", "again", "/quit"])
    client = Answering()
    chat_loop(client, ChatOptions(), about="", read=lambda prompt: next(lines))
    roles = [[turn["role"] for turn in one.prompt] for one in client.asked]
    assert roles == [["user"], ["user", "assistant", "user"], ["user"]]
    assert client.asked[1].prompt[1]["content"] == "two words"
    assert "two words" in capsys.readouterr().out
