"""Compares two checkouts: speed, rows, texts and messages must be equal to the last digit.

    python benchmarks/compare_behaviour.py run --before CHECKOUT [--quick] --data-dir QUESTIONS
    python benchmarks/compare_behaviour.py record --out before.json.gz --data-dir QUESTIONS
    python benchmarks/compare_behaviour.py compare before.json.gz after.json.gz

Every strategy answers questions of every set on an emulated cluster, at T = 0 and 1: all seven with
the EAGLE head, some with the other drafters. The results depend on the machine and on torch, so
both records must come from one machine. Each checkout runs its own benchmarks/record_behaviour.py;
this file only knows the form of its records. `compare` and `run` end with exit code 1 if a figure
differs.

A quick record (one question of a set, 32 tokens) took 6.5 minutes of processor time on a busy
machine with two cores. A full one (four questions of a set, 64 tokens) takes about five times as
long.
"""

import argparse
import gzip
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RECORDER = Path("benchmarks") / "record_behaviour.py"
SETS = ("mt_bench", "humaneval", "gsm8k", "alpaca", "sum", "qa")
KEYS = ("strategy", "drafter", "dataset", "question", "turn", "temperature")
PART_TIMEOUT_S = 3600.0
MAX_SHOWN = 10  # differing records to print
Record = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Ask:
    """A share of the questions."""

    strategies: str
    drafters: str
    limit: int  # questions of each set
    max_tokens: int


# older checkouts know `+merge` by this name alone, newer ones know both
OTHER_DRAFTERS = "eagle3,draft_model,ngram,eagle+graft"
FULL = (
    Ask("all", "eagle", limit=4, max_tokens=64),
    Ask("serial_pp,flowspec,streaming", OTHER_DRAFTERS, limit=1, max_tokens=64),
)
QUICK = (
    Ask("all", "eagle", limit=1, max_tokens=32),
    Ask("streaming", OTHER_DRAFTERS, limit=1, max_tokens=32),
)


def record(checkout: Path, options: argparse.Namespace, models: Path) -> dict[str, Any]:
    """Run a checkout's recorder on every set; `models` holds target and drafters."""
    names = options.datasets.split(",")
    asks, size = (QUICK, ceil(len(names) / 2)) if options.quick else (FULL, 1)
    groups = [",".join(names[start : start + size]) for start in range(0, len(names), size)]
    parts = [(group, ask) for ask in asks for group in groups]
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="flowspec-compare-") as folder:
        files = [Path(folder) / f"{number}.json" for number in range(len(parts))]
        with ThreadPoolExecutor(options.jobs) as pool:
            runs = [
                pool.submit(_run_part, checkout, options.data_dir, models, group, ask, file)
                for (group, ask), file in zip(parts, files, strict=True)
            ]
            try:
                for number, run in enumerate(runs, start=1):
                    run.result()
                    print(f"{number} of {len(runs)} parts", file=sys.stderr, flush=True)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        records = [one for file in files for one in json.loads(file.read_text())]
    return {
        "commit": _git(checkout, "rev-parse", "HEAD"),
        "modified": bool(_git(checkout, "status", "--porcelain", "--untracked-files=no")),
        "machine": {
            "host": platform.node(),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": version("torch"),
        },
        "asked": {"quick": options.quick, "datasets": [Path(name).stem for name in names]},
        "elapsed_s": round(time.monotonic() - start, 1),
        "records": records,
    }


def _run_part(
    checkout: Path, data_dir: Path | None, models: Path, sets: str, ask: Ask, out: Path
) -> None:
    """Record some sets in a new process. Exit if it fails."""
    command = [
        *(sys.executable, str(checkout / RECORDER)),
        *("--datasets", sets, "--strategies", ask.strategies, "--drafters", ask.drafters),
        *("--limit", str(ask.limit), "--max-tokens", str(ask.max_tokens)),
        *("--models", str(models), "--out", str(out)),
    ]
    if data_dir is not None:
        command += ["--data-dir", str(data_dir.resolve())]
    environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
    try:
        done = subprocess.run(
            command, cwd=checkout, env=environment, timeout=PART_TIMEOUT_S, capture_output=True
        )
    except subprocess.TimeoutExpired:
        raise SystemExit(
            f"error: {checkout}, {sets}: no end after {PART_TIMEOUT_S:.0f} s; is the machine busy?"
        ) from None
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip()
        raise SystemExit(f"error: {checkout}, {sets}: the recorder failed:\n{said}")


