"""Coverage-guided fuzzing (atheris, libFuzzer) of all code that reads foreign bytes.

    python -m tests.stress.fuzz [wire|manifest|config|model|eagle|tensors|all] [--seconds 60]
        [--seed 1]
    python -m tests.stress.fuzz wire --replay out/fuzz/wire-crash-...

Each target runs in its own process, from seeds made here. An input that breaks the target's
contract (tests/stress/fuzz_targets.py), or takes over 10 s or over 4 GiB, ends the run: it is kept
in --out, and the exit code is 1.
"""

import argparse
import importlib
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

NAMES = ("wire", "manifest", "config", "model", "eagle", "tensors")
INPUT_TIMEOUT_S = 10
MEMORY_MB = 4096
START_S = 300  # importing torch on a busy machine, and making the seeds
MIN_LENGTH = 4096


def fuzz(options: argparse.Namespace) -> int:
    """Fuzz the given targets in turn; return 1 if any failed."""
    if importlib.util.find_spec("atheris") is None:
        print(
            "error: fuzzing needs atheris, which is not installed; on Linux x86_64: "
            "pip install 'flowspec[fuzz]'",
            file=sys.stderr,
        )
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    names = NAMES if options.target == "all" else (options.target,)
    return max([_fuzz_one(name, options) for name in names])


def _fuzz_one(name: str, options: argparse.Namespace) -> int:
    command = [
        *(sys.executable, "-m", "tests.stress.fuzz", name),
        *("--inside", "--out", str(options.out)),
    ]
    command += ["--seconds", str(options.seconds), "--runs", str(options.runs)]
    command += ["--seed", str(options.seed)]
    limit = options.seconds + INPUT_TIMEOUT_S + START_S
    with tempfile.TemporaryDirectory(prefix="flowspec-fuzz-") as scratch:
        # libFuzzer ends its process without cleaning up, so its files go there
        environment = {**os.environ, "TMPDIR": scratch}
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit,
                env=environment,
            )
        except subprocess.TimeoutExpired:
            print(f"{name}: FAILED, did not end within {limit} s")
            return 1
    runs = re.findall(r"stat::number_of_executed_units:\s*(\d+)", done.stderr)
    coverage = re.findall(r"cov: (\d+)", done.stderr)
    if done.returncode == 0 and runs and coverage:
        print(f"{name}: {runs[-1]} inputs, {coverage[-1]} branches reached, no failure", flush=True)
        return 0
    print(f"{name}: FAILED\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}", flush=True)
    return 1


def _fuzz_inside(name: str, options: argparse.Namespace) -> None:
    """Run the fuzzed process, which ends inside libFuzzer."""
    import atheris

    with atheris.instrument_imports(include=["flowspec", "yaml"]):
        target = importlib.import_module("tests.stress.fuzz_targets").TARGETS[name]
    with tempfile.TemporaryDirectory(prefix="flowspec-corpus-") as corpus:
        seeds = target.seeds()
        for number, seed in enumerate(seeds):
            (Path(corpus) / f"{number:04}").write_bytes(seed)
        words = {word for seed in seeds for word in re.findall(rb'["\w]{3,32}', seed)}
        words_file = Path(corpus) / ".words"
        lines = ['"' + "".join(f"\\x{byte:02x}" for byte in word) + '"' for word in sorted(words)]
        words_file.write_text("\n".join(lines) + "\n")
        flags = [
            f"-max_total_time={options.seconds}",
            f"-runs={options.runs}",
            f"-seed={options.seed}",
            f"-max_len={max(MIN_LENGTH, *map(len, seeds))}",
            f"-timeout={INPUT_TIMEOUT_S}",
            f"-rss_limit_mb={MEMORY_MB}",
            f"-artifact_prefix={options.out}/{name}-",
            f"-dict={words_file}",
            "-print_final_stats=1",
        ]
        atheris.Setup([sys.argv[0], *flags, corpus], target.run)
        atheris.Fuzz()


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("target", nargs="?", choices=(*NAMES, "all"), default="all")
    parser.add_argument("--seconds", type=int, default=60, help="per target [60]")
    parser.add_argument("--runs", type=int, default=-1, help="inputs per target [no limit]")
    parser.add_argument("--seed", type=int, default=1, help="of the mutations [1]")
    parser.add_argument("--out", type=Path, default=Path("out/fuzz"), help="[out/fuzz]")
    parser.add_argument("--replay", type=Path, help="run the target on this one file")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    """Fuzz as the options say; return 0 if no contract was broken."""
    options = _options()
    if options.replay:
        importlib.import_module("tests.stress.fuzz_targets").TARGETS[options.target].run(
            options.replay.read_bytes()
        )
        print(f"{options.replay}: the contract holds")
        return 0
    if options.inside:
        _fuzz_inside(options.target, options)
    return fuzz(options)


if __name__ == "__main__":
    sys.exit(main())
