"""`flowspec report` writes its tables in every format, and refuses invalid records."""

import csv
import io
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from flowspec.bench.aggregate import summarize
from flowspec.bench.tables import Table, to_latex, to_markdown
from flowspec.cli.main import app, main
from tests.support.made_up import benchmark, write

STRATEGIES = ("ar", "flowspec", "streaming")
SETS = ("gsm8k", "qa")


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return records of three strategies, two sets and three questions each."""
    file = tmp_path_factory.mktemp("report") / "samples.jsonl"
    return write(file, benchmark(STRATEGIES, SETS, questions=3))


def report(*words: str) -> str:
    """Return the output of the command."""
    result = CliRunner().invoke(app, ["report", *words])
    assert result.exit_code == 0, result.output
    return result.output


def expected(records: Path) -> dict[tuple[str, str], object]:
    """Return the rows by strategy and set."""
    ((_, rows),) = summarize(list(benchmark(STRATEGIES, SETS, questions=3))).items()
    return {(row.strategy, row.dataset): row for row in rows}


def test_csv_holds_every_figure(records):
    """There is a line per strategy and set and one for the mean; numbers are not rounded."""
    lines = list(csv.DictReader(io.StringIO(report(str(records), "--format", "csv"))))
    rows = expected(records)
    assert [(line["strategy"], line["dataset"]) for line in lines] == list(rows)
    for line in lines:
        row = rows[line["strategy"], line["dataset"]]
        assert line["emulated"] == "True"
        assert float(line["tokens_per_s"]) == row.tokens_per_s
        assert float(line["speedup"]) == row.speedup.value
        assert float(line["ci_low"]) <= row.speedup.value <= float(line["ci_high"])
        assert float(line["stage_busy 4"]) == row.stage_busy[3]
        assert float(line["stage_idle 1 head drafting"]) == row.stage_idle[0]["head drafting"]
        assert bool(line["bound_share"]) is (line["strategy"] == "streaming")
        assert float(line["bound_share"] or 0.8) == pytest.approx(0.8)
        assert line["alpha 0"] or line["strategy"] == "ar"
        assert [float(line[f"alpha {d}"]) for d in range(3 * bool(row.alpha))] == [*row.alpha[:3]]


def test_markdown_has_a_line_per_strategy_in_every_table(records):
    """Every line has as many cells as the header."""
    tables = report(str(records), "--format", "markdown").split("**Emulated, ")[1:]
    assert len(tables) == 4
    for table in tables:
        lines = [line for line in table.splitlines() if line.startswith("|")]
        assert [line.split("|")[1].strip() for line in lines[2:]] == list(STRATEGIES)
        assert len({line.count("|") for line in lines}) == 1
        assert set(lines[1]) <= set("|-: ")
    row = expected(records)["streaming", "mean"]
    assert f"{row.speedup.value:.2f}x {row.speedup.low:.2f}–{row.speedup.high:.2f}" in tables[0]
    assert "0 of 6" in tables[0]


def test_latex_is_balanced_and_escaped(records):
    """With booktabs it compiles: environments are closed, columns match, signs are escaped."""
    text = report(str(records), "--format", "latex", "--only", "strategy=ar,flowspec")
    assert text.count(r"\begin{table}") == text.count(r"\end{table}") == 4
    assert text.count("{") == text.count("}")
    for table in text.split(r"\begin{tabular}{")[1:]:
        columns = len(table.split("}")[0])
        rows = [line for line in table.splitlines() if line.endswith(r"\\")]
        assert len(rows) == 3
        assert {line.count(" & ") for line in rows} == {columns - 1}
    for line in text.splitlines():
        assert "%" not in line.replace(r"\%", ""), line


def test_signs_that_mean_something_are_escaped():
    """In a name, an underscore or a pipe is a letter like any other."""
    table = Table("a_b", ["x|y", "100 %"], [["num_draft_tokens=4", r"c:\d & {e}"]])
    assert r"x\|y" in to_markdown([table])
    assert r"num\_draft\_tokens=4 & c:\textbackslash{}d \& \{e\} \\" in to_latex([table])


def test_text_shows_all_and_folds_no_figure(records):
    """Every title says "emulated", and every strategy is in every table."""
    text = report(str(records))
    assert text.count("Emulated, testbed, vicuna-7b, 4 stages, drafter eagle") == 4
    row = expected(records)["streaming", "gsm8k"]
    assert f"{row.speedup.low:.2f}–{row.speedup.high:.2f}" in text
    assert f"{row.tokens_per_s:.2f}" in text
    assert text.count("\n streaming ") == 4


def test_per_set_has_acceptance_and_time_of_each(records):
    """The tables come beside those of the mean."""
    text = report(str(records), "--per-set")
    for where in ("GSM8K", "Natural Questions", "mean over the sets"):
        assert f"what was accepted, {where}" in text
        assert f"where the time went, {where}" in text


def test_another_baseline_and_a_choice_of_records(records):
    """Speed-ups are over the named baseline."""
    text = report(str(records), "--baseline", "flowspec", "--only", "dataset=qa")
    assert "speed-up over flowspec" in text
    assert "GSM8K" not in text


def test_emulated_and_measured_have_tables_of_their_own(tmp_path):
    """Each has its own baseline; they are never compared with each other."""
    real = [
        replace(one, emulated=False, cluster="local", key=f"real {one.key}", decode_s=1.0)
        for one in benchmark(STRATEGIES, SETS, questions=2)
    ]
    file = write(tmp_path / "both.jsonl", [*benchmark(STRATEGIES, SETS, questions=2), *real])
    text = report(str(file))
    assert text.count("Emulated, testbed") == text.count("Measured, local") == 4
    write(file, [*benchmark(STRATEGIES, SETS), *(s for s in real if s.strategy != "ar")])
    result = CliRunner().invoke(app, ["report", str(file)])
    assert isinstance(result.exception, ValueError)
    assert "baseline ar on local" in str(result.exception)


@pytest.mark.parametrize("field", ["code", "target", "draft", "emulation"])
def test_records_of_other_code_or_models_are_refused_until_one_is_chosen(tmp_path, field):
    """The suggestion of the error works and leaves a baseline."""
    ar = list(benchmark(("ar",), SETS, drafter="none", draft=""))
    samples = [*ar, *benchmark(("streaming",), SETS)]
    others = [
        replace(one, **{field: "feed" if getattr(one, field) else ""}, key=f"other {one.key}")
        for one in samples
    ]
    file = write(tmp_path / "both.jsonl", [*samples, *others])
    result = CliRunner().invoke(app, ["report", str(file)])
    assert isinstance(result.exception, ValueError)
    assert f"differ in {field}" in str(result.exception)
    choice = str(result.exception).rpartition("--only ")[2]
    assert report(str(file), "--only", choice).count("\n streaming ") == 4


def test_a_mean_of_fewer_sets_is_marked(tmp_path):
    """It must not look like the others' mean."""
    samples = [*benchmark(STRATEGIES, SETS), *benchmark(("pipedec",), ("qa",))]
    samples = [one for one in samples if not (one.strategy == "pipedec" and one.dataset == "gsm8k")]
    text = report(str(write(tmp_path / "part.jsonl", samples)))
    line = next(line for line in text.splitlines() if line.startswith(" pipedec"))
    assert " - " in line
    assert "*" in line
    assert "not all sets" in text


