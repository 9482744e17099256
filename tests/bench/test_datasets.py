"""Evaluation sets come from folders, single files or the hub; invalid ones are refused."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowspec.bench.datasets import DATASETS, Range, check_datasets, load_dataset, parse_range
from flowspec.bench.hub import HUB_SETS, PARQUET_READER
from flowspec.bench.prompts import load_prompts
from flowspec.cli.bench_plan import load_sets

EVERYTHING = Range()
ROOT = Path(__file__).resolve().parents[2]


def load(name: str, data_dir: Path | None = None, chosen: Range = EVERYTHING, limit=None):
    """Load a set with fewer arguments."""
    return load_dataset(name, data_dir=data_dir, chosen=chosen, limit=limit)


@pytest.fixture
def data_dir(tmp_path: Path) -> Path:
    """Return six questions of two turns, and single files of other forms."""
    folder = tmp_path / "data"
    (folder / "mt_bench").mkdir(parents=True)
    lines = [
        {"question_id": 81 + n, "category": "x", "turns": [f"ask {n}", f"and {n}"], "reference": []}
        for n in range(6)
    ]
    text = "\n".join(json.dumps(line) for line in lines)
    (folder / "mt_bench" / "question.jsonl").write_text(text + "\n")
    (folder / "own.jsonl").write_text('{"prompt": "one", "id": "a"}\n\n{"prompt": ["two", "2"]}\n')
    conversations = [
        {"id": "x1", "conversations": [{"from": "human", "value": "hello"}, {"from": "gpt"}]},
        {"id": "x2", "conversations": [{"from": "gpt", "value": "unasked"}]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "user", "value": "hi"}]},
    ]
    (folder / "sharegpt.json").write_text(json.dumps(conversations))
    return folder


def test_a_text_is_one_prompt_and_json_lines_are_one_each(tmp_path):
    """A question may have paragraphs, so the lines of a text stay together."""
    text = "Read this.\n\nThen answer: why?"
    (tmp_path / "ask.txt").write_text(text + "\n")
    (tmp_path / "ask.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    assert [one.turns for one in load_prompts(tmp_path / "ask.txt")] == [(text,)]
    assert [one.turns for one in load_prompts(tmp_path)] == [("one",), ("two",), (text,)]


LINE_ENDS = "one\u2028two\u2029three\u0085four"


def test_a_text_may_hold_the_line_ends_of_unicode(tmp_path):
    """JSON texts may contain them; only the newline ends a line."""
    path = tmp_path / "ask.jsonl"
    line = json.dumps({"prompt": LINE_ENDS}, ensure_ascii=False)
    path.write_text(line + '\n\n{"prompt": "x"}', encoding="utf-8")
    assert [one.turns for one in load_prompts(path)] == [(LINE_ENDS,), ("x",)]


def test_a_set_of_a_folder_keeps_ids_and_turns(data_dir):
    """They are read from the public question.jsonl."""
    found = load("mt_bench", data_dir)
    assert [prompt.id for prompt in found] == ["81", "82", "83", "84", "85", "86"]
    assert found[2].turns == ("ask 2", "and 2")
    assert {prompt.source for prompt in found} == {"mt_bench"}


@pytest.mark.parametrize(
    ("text", "limit", "ids"),
    [
        ("2:4", None, ["83", "84"]),
        ("4:", None, ["85", "86"]),
        (":1", None, ["81"]),
        ("1:5", 2, ["82", "83"]),
        ("", 1, ["81"]),
        ("5:99", None, ["86"]),
    ],
)
def test_questions_are_chosen_by_place(data_dir, text, limit, ids):
    """A range refers to the file's order and is then cut to the limit."""
    assert [p.id for p in load("mt_bench", data_dir, parse_range(text), limit)] == ids


@pytest.mark.parametrize("text", ["30", "a:b", "5:5", "7:3", "-1:4", "1:2:3", "1.5:2"])
def test_what_is_no_range_is_refused(text):
    """The text is not read as something else."""
    with pytest.raises(ValueError, match="--questions"):
        parse_range(text)


def test_a_range_beyond_the_set_is_refused(data_dir):
    """A table without a set would look complete."""
    with pytest.raises(ValueError, match="mt_bench has 6 questions"):
        load("mt_bench", data_dir, parse_range("6:9"))


def test_plain_lines_and_sharegpt(data_dir):
    """They give an id or a line number, and the user's first message of a conversation."""
    found = load("own", data_dir)
    assert [(p.id, p.turns) for p in found] == [("a", ("one",)), ("3", ("two", "2"))]
    found = load("sharegpt", data_dir)
    assert [(p.id, p.turns) for p in found] == [("x1", ("hello",)), ("3", ("hi",))]
    by_path = load(str(data_dir / "sharegpt.json"), limit=1)
    assert [(p.id, p.source) for p in by_path] == [("x1", "sharegpt")]


