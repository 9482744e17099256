"""`flowspec bench` gives the same figures on several processes, and runs real stages."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flowspec.bench.answering import Workbench
from flowspec.bench.records import read_samples
from flowspec.cli.main import app

pytestmark = pytest.mark.slow


@pytest.fixture
def command(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Run the command for the tiny checkpoint in its own folder."""
    monkeypatch.chdir(tmp_path)
    lines = [json.dumps({"prompt": f"how many apples are in box {n}?", "id": n}) for n in range(2)]
    Path("apples.jsonl").write_text("\n".join(lines))
    words = ["bench", "--model", str(checkpoint / "target"), "--draft", str(checkpoint / "eagle")]
    words += ["--datasets", "apples.jsonl", "--max-tokens", "6", "--stages", "2"]
    return [*words, "--strategies", "ar,streaming"]


def figures(folder: str) -> list[dict[str, Any]]:
    """Return all fields except times, in a fixed order."""
    found = [{**asdict(sample), "started_at": ""} for sample in read_samples(Path(folder))]
    return sorted(found, key=lambda one: one["key"])


@pytest.mark.parametrize("warm", [[], ["--warm"]])
def test_the_number_of_processes_changes_no_figure(command, warm):
    """The records are also the same, except for their order."""
    for jobs in ("1", "2"):
        flags = ["--jobs", jobs, "--out", f"jobs{jobs}", "--json", f"{jobs}.json", *warm]
        result = CliRunner().invoke(app, [*command, *flags])
        assert result.exit_code == 0, result.output
    assert len(figures("jobs1")) == 4
    assert figures("jobs1") == figures("jobs2")
    assert Path("1.json").read_text() == Path("2.json").read_text()


def test_a_real_set_that_fails_keeps_the_turns_before(command, monkeypatch):
    """Their records are complete once the processes have ended."""
    original = Workbench._answer

    def failing(self, cluster, number, one, group):
        if number == 2:
            raise KeyboardInterrupt
        return original(self, cluster, number, one, group)

    flags = [*command, "--real", "--strategies", "streaming", "--out", "real"]
    with monkeypatch.context() as patch:
        patch.setattr(Workbench, "_answer", failing)
        CliRunner().invoke(app, flags)
    (first,) = read_samples(Path("real"))
    assert (first.question, first.mismatch) == ("0", False)
    assert sum(first.stage_busy) > 0
    result = CliRunner().invoke(app, flags)
    assert "2 samples (1 run now)" in result.output
    assert read_samples(Path("real"))[0] == first


def test_real_processes_give_the_same_texts(command):
    """They are labelled as measured, and show where the time of each process went."""
    words = [*command, "--real", "--repeats", "2", "--out", "real", "--json", "rows.json"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    assert "measured on this machine), median of 2 repeats" in result.output
    assert "lowest to highest" in result.output
    samples = read_samples(Path("real"))
    assert len(samples) == 8
    assert [sample.repeat for sample in samples] == [0] * 4 + [1] * 4
    for sample in samples:
        assert (sample.emulated, sample.cluster, sample.mismatch) == (False, "local", False)
        assert sample.rows_sent == sample.rows_pruned + sample.rows_wasted + sample.tokens - 1
        for busy, idle in zip(sample.stage_busy, sample.stage_idle, strict=True):
            assert 0.0 < busy < 1.0
            assert busy + sum(idle.values()) == pytest.approx(1.0, abs=0.02)
    rows = json.loads(Path("rows.json").read_text())
    assert {(row["emulated"], row["repeats"]) for row in rows} == {(False, 2)}
    assert all(row["lowest"] <= row["tokens_per_s"] <= row["highest"] for row in rows)
