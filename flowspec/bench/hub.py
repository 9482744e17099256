"""Evaluation sets from the Hugging Face hub, used when no folder with questions is given.

The questions are the first rows of each set's test split, in the usual words of that set. They
differ from the questions of the published FlowSpec tables, which are a selection of their own.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from flowspec.bench.prompts import Prompt, decode_file, make_prompt, question_id

Row = Mapping[str, Any]
PARQUET_READER = "pyarrow>=15"  # the extra `hub`: large, and only these sets need it


@dataclass(frozen=True, slots=True)
class HubSet:
    """The place of a set on the hub, and the question that a row gives."""

    repo: str
    file: str  # .parquet, .json or .jsonl
    turns: Callable[[Row], list[str]]
    name: str = ""  # column of the question's id; empty: its position


HUB_SETS: dict[str, HubSet] = {
    "mt_bench": HubSet(
        "HuggingFaceH4/mt_bench_prompts",
        "raw/question.jsonl",
        lambda row: list(row["turns"] if "turns" in row else row["prompt"]),
        "question_id",
    ),
    "humaneval": HubSet(
        "openai/openai_humaneval",
        "openai_humaneval/test-00000-of-00001.parquet",
        lambda row: [f"Complete the code I provided.\n\n{row['prompt']}"],
        "task_id",
    ),
    "gsm8k": HubSet(
        "openai/gsm8k", "main/test-00000-of-00001.parquet", lambda row: [row["question"]]
    ),
    "alpaca": HubSet("tatsu-lab/alpaca_eval", "alpaca_eval.json", lambda row: [row["instruction"]]),
    "sum": HubSet(
        "abisee/cnn_dailymail",
        "3.0.0/test-00000-of-00001.parquet",
        lambda row: [f"Summarize: {row['article']}"],
        "id",
    ),
    "qa": HubSet(
        "google-research-datasets/nq_open",
        "nq_open/validation-00000-of-00001.parquet",
        lambda row: [row["question"]],
    ),
}


def missing_readers(names: Iterable[str]) -> str:
    """Return what must be installed to read these sets of HUB_SETS, and how; "" if nothing."""
    packed = [name for name in names if HUB_SETS[name].file.endswith(".parquet")]
    if not packed:
        return ""
    try:
        import_module("pyarrow.parquet")
    except ImportError:
        pip = shlex.join([sys.executable, "-m", "pip", "install", PARQUET_READER])
        return (
            f"the hub has {', '.join(packed)} as parquet files, which pyarrow reads: run `{pip}`, "
            "or give --data-dir, a folder with SET/question.jsonl, which needs neither"
        )
    return ""


def load_from_hub(name: str, *, limit: int) -> list[Prompt]:
    """Load the first `limit` questions of a set of HUB_SETS, from the hub or its cache.

    Raises ValueError when the hub cannot be reached, or the file cannot be read or has changed.
    """
    if missing := missing_readers([name]):
        raise ValueError(missing)
    source = HUB_SETS[name]
    file = _download(source, name)
    where = f"{source.repo}/{source.file}"
    prompts: list[Prompt] = []
    for place, row in enumerate(_rows(file, where)):
        if len(prompts) == limit:
            break
        try:
            turns = source.turns(row)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where}: row {place} has no {error}; has the set changed?") from None
        at = f"{where}: row {place}"
        own = question_id(row, (source.name,) if source.name else (), at)
        prompts.append(make_prompt(own or str(place), name, turns, at))
    return prompts


def _download(source: HubSet, name: str) -> Path:
    from huggingface_hub import hf_hub_download  # imported here: only this needs a hub client

    try:
        return Path(hf_hub_download(source.repo, source.file, repo_type="dataset"))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"set {name} could not be loaded from the hub as {source.repo} ({reason}); give "
            f"--data-dir, a folder with {name}/question.jsonl"
        ) from error


def _rows(file: Path, where: str) -> Iterator[Row]:
    if file.suffix == ".parquet":
        from pyarrow.parquet import ParquetFile

        for batch in ParquetFile(file).iter_batches(batch_size=64):
            yield from batch.to_pylist()
        return
    text = decode_file(file.read_bytes(), file)
    try:
        rows = (
            json.loads(text)
            if file.suffix == ".json"
            else [json.loads(line) for line in text.split("\n") if line.strip()]
        )
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{where} must hold objects")
    yield from rows
