"""`flowspec verify`: rows of evidence, exit code 1 on a mismatch, errors that name the flag."""

import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import flowspec.bench.verify
from flowspec.bench.verify import Combination, LosslessChecker, find_divergence, resolution_of
from flowspec.cli.main import app, main
from flowspec.engine.reference import LocalTarget
from flowspec.request import Request
from flowspec.speculation.strategies import STRATEGIES
from tests.support.checkpoints import save_checkpoint
from tests.support.clusters import make_cluster
from tests.support.tiny import PROMPT, T0, T1, local_target, request
from tests.support.tiny import whole_model_bf16 as bf16

FIELDS = {"strategy", "drafter", "driver", "stages", "temperature", "runs", "mismatches", "tau"}
FIELDS |= {"tokens", "near_ties", "divergences"}


# Comparison -------------------------------------------------------------------------------------


def ranked(alone: LocalTarget, asked: Request, at: int) -> tuple[list[int], list[int]]:
    """The target's tokens, and all tokens at place `at`, best first by its logits."""
    tokens, logits = [], []
    for token, row in alone.stream(asked):
        tokens.append(token)
        logits.append(row)
        if len(tokens) == asked.max_new_tokens:
            break
    return tokens, logits[at].argsort(descending=True).tolist()


@pytest.mark.parametrize("sampling", [T0, T1])
def test_equal_answers_have_no_divergence(sampling):
    """Nothing to report where nothing differs."""
    alone = local_target()
    asked = request(sampling=sampling, max_new_tokens=6)
    tokens = alone.generate(asked)[0]
    assert find_divergence(alone, asked, tokens, tuple(tokens)) is None


@pytest.mark.parametrize("at", [0, 3])
def test_in_fp32_every_difference_is_an_error(at):
    """Rounding cannot explain another token there: the runner-up is as wrong as any."""
    alone = local_target()
    asked = request(max_new_tokens=6)
    tokens, best_first = ranked(alone, asked, at)
    found = [*tokens[:at], best_first[1], *tokens[at + 1 :]]
    divergence = find_divergence(alone, asked, tokens, found)
    assert divergence is not None
    assert (divergence.position, divergence.expected, divergence.found) == (at, *best_first[:2])
    assert divergence.gap > 0
    assert not divergence.is_near_tie
    assert str(divergence).startswith("ERROR at token")


def test_in_16_bits_only_a_close_choice_is_a_near_tie():
    """What lies within rounding is excused, what does not is a mismatch all the same."""
    alone = replace(local_target(), model=bf16())
    asked = request(max_new_tokens=4)
    tokens, best_first = ranked(alone, asked, 2)
    kinds = []
    for token in best_first[1:]:
        divergence = find_divergence(alone, asked, tokens, [*tokens[:2], token, tokens[3]])
        assert divergence is not None
        assert divergence.is_near_tie == (divergence.gap < divergence.resolution)
        kinds.append(divergence.is_near_tie)
    assert kinds == sorted(kinds, reverse=True), "near-ties are those of the closest tokens"
    assert not kinds[-1]
    assert resolution_of(torch.bfloat16, 40.0) > resolution_of(torch.bfloat16, 2.0) > 0.0
    assert resolution_of(torch.float32, 40.0) == 0.0


def test_the_noise_counts_in_the_gap_of_a_sampled_choice():
    """At temperature 1 the token is the arg-max of logits plus noise; so is the comparison."""
    alone = local_target()
    asked = request(sampling=T1, max_new_tokens=5)
    tokens, best_first = ranked(alone, asked, 4)
    for token in best_first[:6]:
        divergence = find_divergence(alone, asked, tokens, [*tokens[:4], token])
        assert divergence is None or divergence.gap > 0


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: [*t, 7], lambda t: []])
def test_too_short_and_too_long_are_errors(change):
    """A lost or invented token at the end is no rounding."""
    alone = local_target()
    asked = request(max_new_tokens=5)
    tokens = alone.generate(asked)[0]
    divergence = find_divergence(alone, asked, tokens, change(tokens))
    assert divergence is not None
    assert not divergence.is_near_tie


def test_the_verifier_counts_runs_tokens_and_mismatches():
    """The figures of a row are sums over its requests."""
    verifier = LosslessChecker(local_target())
    row = Combination("ar", "none", "simulated", 2, 0.0)
    asked = [request(1, max_new_tokens=5), request(2, prompt=PROMPT[:3], max_new_tokens=4)]
    cluster = make_cluster(2, "ar")
    assert list(verifier.check(cluster, asked, row)) == [None, None]
    assert (row.runs, row.mismatches, row.tokens, row.verdicts) == (2, 0, 9, 7)
    assert row.tau == 1.0  # the prompts gave two of the nine
    key = (asked[0].prompt, asked[0].sampling)
    verifier._expected[key][2] += 1
    again = request(3, max_new_tokens=5)
    (divergence,) = verifier.check(cluster, [again], row)
    assert divergence is not None
    assert divergence.position == 2
    assert (row.runs, row.mismatches, len(row.divergences)) == (3, 1, 1)