ASKED_ONCE = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
ANSWERED = [*ASKED_ONCE, {"role": "assistant", "content": "x"}, {"role": "user", "content": "and"}]
SHAREGPT = [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "x"}]
FORMS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "turns": ({"turns": ["hello", "again"]}, ("hello", "again")),
    "one turn": ({"turns": "hello"}, ("hello",)),
    "prompt": ({"prompt": "hello"}, ("hello",)),
    "prompt of messages": ({"prompt": ASKED_ONCE}, ("hello",)),
    "messages": ({"messages": ANSWERED}, ("hello",)),
    "messages without answers": ({"messages": [*ASKED_ONCE, ANSWERED[-1]]}, ("hello", "and")),
    "bare messages": (ASKED_ONCE, ("hello",)),
    "content in parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "hello"}]}]},
        ("hello",),
    ),
    "sharegpt": ({"conversations": SHAREGPT}, ("hello",)),
    "bare sharegpt": (SHAREGPT, ("hello",)),
    "alpaca": ({"instruction": "hello", "input": "you", "output": "x"}, ("hello\n\nyou",)),
    "alpaca without input": ({"instruction": "hello", "input": "", "output": "x"}, ("hello",)),
    "question": ({"question": "hello", "answer": "x"}, ("hello",)),
    "text": ("hello", ("hello",)),
    "an empty key beside": ({"turns": [], "prompt": "hello", "id": None}, ("hello",)),
}
LAYOUTS: dict[str, tuple[str, Callable[[list[Any]], str]]] = {
    "jsonl": (".jsonl", lambda rows: "".join(json.dumps(row) + "\n" for row in rows)),
    "json": (".json", lambda rows: json.dumps(rows)),
    "indented json": (".json", lambda rows: json.dumps(rows, indent=2)),
    "json lines named json": (".json", lambda rows: "\n".join(json.dumps(row) for row in rows)),
    "a list named jsonl": (".jsonl", lambda rows: json.dumps(rows, indent=1)),
    "empty lines, CRLF": (".jsonl", lambda rows: "\r\n\r\n".join(map(json.dumps, rows)) + "\r\n"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", FORMS)
def test_every_usual_form_is_read(tmp_path, form, layout):
    """This holds for every layout, with a byte order mark as Windows writes it or without."""
    (entry, turns), (suffix, write) = FORMS[form], LAYOUTS[layout]
    text = write([entry, {"prompt": "last", "id": "own"}])
    for number, mark in enumerate(("", "\ufeff")):
        path = tmp_path / f"ask{number}{suffix}"
        path.write_bytes((mark + text).encode())
        found = load(str(path))
        assert [(one.id, one.turns) for one in found] == [("1", turns), ("own", ("last",))]


def test_a_file_may_be_one_conversation(tmp_path):
    """It may be the messages of an API request, or a single entry."""
    for content in (ASKED_ONCE, {"messages": ASKED_ONCE}):
        for suffix in (".json", ".jsonl"):
            path = tmp_path / f"talk{suffix}"
            path.write_text(json.dumps(content))
            assert [(one.id, one.turns) for one in load(str(path))] == [("1", ("hello",))]


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    """A tokenizer would make tokens of it."""
    path = tmp_path / "ask.txt"
    path.write_bytes("\ufeffWhat is 2 + 2?\r\nSay it.\r\n".encode())
    assert [one.turns for one in load_prompts(path)] == [("What is 2 + 2?\nSay it.",)]


def test_conversations_that_ask_nothing_are_left_out(tmp_path):
    """Public files contain some; a file with nothing else is refused."""
    path = tmp_path / "talk.jsonl"
    rows: list[Any] = [{"conversations": []}, {"conversations": [{"from": "gpt", "value": "x"}]}]
    rows += [{"messages": [{"role": "user", "content": " "}]}]
    path.write_text("\n".join(map(json.dumps, [*rows, {"prompt": "hello"}])))
    assert [(one.id, one.turns) for one in load_prompts(path)] == [("4", ("hello",))]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ValueError, match=r"talk\.jsonl has no conversation"):
        load_prompts(path)


def test_questions_without_an_id_are_numbered(tmp_path):
    """The numbers differ from given ids, and from those of another file."""
    rows = [{"prompt": "a", "question_id": None}, {"prompt": "b", "question_id": None, "id": None}]
    rows += [{"prompt": "c", "id": "1"}, {"prompt": "d", "question_id": 0, "id": 7}]
    path = tmp_path / "ask.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    assert [one.id for one in load(str(path))] == ["ask:1", "2", "1", "0"]
    folder = tmp_path / "data" / "both"
    folder.mkdir(parents=True)
    for name in ("x", "y"):
        (folder / f"{name}.jsonl").write_text('{"prompt": "p"}\n')
    assert [one.id for one in load("both", tmp_path / "data")] == ["x:1", "y:1"]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.json", "{}", ["a.json:1 holds an object with nothing", "needed: an object with turns"]),
        ("a.json", "[\n{}]", ["a.json:2 holds an object"]),
        ("a.json", '[{"prompt": "x"},\n {"prompt": 5}]', ['a.json:2: "prompt" holds a number']),
        (
            "a.json",
            '[{"conversations": [1]}]',
            ['"conversations" holds a list whose element 1 is a'],
        ),
        ("a.json", '[{"prompt": "x"} {"prompt": "y"}]', ["a.json:1 is not JSON", "column 18"]),
        ("a.json", '[{"prompt": "x"},\n]', ["a.json:", "is not JSON"]),
        ("a.json", '[{"prompt": "x"}\n]\n]', ["a.json:3 is not JSON", "Extra data"]),
        ("a.jsonl", '{"turns": [null]}', ['"turns" holds a list whose element 1 is null, needed']),
        ("a.jsonl", '{"turns": ["x", 5]}', ['"turns" holds a list whose element 2 is a number']),
        (
            "a.jsonl",
            '{"prompt": "x"}\n[{"role": "user", "content": "x"}, "y"]',
            ["a.jsonl:2 holds a list whose element 2 is a text, which is not a question"],
        ),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"prompt": "y", "question_id": {"a": 1}}',
            ['a.jsonl:2: "question_id" holds an object, needed: a text or a number'],
        ),
        ("a.jsonl", '{"prompt": "y", "id": [1]}', ['a.jsonl:1: "id" holds a list']),
        ("a.jsonl", '{"prompt": "y", "id": false}', ['a.jsonl:1: "id" holds a truth value']),
        (
            "a.jsonl",
            '{"prompt": "y", "id": "\\ud83d"}',
            ["a.jsonl:1: the question's id is not val"],
        ),
        ("a.json", "[", ["a.json:1 is not JSON"]),
        ("a.json", '[\n\n{"prompt": }]', ["a.json:3 is not JSON", "column 12"]),
        ("a.json", "7", ["a.json:1 holds a number"]),
        ("a.json", "[" * 100_000, ["a.json:1 is not JSON"]),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"query": "x", "gold": 1}',
            ["a.jsonl:2", "with query, gold"],
        ),
        ("a.jsonl", '{"prompt": "x"}\n{"prompt": "y"', ["a.jsonl:2 is not JSON"]),
        ("a.jsonl", '{"prompt": "x"\n{"prompt": "y"}', ["a.jsonl:1 is not JSON"]),
        ("a.jsonl", '{"prompt": "x"}\n[1]', ["a.jsonl:2 holds a list whose element 1 is a number"]),
        ("a.jsonl", '{"prompt": "x"}\nnull', ["a.jsonl:2 holds null"]),
        ("a.jsonl", '{"turns": ["x", ""]}', ["a.jsonl:1 has an empty text"]),
        (
            "a.jsonl",
            '{"prompt": "x"}\n{"role": "user", "content": "x"}',
            ["a.jsonl:2 holds one message", "one list"],
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}',
            ["a.jsonl:1", "part of type image_url"],
        ),
        ("a.jsonl", '{"turns": ["cut \\ud83d here"]}', ["a.jsonl:1", "half a character, \\ud83d"]),
        (
            "a.jsonl",
            '{"prompt": "x", "id": 1}\n{"prompt": "y", "id": "1"}',
            ["id 1", ":1 and", ":2"],
        ),
        ("a.jsonl", " \n", ["a.jsonl is empty"]),
    ],
)
def test_what_is_no_question_is_told_by_form_file_and_line(tmp_path, name, text, words):
    """The error does not name the key of one form among several."""
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"a\.json") as error:
        load(str(tmp_path / name))
    assert [word for word in words if word not in str(error.value)] == []


