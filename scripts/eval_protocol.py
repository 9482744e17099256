"""The experiments of docs/schedule.md on emulated clusters: what runs, tables and pictures.

    python scripts/eval_protocol.py EXPERIMENT --data-dir QUESTIONS [--out FOLDER] [more options]

Each is one or more runs of `flowspec bench` into a folder of its own, then `flowspec report` of
that folder. Options that are not this script's go to every run, after its own: they win.
"""

import argparse
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from flowspec.speculation.strategies import ABLATIONS, DEFAULT_STRATEGY

ROOT = Path(__file__).resolve().parent.parent
COMMON = ("--warm", "--max-tokens", "96")
HELD_OUT = "30:50"  # parameters were chosen on questions 0 to 29
SHORT = "30:34"
GREEDY = ("--temperatures", "0")
SAMPLED = ("--temperatures", "1", "--seeds", "1,2,3")
RATES = ("jetson-5-125mbit", "jetson-5-250mbit", "jetson-5-500mbit", "jetson-5")
SHARED_NOISE = "streaming-uncoupled"  # differs from streaming where something is sampled alone


def _strategies(*names: str) -> tuple[str, ...]:
    return ("--strategies", ",".join(names))


FOUR = _strategies("ar", "serial_pp", "flowspec", DEFAULT_STRATEGY)


@dataclass(frozen=True, slots=True)
class Experiment:
    """Runs of `flowspec bench` by name, each with its own options, and what is made of them."""

    about: str
    runs: Mapping[str, tuple[str, ...]]
    questions: str = HELD_OUT
    baseline: str = "ar"
    picture: str = ""  # a kind of `flowspec plot`


EXPERIMENTS: dict[str, Experiment] = {
    "table": Experiment("every strategy, temperature 0", {"table": GREEDY}),
    "table-t1": Experiment(
        "four strategies, temperature 1, seeds 1, 2 and 3",
        {"table-t1": (*SAMPLED, *FOUR)},
        questions="30:38",
    ),
    "eagle3": Experiment(
        "four strategies with the EAGLE-3 head, temperature 0",
        {"eagle3": (*GREEDY, *FOUR, "--drafter", "eagle3")},
    ),
    "everything-on": Experiment(
        "every strategy with all that it can use (--table all), temperature 0",
        {"everything-on": (*GREEDY, "--table", "all")},
        questions=SHORT,
    ),
    "hardware": Experiment(
        "four strategies with 4-bit stages, eight stages, slow links, mixed devices",
        {
            "4-bit": (*GREEDY, *FOUR, "--emulated-model", "vicuna-7b-4bit"),
            **{
                name: (*GREEDY, *FOUR, "--cluster", name)
                for name in ("jetson-9", "jetson-5-125mbit", "mixed-5")
            },
        },
        questions=SHORT,
    ),
    "bandwidth": Experiment(
        "every strategy at four link rates, temperature 0; ends with a picture",
        {name: (*GREEDY, "--cluster", name) for name in RATES},
        questions=SHORT,
        picture="bandwidth",
    ),
    "ablations": Experiment(
        "streaming, and without one of its mechanisms each; the shared noise at temperature 1",
        {
            "ablations": (
                *GREEDY,
                *_strategies(DEFAULT_STRATEGY, *(n for n in ABLATIONS if n != SHARED_NOISE)),
            ),
            "ablations-t1": (*SAMPLED, *_strategies(DEFAULT_STRATEGY, SHARED_NOISE)),
        },
        questions=SHORT,
        baseline=DEFAULT_STRATEGY,
    ),
}
COST = """\
every run: {common}
Options of `flowspec bench` given here replace these, such as `--questions 30:32`
for a short run (with an --out of its own), or add to them.
Without --data-dir the questions come from the hub: not those of the tables.

Every forward is really computed: about 1 s of processor time per turn and
strategy on the 2-core test machine, 2 s in `sum`, whose prompts are long. A full
`table` has 140 turns for each of 7 strategies: half an hour of processor time.
At temperature 1 a turn takes longer, as fewer drafts come true. What is in the
folder is not run again.
"""


def commands(name: str, folder: Path, extra: Sequence[str]) -> list[list[str]]:
    """The `flowspec` commands of an experiment, in order; those of `flowspec bench` come first."""
    one = EXPERIMENTS[name]
    found = [
        [
            "bench",
            "--questions",
            one.questions,
            *COMMON,
            *own,
            *extra,
            "--out",
            str(folder),
            "--json",
            str(folder / f"{run}.json"),
        ]
        for run, own in one.runs.items()
    ]
    report = ["report", str(folder), "--baseline", one.baseline, "--format", "markdown"]
    found.append([*report, "--out", str(folder / "report.md")])
    if one.picture:
        picture = str(folder / f"{one.picture}.png")
        found.append(["plot", one.picture, str(folder), "--out", picture])
    return found


def flowspec(words: Sequence[str]) -> int:
    """Run a command of this copy of the project; its exit code."""
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "flowspec", *words]
    return subprocess.run(command, env={**os.environ, "PYTHONPATH": paths}).returncode


def run(name: str, folder: Path, extra: Sequence[str]) -> int:
    """Exit code: 1 where a text differs from the target's own, else that of what failed, or 0."""
    folder.mkdir(parents=True, exist_ok=True)
    worst = 0
    for words in commands(name, folder, extra):
        print(f"$ flowspec {shlex.join(words)}", file=sys.stderr, flush=True)
        code = flowspec(words)
        if code and (code != 1 or words[0] != "bench"):
            return code
        worst = max(worst, code)
    print("wrote:")
    for path in sorted(folder.iterdir()):
        print(f"  {path}")
    return worst


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module."""
    names = "\n".join(
        f"  {name:14} {one.questions}  {one.about}" for name, one in EXPERIMENTS.items()
    )
    parser = argparse.ArgumentParser(
        prog="run_eval.sh",
        usage="run_eval.sh EXPERIMENT --data-dir QUESTIONS [--out FOLDER] [options of bench]",
        description=f"experiments, each on these questions of the six sets:\n{names}",
        epilog=COST.format(common=shlex.join(COMMON)),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("experiment", metavar="EXPERIMENT", choices=list(EXPERIMENTS))
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="of records and tables [out/eval/EXPERIMENT]"
    )
    options, extra = parser.parse_known_args(arguments)
    return run(options.experiment, options.out or Path("out/eval") / options.experiment, extra)


if __name__ == "__main__":
    sys.exit(main())
