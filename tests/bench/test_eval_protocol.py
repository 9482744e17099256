"""The published experiments of scripts/run_eval.sh: their commands, and some short runs."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowspec.bench.experiment import Plan
from flowspec.bench.records import read_samples
from flowspec.bench.runner import RunOutcome
from flowspec.cli.bench_plan import run_shown
from flowspec.cli.main import app
from flowspec.speculation.strategies import ABLATIONS
from scripts.eval_protocol import EXPERIMENTS, commands, main
from tests.support.checkpoints import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]

QUESTIONS = {"table": "30:50", "table-t1": "30:38", "eagle3": "30:50"}


def options(words: list[str]) -> dict[str, str]:
    """Return the last value of each option, which is the one that counts."""
    return {word: words[n + 1] for n, word in enumerate(words[:-1]) if word.startswith("--")}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_run_is_the_published_protocol(name, tmp_path):
    """Runs are warm, with 96 tokens and held-out questions; all seeds run; options override."""
    *runs, report = [words for words in commands(name, tmp_path, []) if words[0] != "plot"]
    assert report[:2] == ["report", str(tmp_path)]
    for words in runs:
        assert words[0] == "bench"
        assert "--warm" in words
        given = options(words)
        assert given["--questions"] == QUESTIONS.get(name, "30:34")
        assert given["--max-tokens"] == "96"
        assert given.get("--seeds") == ("1,2,3" if given["--temperatures"] == "1" else None)
    assert len({options(words)["--json"] for words in runs}) == len(runs)
    short = commands(name, tmp_path, ["--questions", "30:32"])
    assert all(options(words)["--questions"] == "30:32" for words in short[: len(runs)])


def test_the_ablations_are_all_there_are(tmp_path):
    """At temperature 1, only those that affect sampling run, with streaming beside them."""
    greedy, sampled, _ = commands("ablations", tmp_path, [])
    named = [options(words)["--strategies"].split(",") for words in (greedy, sampled)]
    assert [names[0] for names in named] == ["streaming", "streaming"]
    assert sorted(named[0][1:] + named[1][1:]) == sorted(ABLATIONS)


@pytest.fixture
def here(monkeypatch):
    """Run commands in this process, because starting another takes seconds."""

    def flowspec(words: list[str]) -> int:
        done = CliRunner().invoke(app, words)
        if done.exception and not isinstance(done.exception, ValueError | SystemExit):
            raise done.exception
        # only main() makes an exit code of an error of the user's
        return 2 if isinstance(done.exception, ValueError) else done.exit_code

    monkeypatch.setattr("scripts.eval_protocol.flowspec", flowspec)


@pytest.fixture
def tiny(tmp_path) -> list[str]:
    """Return options for one short question of a tiny model."""
    folder = save_checkpoint(tmp_path / "tiny", num_layers=4)
    (folder / "qa.jsonl").write_text(json.dumps({"id": "fox", "prompt": "a fox in a box"}))
    words = ["--datasets", str(folder / "qa.jsonl"), "--questions", "0:1", "--max-tokens", "4"]
    words += ["--model", str(folder / "target"), "--draft", str(folder / "eagle"), "--jobs", "1"]
    return [*words, "--strategies", "ar,streaming"]


def test_a_short_run_of_the_sweep_writes_records_tables_and_picture(here, tiny, tmp_path, capsys):
    """The run is complete, and every file is named at the end."""
    out = tmp_path / "out"
    assert main(["bandwidth", "--out", str(out), *tiny]) == 0
    samples = read_samples(out)
    assert {s.cluster for s in samples} == set(EXPERIMENTS["bandwidth"].runs)
    assert {(s.strategy, s.tokens) for s in samples} == {("ar", 4), ("streaming", 4)}
    assert (out / "bandwidth.png").read_bytes().startswith(b"\x89PNG")
    assert "streaming" in (out / "report.md").read_text()
    said = capsys.readouterr().out
    assert {Path(line.strip()) for line in said.splitlines()[1:]} == set(out.iterdir())


def test_a_wrong_text_gives_tables_and_exit_code_1(here, tiny, tmp_path, monkeypatch):
    """The table has their number."""
    monkeypatch.setattr("flowspec.cli.bench.run_shown", one_wrong)
    assert main(["table", "--out", str(tmp_path / "out"), *tiny]) == 1
    assert (tmp_path / "out" / "report.md").exists()


def one_wrong(plan: Plan, out: Path, jobs: int | None, *, bench: None) -> RunOutcome:
    """Run the benchmark, but report a mismatch."""
    outcome = run_shown(plan, out, jobs, bench=bench)
    first, *others = outcome.samples
    return replace(outcome, samples=[replace(first, mismatch=True), *others])


def test_what_the_benchmark_refuses_ends_it(here, tmp_path):
    """It keeps the exit code and prints no table."""
    out = tmp_path / "out"
    assert main(["table", "--out", str(out), "--strategies", "warp", "--data-dir", "."]) == 2
    assert list(out.iterdir()) == []
    with pytest.raises(SystemExit):
        main(["tabel"])


def test_the_wrapper_names_every_experiment():
    """It also shows their cost."""
    done = subprocess.run(
        ["bash", str(ROOT / "scripts" / "run_eval.sh"), "--help"],
        env={**os.environ, "FLOWSPEC_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    assert all(f"  {name} " in done.stdout for name in EXPERIMENTS)
    assert "processor time" in done.stdout
