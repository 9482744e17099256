"""Reads prompts from files of the usual forms; the content shows which form a file has.

In JSON lines or one JSON list, an entry is an object with `turns`, `prompt`, `messages`,
`conversations` (ShareGPT), `instruction` (Alpaca) or `question`, a list of messages, or a text. Any
other file is one prompt, including its line ends.
"""

import codecs
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from flowspec.system.bundled import find_bundled
from flowspec.tokenizer import PromptError, check_text

Render = Callable[[Sequence[Mapping[str, str]]], tuple[int, ...]]  # a conversation as token ids
MAX_PROMPT_CHARS = 1_000_000
PROMPTS_HELP = "JSON lines or a list (a prompt each), a text (one prompt), or a folder of them."
_KEYS = ("turns", "prompt", "messages", "conversations", "instruction", "question")
_NEEDED = f"needed: an object with {', '.join(_KEYS[:-1])} or {_KEYS[-1]}"
_SPACE = re.compile(r"[ \t\n\r]*")  # JSON's white space
_ASKING = ("user", "human")
_UNASKED = ("system", "developer", "tool")  # neither a question nor an answer
_KINDS = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "a truth value",
    type(None): "null",
}


@dataclass(frozen=True, slots=True)
class Prompt:
    """One question; `turns` are the user's messages in order."""

    id: str
    source: str  # name of its file or folder
    turns: tuple[str, ...]
    where: str = field(default="", compare=False)  # file and line, for messages
    numbered: bool = field(default=False, compare=False)  # its id is only its position


@dataclass(frozen=True, slots=True)
class _Entry:
    """One value of a file of questions."""

    where: str  # file and line
    number: int  # number of its line, or its position in a list
    value: Any


def load_prompts(path: Path, *, limit: int | None = None) -> list[Prompt]:
    """Return the first `limit` prompts of each file at `path` (a file, or a folder to search).

    Raises ValueError that names file, line and the value if something is not a prompt.
    """
    path = find_bundled(path)
    if path.is_dir():
        files = sorted(p for p in path.rglob("*") if p.suffix in (".jsonl", ".txt"))
        if not files:
            raise ValueError(f"{path} has no .jsonl or .txt file")
        return _tell_apart([one for file in files for one in load_prompts(file, limit=limit)])
    text = _read(path)
    if not text.strip():
        raise ValueError(f"{path} is empty")
    source = path.parent.name if path.name == "question.jsonl" else path.stem
    if path.suffix not in (".jsonl", ".json"):
        return [make_prompt(path.stem, source, (text.strip(),), str(path))]
    found = (_prompt_of(entry, source) for entry in _entries(text, path))
    prompts = list(islice((prompt for prompt in found if prompt is not None), limit))
    if not prompts:
        raise ValueError(f"{path} has no conversation with a message of a user")
    return _tell_apart(prompts)


def make_prompt(
    name: str, source: str, turns: Sequence[Any], where: str, *, numbered: bool = False
) -> Prompt:
    """Make a prompt of texts of acceptable length. Raises ValueError that names `where`."""
    for turn in turns:
        if not isinstance(turn, str) or not turn:
            found = "an empty text" if turn == "" else _kind(turn)
            raise ValueError(f"{where} has {found} where a question's text is needed")
        if len(turn) > MAX_PROMPT_CHARS:
            raise ValueError(f"{where} is longer than {MAX_PROMPT_CHARS} characters")
        check_text(turn, where)
    check_text(name, f"{where}: the question's id")
    return Prompt(name, source, tuple(turns), where, numbered)


def first_turn(render: Render, prompt: Prompt) -> tuple[int, ...]:
    """Return the token ids of its first question. Raises PromptError that names file and line."""
    try:
        return render([{"role": "user", "content": prompt.turns[0]}])
    except PromptError as error:
        raise PromptError(f"{prompt.where}: {error}" if prompt.where else str(error)) from error