def test_a_list_is_decoded_once(tmp_path, monkeypatch):
    """A file of questions may be large; lines are counted on the way."""
    rows = [{"prompt": f"{n} [,] ]"} for n in range(30)]
    decoded, decode = [], json.JSONDecoder.raw_decode

    def counted(self: json.JSONDecoder, text: str, idx: int = 0) -> tuple[Any, int]:
        value, end = decode(self, text, idx)
        decoded.append(end - idx)
        return value, end

    monkeypatch.setattr("json.JSONDecoder.raw_decode", counted)
    for name, indent in [("ask.json", 1), ("ask.json", None), ("ask.jsonl", 1)]:
        decoded.clear()
        text = json.dumps(rows, indent=indent)
        (tmp_path / name).write_text(text)
        found = load_prompts(tmp_path / name)
        assert [one.turns for one in found] == [(row["prompt"],) for row in rows]
        lines = [int(one.where.rpartition(":")[2]) for one in found]
        assert lines == ([2 + 3 * n for n in range(30)] if indent else [1] * 30)
        assert 0.5 * len(text) < sum(decoded) <= len(text), name


@pytest.mark.parametrize("name", ["ask.txt", "ask.jsonl"])
def test_what_is_no_utf_8_is_told_by_line_and_byte(tmp_path, name):
    """UTF-16, which Windows calls Unicode, is named as such."""
    path = tmp_path / name
    path.write_bytes(b'{"prompt": "x"}\n{"prompt": "caf\xe9"}\n')
    with pytest.raises(ValueError, match=rf"{name}:2 is not UTF-8 text: it has the byte 0xe9"):
        load_prompts(path)
    path.write_bytes('{"prompt": "x"}'.encode("utf-16"))
    with pytest.raises(ValueError, match=rf"{name} is UTF-16 text; save it as UTF-8"):
        load_prompts(path)


