"""Records this checkout's emulated benchmark, for comparison with another checkout's records.

    python benchmarks/record_behaviour.py --datasets gsm8k --data-dir QUESTIONS --out FILE.json ...

`compare_behaviour.py` starts the version of this file in each checkout. It runs `flowspec bench` in
this process, logs every message, and translates the samples' fields to fixed words: change the
table FIGURES when the benchmark renames a figure. The form of FILE must stay.
"""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flowspec
from benchmarks.message_text import MessageLog
from flowspec.bench import answering
from flowspec.bench.records import FILE_NAME
from flowspec.cli.main import main as run_command
from flowspec.protocol.messages import CLIENT, HEAD, Message
from flowspec.runtime.recorder import Recorder

ROOT = Path(__file__).resolve().parent.parent
CLUSTER, MODEL = "jetson-5", "vicuna-7b"
FOLDERS = {"eagle": "eagle", "eagle3": "eagle3", "draft_model": "draft"}  # below --models
KEYS = ("strategy", "drafter", "dataset", "question", "turn", "temperature")
# of a record: of a sample
FIGURES: Mapping[str, str] = {
    "tokens": "tokens",
    "text": "token_hash",
    "differs_from_target": "mismatch",
    "finish": "finish",
    "tokens_per_s": "decode_tokens_per_s",
    "end_to_end_tokens_per_s": "end_to_end_tokens_per_s",
    "first_token_s": "ttft_s",
    "inter_token_ms": "inter_token_ms",
    "tau": "tau",
    "accepted_runs": "runs",
    "rows": "rows_sent",
    "rows_pruned": "rows_pruned",
    "rows_wasted": "rows_wasted",
    "segments": "segments",
    "drafter_forwards": "draft_forwards",
    "drafter_busy": "drafter_busy",
    "stage_busy": "stage_busy",
    "stage_idle": "stage_idle",
    "tree_nodes": "tree_size",
    "link_bytes": "link_bytes",
}
LOGS: list[MessageLog] = []  # logs of the requests so far, in order


class NotingRecorder(Recorder):
    """A recorder of the simulator that also logs every message in the newest of LOGS.

    The benchmark gives each request a recorder per process, the head's first.
    """

    def __init__(self, rank: int, **options: Any) -> None:
        super().__init__(rank, **options)
        if rank == HEAD:
            LOGS.append(MessageLog())

    def sent(self, now: float, to: int, message: Message) -> None:
        """Record and log a sent message."""
        if to != CLIENT:
            LOGS[-1].add(self.rank, to, message)
        super().sent(now, to, message)


def main() -> None:
    """Run the benchmark and write the records."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--datasets", required=True)
    parser.add_argument("--strategies", required=True)
    parser.add_argument("--drafters", required=True)
    parser.add_argument("--limit", type=int, required=True)
    parser.add_argument("--max-tokens", type=int, required=True)
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if not Path(flowspec.__file__).is_relative_to(ROOT):
        sys.exit(f"error: {ROOT} was to be recorded, but {flowspec.__file__} was imported")
    answering.Recorder = NotingRecorder  # type: ignore[misc]
    with tempfile.TemporaryDirectory(prefix="flowspec-record-") as folder:
        run_bench(bench_arguments(options, Path(folder)))
        lines = (Path(folder) / FILE_NAME).read_text().splitlines()
    options.out.write_text(json.dumps(records([json.loads(line) for line in lines])))


def bench_arguments(options: argparse.Namespace, out: Path) -> list[str]:
    """Return the arguments of `flowspec bench`."""
    names = {drafter.partition("+")[0] for drafter in options.drafters.split(",")}
    folders = [f"{name}={options.models / FOLDERS[name]}" for name in sorted(names & set(FOLDERS))]
    given = {
        "--cluster": CLUSTER,
        "--emulated-model": MODEL,
        "--strategies": options.strategies,
        "--drafter": options.drafters,
        "--datasets": options.datasets,
        "--data-dir": options.data_dir,
        "--limit": options.limit,
        "--max-tokens": options.max_tokens,
        "--temperatures": "0,1",
        "--model": options.models / "target",
        "--jobs": 1,  # in this process
        "--out": out,
    }
    pairs = [(name, str(value)) for name, value in given.items() if value is not None]
    pairs += [("--draft", folder) for folder in folders]
    return ["bench", *(part for pair in pairs for part in pair)]


def run_bench(arguments: Sequence[str]) -> None:
    """Run the command; exit if it fails. A wrong text shows in its record."""
    sys.argv = ["flowspec", *arguments]
    try:
        with contextlib.redirect_stdout(sys.stderr):
            run_command()
    except SystemExit as end:
        if end.code not in (None, 0, 1):
            raise


def records(samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return a record per sample, with its messages; both lists have the order of the runs."""
    assert len(samples) == len(LOGS), f"{len(samples)} samples, {len(LOGS)} recorded requests"
    return [
        {
            **{key: sample[key] for key in KEYS},
            **{name: sample[of] for name, of in FIGURES.items()},
            "messages": dict(sorted(log.counts.items())),
            "message_order": log.digest,
        }
        for sample, log in zip(samples, LOGS, strict=True)
    ]


if __name__ == "__main__":
    main()
