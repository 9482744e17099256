"""`flowspec bench`, whole, on a tiny checkpoint: records, rows, resuming, refusals."""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import flowspec.bench.answering
from flowspec.bench.records import Sample, read_samples
from flowspec.cli.main import app, main
from flowspec.tokenizer import load_tokenizer, render_chat
from tests.support.checkpoints import save_checkpoint

Bench = Callable[..., Result]
QUESTIONS = {
    "mt_bench": [{"question_id": 81, "turns": ["a fox in a box", "and a lazy dog"]}],
    "qa": [{"question_id": n, "turns": [f"how many apples are in box {n}?"]} for n in range(3)],
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target/`, `eagle/` and `data/`."""
    folder = save_checkpoint(tmp_path_factory.mktemp("bench") / "tiny", num_layers=2)
    for name, lines in QUESTIONS.items():
        (folder / "data" / name).mkdir(parents=True)
        text = "\n".join(json.dumps(line) for line in lines)
        (folder / "data" / name / "question.jsonl").write_text(text)
    return folder


def words(tiny: Path, *flags: str) -> list[str]:
    """The command for the tiny checkpoint."""
    command = ["bench", "--model", str(tiny / "target"), "--draft", str(tiny / "eagle")]
    command += ["--data-dir", str(tiny / "data"), "--datasets", "mt_bench,qa", "--jobs", "1"]
    return [*command, "--max-tokens", "8", "--cluster", "agx-5", "--stages", "2", *flags]


@pytest.fixture
def bench(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    """Run it, in a folder of its own (it writes to ./out)."""
    monkeypatch.chdir(tmp_path)

    def run(*flags: str) -> Result:
        return CliRunner().invoke(app, words(tiny, *flags))

    return run


def figures(samples: list[Sample]) -> list[dict[str, Any]]:
    """All but when they were taken."""
    return [{k: v for k, v in asdict(s).items() if k != "started_at"} for s in samples]


@pytest.mark.slow
def test_every_strategy_over_two_sets(bench):
    """A sample per turn, a row per strategy, set and mean; texts are the target's own."""
    result = bench("--json", "rows.json", "--temperatures", "0,1", "--limit", "1")
    assert result.exit_code == 0, result.output
    samples = read_samples(Path("out/bench"))
    assert len(samples) == 7 * 2 * (2 + 1)
    assert not any(sample.mismatch for sample in samples)
    by_question: dict[tuple[str, str, int, float], set[str]] = {}
    for s in samples:
        question = (s.dataset, s.question, s.turn, s.temperature)
        by_question.setdefault(question, set()).add(s.token_hash)
    assert all(len(hashes) == 1 for hashes in by_question.values())
    rows = json.loads(Path("rows.json").read_text())
    assert len(rows) == 7 * 2 * 3
    by_line = {(r["strategy"], r["dataset"], r["temperature"]): r for r in rows}
    assert len(by_line) == len(rows)
    assert {row["speedup_over_ar"] for line, row in by_line.items() if line[0] == "ar"} == {1.0}
    for row in rows:
        assert (row["cluster"], row["model"], row["stages"]) == ("agx-5", "vicuna-7b", 2)
        assert row["emulated"] is True
        assert row["mismatches"] == 0
        assert 0.1 < row["bound_share"] < 1.0
    assert "vicuna-7b on agx-5, 2 stages, table main (emulated)" in result.output
    assert "42 samples (42 run now)" in result.output
    assert "0 differ from the target alone" in result.output
    for unknown in ("95 %", "interval"):  # one question
        assert unknown not in result.stdout


def test_a_second_turn_holds_the_first_ones_answer(bench, tiny):
    """Its prompt is the whole conversation."""
    assert bench("--datasets", "mt_bench", "--strategies", "ar").exit_code == 0
    first, second = read_samples(Path("out/bench"))
    assert (first.turn, second.turn) == (0, 1)
    tokenizer = load_tokenizer(tiny / "target")
    turns = QUESTIONS["mt_bench"][0]["turns"]
    asked = [{"role": "user", "content": turns[0]}]
    assert first.prompt_tokens == len(render_chat(tokenizer, asked))
    between = second.prompt_tokens - len(tokenizer.encode("\n".join(turns)))
    assert between >= first.tokens // 2  # the answer's text, encoded anew


def test_a_run_goes_on_where_it_ended(bench, monkeypatch):
    """What is there is not run again, what failed is; the rows are as if nothing had happened."""
    flags = ("--strategies", "ar,streaming", "--datasets", "qa")
    whole = bench(*flags, "--out", "whole", "--json", "whole.json")
    assert whole.exit_code == 0, whole.output
    original = flowspec.bench.answering.Workbench.run
    calls: list[str] = []

    def failing(self, case, group, asked):
        calls.append(case.strategy)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(self, case, group, asked)

    monkeypatch.setattr(flowspec.bench.answering.Workbench, "run", failing)
    bench(*flags, "--out", "half")
    assert len(read_samples(Path("half"))) == 3
    calls.extend("xxxx")  # past the failure
    again = bench(*flags, "--out", "half", "--json", "half.json")
    assert "6 samples (3 run now)" in again.output
    assert Path("half.json").read_text() == Path("whole.json").read_text()
    by_key = [
        sorted(figures(read_samples(Path(p))), key=lambda s: s["key"]) for p in ("half", "whole")
    ]
    assert by_key[0] == by_key[1]
    assert "6 samples (0 run now)" in bench(*flags, "--out", "half").output
    assert (
        "9 samples (3 run now)"
        in bench("--strategies", "ar,streaming,pipedec", "--datasets", "qa", "--out", "half").output
    )


def test_without_plain_decoding_there_are_no_speedups(bench):
    """It says why, rather than showing an empty table."""
    result = bench("--strategies", "streaming", "--datasets", "qa")
    assert "speed-up over ar: unknown, as ar was not run; add it to --strategies" in result.output
    assert "at most 5 questions of each set; --questions 0: takes all" in result.output
    chosen = bench("--strategies", "streaming", "--datasets", "qa", "--questions", "0:")
    assert "at most" not in chosen.output


def test_a_table_that_could_not_be_written_is_refused_at_once(bench):
    """Not after hours."""
    result = bench("--json", ".")
    assert isinstance(result.exception, ValueError)
    assert "--json . cannot be written: it is a folder" in str(result.exception)


def test_every_emulated_sample_has_its_bound(bench):
    """No run beats its own; a drafter's time is what this cluster loses most by."""
    result = bench("--strategies", "ar,serial_pp,streaming", "--datasets", "qa")
    assert "bound" in result.output
    shares: dict[str, list[float]] = {}
    for s in read_samples(Path("out/bench")):
        assert s.bound_tokens_per_s is not None
        assert s.bound_share == s.decode_tokens_per_s / s.bound_tokens_per_s
        assert 0.1 < s.bound_share < 1.0
        shares.setdefault(s.strategy, []).append(s.bound_share)
    assert max(shares["serial_pp"]) < min(shares["ar"])


def test_a_warm_cluster_answers_a_whole_set(bench):
    """In order, with what it has learnt; the text stays the target's."""
    result = bench("--warm", "--strategies", "ar,streaming", "--set", "calibrate=true")
    assert result.exit_code == 0, result.output
    samples = read_samples(Path("out/bench"))
    assert len(samples) == 2 * 5
    assert all(sample.warm for sample in samples)
    switched = {(sample.strategy, sample.parameters.get("calibrate")) for sample in samples}
    assert switched == {("ar", None), ("streaming", True)}  # ar does not have it


@pytest.mark.parametrize("warm", [False, True])
def test_an_interrupted_set_keeps_what_it_had(bench, monkeypatch, warm):
    """Every turn is written as it is finished; going on gives what one go gives, nothing twice."""
    flags = ["--strategies", "streaming", "--datasets", "qa", *(["--warm"] if warm else [])]
    assert bench(*flags, "--out", "whole").exit_code == 0
    original = flowspec.bench.answering.Workbench._answer
    answered: list[str] = []

    def failing(self, cluster, number, one, group):
        answered.append(one.question)
        if len(answered) == 3:
            raise KeyboardInterrupt
        return original(self, cluster, number, one, group)

    monkeypatch.setattr(flowspec.bench.answering.Workbench, "_answer", failing)
    bench(*flags, "--out", "half")
    assert [sample.question for sample in read_samples(Path("half"))] == ["0", "1"]
    assert "3 samples (1 run now)" in bench(*flags, "--out", "half").output
    assert len(answered) == 3 + (3 if warm else 1)
    assert len(Path("half/samples.jsonl").read_text().splitlines()) == 3
    assert figures(read_samples(Path("half"))) == figures(read_samples(Path("whole")))


def test_a_pipeline_without_a_mechanism_is_emulated_alone(bench, tmp_path):
    """Found by name; its samples are its own, its text the target's. Real stages have them all."""
    names = "streaming,streaming-unpruned,streaming-head-verdict"
    result = bench("--strategies", names, "--datasets", "qa", "--limit", "1")
    assert result.exit_code == 0, result.output
    assert "3 samples (3 run now)" in result.output
    assert "0 differ from the target alone" in result.output
    real = CliRunner().invoke(app, ["bench", "--real", "--strategies", names, "--out", "real"])
    assert isinstance(real.exception, ValueError)
    assert "streaming-unpruned runs on an emulated cluster alone" in str(real.exception)
    assert not (tmp_path / "real").exists()


def test_questions_that_do_not_fit_are_left_out_and_told(bench):
    """By set, question and turn; a set that fits not at all is an error."""
    result = bench("--strategies", "ar", "--datasets", "mt_bench", "--max-tokens", "16383")
    assert isinstance(result.exception, ValueError)
    assert "every question is longer" in str(result.exception)
    assert "left out: mt_bench, question 81, turn 1" in result.output


def test_another_text_is_told_and_ends_with_1(bench, monkeypatch):
    """A strategy whose text differs from the target's is wrong, however fast."""
    original = flowspec.bench.answering.Workbench.ask

    def other(self, group):
        asked, too_long = original(self, group)
        changed = [
            type(one)(one.question, one.turn, one.prompt, (*one.expected[:-1], 7)) for one in asked
        ]
        return changed, too_long

    monkeypatch.setattr(flowspec.bench.answering.Workbench, "ask", other)
    result = bench("--strategies", "ar", "--datasets", "qa", "--json", "rows.json")
    assert result.exit_code == 1
    assert "3 differ from the target alone" in result.output
    assert [row["mismatches"] for row in json.loads(Path("rows.json").read_text())] == [3, 3]


def test_a_second_turn_that_does_not_fit_leaves_the_first(bench, tiny, monkeypatch):
    """The answer between has made it too long."""
    original = flowspec.bench.answering.load_head_parts
    asked = [{"role": "user", "content": QUESTIONS["mt_bench"][0]["turns"][0]}]
    num_first = len(render_chat(load_tokenizer(tiny / "target"), asked))

    def smaller(config, folder):
        return replace(original(config, folder), max_context=num_first + 8)

    monkeypatch.setattr(flowspec.bench.answering, "load_head_parts", smaller)
    result = bench("--strategies", "ar", "--datasets", "mt_bench")
    assert result.exit_code == 0, result.output
    assert [sample.turn for sample in read_samples(Path("out/bench"))] == [0]
    assert "left out: mt_bench, question 81, turn 2" in result.output
    assert "1 turns left out" in result.output

    def unexpected(*_):
        raise AssertionError("nothing is missing")

    monkeypatch.setattr(flowspec.bench.answering.Workbench, "ask", unexpected)
    again = bench("--strategies", "ar", "--datasets", "mt_bench")
    assert again.exit_code == 0, again.exception
    assert "1 samples (0 run now)" in again.output
    assert "left out: mt_bench, question 81, turn 2" in again.output
    assert "1 turns left out" in again.output


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--strategies", "warp"], ["warp", "streaming"]),
        (["--strategies", "ar,ar"], ["--strategies"]),
        (["--drafter", "oracle"], ["oracle", "ngram"]),
        (["--drafter", "none"], ["needs a drafter"]),
        (["--cluster", "nowhere"], ["nowhere", "jetson-5"]),
        (["--emulated-model", "nothing"], ["nothing", "vicuna-7b"]),
        (["--datasets", "gsm8k"], ["gsm8k", "mt_bench, qa"]),
        (["--questions", "9:"], ["none in the given range"]),
        (["--temperatures", "warm"], ["--temperatures"]),
        (["--seeds", "1,1"], ["--seeds", "twice"]),
        (["--set", "ar.speed=9"], ["--set", "speed", "strategy ar; it takes: nothing"]),
        (["--set", "draft_topk=\uff18x"], ["--set", "draft_topk", "whole number", r"'\uff18x'"]),
        (["--set", "streaming.merge=perhaps"], ["--set", "merge", "true or false", "'perhaps'"]),
        (["--table", "best"], ["best", "main"]),
        (["--config", "none.yaml"], ["none.yaml"]),
        (["--json", "no/rows.json"], ["--json", "no"]),
        (["--draft", "ngram=here"], ["--draft", "eagle"]),
        (["--real"], ["--real", "--cluster"]),
        (["--repeats", "2"], ["--repeats needs --real", "same figures"]),
    ],
)
def test_errors_name_what_is_wrong(tiny, tmp_path, monkeypatch, capsys, flags, names):
    """One line, exit code 2, nothing written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flowspec", *words(tiny, *flags)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith("error: ")
    assert all(name in line for name in names), line
    assert not (tmp_path / "out" / "bench").exists()