def question_id(given: Mapping[str, Any], keys: Sequence[str], where: str) -> str | None:
    """Return the first of these keys that is present, as text; None if there is none.

    Raises ValueError that names `where` for an id that is neither a text nor a number.
    """
    for key in keys:
        found = given.get(key)
        if found is None or found == "":
            continue
        if isinstance(found, bool) or not isinstance(found, str | int | float):
            raise ValueError(f'{where}: "{key}" holds {_kind(found)}, needed: a text or a number')
        return str(found)
    return None


def decode_file(raw: bytes, name: Path | str, *, remedy: str = "save it as UTF-8") -> str:
    """Decode a file's bytes without byte order mark, with newlines as line ends.

    Raises ValueError that names file, line, byte and the remedy if it is not UTF-8.
    """
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{name} is UTF-16 text; {remedy}") from None
        line = raw.count(b"\n", 0, error.start) + 1
        raise ValueError(
            f"{name}:{line} is not UTF-8 text: it has the byte 0x{raw[error.start]:02x}; {remedy}"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read(path: Path) -> str:
    try:
        return decode_file(path.read_bytes(), path)
    except FileNotFoundError:
        raise ValueError(f"prompt file {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"prompt file {path} cannot be read: {error.strerror}") from None


def _entries(text: str, path: Path) -> Iterator[_Entry]:
    """Yield JSON lines if there are several and the first is a value by itself; else one value."""
    # not splitlines: JSON texts may contain Unicode's line ends
    lines = [(number, line) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    first_number, first_line = lines[0]
    if len(lines) > 1 and _is_json(first_line):
        for number, line in lines:
            yield _Entry(f"{path}:{number}", number, _parse(line, path, number))
        return
    try:
        entries = _entries_of(text, path)
    except (ValueError, RecursionError):
        if path.suffix == ".jsonl":
            _parse(first_line, path, first_number)  # raises the error of its first line
        _parse(text, path, 1)
        raise
    yield from entries


def _entries_of(text: str, path: Path) -> list[_Entry]:
    """Return the entries of a text that is one JSON value: one question, or a list of them.

    Raises ValueError or RecursionError if it is not JSON.
    """
    start = _skip(text, 0)
    line = 1 + text.count("\n", 0, start)
    if text[start] != "[":
        return [_Entry(f"{path}:{line}", 1, json.loads(text))]
    entries, before, first_line = [], start, line
    for number, (place, value) in enumerate(_elements(text, start), 1):
        line += text.count("\n", before, place)
        before = place
        entries.append(_Entry(f"{path}:{line}", number, value))
    values = [entry.value for entry in entries]
    return [_Entry(f"{path}:{first_line}", 1, values)] if _is_conversation(values) else entries


def _elements(text: str, start: int) -> Iterator[tuple[int, Any]]:
    """Yield the start of each value of the JSON list at `start`, and the value.

    Raises ValueError if there is no JSON list, or if text follows it.
    """
    decoder, place = json.JSONDecoder(), _skip(text, start + 1)
    while not text.startswith("]", place):
        value, end = decoder.raw_decode(text, place)
        yield place, value
        place = _skip(text, end)
        if text.startswith(",", place):
            place = _skip(text, place + 1)
            if text.startswith("]", place):
                raise ValueError("a comma without a value after it")
        elif not text.startswith("]", place):
            raise ValueError("no comma between two values")
    if _skip(text, place + 1) != len(text):
        raise ValueError("text after the list")


def _skip(text: str, start: int) -> int:
    """Return the position of the first character that is not white space."""
    found = _SPACE.match(text, start)
    assert found is not None, "it matches nothing too"
    return found.end()


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _parse(text: str, path: Path, line: int) -> Any:
    """Parse `text`, which begins in `line`. Raises ValueError that names file and line."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        where = f"{path}:{line + error.lineno - 1}"
        raise ValueError(f"{where} is not JSON: {error.msg} (column {error.colno})") from None
    # numbers that are too long, brackets that are nested too deep
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}:{line} is not JSON that can be read: {error}") from None


def _prompt_of(entry: _Entry, source: str) -> Prompt | None:
    """Return the prompt, or None if nobody asks in the conversation. Raises ValueError."""
    turns = _turns_of(entry.value, entry.where)
    if not turns:
        return None
    given = entry.value if isinstance(entry.value, dict) else {}
    name = question_id(given, ("question_id", "id"), entry.where)
    numbered = name is None
    return make_prompt(name or str(entry.number), source, turns, entry.where, numbered=numbered)


def _turns_of(value: Any, where: str) -> list[str]:
    """Return the questions. Raises ValueError that names the form that was found."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and _is_conversation(value):
        return _asked(value, where)
    if not isinstance(value, dict):
        raise ValueError(f"{where} holds {_form(value)}, which is not a question; {_NEEDED}")
    if _is_message(value):
        raise ValueError(
            f"{where} holds one message of a conversation (role and content); put the messages of "
            "each conversation into one list"
        )
    key = next((key for key in _KEYS if value.get(key) not in (None, "", [])), None)
    if key is None and [] in (value.get("messages"), value.get("conversations")):
        return []  # public files contain some
    if key is None:
        keys = ", ".join(str(key)[:40] for key in [*value][:8]) or "nothing"
        raise ValueError(f"{where} holds an object with {keys}, which is not a question; {_NEEDED}")
    found = value[key]
    if isinstance(found, str):
        more = value.get("input") if key == "instruction" else None
        return [f"{found}\n\n{more}" if more and isinstance(more, str) else found]
    if isinstance(found, list) and all(isinstance(turn, str) for turn in found):
        return found
    if isinstance(found, list) and _is_conversation(found):
        return _asked(found, where)
    raise ValueError(
        f'{where}: "{key}" holds {_form(found)}, needed: a text, a list of texts, or a list of '
        "messages (role and content, or from and value)"
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)


def _is_conversation(values: Sequence[Any]) -> bool:
    return bool(values) and all(_is_message(value) for value in values)


def _asked(messages: Sequence[Mapping[str, Any]], where: str) -> list[str]:
    """Return the user's messages; only the first one if others' answers stand between them.

    System instructions are left out.
    """
    asked, is_answered = [], False
    for message in messages:
        role = message.get("role", message.get("from"))
        if role in _ASKING:
            asked.append(_content(message.get("content", message.get("value")), where))
        else:
            is_answered |= role not in _UNASKED
    if not asked or not asked[0].strip():
        return []
    return asked[:1] if is_answered else [text for text in asked if text.strip()]


def _content(content: Any, where: str) -> str:
    """Return a message's text, whole or in parts. Raises ValueError for anything else."""
    parts = [content] if isinstance(content, str) or content is None else content
    if not isinstance(parts, list):
        raise ValueError(f"{where}: a message's content is {_kind(content)}, needed: a text")
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, dict) else part or ""
        if not isinstance(text, str):
            kind = part.get("type", "an unknown") if isinstance(part, dict) else _kind(part)
            raise ValueError(f"{where}: a message has a part of type {kind}; only text is asked")
        texts.append(text)
    return "".join(texts)


def _tell_apart(prompts: list[Prompt]) -> list[Prompt]:
    """Prefix ids that are only positions with their file's name if another prompt has that id."""
    ids = Counter(prompt.id for prompt in prompts)
    return [
        replace(prompt, id=f"{prompt.source}:{prompt.id}")
        if prompt.numbered and ids[prompt.id] > 1
        else prompt
        for prompt in prompts
    ]


def _form(value: Any) -> str:
    """Describe a value that is neither texts nor messages; for a list, its first wrong element."""
    if not isinstance(value, list) or not value:
        return _kind(value)
    fits = _is_message if _is_message(value[0]) else _is_text
    odd = ((place, one) for place, one in enumerate(value, 1) if not fits(one))
    place, one = next(odd, (0, None))
    return f"a list whose element {place} is {_kind(one)}" if place else "a list of texts"


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _kind(value: Any) -> str:
    return _KINDS.get(type(value), "a number")
