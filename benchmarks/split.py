"""Measures the splitter: its peak memory, and its speed compared with a plain copy of the files.

    python -m benchmarks.split --gigabytes 3.2 --stages 4 --folder /somewhere/with/room

It writes a Llama checkpoint of random bytes in two shards, then copies and splits it in turns, each
in its own process, and prints the medians. Nothing is left behind.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

from flowspec.model.architecture import ModelConfig
from flowspec.weights import tensor_files
from flowspec.weights.checkpoint import open_checkpoint, part_shapes
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import even_layers, plan_split

HIDDEN = 2048
MODES = ("copy", "split", "split without hashing")


class NoHash:
    """Replaces hashlib.sha256 when hashing is excluded from the measurement."""

    def update(self, piece: bytes) -> None:
        """Do nothing."""

    def hexdigest(self) -> str:
        """Return a well-formed hash of nothing."""
        return "0" * 64


def make_checkpoint(folder: Path, gigabytes: float) -> None:
    """Write a bf16 Llama of about this size in two shards; its values are random bytes."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": 4 * HIDDEN,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": 32000,
        "torch_dtype": "bfloat16",
    }
    layer_bytes = 2 * (4 * HIDDEN**2 + 3 * HIDDEN * 4 * HIDDEN)
    config["num_hidden_layers"] = max(4, round(gigabytes * 1e9 / layer_bytes))
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig.from_hf(config)
    names = list(part_shapes(model, first_layer=0, last_layer=model.num_layers).items())
    half = len(names) // 2
    weight_map = {}
    for number, part in enumerate((names[:half], names[half:]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        weight_map.update({name: shard for name, _ in part})
        write_shard(folder / shard, dict(part))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write one safetensors file of random bytes."""
    noise = os.urandom(1 << 20)
    with path.open("wb") as file:
        file.write(tensor_files.header_bytes({n: ("bfloat16", s) for n, s in shapes.items()}))
        for shape in shapes.values():
            left = 2
            for size in shape:
                left *= size
            while left:
                left -= file.write(noise[: min(left, len(noise))])


def measure(mode: str, source: Path, out: Path, stages: int) -> dict[str, float]:
    """Run one mode in this process; return seconds, bytes written, peak resident bytes."""
    if mode == "split without hashing":
        tensor_files.hashlib = SimpleNamespace(sha256=NoHash)  # type: ignore[assignment]
    start = time.perf_counter()
    if mode == "copy":
        out.mkdir()
        for path in source.iterdir():
            shutil.copyfile(path, out / path.name)
    else:
        checkpoint = open_checkpoint(source)
        plan = plan_split(checkpoint, layers=even_layers(checkpoint.config.num_layers, stages))
        run_split(plan, out, model_id="bench")
    seconds = time.perf_counter() - start
    written = [path.stat().st_size for path in out.rglob("*") if path.is_file()]
    return {
        "seconds": seconds,
        "bytes": sum(written),
        "largest_bytes": max(written),
        "peak_bytes": peak_resident_bytes(),
    }


def peak_resident_bytes() -> int:
    """Return VmHWM of this process (getrusage would count the parent's before exec)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("this system does not report VmHWM; run on Linux")


def run_child(mode: str, source: Path, out: Path, stages: int) -> dict[str, float]:
    """Measure once in a new process, after earlier writes have reached the disk."""
    os.sync()
    command = [sys.executable, "-m", "benchmarks.split", "--child", mode, str(source), str(out)]
    done = subprocess.run(
        [*command, "--stages", str(stages)], check=True, capture_output=True, text=True
    )
    shutil.rmtree(out)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=3.2)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: the temp folder")
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        mode, source, out = options.child
        print(json.dumps(measure(mode, Path(source), Path(out), options.stages)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        source = Path(name) / "checkpoint"
        source.mkdir()
        make_checkpoint(source, options.gigabytes)
        runs: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
        for _ in range(options.repeat):
            for mode in MODES:
                runs[mode].append(run_child(mode, source, Path(name) / "out", options.stages))
    copy = statistics.median(run["bytes"] / run["seconds"] for run in runs["copy"])
    for mode, results in runs.items():
        speed = statistics.median(run["bytes"] / run["seconds"] for run in results)
        peak = max(run["peak_bytes"] for run in results)
        size, largest = results[0]["bytes"], results[0]["largest_bytes"]
        print(
            f"{mode:22} {speed / 1e6:7.0f} MB/s ({speed / copy:4.0%} of copy)  "
            f"{size / 1e9:.2f} GB written, largest file {largest / 1e6:.0f} MB, "
            f"peak RSS {peak / 1e6:.0f} MB"
        )


if __name__ == "__main__":
    main()