# The command ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target/`, `eagle/` and a file of two prompts."""
    folder = save_checkpoint(tmp_path_factory.mktemp("verify") / "tiny", num_layers=2)
    lines = [{"question_id": n, "turns": [text]} for n, text in enumerate(("a fox", "my box"))]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "prompts.jsonl").write_text(text)
    return folder


@pytest.fixture
def command(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command for the tiny checkpoint, in a folder of its own (it writes to ./out)."""
    monkeypatch.chdir(tmp_path)
    words = ["verify", str(tiny / "target"), "--draft", str(tiny / "eagle")]
    words += ["--prompts", str(tiny / "prompts.jsonl"), "--max-tokens", "4"]
    return [*words, "--json", "rows.json", "--stages", "1,2", "--temperatures", "0,1"]


def test_every_strategy_passes_and_the_rows_say_so(command):
    """The command is the evidence that a user can make himself; its JSON is what CI reads."""
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("rows.json").read_text())
    assert len(rows) == len(STRATEGIES) * 2 * 2
    combinations = {(row["strategy"], row["stages"], row["temperature"]) for row in rows}
    assert combinations == {(s, n, t) for s in STRATEGIES for n in (1, 2) for t in (0.0, 1.0)}
    for row in rows:
        assert set(row) >= FIELDS
        assert (row["driver"], row["runs"], row["mismatches"]) == ("simulated", 2, 0)
        assert row["drafter"] == ("eagle" if STRATEGIES[row["strategy"]].drafts else "none")
        assert 0 < row["tokens"] <= 8
        assert row["tau"] >= 1.0
    assert f"{2 * len(rows)} runs, 0 mismatches" in result.output


def test_drafters_and_company_change_nothing_but_the_speed(command, tiny):
    """One hash per temperature, whatever drafted and whoever shared the pipe."""
    words = [*command, "--strategies", "ar,streaming,naive_pp", "--stages", "2"]
    words += ["--drafters", "eagle,eagle+merge+calibrate,ngram", "--requests", "1,2"]
    words[words.index("--draft") + 1] = f"eagle={tiny / 'eagle'}"
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, result.output
    rows = json.loads(Path("rows.json").read_text())
    assert len(rows) == (2 * 3 + 1) * 2 * 2
    assert {row["requests"] for row in rows} == {1, 2}
    assert {row["drafter"] for row in rows} == {"eagle", "eagle+merge+calibrate", "ngram", "none"}
    hashes = {row["temperature"]: row["tokens_sha256"] for row in rows}
    assert len(set(hashes.values())) == 2
    assert all(row["tokens_sha256"] == hashes[row["temperature"]] for row in rows)


def test_a_mismatch_ends_with_exit_code_1_and_is_in_the_rows(command, monkeypatch):
    """A verification that cannot fail would prove nothing."""
    right = LosslessChecker.expected

    def off(self: LosslessChecker, asked: Request) -> Sequence[int]:
        tokens = list(right(self, asked))
        return [*tokens[:1], tokens[1] + 1, *tokens[2:]] if asked.sampling.seed == 2 else tokens

    monkeypatch.setattr(flowspec.bench.verify.LosslessChecker, "expected", off)
    words = [*command, "--strategies", "ar,streaming", "--stages", "2"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1, result.output
    rows = json.loads(Path("rows.json").read_text())
    assert [(row["runs"], row["mismatches"]) for row in rows] == [(2, 1)] * 4
    assert all("ERROR at token 1" in row["divergences"][0] for row in rows)


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        (["--strategies", "ar,warp"], ["warp", "streaming"]),
        (["--drafters", "oracle"], ["oracle", "eagle"]),
        (["--drafters", "eagle+wings"], ["wings", "merge"]),
        (["--draft", "ngram=x"], ["ngram=x", "eagle"]),
        (["--requests", "17"], ["max_num_seqs", "17"]),
        (["--requests", "0"], ["max_num_seqs", "0"]),
        (["--driver", "carrier-pigeon"], ["carrier-pigeon", "simulated"]),
        (["--stages", "two"], ["--stages", "two"]),
        (["--stages", "0"], ["stages", "0"]),
        (["--stages", "9"], ["9"]),
        (["--temperatures", "warm"], ["--temperatures"]),
        (["--temperatures", "-1"], ["temperature", "-1"]),
        (["--dtype", "int8"], ["dtype", "int8"]),
        (["--prompts", "nowhere.jsonl"], ["nowhere.jsonl"]),
        (["--draft", "nowhere"], ["nowhere"]),
        (["--max-tokens", "0"], ["--max-tokens"]),
        (["--limit", "0"], ["limit"]),
    ],
)
def test_wrong_flags_end_with_exit_code_2_and_one_line(command, monkeypatch, capsys, flags, names):
    """The line names what was wrong; there is no traceback for what a user typed."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["flowspec", *command, *flags])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    for name in names:
        assert name in error, error


def test_a_model_needs_its_own_draft_head(tiny, tmp_path, monkeypatch):
    """The bundled head fits the bundled model alone."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["verify", str(tiny / "target")])
    assert isinstance(result.exception, ValueError)
    assert "--draft" in str(result.exception)
