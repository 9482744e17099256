"""Compare what `flowspec generate --json` wrote for several strategies: speeds, and the tokens.

    python scripts/compare_answers.py ar.jsonl flowspec.jsonl streaming.jsonl

A file's name is its strategy's; speed-ups are over the first one. Tokens/s are all tokens after
each answer's first, by all the seconds they took; outages are left out and counted as "rebuilt".
Exit code 1 where an answer has not the same tokens as the first strategy's to the same question, 2
where the files do not hold answers to the same questions.

`--prepare HOSTS.yaml PROMPTS A,B`, for run_jetson_eval.sh: checks all three and prints the port of
the hosts' head and a new token.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec.cluster.hosts import read_hosts
from flowspec.cluster.token import new_token
from flowspec.eval.prompts import load_prompts
from flowspec.eval.tables import Table, to_markdown

ASKED = ("prompt", "temperature", "top_k", "top_p", "min_p", "seed", "max_new_tokens", "stop")
FIGURES = ("tokens", "tokens_per_s", "time_to_first_token_s", "resumed")
COLUMNS = ("strategy", "answers", "tokens", "tokens/s", "speed-up", "first token, s", "rebuilt")


@dataclass(frozen=True, slots=True)
class Answers:
    """One strategy's, in the order of the questions."""

    strategy: str
    lines: Sequence[dict[str, Any]]

    @property
    def tokens_per_s(self) -> float:
        """0 where no answer has a second token."""
        timed = [(len(a["tokens"]) - 1, a["tokens_per_s"]) for a in self.lines]
        timed = [(count, speed) for count, speed in timed if count > 0 and speed > 0]
        seconds = sum(count / speed for count, speed in timed)
        return sum(count for count, _ in timed) / seconds if seconds else 0.0


def read_answers(path: Path) -> Answers:
    """Raises ValueError naming file and line of what is no answer."""
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number} is not JSON: {error}") from None
        if not isinstance(line, dict) or not {*ASKED, *FIGURES} <= line.keys():
            raise ValueError(f"{path}:{number} is no line of `flowspec generate --json`")
        if line.get("error"):
            raise ValueError(f"{path}:{number} is no whole answer: {line['error']}")
        lines.append(line)
    if not lines:
        raise ValueError(f"{path} has no answer")
    return Answers(path.stem, lines)


def check_same_questions(first: Answers, other: Answers) -> None:
    """Raises ValueError unless both were asked the same, with the same seeds and limits."""
    if len(first.lines) != len(other.lines):
        raise ValueError(
            f"{first.strategy} has {len(first.lines)} answers, {other.strategy} {len(other.lines)}"
        )
    for number, (a, b) in enumerate(zip(first.lines, other.lines, strict=True), start=1):
        for key in ASKED:
            if a[key] != b[key]:
                raise ValueError(
                    f"answer {number}: {first.strategy} and {other.strategy} differ in {key}: "
                    f"{a[key]!r:.80}, {b[key]!r:.80}"
                )


def differences(first: Answers, other: Answers) -> list[str]:
    """A sentence for each answer whose tokens are not the first strategy's."""
    found = []
    for number, (a, b) in enumerate(zip(first.lines, other.lines, strict=True), start=1):
        if a["tokens"] != b["tokens"]:
            pairs = zip(a["tokens"], b["tokens"], strict=False)  # one may be the other's beginning
            equal = next(
                (n for n, (x, y) in enumerate(pairs) if x != y),
                min(len(a["tokens"]), len(b["tokens"])),
            )
            found.append(
                f"answer {number}: {other.strategy} has not {first.strategy}'s tokens, from token "
                f"{equal + 1} on"
            )
    return found


def table(everything: Sequence[Answers]) -> Table:
    """A row per strategy."""
    baseline = everything[0]
    rows = []
    for one in everything:
        speed, count = one.tokens_per_s, len(one.lines)
        ratio = f"{speed / baseline.tokens_per_s:.2f}" if baseline.tokens_per_s else "-"
        first = sum(line["time_to_first_token_s"] for line in one.lines) / count
        tokens = sum(len(line["tokens"]) for line in one.lines)
        rebuilt = sum(line["resumed"] for line in one.lines)
        figures = (str(count), str(tokens), f"{speed:.2f}", ratio, f"{first:.2f}", str(rebuilt))
        rows.append((one.strategy, *figures))
    return Table(f"measured; speed-up over {baseline.strategy}", COLUMNS, rows)


def prepare(hosts: str, prompts: str, strategies: str) -> str:
    """Port and a new token. Raises ValueError for what a run would fail of later."""
    from flowspec.strategies import find_strategy  # torch, which the table does not need

    names = strategies.split(",")
    for name in names:
        find_strategy(name)
    if len(set(names)) < len(names):
        raise ValueError(f"--strategies names one twice: {strategies}")
    load_prompts(Path(prompts))
    return f"{read_hosts(Path(hosts)).port} {new_token()!s}"


def main(arguments: Sequence[str]) -> int:
    """See the module."""
    match arguments:
        case ["--prepare", hosts, prompts, strategies]:
            print(prepare(hosts, prompts, strategies))
            return 0
        case [] | ["-h" | "--help", *_]:
            print(__doc__)
            return 0 if arguments else 2
    first, *others = [read_answers(Path(name)) for name in arguments]
    for other in others:
        check_same_questions(first, other)
    print(to_markdown([table([first, *others])]))
    wrong = [sentence for other in others for sentence in differences(first, other)]
    for sentence in wrong:
        print(f"error: {sentence}", file=sys.stderr)
    if others and not wrong:
        print("all strategies gave the same tokens")
    return 1 if wrong else 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