def _git(checkout: Path, *arguments: str) -> str:
    command = ["git", "-C", str(checkout), *arguments]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def compare(before: Mapping[str, Any], after: Mapping[str, Any]) -> int:
    """Print the differences; return the number of records that differ."""
    if before["asked"] != after["asked"]:
        raise SystemExit(
            f"error: the records have different questions: {before['asked']} before, "
            f"{after['asked']} after; record both with the same options"
        )
    if before["machine"] != after["machine"]:
        print(
            f"note: recorded on {before['machine']} before, on {after['machine']} after; last "
            "digits may differ for this reason alone"
        )
    one, other = by_key(before["records"]), by_key(after["records"])
    keys = sorted(one.keys() | other.keys())
    changed = {key: differences(one.get(key), other.get(key)) for key in keys}
    changed = {key: figures for key, figures in changed.items() if figures}
    for key in list(changed)[:MAX_SHOWN]:
        print(f"{_name(key)}: " + "; ".join(changed[key].values()))
    if len(changed) > MAX_SHOWN:
        print(f"... and {len(changed) - MAX_SHOWN} more")
    for figure, count in sorted(Counter(chain.from_iterable(changed.values())).items()):
        print(f"{figure} differs in {count} records")
    if changed:
        print(f"{len(changed)} of {len(keys)} records differ")
    else:
        print(f"all figures of {len(keys)} records are equal to the last digit")
    return len(changed)


def by_key(records: Iterable[Record]) -> dict[tuple[Any, ...], Record]:
    """Records by what they are of; a drafter has the name that newer checkouts give it."""
    renamed = [{**one, "drafter": one["drafter"].replace("+graft", "+merge")} for one in records]
    found: dict[tuple[Any, ...], Record] = {tuple(one[key] for key in KEYS): one for one in renamed}
    if not found:
        raise SystemExit("error: there are no records to compare")
    return found


def differences(before: Record | None, after: Record | None) -> dict[str, str]:
    """Return old and new value by figure; a record on one side only differs as a whole."""
    if before is None or after is None:
        return {"record": "recorded only after" if before is None else "recorded before alone"}
    old, new = _flat(before), _flat(after)
    names = [*old, *(name for name in new if name not in old)]
    return {
        name: f"{name} {_short(old, name)} -> {_short(new, name)}"
        for name in names
        if name not in old or name not in new or old[name] != new[name]
    }


def _flat(record: Record) -> dict[str, Any]:
    """Flatten counts by kind, bytes by link and the like into single figures."""
    flat: dict[str, Any] = {}
    for name, value in record.items():
        inner = value if isinstance(value, Mapping) else {}
        flat |= {f"{name}.{part}": one for part, one in inner.items()} or {name: value}
    return flat


def _short(figures: Record, name: str) -> str:
    text = json.dumps(figures[name]) if name in figures else "nothing"
    return text if len(text) <= 80 else f"{text[:77]}..."


def _name(key: Sequence[Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in zip(KEYS, key, strict=True))


def read(path: Path) -> dict[str, Any]:
    """Read a record file."""
    data = path.read_bytes()
    found: dict[str, Any] = json.loads(gzip.decompress(data) if path.suffix == ".gz" else data)
    return found


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Write a record file, compressed if its name ends in .gz."""
    data = json.dumps(found, indent=1).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    print(f"{len(found['records'])} records in {path}, {found['elapsed_s']} s", file=sys.stderr)


def parse() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    asked = argparse.ArgumentParser(add_help=False)
    asked.add_argument("--data-dir", type=Path, help="folder with SET/question.jsonl")
    asked.add_argument("--datasets", default=",".join(SETS), help="comma-separated sets or files")
    asked.add_argument("--quick", action="store_true", help="one question of a set, 32 tokens")
    asked.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes [one per core]")
    asked.add_argument("--models", type=Path, help="folder with target, eagle, eagle3 and draft")
    one = commands.add_parser("record", parents=[asked], help="record one checkout")
    one.add_argument("--checkout", type=Path, default=HERE.parent)
    one.add_argument("--out", type=Path, required=True, help="FILE.json or FILE.json.gz")
    two = commands.add_parser("compare", help="compare two records")
    two.add_argument("before", type=Path)
    two.add_argument("after", type=Path)
    both = commands.add_parser("run", parents=[asked], help="record two checkouts and compare")
    both.add_argument("--before", type=Path, required=True)
    both.add_argument("--after", type=Path, default=HERE.parent)
    return parser.parse_args()


def main() -> None:
    """Run the command that the options name."""
    options = parse()
    if options.command == "compare":
        sys.exit(compare(read(options.before), read(options.after)) > 0)
    first = (options.checkout if options.command == "record" else options.before).resolve()
    # both checkouts use the same weights, even if the bundled ones have changed
    models = (options.models or first / "models" / "demo").resolve()
    if options.command == "record":
        write(options.out, record(first, options, models))
        return
    found = [record(checkout, options, models) for checkout in (first, options.after.resolve())]
    sys.exit(compare(*found) > 0)


if __name__ == "__main__":
    main()
