"""benchmarks/compare_behaviour.py records this checkout and compares records."""

import json
import os
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from benchmarks import compare_behaviour
from benchmarks.compare_behaviour import KEYS, SETS, compare, read, write
from flowspec.bench.datasets import DATASETS

ROOT = Path(__file__).resolve().parents[2]
BUNDLED = ROOT / "models" / "demo"


def made_up() -> dict[str, Any]:
    """Return three records of one machine."""
    key = dict.fromkeys(KEYS, "x")
    records = [
        {**key, "question": str(n), "tokens_per_s": 0.1 * n, "messages": {"segment": n}}
        for n in (1, 2, 3)
    ]
    return {
        "commit": "0",
        "machine": {"host": "a"},
        "asked": {"quick": True},
        "elapsed_s": 1.0,
        "records": records,
    }


def test_what_is_equal_is_said_to_be(capsys: pytest.CaptureFixture[str]) -> None:
    """The order of the records does not matter."""
    after = made_up()
    after["records"].reverse()
    assert compare(made_up(), after) == 0
    assert capsys.readouterr().out == "all figures of 3 records are equal to the last digit\n"


def test_the_last_digit_counts(capsys: pytest.CaptureFixture[str]) -> None:
    """A changed figure or message count, a missing record, and a new figure are differences."""
    after = deepcopy(made_up())
    first, second, _ = after["records"]
    first["tokens_per_s"] = 0.10000000000000002
    second["messages"]["segment"] = 5
    second["tau"] = 1.0
    del after["records"][2]
    assert compare(made_up(), after) == 3
    said = capsys.readouterr().out
    assert "tokens_per_s 0.1 -> 0.10000000000000002" in said
    assert "messages.segment 2 -> 5; tau nothing -> 1.0" in said
    assert "recorded before alone" in said
    assert said.endswith("3 of 3 records differ\n")


def test_other_questions_are_not_compared() -> None:
    """All records would differ, without any meaning."""
    after = made_up() | {"asked": {"quick": False}}
    with pytest.raises(SystemExit, match="different questions"):
        compare(made_up(), after)


def test_another_machine_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    """Its last digits may differ."""
    compare(made_up(), made_up() | {"machine": {"host": "b"}})
    assert "may differ for this reason alone" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["record.json", "record.json.gz"])
def test_a_record_is_read_as_it_was_written(name: str, tmp_path: Path) -> None:
    """Floats keep every digit."""
    write(tmp_path / name, made_up())
    assert read(tmp_path / name) == made_up()


def test_it_asks_of_every_set() -> None:
    """The script has its own list of sets, because the package differs between checkouts."""
    assert set(SETS) == set(DATASETS)


@pytest.mark.slow
def test_this_checkout_can_be_recorded(tmp_path: Path) -> None:
    """A moved class or a renamed figure breaks this test, not a later comparison."""
    out = tmp_path / "records.json"
    command = [
        *(sys.executable, str(ROOT / compare_behaviour.RECORDER)),
        *("--strategies", "ar,streaming", "--drafters", "eagle", "--limit", "1"),
        *("--datasets", str(BUNDLED / "prompts.jsonl"), "--max-tokens", "6"),
        *("--models", str(BUNDLED), "--out", str(out)),
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    records = json.loads(out.read_text())
    assert [(one["strategy"], one["temperature"]) for one in records] == [
        ("ar", 0.0),
        ("streaming", 0.0),
        ("ar", 1.0),
        ("streaming", 1.0),
    ]
    for one in records:
        assert one["tokens"] == 6
        assert not one["differs_from_target"]
        assert one["tokens_per_s"] > 0
        messages = one["messages"]
        assert messages["open"] == messages["close"] == 4, "once from each rank to the next"
        assert messages["segment"] == 4 * messages["started"] == 4 * messages["left"]
    assert records[0]["messages"]["verdict"] == 6 * 4, "every token's, to the head and three stages"
    assert len({one["message_order"] for one in records}) == 4
