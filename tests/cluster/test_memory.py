"""What loading costs in memory: mapped pages of the file, and no copy where nothing has to change.

Each measurement is a process of its own: what another test left allocated would hide a copy.
"""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from flowspec.model.architecture import ModelConfig
from flowspec.weights.checkpoint import open_checkpoint, part_shapes
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from flowspec.weights.tensor_files import header_bytes

pytestmark = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="needs Linux with /proc/self/clear_refs"
)
HF = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 5,
    "num_attention_heads": 8,
    "torch_dtype": "bfloat16",
}
MIB = 1 << 20
_CHILD = """
import json, sys
from pathlib import Path
from flowspec.weights.load import load_stage

def figures():
    lines = Path("/proc/self/status").read_text().splitlines()
    values = dict(line.split(":") for line in lines)
    return {key: int(values[key].split()[0]) << 10 for key in ("RssAnon", "VmHWM", "VmRSS")}

Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
before = figures()
model = load_stage(sys.argv[1], 1, dtype=sys.argv[2])
after = figures()
touched = sum(float(weight.sum()) for weight in model.parameters())
print(json.dumps({
    "anonymous": after["RssAnon"] - before["RssAnon"],
    "peak": after["VmHWM"] - before["VmRSS"],
    "anonymous_used": figures()["RssAnon"] - before["RssAnon"],
    "compiler": "sympy" in sys.modules,
}))
"""


@pytest.fixture(scope="module")
def split(tmp_path_factory) -> Path:
    """A split bf16 model of zeros; stage 1 has four of the five layers."""
    folder = tmp_path_factory.mktemp("memory")
    (folder / "hf").mkdir()
    (folder / "hf" / "config.json").write_text(json.dumps(HF))
    shapes = part_shapes(ModelConfig.from_hf(HF), first_layer=0, last_layer=5)
    header = header_bytes({name: ("bfloat16", shape) for name, shape in shapes.items()})
    with (folder / "hf" / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + 2 * sum(math.prod(shape) for shape in shapes.values()))
    plan = plan_split(open_checkpoint(folder / "hf"), layers=(4, 1))
    run_split(plan, folder / "out", model_id="zeros")
    return folder / "out"


def measure(split: Path, dtype: str) -> tuple[int, dict[str, int]]:
    """Bytes of stage 1 as stored, and what loading it in `dtype` did to a fresh process."""
    command = [sys.executable, "-c", _CHILD, str(split), dtype]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=120)
    stored = (split / "stage_1" / "model.safetensors").stat().st_size
    assert stored > 100 * MIB
    return stored, json.loads(done.stdout)


def test_a_stage_in_its_stored_dtype_is_mapped_not_copied(split):
    stored, found = measure(split, "bfloat16")
    assert found["anonymous"] < stored / 8
    assert found["anonymous_used"] < stored / 8, "using the weights must not copy them either"
    assert found["peak"] < stored / 8, "verification reads the file in small pieces"
    assert not found["compiler"], "building the empty modules imported torch's compiler"


def test_a_stage_in_another_dtype_is_held_once(split):
    """It must be converted; the pages it was read from go on the way."""
    stored, found = measure(split, "float32")
    assert found["anonymous"] > 1.9 * stored, "the measurement sees copies"
    assert found["peak"] < 2 * stored + 72 * MIB