def test_what_no_row_has_takes_no_column(tmp_path):
    """Bounds that were not run and intervals of single questions have none; none comes twice."""
    once = [
        replace(one, dataset="prompts", bound_share=None)
        for one in benchmark(("ar", "serial_pp"), ("qa",), questions=1)
    ]
    text = report(str(write(tmp_path / "one.jsonl", once)), "--format", "markdown")
    heads = [line for line in text.splitlines() if line.startswith("| strategy")]
    assert heads[0] == "| strategy | prompts | mean | questions | mismatches |"
    assert "bound" not in text
    assert "95 %" not in text
    assert "No intervals: a set has fewer than 3 questions" in text
    with_all = report(str(write(tmp_path / "all.jsonl", benchmark(STRATEGIES, SETS))))
    assert "bound" in with_all
    assert "95 % bootstrap intervals" in with_all


def test_the_table_goes_to_a_file(records, tmp_path):
    """It is not printed."""
    out = tmp_path / "table.md"
    assert report(str(records), "--format", "markdown", "--out", str(out)) == ""
    assert out.read_text() == report(str(records), "--format", "markdown")


def test_what_drafts_nothing_has_every_drafter(tmp_path):
    """`--only` with one of two drafters keeps its baseline."""
    both = [
        replace(one, drafter="none" if one.strategy == "ar" else drafter)
        for drafter in ("eagle", "ngram")
        for one in benchmark(("ar", "streaming"), ("qa",))
        if drafter == "eagle" or one.strategy != "ar"
    ]
    both = [replace(one, key=f"{one.key}-{one.drafter}") for one in both]
    text = report(str(write(tmp_path / "two.jsonl", both)), "--only", "drafter=ngram")
    assert "drafter ngram" in text
    assert "drafter eagle" not in text
    assert any(line.split()[0] == "ar" for line in text.splitlines() if line.strip())


