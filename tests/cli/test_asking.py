"""Asking a head: what cannot be asked is told before it is; what the head says is told once."""

import sys
from collections.abc import Iterator
from typing import Any

import pytest

from flowspec.cli import generate as generate_module
from flowspec.cli.chat import ChatOptions, chat_loop
from flowspec.cli.main import main
from flowspec.engine.remote import RemoteEngine
from flowspec.protocol.control import Ask, Done, Piece
from flowspec.transport.secure.token import new_token

NO_ROOM = Done(id=1, reason="error", error="the prompt has 9000 tokens, the context 2048")


class Head:
    """A client whose head answers with these events."""

    events: tuple[Piece | Done, ...] = (NO_ROOM,)
    _ids = iter(range(1, 1000))
    new_ask = RemoteEngine.new_ask

    def __init__(self, *address: object) -> None:
        del address

    def __enter__(self) -> "Head":
        return self

    def __exit__(self, *ended: object) -> None:
        """Nothing to close."""

    def ask(self, ask: Ask) -> Iterator[Piece | Done]:
        """See RemoteEngine.ask."""
        del ask
        yield from self.events


def ends(words: list[str], monkeypatch: Any, capsys: Any) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of `flowspec generate`."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the handlers outlive the command
    monkeypatch.setattr(sys, "argv", ["flowspec", "generate", "--head", "127.0.0.1:1", *words])
    monkeypatch.setenv("FLOWSPEC_TOKEN", new_token())
    with pytest.raises(SystemExit) as ended:
        main()
    printed = capsys.readouterr()
    return int(ended.value.code or 0), printed.out, printed.err


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
    monkeypatch.setattr(generate_module, "RemoteEngine", Head)
    code, out, err = ends(["hi", *flags], monkeypatch, capsys)
    assert (code, out) == (2, "")
    assert names in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_an_error_of_the_head_is_told_once(flags, monkeypatch, capsys):
    """And there is no empty line in place of an answer."""
    monkeypatch.setattr(generate_module, "RemoteEngine", Head)
    code, out, err = ends(["hi", *flags], monkeypatch, capsys)
    assert code == 3
    assert err == f"error: head: {NO_ROOM.error}\n"
    assert not out or flags


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("stage 1 on ada: IndexError: boom", "stage 1 on ada: {}IndexError: boom"),
        ("head: Broken: it broke", "head: {}Broken: it broke"),
        ("not ready: waiting for devices", "head: {}not ready: waiting for devices"),
    ],
)
@pytest.mark.parametrize("from_file", [False, True])
def test_a_failure_has_one_place_and_the_question_s_line(
    said, told, from_file, monkeypatch, capsys, tmp_path
):
    """The device's where a device has failed, else the head's."""
    end = Done(id=1, reason="error", error=said)
    monkeypatch.setattr(
        generate_module, "RemoteEngine", type("Failing", (Head,), {"events": (end,)})
    )
    file = tmp_path / "questions.txt"
    file.write_text("hi\n")
    words = ["--prompts", str(file)] if from_file else ["hi"]
    code, _, err = ends(words, monkeypatch, capsys)
    assert code == 3
    (line,) = err.splitlines()
    if not from_file:
        assert line == f"error: {told.format('')}"
        return
    place, _, cause = told.partition("{}")
    assert line.startswith(f"error: {place}")
    assert line.endswith(f": {cause}")
    assert "questions.txt" in line


def test_a_conversation_goes_on_after_an_error(capsys):
    """There it is told by the loop, once."""
    lines = iter(["hi", "/quit"])
    chat_loop(Head(), ChatOptions(), about="", read=lambda prompt: next(lines))
    assert capsys.readouterr().err.strip() == f"error: {NO_ROOM.error}"
