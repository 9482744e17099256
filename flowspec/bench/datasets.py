"""Evaluation sets by name: where their questions are, and which of them are asked.

The six sets of the published tables, from a folder in the public form (`<set>/question.jsonl`) or
the hub; and any file or folder of prompts by its path, of any form that `prompts` reads.
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
    """Questions by their place in the set's file: from `first` up to, not including, `last`."""

    first: int = 0
    last: int | None = None

    def of(self, prompts: list[Prompt], limit: int | None) -> list[Prompt]:
        """At most `limit` of those in the range."""
        return prompts[self.first : self.last][:limit]


def parse_range(text: str) -> Range:
    """`30:50`, `30:`, `:30` or all (empty). Raises ValueError for anything else."""
    first, colon, last = text.partition(":")
    parts = [part for part in (first, last) if part]
    if text and (not colon or not all(part.isdecimal() for part in parts)):
        raise ValueError(f"--questions takes a range such as 30:50, not {text!r}")
    found = Range(int(first or 0), int(last) if last else None)
    if found.last is not None and found.first >= found.last:
        raise ValueError(f"--questions {text} holds no question")
    return found


def check_datasets(names: Sequence[str], *, data_dir: Path | None) -> None:
    """Raises ValueError naming all that is missing to load these sets; asks the hub for nothing."""
    elsewhere = [name for name in names if _find(name, data_dir) is None]
    of_hub = [name for name in elsewhere if name in HUB_SETS and data_dir is None]
    unknown = [name for name in elsewhere if name not in of_hub]
    found = [_not_there(unknown, data_dir) if unknown else "", missing_readers(of_hub)]
    if missing := "; ".join(text for text in found if text):
        raise ValueError(missing)


def load_dataset(
    name: str, *, data_dir: Path | None, chosen: Range, limit: int | None
) -> list[Prompt]:
    """The chosen questions of a set, at most `limit`; their `source` is `name`'s last part.

    `name` is a folder or file in `data_dir`, a path, or, without `data_dir`, a set of the hub.
    Raises ValueError naming what was looked for, where a question is missing its text, and where
    the range holds none.
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
        raise ValueError(f"set {name} has {len(everything)} questions, none in the range asked for")
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
    """A file or folder of this name; None where there is none."""
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
        return f"--data-dir {data_dir} is no folder"
    there = sorted(
        path.stem for path in data_dir.iterdir() if path.is_dir() or path.suffix in SUFFIXES
    )
    return f"{data_dir} has no set {', '.join(names)}; there: {', '.join(there) or 'nothing'}"
