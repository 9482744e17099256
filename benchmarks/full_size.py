"""Tests a model of full size on this machine: creates, splits, runs and measures it.

    python -m benchmarks.full_size --folder /somewhere/with/room [--layers-total 32] [--stages 4]

Writes a Llama checkpoint with the shapes of a 7B model and random bf16 weights (13.5 GB), splits it
with `flowspec split`, starts head and stages as `flowspec run` does and generates a few tokens with
strategy `ar`. Prints the time of each step and the memory of each process: its peak, its own
(anonymous) memory, and the pages of the weight files, which the system may take back and which the
processes of one machine share. Then the target alone generates the same tokens from the same files,
for comparison. Needs twice the model's size on disk for a while; all files are removed at the end
unless --keep is given. Linux only.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import torch

from flowspec.config import DeviceConfig, EngineConfig, NumericsConfig
from flowspec.engine.build import load_head_parts
from flowspec.engine.engine import generate
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.model.architecture import ModelConfig
from flowspec.request import Request, RequestOutput
from flowspec.weights.checkpoint import part_shapes
from flowspec.weights.formats.hugging_face import TOKENIZER_FILES
from flowspec.weights.load import load_whole
from flowspec.weights.tensor_files import header_bytes

ROOT = Path(__file__).resolve().parent.parent
TOKENIZER = ROOT / "models" / "demo" / "target"  # any will do: the answers have no meaning
SHARD_BYTES = 2 << 30
CHUNK = 1 << 22  # weights written at a time
HF_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32000,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}
Shapes = dict[str, tuple[int, ...]]


def make_checkpoint(folder: Path, num_layers: int) -> int:
    """Write the checkpoint shard by shard with little memory; return its bytes."""
    folder.mkdir(parents=True)
    hf = {**HF_CONFIG, "num_hidden_layers": num_layers}
    (folder / "config.json").write_text(json.dumps(hf))
    for name in TOKENIZER_FILES:
        if name != "generation_config.json" and (TOKENIZER / name).exists():
            shutil.copy(TOKENIZER / name, folder / name)
    shapes = part_shapes(ModelConfig.from_hf(hf), first_layer=0, last_layer=num_layers)
    shards = list(cut_in_shards(shapes))
    weight_map, total = {}, 0
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        total += write_shard(folder / name, shard)
        weight_map.update(dict.fromkeys(shard, name))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return total


def cut_in_shards(shapes: Shapes) -> Iterator[Shapes]:
    """Group tensors into shards of about SHARD_BYTES."""
    shard: Shapes = {}
    size = 0
    for name, shape in shapes.items():
        shard[name] = shape
        size += 2 * torch.Size(shape).numel()
        if size >= SHARD_BYTES:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def write_shard(path: Path, shapes: Shapes) -> int:
    """Write random bf16 weights at a scale that keeps activations alive; return the bytes written.

    Every tensor repeats a few million values that were drawn once, from its own offset, because
    drawing billions takes longer than everything else.
    """
    noise = torch.randn(2 * CHUNK, generator=torch.Generator().manual_seed(0))
    random = Random(path.name)
    with path.open("wb") as file:
        file.write(header_bytes({name: ("bfloat16", shape) for name, shape in shapes.items()}))
        for name, shape in shapes.items():
            scale = 1.0 if "embed" in name else shape[-1] ** -0.5
            values = torch.ones(CHUNK) if len(shape) == 1 else noise * scale  # norms are ones
            raw, left = values.bfloat16(), torch.Size(shape).numel()
            while left:
                count = min(left, CHUNK)
                start = random.randint(0, len(raw) - count)
                file.write(raw[start : start + count].view(torch.uint8).numpy().data)
                left -= count
        return file.tell()


def memory(pid: int | str) -> dict[str, int]:
    """Return bytes by name from /proc: VmHWM (peak), RssAnon, RssFile."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    return {key: int(values[key].split()[0]) << 10 for key in ("VmHWM", "RssAnon", "RssFile")}