def test_a_set_that_is_not_there_is_refused_by_what_is(data_dir, tmp_path):
    """A typing error shows at once; with a given folder, the hub is not contacted."""
    with pytest.raises(ValueError, match="data has no set gsm8k; there: mt_bench, own, sharegpt"):
        load("gsm8k", data_dir)
    with pytest.raises(ValueError, match="is not a folder"):
        load("gsm8k", tmp_path / "nowhere")
    with pytest.raises(ValueError, match="unknown set 'gms8k'; known: mt_bench, humaneval"):
        load("gms8k")


def test_two_questions_with_one_id_are_refused(tmp_path):
    """Their samples could not be distinguished."""
    (tmp_path / "twice.jsonl").write_text('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n')
    with pytest.raises(ValueError, match="twice has two questions with the id 1"):
        load("twice", tmp_path)


# The hub ----------------------------------------------------------------------------------------

ROWS: dict[str, dict[str, Any]] = {
    "mt_bench": {"question_id": 81, "turns": ["a", "b"]},
    "alpaca": {"instruction": "Name a fish."},
    "humaneval": {"task_id": "HumanEval/0", "prompt": "def f():"},
    "gsm8k": {"question": "How many?"},
    "sum": {"id": "abc", "article": "Much happened."},
    "qa": {"question": "who sang it"},
}
ASKED = {
    "mt_bench": ("81", ("a", "b")),
    "alpaca": ("0", ("Name a fish.",)),
    "humaneval": ("HumanEval/0", ("Complete the code I provided.\n\ndef f():",)),
    "gsm8k": ("0", ("How many?",)),
    "sum": ("abc", ("Summarize: Much happened.",)),
    "qa": ("0", ("who sang it",)),
}


class FakeHub:
    """Writes the requested file, and records the requests."""

    def __init__(self, folder: Path, rows: list[dict[str, Any]]) -> None:
        self.folder, self.rows = folder, rows
        self.asked: list[tuple[str, str, str]] = []

    def __call__(self, repo: str, file: str, *, repo_type: str) -> str:
        self.asked.append((repo, file, repo_type))
        path = self.folder / Path(file).name
        if path.suffix == ".jsonl":
            path.write_text("\n".join(json.dumps(row) for row in self.rows))
        else:
            path.write_text(json.dumps(self.rows))
        return str(path)


class FakeParquet:
    """Replaces pyarrow: reads JSON instead."""

    def __init__(self, path: Path) -> None:
        self.rows = json.loads(path.read_text())

    def iter_batches(self, batch_size: int):
        """Yield batches of rows."""
        for start in range(0, len(self.rows), batch_size):
            batch = type("Batch", (), {})()
            batch.to_pylist = lambda start=start: self.rows[start : start + batch_size]
            yield batch


def use_hub(monkeypatch, tmp_path, rows) -> FakeHub:
    """Replace the network and the parquet library."""
    hub = FakeHub(tmp_path, rows)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", hub)
    module = type(sys)("pyarrow.parquet")
    module.ParquetFile = FakeParquet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pyarrow", type(sys)("pyarrow"))
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", module)
    return hub


