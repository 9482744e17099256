"""What a prompt, a chat template or a tokenizer does to a command: one sentence, exit code 2."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from flowspec.bench.records import read_samples
from flowspec.cli import generate as generate_module
from flowspec.cli.chat import ChatOptions, chat_loop
from flowspec.cli.main import main
from flowspec.cluster.controller.server import refusal_of
from flowspec.config import EngineConfig
from flowspec.engine.build import load_head_parts
from flowspec.request import FailureKind, Request
from flowspec.tokenizer import PromptError
from flowspec.transport.secure.token import new_token
from flowspec.weights.manifest import read_manifest
from tests.support.checkpoints import save_checkpoint
from tests.support.clients import AnsweringClient, failing
from tests.support.vocabularies import write_sentencepiece

ROOT = Path(__file__).resolve().parents[2]
BAD_BYTE = "caf\udce9"  # as the command line has what is not UTF-8
HALF = json.dumps({"turns": ["cut \ud83d here"]})
REFUSAL = "the model's chat template refuses this conversation: say please"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' or 'now' in m['content'] %}"
    "{{ raise_exception('say please') }}{% endif %}{{ m['content'] }}{% endfor %}"
)


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target/`, whose chat template refuses, and `eagle/`."""
    folder = save_checkpoint(tmp_path_factory.mktemp("prompts") / "tiny", num_layers=2)
    config = folder / "target" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def flowspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Any:
    """Run a command here, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the handlers outlive the command
    monkeypatch.setenv("FLOWSPEC_TOKEN", new_token())

    def run(*words: str) -> Ended:
        monkeypatch.setattr(sys, "argv", ["flowspec", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        return Ended(int(ended.value.code or 0), *capsys.readouterr())

    return run


def is_one_sentence(ended: Ended, *words: str) -> bool:
    """Exit code 2, one line of error that holds all of `words`, no traceback."""
    errors = [line for line in ended.err.splitlines() if line.startswith("error: ")]
    assert (ended.code, len(errors)) == (2, 1), ended
    assert "Traceback" not in ended.err
    assert [word for word in words if word not in errors[0]] == [], errors
    return True


def test_bytes_of_the_command_line_that_are_no_text() -> None:
    """As a terminal of another encoding types them."""
    words = [b"run", b"--prompt", b"caf\xe9"]
    done = subprocess.run(
        [sys.executable.encode(), b"-m", b"flowspec", *words], capture_output=True, timeout=120
    )
    expected = "error: --prompt is not valid text: after 'caf' it has the byte 0xe9; write it in "
    assert done.returncode == 2
    assert done.stderr.decode() == f"{expected}UTF-8\n"


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("run", "--prompt", "x", "--stop", BAD_BYTE), "--stop"),
        (("run", "--set", f"drafter={BAD_BYTE}"), "--set"),
        (("bench", "--set", f"max_depth={BAD_BYTE}"), "--set"),
        (("simulate", "--vary", "stages=2", "--set", f"max_depth={BAD_BYTE}"), "--set"),
        (("generate", "--head", "127.0.0.1:1", BAD_BYTE), "the prompt"),
        (("generate", "--head", "127.0.0.1:1", "x", "--stop", BAD_BYTE), "--stop"),
    ],
)
def test_one_rule_for_every_option_that_is_text(flowspec, words, option) -> None:
    """Before anything is loaded or anybody is asked."""
    assert is_one_sentence(flowspec(*words), f"{option} is not valid text", "the byte 0xe9")


@pytest.mark.parametrize(
    "words",
    [
        ("verify", "--prompts", "ask.jsonl"),
        ("reliability", "--prompts", "ask.jsonl"),
        ("bench", "--datasets", "ask.jsonl"),
        ("generate", "--head", "127.0.0.1:1", "--prompts", "ask.jsonl"),
    ],
)
def test_half_a_character_in_a_file(flowspec, tmp_path, words) -> None:
    """By file and line."""
    (tmp_path / "ask.jsonl").write_text('{"prompt": "x"}\n' + HALF)
    assert is_one_sentence(flowspec(*words), "ask.jsonl:2", "after 'cut '", "\\ud83d")


def test_standard_input_is_text(flowspec, monkeypatch) -> None:
    """`generate -` reads it as it reads a file."""
    reading, writing = os.pipe()
    os.write(writing, b"caf\xe9")
    os.close(writing)
    with os.fdopen(reading) as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        ended = flowspec("generate", "--head", "127.0.0.1:1", "-")
    assert is_one_sentence(ended, "standard input:1 is not UTF-8 text", "0xe9; convert it before")
    assert "save" not in ended.err


def test_a_conversation_goes_on_after_a_line_that_is_no_text(monkeypatch, capsys) -> None:
    """One slip of the keyboard ends nothing."""
    reading, writing = os.pipe()
    os.write(writing, b"caf\xe9\nhello\n")
    os.close(writing)
    client = AnsweringClient()
    with os.fdopen(reading, encoding="utf-8") as stdin:
        monkeypatch.setattr("sys.stdin", stdin)
        chat_loop(client, ChatOptions())
    assert [one.prompt[-1]["content"] for one in client.asked] == ["hello"]
    assert (
        "error: this line is not valid text: after 'caf' it has the byte" in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    ("words", "where"),
    [
        (("run", "--prompt", "now", "--strategy", "ar", "--stages", "2", "--model"), ""),
        (("verify", "--strategies", "ar", "--stages", "2", "--prompts", "ask.jsonl"), ":2"),
        (("bench", "--strategies", "ar", "--datasets", "ask.jsonl", "--model"), ":2"),
    ],
)
def test_a_template_that_raises(flowspec, tiny, tmp_path, words, where) -> None:
    """Its own words, and the question's file and line where it is from one."""
    (tmp_path / "ask.jsonl").write_text('{"prompt": "please"}\n{"prompt": "now"}\n')
    if words[0] == "bench":
        words = (*words, str(tiny / "target"), "--max-tokens", "4", "--jobs", "1", "--stages", "2")
        words = (*words, "--cluster", "agx-5")
    else:
        words = (*words, str(tiny / "target"))
    ended = flowspec(*words)
    assert is_one_sentence(ended, REFUSAL, f"ask.jsonl{where}: the model's" if where else "")