def show_memory(name: str, figures: dict[str, int]) -> None:
    """Print one line of the report."""
    peak, own, mapped = (figures[key] / 1e9 for key in ("VmHWM", "RssAnon", "RssFile"))
    print(f"  {name:8} peak {peak:6.2f} GB   own {own:5.2f} GB   files {mapped:6.2f} GB")


@contextmanager
def timed(step: str) -> Iterator[None]:
    """Print how long a step took."""
    start = time.perf_counter()
    yield
    print(f"{step:24} {time.perf_counter() - start:7.1f} s", flush=True)


def split(source: Path, out: Path, stages: int) -> dict[str, int]:
    """Run `flowspec split` as a process; return its last known memory."""
    command = [sys.executable, "-m", "flowspec", "split", str(source), "--stages", str(stages)]
    child = subprocess.Popen([*command, "--out", str(out)], cwd=ROOT, stdout=subprocess.DEVNULL)
    seen: dict[str, int] = {}
    while child.poll() is None:
        try:
            seen = memory(child.pid)
        except (FileNotFoundError, KeyError):  # the process has just ended
            break
        time.sleep(0.1)
    if child.wait(timeout=60):
        raise SystemExit(f"flowspec split ended with exit code {child.returncode}")
    return seen


def run(config: EngineConfig, out: Path, request: Request) -> RequestOutput:
    """Start the processes, answer `request`, report."""
    Path("/proc/self/clear_refs").write_text("5")  # the head's peak, not this script's so far
    start = time.perf_counter()
    parts = load_head_parts(config, out)
    with LocalEngine(config, parts) as cluster:
        print(f"{'start, verify and load':24} {time.perf_counter() - start:7.1f} s", flush=True)
        start = time.perf_counter()
        completion = generate(cluster, request)
        seconds = time.perf_counter() - start
        print(f"{'generate':24} {seconds:7.1f} s for {len(completion.tokens)} tokens")
        show_memory("head", memory("self"))
        for rank, child in cluster.children.items():
            show_memory(f"stage {rank}", memory(child.pid))
    if completion.error:
        raise SystemExit(str(completion.error))
    return completion


def main() -> None:
    """Parse the command line and run the steps."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="working folder; may be new")
    parser.add_argument("--layers-total", type=int, default=32, help="fewer for a quick try [32]")
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=4, help="tokens to generate [4]")
    parser.add_argument("--prompt-tokens", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2, help="threads per process [2]")
    parser.add_argument("--keep", action="store_true", help="keep checkpoint and split")
    options = parser.parse_args()
    source, out = options.folder / "checkpoint", options.folder / "split"
    if source.exists() or out.exists():
        raise SystemExit(f"{options.folder} has a checkpoint or split already; give another folder")
    torch.set_num_threads(options.threads)
    config = EngineConfig(
        model=str(out),
        strategy="ar",
        drafter="none",
        numerics=NumericsConfig(dtype="bfloat16"),
        stages=options.stages,
        local=DeviceConfig(threads=options.threads),
        timeout_s=600.0,
    )
    prompt = tuple(range(100, 100 + options.prompt_tokens))
    request = Request(id=1, prompt=prompt, max_new_tokens=options.tokens)
    try:
        with timed("make the checkpoint"):
            total = make_checkpoint(source, options.layers_total)
        print(f"{options.layers_total} layers, {total / 1e9:.2f} GB")
        with timed("split"):
            splitting = split(source, out, options.stages)
        show_memory("split", splitting)
        if not options.keep:
            shutil.rmtree(source)
        completion = run(config, out, request)
        with timed("the target alone"):
            alone = LocalTarget(load_whole(out, verify=False), 4096).generate(request)[0]
        same = list(completion.tokens) == alone
        print(
            f"tokens {list(completion.tokens)}, the target alone: {'the same' if same else alone}"
        )
    finally:
        if not options.keep:
            for folder in (source, out):
                shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