@pytest.mark.parametrize("name", DATASETS)
def test_each_set_of_the_hub_is_asked_in_its_own_words(name, monkeypatch, tmp_path):
    """One row of each set is read, with its own id or its position."""
    hub = use_hub(monkeypatch, tmp_path, [ROWS[name]])
    (found,) = load(name)
    assert (found.id, found.turns) == ASKED[name]
    assert found.source == name
    source = HUB_SETS[name]
    assert hub.asked == [(source.repo, source.file, "dataset")]


def test_an_id_of_the_hub_is_a_text_or_a_number(monkeypatch, tmp_path):
    """The same holds for a user's own file."""
    use_hub(monkeypatch, tmp_path, [{"question_id": {"a": 1}, "turns": ["x"]}])
    with pytest.raises(ValueError, match='row 0: "question_id" holds an object, needed: a text'):
        load("mt_bench")


def test_a_row_of_the_hub_may_hold_the_line_ends_of_unicode(monkeypatch, tmp_path):
    """The set has JSON lines."""
    file = tmp_path / "question.jsonl"
    row = {"question_id": 81, "turns": [LINE_ENDS]}
    file.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *_, **__: str(file))
    assert [one.turns for one in load("mt_bench", limit=1)] == [(LINE_ENDS,)]


def test_of_the_hub_no_more_is_read_than_asked_for(monkeypatch, tmp_path):
    """A range is taken from the first rows."""
    rows = [{"question": f"q{n}"} for n in range(200)]
    use_hub(monkeypatch, tmp_path, rows)
    found = load("gsm8k", chosen=parse_range("70:90"), limit=3)
    assert [(p.id, p.turns[0]) for p in found] == [("70", "q70"), ("71", "q71"), ("72", "q72")]


def test_a_hub_that_cannot_be_reached_says_what_to_do(monkeypatch):
    """The error has the set, the reason and the option."""

    def fail(*args: Any, **options: Any) -> str:
        raise OSError("We have no connection\nand more")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fail)
    with pytest.raises(ValueError, match=r"alpaca .*We have no connection\).*--data-dir"):
        load("alpaca")


def test_a_set_that_has_changed_is_refused(monkeypatch, tmp_path):
    """The error names row and column."""
    use_hub(monkeypatch, tmp_path, [{"query": "?"}])
    with pytest.raises(ValueError, match=r"row 0 has no 'question'"):
        load("gsm8k")
    use_hub(monkeypatch, tmp_path, ["text"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="must hold objects"):
        load("alpaca")


@pytest.fixture
def hub_alone(monkeypatch, tmp_path) -> FakeHub:
    """Provide a hub without the optional library for parquet files."""
    hub = use_hub(monkeypatch, tmp_path, [ROWS["mt_bench"]])
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    return hub


def test_without_the_parquet_library_nothing_is_downloaded(hub_alone):
    """One sentence names every set that needs it, the command for this Python, and a way out."""
    with pytest.raises(ValueError, match="parquet") as error:
        load_sets("all", None, "", None)
    assert "the hub has humaneval, gsm8k, sum, qa as parquet files" in str(error.value)
    assert f"run `{sys.executable} -m pip install '{PARQUET_READER}'`" in str(error.value)
    assert "--data-dir" in str(error.value)
    with pytest.raises(ValueError, match="the hub has gsm8k as parquet"):
        load("gsm8k")
    assert hub_alone.asked == []
    assert f'hub = ["{PARQUET_READER}"]' in (ROOT / "pyproject.toml").read_text()


def test_sets_that_need_no_library_load_without_it(hub_alone, data_dir):
    """This holds for the hub, and for any set from a folder, without contacting the hub."""
    assert list(load_sets("mt_bench", None, "", None)) == ["mt_bench"]
    assert len(hub_alone.asked) == 1
    (data_dir / "qa.txt").write_text("who?")
    assert list(load_sets("mt_bench,qa", data_dir, "", None)) == ["mt_bench", "qa"]
    assert len(hub_alone.asked) == 1


def test_all_that_is_missing_is_named_at_once(hub_alone, data_dir):
    """They are not reported one at a time, after a download."""
    with pytest.raises(ValueError, match="unknown set 'gms8k', 'qq'; .*the hub has sum as parquet"):
        check_datasets(["mt_bench", "gms8k", "sum", "qq"], data_dir=None)
    with pytest.raises(ValueError, match="data has no set sum, qa; there: mt_bench, own"):
        check_datasets(["mt_bench", "sum", "qa"], data_dir=data_dir)
    assert hub_alone.asked == []
