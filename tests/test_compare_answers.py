"""run_jetson_eval.sh and compare_answers.py: strategies on a cluster, one table, same tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
from compare_answers import main  # noqa: E402

from flowspec.cluster.token import check_token  # noqa: E402

Lines = list[dict[str, object]]
ASKED = {
    "prompt": "a fox",
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "seed": 7,
    "max_new_tokens": 9,
    "stop": [],
}


def answer(tokens: list[int], speed: float, **changed: object) -> dict[str, object]:
    """A line of `flowspec generate --json`."""
    figures = {"tokens_per_s": speed, "time_to_first_token_s": 0.5, "resumed": 0, "error": ""}
    return {**ASKED, "text": "", "tokens": tokens, **figures, **changed}


def written(folder: Path, **files: Lines) -> list[str]:
    """A file per strategy."""
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return [str(folder / f"{name}.jsonl") for name in files]


AR = [answer([5, 6, 7], 4.0), answer([5, 6, 7, 8, 9], 2.0, prompt="a dog")]
FAST = [answer([5, 6, 7], 8.0, resumed=1), answer([5, 6, 7, 8, 9], 16.0, prompt="a dog")]


def test_speeds_are_all_tokens_by_all_seconds(tmp_path, capsys):
    """6 tokens after the first ones in 0.5 + 2 s, and in 0.25 + 0.25 s."""
    assert main(written(tmp_path, ar=AR, streaming=FAST)) == 0
    said = capsys.readouterr().out
    assert "| ar | 2 | 8 | 2.40 | 1.00 | 0.50 | 0 |" in said
    assert "| streaming | 2 | 8 | 12.00 | 5.00 | 0.50 | 1 |" in said
    assert "all strategies gave the same tokens" in said


@pytest.mark.parametrize(
    ("tokens", "place"), [([5, 6, 8], 3), ([5, 6], 3), ([5, 6, 7, 7], 4), ([], 1)]
)
def test_other_tokens_are_named_and_exit_code_1(tmp_path, capsys, tokens, place):
    """Also where one text is the beginning of the other. The table is printed all the same."""
    wrong = [answer(tokens, 8.0), FAST[1]]
    assert main(written(tmp_path, ar=AR, flowspec=wrong, streaming=FAST)) == 1
    said = capsys.readouterr()
    assert said.err == (f"error: answer 1: flowspec has not ar's tokens, from token {place} on\n")
    assert "streaming" in said.out
    assert "same tokens" not in said.out


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (FAST[:1], "ar has 2 answers, streaming 1"),
        (
            [FAST[0], answer([5], 1.0, prompt="a cat")],
            "answer 2.*differ in prompt: 'a dog', 'a cat'",
        ),
        ([answer([5, 6, 7], 1.0, seed=8), FAST[1]], "answer 1.*differ in seed: 7, 8"),
        ([answer([5, 6], 1.0, error="device lost"), FAST[1]], "streaming.jsonl:1.*device lost"),
        ([{"tokens": []}], "streaming.jsonl:1 is no line of `flowspec generate --json`"),
        ([], "has no answer"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path, lines, words):
    """Other questions, or answers that did not end."""
    with pytest.raises(ValueError, match=words):
        main(written(tmp_path, ar=AR, streaming=lines))


# Stands in for Python with flowspec: notes what it was called with; the rest is the real one's.
PYTHON = """#!/bin/sh
[ "$1 $2" = "-m flowspec" ] || exec REAL "$@"
shift 2
echo "$*" >> "$NOTES"
case "$1" in
  serve) echo "$*" > "$NOTES.serving"; trap 'rm "$NOTES.serving"; exit 0' TERM
         while :; do sleep 0.05; done ;;
  status) [ -e "$NOTES.serving" ] ;;
  generate) name="$(sed 's/.*--strategy \\([a-z]*\\) .*/\\1/' "$NOTES.serving")"
            exec cat "$ANSWERS/$name.jsonl" ;;
esac
"""


@pytest.fixture
def jetson(tmp_path):
    """The script, with a stand-in for the cluster that answers from files."""
    python = tmp_path / "python"
    python.write_text(PYTHON.replace("REAL", sys.executable))
    python.chmod(0o755)
    (tmp_path / "hosts.yaml").write_text("head: 127.0.0.1\nport: 7321\nhosts: [a, b]\n")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a fox"}\n{"prompt": "a dog"}\n')
    inputs = [str(tmp_path / name) for name in ("hosts.yaml", "prompts.jsonl", "out")]

    def run(*words: str, options: tuple[str, ...] = ()) -> "subprocess.CompletedProcess[str]":
        environment = {"FLOWSPEC_PYTHON": str(python), "NOTES": str(tmp_path / "notes")}
        return subprocess.run(
            ["bash", str(ROOT / "scripts/run_jetson_eval.sh"), *options, *inputs, *words],
            env={**os.environ, **environment, "ANSWERS": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=120,
        )

    return run


def test_every_strategy_is_served_asked_and_compared(jetson, tmp_path):
    """One after the other on the same port, with the same options; no head is left."""
    written(tmp_path, ar=AR, flowspec=FAST, streaming=FAST)
    done = jetson("MODEL", "--draft", "HEAD", "--", "--temperature", "1", "--seed", "7")
    assert done.returncode == 0, done.stderr
    assert "5.00" in done.stdout
    notes = (tmp_path / "notes").read_text().splitlines()
    served = [line for line in notes if line.startswith("serve")]
    hosts = tmp_path / "hosts.yaml"
    assert served == [
        f"serve --hosts {hosts} MODEL --draft HEAD --strategy {name} --no-prompt --no-mdns"
        for name in ("ar", "flowspec", "streaming")
    ]
    asked = [line for line in notes if line.startswith("generate")]
    head = f"--prompts {tmp_path / 'prompts.jsonl'} --head 127.0.0.1:7321 --json"
    assert asked == [f"generate {head} --temperature 1 --seed 7"] * 3
    assert not (tmp_path / "notes.serving").exists()
    assert (tmp_path / "out/ar.jsonl").read_text() == (tmp_path / "ar.jsonl").read_text()


def test_a_wrong_token_is_the_scripts_exit_code(jetson, tmp_path):
    """As for whoever runs it unwatched."""
    written(tmp_path, ar=AR, streaming=[answer([5, 6, 8], 9.0), FAST[1]])
    done = jetson("MODEL", options=("--strategies", "ar,streaming"))
    assert done.returncode == 1
    assert "answer 1: streaming has not ar's tokens, from token 3 on" in done.stderr


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["hosts.yaml", "prompts.jsonl", "ar,warp"], "unknown strategy 'warp'"),
        (["hosts.yaml", "prompts.jsonl", "ar,ar"], "names one twice"),
        (["hosts.yaml", "nowhere.jsonl", "ar"], "nowhere.jsonl does not exist"),
        (["prompts.jsonl", "prompts.jsonl", "ar"], "prompts.jsonl"),
    ],
)
def test_what_a_run_would_fail_of_is_told_before_it(jetson, tmp_path, monkeypatch, words, names):
    """And nothing is started."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=names):
        main(["--prepare", *words])


def test_a_run_gets_the_hosts_port_and_a_token(jetson, tmp_path, monkeypatch, capsys):
    """A new one each time."""
    monkeypatch.chdir(tmp_path)
    tokens = set()
    for _ in range(2):
        assert main(["--prepare", "hosts.yaml", "prompts.jsonl", "ar,streaming"]) == 0
        port, token = capsys.readouterr().out.split()
        assert port == "7321"
        tokens.add(check_token(token))
    assert len(tokens) == 2
