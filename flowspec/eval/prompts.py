"""Prompts from files: JSON lines have one a line, a text is one as a whole, lines and all.

A line of `.jsonl` has `turns` (MT-bench's `question.jsonl`) or `prompt`; `.json` is ShareGPT, the
first question of each conversation; any other file is one prompt.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec.bundled import find_bundled

MAX_PROMPT_CHARS = 1_000_000
PROMPTS_HELP = "JSON lines (a prompt each), a text (one prompt), or a folder of them."


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question; `turns` are the user's messages in order."""

    id: str
    source: str  # name of its file or folder
    turns: tuple[str, ...]


def load_prompts(path: Path, *, limit: int | None = None) -> list[Prompt]:
    """The first `limit` prompts of each file at `path` (a file, or a folder searched for them).

    Raises ValueError naming file and line where something is not a prompt.
    """
    path = find_bundled(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".txt"))
        if not files:
            raise ValueError(f"{path} has no .jsonl or .txt file")
        return [prompt for file in files for prompt in load_prompts(file, limit=limit)]
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ValueError(f"prompt file {path} does not exist") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    source = path.parent.name if path.name == "question.jsonl" else path.stem
    if path.suffix == ".json":
        return _sharegpt(text, source, path)[:limit]
    if path.suffix != ".jsonl":
        if not text.strip():
            raise ValueError(f"{path} is empty")
        return [Prompt(path.stem, source, (text.strip(),))]
    return _lines(text, source, path, limit)


def _lines(text: str, source: str, path: Path, limit: int | None) -> list[Prompt]:
    prompts: list[Prompt] = []
    # not splitlines: a JSON text may hold the line ends of Unicode as they are
    for number, line in enumerate(text.split("\n"), start=1):
        if limit is not None and len(prompts) >= limit:
            break
        if line.strip():
            prompts.append(_parse(line, source, f"{path}:{number}", number))
    return prompts


def _parse(line: str, source: str, where: str, number: int) -> Prompt:
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ValueError(f"{where} must be an object, not {type(record).__name__}")
    turns = record.get("turns", record.get("prompt"))
    turns = [turns] if isinstance(turns, str) else turns
    if not isinstance(turns, list) or not turns or not all(isinstance(t, str) and t for t in turns):
        raise ValueError(f'{where} needs "turns" (a list of texts) or "prompt" (a text)')
    name = record.get("question_id", record.get("id", number))
    return make_prompt(str(name), source, turns, where)


def make_prompt(name: str, source: str, turns: Sequence[str], where: str) -> Prompt:
    """A prompt of acceptable length. Raises ValueError naming `where`."""
    if any(len(turn) > MAX_PROMPT_CHARS for turn in turns):
        raise ValueError(f"{where} is longer than {MAX_PROMPT_CHARS} characters")
    return Prompt(name, source, tuple(turns))


def _sharegpt(text: str, source: str, path: Path) -> list[Prompt]:
    """The user's first message of each conversation; one that has none (some do not) asks nothing.

    Only the first: what follows answers another model's words.
    """
    try:
        records: Any = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(records, list):
        raise ValueError(f"{path} must hold a list of conversations (ShareGPT)")
    prompts = []
    for number, record in enumerate(records, start=1):
        where = f"{path}: conversation {number}"
        said = record.get("conversations") if isinstance(record, dict) else None
        if not isinstance(said, list) or not all(isinstance(one, dict) for one in said):
            raise ValueError(
                f'{where} needs "conversations", a list of objects with from and value'
            )
        asked = [one.get("value") for one in said if one.get("from") in ("human", "user")]
        if asked and isinstance(asked[0], str) and asked[0].strip():
            name = str(record.get("id", number))
            prompts.append(make_prompt(name, source, asked[:1], where))
    if not prompts:
        raise ValueError(f"{path} has no conversation that a user begins or joins")
    return prompts