def test_a_later_turn_that_a_template_refuses_is_left_out(flowspec, tiny, tmp_path) -> None:
    """The model's answer is in it: that is no fault of the question's, and the others count."""
    (tmp_path / "ask.jsonl").write_text('{"turns": ["one", "two", "three"]}\n{"prompt": "four"}\n')
    words = ("--model", str(tiny / "target"), "--stages", "2", "--cluster", "agx-5", "--jobs", "1")
    ended = flowspec(
        "bench", "--strategies", "ar", "--datasets", "ask.jsonl", "--max-tokens", "4", *words
    )
    assert ended.code == 0, ended
    assert f"left out: ask, question 1, turn 2: {REFUSAL}" in ended.err
    assert "2 turns left out" in ended.out
    found = [(sample.question, sample.turn) for sample in read_samples(tmp_path / "out" / "bench")]
    assert sorted(found) == [("1", 0), ("2", 0)]


def test_a_head_refuses_one_request_and_says_so(flowspec, tiny, tmp_path) -> None:
    """What the template raises is the refusal of a prompt, for that request alone."""
    assert flowspec("split", str(tiny / "target"), "--stages", "1", "--out", "split").code == 0
    parts = load_head_parts(EngineConfig(strategy="ar", drafter="none"), tmp_path / "split")
    asked = Request(prompt=[{"role": "user", "content": "now"}])
    with pytest.raises(PromptError, match=REFUSAL) as refusal:
        parts.render(asked)
    assert refusal_of(refusal.value).kind is FailureKind.BAD_PROMPT
    assert parts.render(Request(prompt="please")).prompt_tokens


def test_a_refused_prompt_of_a_file_is_named(flowspec, tmp_path, monkeypatch) -> None:
    """The head does not know where a prompt is from."""
    client = failing(REFUSAL, FailureKind.BAD_PROMPT)
    monkeypatch.setattr(generate_module, "RemoteEngine", client)
    (tmp_path / "ask.jsonl").write_text('\n{"prompt": "now"}\n')
    ended = flowspec("generate", "--head", "127.0.0.1:1", "--prompts", "ask.jsonl")
    assert is_one_sentence(ended, f"ask.jsonl:2: {REFUSAL}")


def test_the_first_command_names_what_a_tokenizer_lacks(
    flowspec, tiny, tmp_path, monkeypatch
) -> None:
    """`split` is often the first; nothing is written for a model that could not be asked."""
    model = tmp_path / "model"
    shutil.copytree(tiny / "target", model)
    (model / "tokenizer.json").unlink()
    split = ("split", str(model), "--stages", "2", "--out", "split")
    run = ("run", "--model", str(model), "--drafter", "ngram", "--stages", "2")
    assert is_one_sentence(flowspec(*split), f"{model} has no tokenizer")
    write_sentencepiece(model, vocab_size=290, corpus=["the cat sat on the mat"])
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert is_one_sentence(flowspec(*split), "tokenizer.model is a Sentence", "sentencepiece; run")
    assert is_one_sentence(flowspec(*run), "-m pip install sentencepiece")
    assert not (tmp_path / "split").exists()
    assert not (tmp_path / "out").exists()


def test_a_model_with_a_sentencepiece_file_alone_runs(flowspec, tiny, tmp_path) -> None:
    """From the folder to answers."""
    model = tmp_path / "model"
    shutil.copytree(tiny / "target", model)
    (model / "tokenizer.json").unlink()
    (model / "tokenizer_config.json").unlink()
    write_sentencepiece(model, vocab_size=290, corpus=["the cat sat on the mat"])
    (tmp_path / "ask.txt").write_text("Anna has 3 boxes")
    words = ("--strategies", "ar,streaming", "--drafters", "ngram", "--stages", "2")
    flags = ("--temperatures", "0", "--max-tokens", "8", "--prompts", "ask.txt")
    ended = flowspec("verify", str(model), *words, *flags, "--json", "rows.json")
    assert "2 runs, 0 mismatches" in ended.out, ended


def test_tokenizer_files_belong_to_the_models_identity(flowspec, tiny, tmp_path) -> None:
    """Devices compare the hash when they join; a file that changed later is found out."""
    other = tmp_path / "other"
    shutil.copytree(tiny / "target", other)
    config = other / "tokenizer_config.json"
    config.write_text(config.read_text().replace("say please", "say so"))
    hashes = set()
    for model, out in ((tiny / "target", "a"), (other, "b")):
        assert flowspec("split", str(model), "--stages", "1", "--out", out).code == 0
        hashes.add(read_manifest(tmp_path / out).model_hash)
    assert len(hashes) == 2
    shutil.copy(config, tmp_path / "a" / "head" / "tokenizer_config.json")
    run = ("run", "--drafter", "ngram", "--prompt", "x", "--model")
    assert is_one_sentence(flowspec(*run, "a"), "tokenizer_config.json", "has", "needed")
    (tmp_path / "b" / "head" / "vocab.json").write_text("{}")
    assert is_one_sentence(flowspec(*run, "b"), "vocab.json is not part of this split")
