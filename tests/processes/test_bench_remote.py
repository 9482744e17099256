"""`flowspec bench --real --head` on joined devices writes the table and its records."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

import flowspec.bench.answering_remote
from flowspec.bench.provenance import code_hash
from flowspec.bench.records import read_samples
from flowspec.cli.main import app
from flowspec.request import ClusterError
from tests.support.devices import Processes, two_devices

pytestmark = pytest.mark.slow

QUESTIONS = [
    {"id": "box", "prompt": "how many apples are in the box?"},
    {"id": "fox", "turns": ["a fox in a box", "and a lazy dog"]},
]


@pytest.fixture(scope="module")
def cluster(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """Start a head and two devices."""
    with two_devices(tmp_path_factory.mktemp("bench"), checkpoint) as processes:
        yield processes


def bench(cluster: Processes, *flags: str) -> Result:
    """Run the benchmark in the folder of the test."""
    Path("asked.jsonl").write_text("\n".join(json.dumps(one) for one in QUESTIONS))
    words = ["bench", "--real", "--head", f"127.0.0.1:{cluster.port}", "--max-tokens", "24"]
    words += ["--datasets", "asked.jsonl", "--strategies", "ar,streaming", *flags]
    return CliRunner().invoke(app, words, env={"FLOWSPEC_TOKEN": cluster.token})


def test_a_running_cluster_is_measured_strategy_by_strategy(cluster, tmp_path, monkeypatch):
    """The cluster does not restart; every row is accounted for, and finished samples stay."""
    monkeypatch.chdir(tmp_path)
    result = bench(cluster, "--out", "out", "--json", "rows.json", "--temperatures", "0,1")
    assert result.exit_code == 0, result.output
    assert f"target on 127.0.0.1:{cluster.port}, 2 stages, table main" in result.output
    assert "measured on a cluster of devices" in result.output
    assert "12 samples (12 run now) in out; 0 differ from plain decoding on the cluster" in (
        result.output
    )
    samples = read_samples(Path("out"))
    assert [s.strategy for s in samples] == ["ar", "ar", "ar", *["streaming"] * 3] * 2
    for sample in samples:
        assert (sample.emulated, sample.warm, sample.alone) == (False, True, True)
        assert [one.partition(":")[0] for one in sample.devices] == cluster.stages()
        assert (sample.stage_idle, sample.link_bytes) == ((), {})
        assert sample.code == code_hash()
        assert not sample.relearnt
    known = [sample for sample in samples if sample.rows_pruned is not None]
    assert len(known) >= 10  # a probe may have been under way when the first was asked
    for s in known:
        assert s.rows_sent == s.rows_pruned + s.rows_wasted + s.tokens - 1
    assert any(sample.stage_busy for sample in samples)
    rows = json.loads(Path("rows.json").read_text())
    assert {(row["emulated"], row["stages"], row["mismatches"]) for row in rows} == {(False, 2, 0)}
    again = bench(cluster, "--out", "out", "--temperatures", "0,1")
    assert "12 samples (0 run now)" in again.output
    more = bench(cluster, "--out", "out", "--strategies", "ar,streaming,serial_pp")
    assert "9 samples (3 run now) in out; 0 differ" in more.output


def test_the_target_alone_may_be_the_truth(cluster, tmp_path, monkeypatch):
    """It is used if it is the cluster's model, by hash."""
    monkeypatch.chdir(tmp_path)
    result = bench(cluster, "--model", str(cluster.checkpoint / "target"), "--limit", "1")
    assert result.exit_code == 0, result.output
    assert "2 samples (2 run now) in out/bench; 0 differ from the target alone" in result.output
    wrong = bench(cluster, "--drafter", "ngram")
    assert isinstance(wrong.exception, ValueError)
    assert "served with eagle" in str(wrong.exception)


def test_other_devices_end_it_and_have_samples_of_their_own(cluster, tmp_path, monkeypatch):
    """A spare takes over in the middle; the same command then measures the new devices."""
    monkeypatch.chdir(tmp_path)
    before = cluster.stages()
    cluster.join("cyd")
    cluster.wait_for("head", r"cyd.*spare: came when the layers were covered")
    original = flowspec.bench.answering_remote.RemoteBench._answer

    def answer(self, case, group, messages):
        if case.strategy == "streaming" and len(messages) == 3:
            cluster.running["bob"].kill()
        return original(self, case, group, messages)

    with monkeypatch.context() as patch:
        patch.setattr(flowspec.bench.answering_remote.RemoteBench, "_answer", answer)
        result = bench(cluster)
    assert isinstance(result.exception, ClusterError)
    assert re.search(
        r"other devices answer now, before: .*bob: layers.*, now: .*cyd: layers.*; what was "
        r"answered before is kept, and the same command measures",
        str(result.exception),
    )
    kept = read_samples(Path("out/bench"))
    assert len(kept) == 5
    assert {tuple(one.partition(":")[0] for one in s.devices) for s in kept} == {tuple(before)}
    again = bench(cluster)
    assert again.exit_code == 0, again.output
    assert "6 samples (6 run now) in out/bench; 0 differ" in again.output
    new = read_samples(Path("out/bench"))[5:]
    assert all(any(one.startswith("cyd:") for one in s.devices) for s in new)


def test_a_head_that_goes_away_ends_it_with_what_there_is(cluster, tmp_path, monkeypatch):
    """There is one sentence, and no sample is lost."""
    monkeypatch.chdir(tmp_path)
    original = flowspec.bench.answering_remote.RemoteBench._answer

    def answer(self, case, group, messages):
        if case.strategy == "streaming" and len(messages) == 3:
            cluster.running["head"].kill()
        return original(self, case, group, messages)

    monkeypatch.setattr(flowspec.bench.answering_remote.RemoteBench, "_answer", answer)
    result = bench(cluster)
    assert isinstance(result.exception, ClusterError)
    assert str(result.exception) == f"head at 127.0.0.1:{cluster.port}: connection lost"
    assert len(read_samples(Path("out/bench"))) == 5
