"""Training text of the demo family: turns conversations into packed token blocks.

Shapes: N blocks, T tokens a block.
"""

from __future__ import annotations

import ast
import gzip
import importlib.util
import json
import random
import re
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

BOS, EOS, USER, ASSISTANT, SYSTEM = 1, 2, 3, 4, 5

# How often one pass visits each set; a narrow mix, so that the small model predicts its text well.
REPEATS: dict[str, float] = {
    "gsm8k": 1.0,
    "factqa": 1.0,
    "factlong": 0.5,
    "codegen": 1.0,
    "pycode": 1.0,
    "selfinst": 1.0,
    "toolformer": 1.0,
    "roleplay": 1.0,
    "summ": 1.0,
    "lead": 1.0,
}
WHOLE_ONLY = ("summ", "lead")  # an answer that copies teaches nothing without its source
MADE_HERE = ("pycode", "lead")
TOOL_CALL = re.compile(r"\w+\([^)]*['\"?=]")
CODE_PACKAGES = ("networkx", "sympy")  # both BSD-3-Clause; the standard library is PSF-2.0
STDLIB_MODULES = [
    "statistics", "fractions", "random", "bisect", "heapq", "textwrap", "string",
    "collections.__init__", "functools", "calendar", "difflib", "shlex", "glob", "fnmatch",
    "posixpath", "copy", "inspect", "keyword", "colorsys", "datetime", "_pydatetime", "csv",
    "configparser", "ast", "tokenize", "types", "typing", "operator", "contextlib", "shutil",
    "tempfile", "gettext", "locale", "re.__init__", "html.__init__", "json.__init__",
    "json.decoder", "json.encoder", "urllib.parse", "mimetypes", "base64", "binascii", "quopri",
    "pprint", "reprlib", "enum", "graphlib", "ipaddress", "uuid", "zipfile.__init__", "tarfile",
    "argparse", "optparse", "getopt", "logging.__init__", "unittest.case", "turtle", "decimal",
    "_pydecimal", "numbers", "cmd", "code", "codeop", "pdb", "bdb", "timeit", "trace",
]  # fmt: skip


