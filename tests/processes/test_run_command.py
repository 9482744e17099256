"""`flowspec run` on the bundled models, as a user sees it."""

import json
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from flowspec.cli.main import main
from tests.support.spawned import spawn

pytestmark = pytest.mark.slow

SUMMARY = (
    *("finished", "speed", "first token", "tau", "alpha per depth", "stages busy", "sent"),
    *("pruned in flight", "identical to the target alone: yes"),
)


def flowspec_run(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the command in an empty folder, with pipes, as a script would."""
    command = [sys.executable, "-m", "flowspec", "run", *options]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)


def test_the_bundled_model_answers_and_the_summary_is_whole(tmp_path):
    """The summary has every line, and the proof that the text is exact."""
    options = ("--prompt", "What is the capital of Norway?", "--strategy", "pipedec")
    sampled = ("--stages", "2", "--temperature", "1", "--seed", "7", "--max-new-tokens", "24")
    done = flowspec_run(tmp_path, *options, *sampled)
    assert done.returncode == 0, done.stderr
    for line in SUMMARY:
        assert re.search(f"^{re.escape(line)}", done.stdout, re.MULTILINE), done.stdout
    assert re.search(r"^stages busy +1:\d+% 2:\d+%", done.stdout, re.MULTILINE)
    assert "head + 2 stages" in done.stderr


def test_a_stretched_model_answers_and_warns_once(checkpoint, tmp_path):
    """Only the command warns of a key that its RoPE does not have, not each stage again.

    The prompt is longer than the context before scaling.
    """
    shutil.copytree(checkpoint / "target", tmp_path / "target")
    file = tmp_path / "target" / "config.json"
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    config = {"max_position_embeddings": 64, "rope_scaling": {**rope, "attn_factor": 0.878}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **config, "author_s_note": 1}))
    words = ("--model", "target", "--drafter", "ngram", "--stages", "2", "--max-new-tokens", "8")
    done = flowspec_run(tmp_path, *words, "--prompt", "a fox in a box " * 16)
    assert done.returncode == 0, done.stderr
    assert "identical to the target alone: yes" in done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("config.json: ")]
    assert len(told) == 2, done.stderr
    assert "author_s_note" in told[0]
    assert "attn_factor means nothing for rope_type 'yarn' and is ignored" in told[1]
    assert "the near key is attention_factor" in told[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--strategy", "warp"), "unknown strategy 'warp'; known: ar, serial_pp"),
        (("--drafter", "none"), "needs a drafter"),
        (("--stages", "9"), "1 to 8 stages are possible"),
        (("--set", "draft_topk"), "takes key=value"),
        (("--device", "abacus"), "device 'abacus'"),
        (("--model", "nowhere/at-all-", "--draft", "x"), "nowhere/at-all-"),
    ],
)
def test_wrong_options_are_one_clear_line(tmp_path, monkeypatch, capsys, options, message):
    """There is no traceback; the exit code is 2, and the error comes before any process starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda number, handler: None)  # pytest keeps its own
    monkeypatch.setattr(sys, "argv", ["flowspec", "run", *options])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]


def test_first_runs_started_together_in_one_folder_all_answer(tmp_path):
    """One splits the model, and the others wait; no run sees another one's unfinished files."""
    options = ("--stages", "1", "--strategy", "ar", "--max-tokens", "2", "--no-check")
    logs = [tmp_path / f"{number}.log" for number in range(3)]
    runs = [spawn(["run", *options], log, tmp_path, {}) for log in logs]
    for process in runs:
        process.join(120)
    said = [log.read_text() for log in logs]
    assert [process.exitcode for process in runs] == [0, 0, 0], said
    assert sum("another process is splitting" in text for text in said) <= 2
    assert len(list((tmp_path / "out").iterdir())) == 1
    assert not list((tmp_path / "out").rglob("*.partial"))
