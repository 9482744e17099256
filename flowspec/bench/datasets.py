"""Evaluation sets by name: where their questions are, and which of them are asked.

The six sets of the published tables come from a folder in the public form (`<set>/question.jsonl`)
or from the hub. A path names any other file or folder of prompts, in any form that `prompts` reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from flowspec.bench.hub import HUB_SETS, load_from_hub, missing_readers
from flowspec.bench.prompts import Prompt, load_prompts
from flowspec.system.bundled import find_bundled

SUFFIXES = (".jsonl", ".json", ".txt")
TITLES = {
    "mt_bench": "MT-bench",
    "humaneval": "HumanEval",
    "gsm8k": "GSM8K",
    "alpaca": "Alpaca",
    "sum": "CNN/DM",
    "qa": "Natural Questions",
}
DATASETS = tuple(TITLES)


@dataclass(frozen=True, slots=True)
class Range:
    """The questions from position `first` up to, but not including, `last` in the set's file."""

    first: int = 0
    last: int | None = None

    def of(self, prompts: list[Prompt], limit: int | None) -> list[Prompt]:
        """Return at most `limit` of the prompts in the range."""
        return prompts[self.first : self.last][:limit]


def parse_range(text: str) -> Range:
    """Parse `30:50`, `30:`, `:30` or all (empty). Raises ValueError for anything else."""
    first, colon, last = text.partition(":")
    parts = [part for part in (first, last) if part]
    if text and (not colon or not all(part.isdecimal() for part in parts)):
        raise ValueError(f"--questions takes a range such as 30:50, not {text!r}")
    found = Range(int(first or 0), int(last) if last else None)
    if found.last is not None and found.first >= found.last:
        raise ValueError(f"--questions {text} holds no question")
    return found


def check_datasets(names: Sequence[str], *, data_dir: Path | None) -> None:
    """Raise ValueError that names everything missing to load these sets; do not contact the hub."""
    elsewhere = [name for name in names if _find(name, data_dir) is None]
    of_hub = [name for name in elsewhere if name in HUB_SETS and data_dir is None]
    unknown = [name for name in elsewhere if name not in of_hub]
    found = [_not_there(unknown, data_dir) if unknown else "", missing_readers(of_hub)]
    if missing := "; ".join(text for text in found if text):
        raise ValueError(missing)


def load_dataset(
    name: str, *, data_dir: Path | None, chosen: Range, limit: int | None
) -> list[Prompt]:
    """Load the chosen questions of a set, at most `limit`.

    Their `source` is the last part of `name`, which is a folder or file in `data_dir`, a path, or,
    without `data_dir`, a set of the hub. Raises ValueError when the set is not found, a question
    has no text, or the range is empty.
    """
    path = _find(name, data_dir)
    if path is not None:
        everything = load_prompts(path)
        source = Path(name).stem
    elif name in HUB_SETS and data_dir is None:
        last = chosen.last if chosen.last is not None else chosen.first + (limit or 100)
        everything = load_from_hub(name, limit=last)
        source = name
    else:
        raise ValueError(_not_there([name], data_dir))
    prompts = chosen.of(everything, limit)
    if not prompts:
        raise ValueError(f"set {name} has {len(everything)} questions, but none in the given range")
    first: dict[str, Prompt] = {}
    for prompt in prompts:
        other = first.setdefault(prompt.id, prompt)
        if other is not prompt:
            raise ValueError(
                f"set {name} has two questions with the id {prompt.id} ({other.where} and "
                f"{prompt.where}); give each its own"
            )
    return [replace(prompt, source=source) for prompt in prompts]


def _find(name: str, data_dir: Path | None) -> Path | None:
    """Return the file or folder of this name, or None."""
    if data_dir is not None:
        folder = data_dir / name
        found = [folder / "question.jsonl", folder]
        found += [data_dir / f"{name}{suffix}" for suffix in SUFFIXES]
        for path in found:
            if path.is_file() or (path.is_dir() and path.resolve() != data_dir.resolve()):
                return path
    path = find_bundled(name)
    is_path = path.suffix in SUFFIXES or len(path.parts) > 1
    return path if is_path and path.exists() else None


def _not_there(names: Sequence[str], data_dir: Path | None) -> str:
    if data_dir is None:
        known = ", ".join(DATASETS)
        unknown = ", ".join(map(repr, names))
        return f"unknown set {unknown}; known: {known}, or a file or folder of prompts"
    if not data_dir.is_dir():
        return f"--data-dir {data_dir} is not a folder"
    there = sorted(
        path.stem for path in data_dir.iterdir() if path.is_dir() or path.suffix in SUFFIXES
    )
    return f"{data_dir} has no set {', '.join(names)}; there: {', '.join(there) or 'nothing'}"