def read_set(
    folder: Path, name: str, split: str, *, questions_only: bool = False
) -> list[tuple[str, str]]:
    """Return the (question, answer) pairs of one corpus file; first turns only.

    Answers that call tools are left out, unless only the questions are wanted.
    """
    with gzip.open(folder / f"{name}.{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines]
    pairs = []
    for record in records:
        turns = record.get("conversation", [])
        if len(turns) < 2:
            continue
        question, answer = turns[0]["content"].strip(), turns[1]["content"].strip()
        calls_tool = name == "toolformer" and TOOL_CALL.search(answer)
        if calls_tool and not questions_only:
            continue
        pairs.append((question, answer))
    return pairs


def code_files() -> Iterator[Path]:
    """Yield Python sources of the standard library and of CODE_PACKAGES, without tests."""
    stdlib = Path(ast.__file__).parent
    for module in STDLIB_MODULES:
        path = stdlib / (module.replace(".", "/") + ".py")
        if path.exists():
            yield path
    for package in CODE_PACKAGES:
        spec = importlib.util.find_spec(package)
        if spec is None or spec.origin is None:
            raise ValueError(f"pip install {package}: its docstrings are part of the training text")
        for path in sorted(Path(spec.origin).parent.rglob("*.py")):
            if "test" not in str(path.relative_to(Path(spec.origin).parent)):
                yield path


def code_pairs() -> list[tuple[str, str]]:
    """Return (signature and docstring, body) of small functions, as completion requests."""
    pairs = []
    for path in code_files():
        source = path.read_text(encoding="utf-8", errors="replace")
        lines = source.splitlines()
        for node in ast.walk(ast.parse(source)):
            if not isinstance(node, ast.FunctionDef) or ast.get_docstring(node) is None:
                continue
            if len(node.body) < 2 or node.decorator_list:
                continue
            doc_end, end = node.body[0].end_lineno, node.end_lineno
            assert doc_end is not None, "parsed from source, so lines are known"
            assert end is not None, "parsed from source, so lines are known"
            head = textwrap.dedent("\n".join(lines[node.lineno - 1 : doc_end]))
            body = textwrap.dedent("\n".join(lines[doc_end:end])).strip("\n")
            if not 60 <= len(head) <= 900 or not 16 <= len(body) <= 700:
                continue
            gap = "\n" if len(head) % 2 else ""
            tail = "\n" if len(body) % 2 else ""
            question = f"Complete the code I provided.\n{gap}{head}{tail}"
            pairs.append((question, textwrap.indent(body, "    ")))
    return pairs


def lead_pairs(folder: Path, split: str) -> list[tuple[str, str]]:
    """Return (passage to summarize, its first two sentences) from the public-domain books."""
    rng = random.Random(5)
    pairs = []
    with gzip.open(folder / f"books.{split}.jsonl.gz", "rt", encoding="utf-8") as lines:
        texts = [" ".join(json.loads(line).get("text", "").split()) for line in lines]
    for text in texts:
        sentences = re.split(r"(?<=[.!?])['\"]?\s+(?=[A-Z'\"])", text)
        at = 0
        while at < len(sentences) - 3:
            wanted = rng.randint(300, 700) if rng.random() < 0.75 else rng.randint(1500, 6000)
            end = at + 3
            while end < len(sentences) and sum(map(len, sentences[at:end])) < wanted:
                end += 1
            answer = " ".join(sentences[at : at + 2])
            if 60 <= len(answer) <= 420 and sentences[at][0].isupper():
                pairs.append(("Summarize: " + " ".join(sentences[at:end]), answer))
            at = end
    return pairs


def load_pairs(folder: Path, split: str) -> dict[str, list[tuple[str, str]]]:
    """Return every set of the mix; 1 in 50 code pairs is held out."""
    sets = {name: read_set(folder, name, split) for name in REPEATS if name not in MADE_HERE}
    sets["lead"] = lead_pairs(folder, split)
    held_out = split == "val"
    code = code_pairs()
    sets["pycode"] = [p for i, p in enumerate(code) if (i % 50 == 7) == held_out]
    return sets


def encode(tokenizer: Tokenizer, question: str, answer: str) -> tuple[list[int], int]:
    """Return the token ids of one chat sample and the index of the first answer token."""
    newline = tokenizer.encode("\n", add_special_tokens=False).ids
    ask = tokenizer.encode("\n" + question + "\n", add_special_tokens=False).ids
    say = tokenizer.encode("\n" + answer, add_special_tokens=False).ids
    # The template writes "<|assistant|>\n" before the answer; that newline is a token of its own.
    if say[: len(newline)] != newline:
        say = newline + tokenizer.encode(answer, add_special_tokens=False).ids
    head = [BOS, USER, *ask, ASSISTANT, *newline]
    return [*head, *say[len(newline) :], EOS, *newline], len(head)


Sample = tuple[NDArray[np.uint16], int]


def encode_sets(
    tokenizer: Tokenizer, sets: dict[str, list[tuple[str, str]]], max_tokens: int = 1024
) -> dict[str, list[Sample]]:
    """Tokenise every pair; a sample longer than `max_tokens` loses its tail."""
    encoded: dict[str, list[Sample]] = {}
    for name, pairs in sets.items():
        encoded[name] = []
        for question, answer in pairs:
            ids, start = encode(tokenizer, question, answer)
            if start < max_tokens - 8:
                encoded[name].append((np.array(ids[:max_tokens], dtype=np.uint16), start))
    return encoded


def one_pass(sets: dict[str, list[Sample]], rng: random.Random) -> list[Sample]:
    """Return the samples of one pass over the mix, shuffled."""
    chosen: list[Sample] = []
    for name, samples in sets.items():
        whole, part = divmod(REPEATS[name], 1.0)
        chosen += samples * int(whole) + rng.sample(samples, int(part * len(samples)))
    rng.shuffle(chosen)
    return chosen


def that_fit(sets: dict[str, list[Sample]], block: int) -> dict[str, list[Sample]]:
    """Return the sets without the samples that must stay whole but do not fit a block."""
    return {
        name: [s for s in samples if len(s[0]) <= block + 1] if name in WHOLE_ONLY else samples
        for name, samples in sets.items()
    }


def pack(
    samples: list[Sample], block: int, question_weight: float, rng: random.Random
) -> tuple[NDArray[np.uint16], NDArray[np.float16]]:
    """Fill blocks of T+1 tokens best-fit; return tokens [N, T+1] and loss weights [N, T+1].

    The weight is 0 for padding, `question_weight` for the question, 1 for the answer. Only samples
    longer than a block are cut.
    """
    size = block + 1
    pieces: list[tuple[NDArray[np.uint16], NDArray[np.float16]]] = []
    for ids, start in samples:
        weights = np.ones(len(ids), dtype=np.float16)
        # A long question must not outweigh its answer.
        weights[:start] = question_weight * min(1.0, 100 / start)
        weights[0] = 0.0
        pieces += [(ids[i : i + size], weights[i : i + size]) for i in range(0, len(ids), size)]
    open_bins: list[tuple[int, list[int]]] = []
    closed: list[list[int]] = []
    for index, (ids, _) in enumerate(pieces):
        fits = [b for b in range(len(open_bins)) if open_bins[b][0] >= len(ids)]
        if fits:
            best = min(fits, key=lambda b: open_bins[b][0])
            room, members = open_bins.pop(best)
        else:
            room, members = size, []
        members.append(index)
        room -= len(ids)
        if room < 12:
            closed.append(members)
        else:
            open_bins.append((room, members))
        if len(open_bins) > 24:
            fullest = min(range(len(open_bins)), key=lambda b: open_bins[b][0])
            closed.append(open_bins.pop(fullest)[1])
    closed += [members for _, members in open_bins]
    rng.shuffle(closed)
    tokens = np.zeros((len(closed), size), dtype=np.uint16)
    weights_out = np.zeros((len(closed), size), dtype=np.float16)
    for row, members in enumerate(closed):
        at = 0
        for index in members:
            ids, weights = pieces[index]
            tokens[row, at : at + len(ids)] = ids
            weights_out[row, at : at + len(ids)] = weights
            at += len(ids)
    return tokens, weights_out