def test_answers_that_do_not_loop_are_chosen_by_a_range(tmp_path):
    """Both ends count; the text is the same for every strategy, so the pairs stay."""
    everything = [
        replace(one, repeated={"0": 0.0, "1": 0.25}.get(one.question, 0.9))
        for one in benchmark(("ar", "streaming"), ("qa",), questions=3)
    ]
    file = str(write(tmp_path / "some.jsonl", everything))
    chosen = [one for one in everything if one.question in ("0", "1")]
    few = str(write(tmp_path / "few.jsonl", chosen))
    assert report(file, "--only", "repeated=0..0.25") == report(few)
    assert report(file, "--only", "repeated=0..1") == report(file)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["missing.jsonl"], ["missing.jsonl", "does not exist"]),
        (["empty.jsonl"], ["empty.jsonl", "no records yet"]),
        (["text.jsonl"], ["text.jsonl:1", "not JSON"]),
        (["good.jsonl", "--baseline", "pipedec"], ["pipedec", "there are: flowspec, streaming"]),
        (["good.jsonl"], ["baseline ar", "--baseline"]),
        (["good.jsonl", "--format", "html"], ["html", "markdown"]),
        (["good.jsonl", "--only", "colour=red"], ["unknown key 'colour'", "known:", "temperature"]),
        (["good.jsonl", "--only", "colour"], ["'colour'", "must be key=value"]),
        (["good.jsonl", "--only", "temperature=3"], ["temperature=3", "there are: 0"]),
        (["good.jsonl", "--only", "repeated=0.3"], ["repeated=0.3", "repeated=LOW..HIGH"]),
        (["good.jsonl", "--only", "repeated=0..1"], ["records of before repeated was kept"]),
        (["good.jsonl", "--only", "tokens=1..2"], ["tokens=1..2", "no record", "there are "]),
        (["good.jsonl", "--out", "nowhere/t.md"], ["nowhere", "folder"]),
        (["good.jsonl", "--out", "."], ["--out .", "it is a folder"]),
    ],
)
def test_what_cannot_be_reported_ends_with_one_line(tmp_path, monkeypatch, capsys, words, names):
    """The line names the file or the option, and valid alternatives."""
    monkeypatch.chdir(tmp_path)
    Path("empty.jsonl").write_text("")
    Path("text.jsonl").write_text("hello\n")
    write(Path("good.jsonl"), benchmark(("flowspec", "streaming"), SETS, questions=2))
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["flowspec", "report", *words])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for name in names:
        assert name in error, error
