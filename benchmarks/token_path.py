"""The path of one decoded token: modules and executed lines in head and stages.

    python benchmarks/token_path.py [--stages 2] [--tokens 96] [--json FILE]

Runs `flowspec run` with streaming, the EAGLE head and ZeroMQ, and records every line of the package
that any of its processes executes, with its time. A token's lines are those between two pieces of
text on standard output, once decoding is steady. Tracing slows the run, so rare work (statuses,
pings) is more frequent than usual: compare the medians over tokens; the union over all tokens shows
what the medians leave out.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flowspec"
PROBE = Path(__file__).resolve().parent / "line_probe"
WARM_UP = 8  # pieces of text to skip
FEWEST = 5  # fewest pieces for a median
TIMEOUT_S = 300.0
Line = tuple[str, int]  # file below the package, line
Ticks = Mapping[Line, Sequence[int]]  # times at which a line was executed


def pieces(command: Sequence[str], environment: Mapping[str, str]) -> list[int]:
    """Run the command; return the time of each piece of its output, in ticks."""
    came = []
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        limit = threading.Timer(TIMEOUT_S, process.terminate)
        limit.start()
        while os.read(process.stdout.fileno(), 65536):
            came.append(tick())
        limit.cancel()
    if process.returncode:
        raise SystemExit(
            f"error: {' '.join(command)} ended with code {process.returncode}; it may take "
            f"{TIMEOUT_S:.0f} s"
        )
    return came


def tick() -> int:
    """Return the current time as the probe counts it."""
    return time.monotonic_ns() // 1_000_000


def read(folder: Path) -> dict[str, Ticks]:
    """Return, by process (its command, or its stage), the executed lines with their times."""
    found: dict[str, Ticks] = {}
    for file in folder.glob("*.json"):
        data = json.loads(file.read_text())
        name = data["arguments"][1]
        if name == "stage":
            name = Path(data["arguments"][2]).stem  # its configuration file, such as stage_1.json
        name = name if name not in found else f"{name} ({file.stem})"
        found[name] = {
            (path, line): ticks for path, lines in data["lines"].items() for line, ticks in lines
        }
    return dict(sorted(found.items()))


def between(ticks: Ticks, start: int, end: int) -> set[Line]:
    """Return the lines executed from `start` until `end`."""
    return {line for line, when in ticks.items() if any(start <= t <= end for t in when)}


def describe(lines: Iterable[Line]) -> dict[str, int]:
    """Return the numbers of modules, of executed lines, and of lines in these modules."""
    executed = set(lines)
    modules = {path for path, _ in executed}
    total = sum(len((PACKAGE / path).read_text().splitlines()) for path in modules)
    return {"modules": len(modules), "executed": len(executed), "module_lines": total}


def medians(windows: Sequence[set[Line]]) -> dict[str, int]:
    """Return the median of each figure over the tokens."""
    found = [describe(window) for window in windows]
    return {name: int(statistics.median(one[name] for one in found)) for name in found[0]}


def measure(stages: int, tokens: int) -> dict[str, list[set[Line]]]:
    """Return, by process and for all, the lines of each piece of text in steady decoding."""
    with tempfile.TemporaryDirectory(prefix="flowspec-path-") as name:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(PROBE), str(ROOT))),
            "LINE_PROBE_PACKAGE": str(PACKAGE),
            "LINE_PROBE_OUT": name,
            "OMP_NUM_THREADS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        command = [
            *(sys.executable, "-m", "flowspec", "run", "--strategy", "streaming"),
            *("--drafter", "eagle", "--transport", "zmq", "--no-check"),
            *("--stages", str(stages), "--max-tokens", str(tokens)),
        ]
        came = pieces(command, environment)
        processes = read(Path(name))
    steady = came[WARM_UP:-2]  # the last pieces are the end of the text and the summary
    if len(steady) < FEWEST:
        raise SystemExit(f"error: {len(came)} pieces of text came, too few; give more --tokens")
    windows = list(zip(steady, steady[1:], strict=False))
    found = {
        process: [between(ticks, start, end) for start, end in windows]
        for process, ticks in processes.items()
    }
    found["all"] = [set().union(*sets) for sets in zip(*found.values(), strict=True)]
    return found


def main() -> None:
    """Run, and print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = measure(options.stages, options.tokens)
    rows = {
        process: {"piece": medians(sets), "union": describe(set().union(*sets))}
        for process, sets in found.items()
    }
    print(f"{len(found['all'])} pieces of text; first a piece (median), then all of them together")
    print("process     modules  executed  of lines   modules  executed  of lines")
    for process, row in rows.items():
        figures = [*row["piece"].values(), *row["union"].values()]
        print(f"{process:<10}" + "".join(f"{figure:>10}" for figure in figures))
    executed = Counter(path for path, _ in set().union(*found["all"]))
    pieces_of = Counter(path for lines in found["all"] for path in {path for path, _ in lines})
    for path, count in sorted(executed.items()):
        print(f"  {path}: {count} lines, in {pieces_of[path]} of {len(found['all'])} pieces")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
