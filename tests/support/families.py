"""Tiny random HF checkpoints of every supported family, made with transformers, for any test.

`save(...)` writes one to a folder. `FAMILIES` lists the differences between the families, `MATRIX`
every family with every kind of RoPE, with and without a sliding window.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from tests.support.vocabularies import byte_level

NUM_LAYERS = 4
VOCAB = 61
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    # Short enough for the 4 frequencies of a tiny head to fall into all three bands.
    "original_max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama2": {"num_key_value_heads": 4},
    "vicuna": {"num_key_value_heads": 4, "rms_norm_eps": 1e-5},
    "llama3": {"rope_parameters": _LLAMA3_ROPE},
    "head_dim": {"head_dim": 12},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "tied": {"tie_word_embeddings": True},
    "qwen2": {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
    "qwen2_tied": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": None, "head_dim": 12},
    "qwen3": {"head_dim": 12},
    "qwen3_biases": {"head_dim": 8, "attention_bias": True, "tie_word_embeddings": True},
}
_MAKERS: dict[str, tuple[Any, Any]] = {
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
WINDOW = 24
_WINDOWS: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": WINDOW},
    "qwen2": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 3},
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "llama3": _LLAMA3_ROPE,
    "yarn": _YARN,
    "yarn_all": {
        **_YARN,
        "beta_fast": 9.0,
        "beta_slow": 0.5,
        "mscale": 2.0,
        "mscale_all_dim": 0.5,
        "truncate": False,
    },
    "yarn_factor": {**_YARN, "attention_factor": 0.7, "rope_theta": 500.0},
}
MATRIX = [
    *(f"llama2-{rope}" for rope in ROPES),
    *(f"{family}-{rope}" for family in ("mistral", "qwen3") for rope in ("linear", "yarn")),
    *(f"{f}-{r}-window" for f in _WINDOWS for r in ("default", "linear", "llama3", "yarn")),
]


def make(family: str, *, seed: int = 0) -> PreTrainedModel:
    """Return a random model in fp32, with biases and norms that are not trivial.

    `family` is one of FAMILIES, or as in MATRIX: family-rope or family-rope-window.
    """
    torch.manual_seed(seed)
    name, rope, window = (*family.split("-"), "", "")[:3]
    changes = {**_SIZES, **FAMILIES[name]}
    changes |= {"rope_parameters": {"rope_theta": 10000.0, **ROPES[rope]}} if rope else {}
    changes |= _WINDOWS[name] if window else {}
    own_config, own_model = _MAKERS.get(name.split("_")[0], (LlamaConfig, LlamaForCausalLM))
    model: PreTrainedModel = own_model(own_config(**changes))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            around = 1.0 if name.endswith("norm.weight") else 0.0
            weight.copy_(around + 0.15 * torch.randn_like(weight))
    return model.eval()


def save(
    folder: Path,
    family: str = "llama3",
    *,
    form: str = "single",
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> PreTrainedModel:
    """Write a checkpoint to `folder`; `form` is single, sharded, bin or bin_sharded.

    Returns the model, for reference.
    """
    model = make(family, seed=seed).to(dtype)
    folder.mkdir(parents=True, exist_ok=True)
    size = "20KB" if "sharded" in form else "1GB"
    model.save_pretrained(folder, max_shard_size=size)
    if form.startswith("bin"):
        _turn_to_bin(folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 5]}))
    byte_level().save(str(folder / "tokenizer.json"))
    return model


def old_style(folder: Path) -> None:
    """Rewrite config.json the way transformers 4 wrote it."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    rope = content.pop("rope_parameters")
    content["rope_theta"] = rope.pop("rope_theta")
    kind = rope.pop("rope_type")
    content["rope_scaling"] = {"type": kind, **rope} if kind != "default" else None
    content["torch_dtype"] = content.pop("dtype")
    content.pop("layer_types", None)
    path.write_text(json.dumps(content))


def _turn_to_bin(folder: Path) -> None:
    for path in folder.glob("*.safetensors"):
        name = path.name.replace("model", "pytorch_model", 1).replace(".safetensors", ".bin")
        torch.save(load_file(path), folder / name)
        path.unlink()
    index = folder / "model.safetensors.index.json"
    if index.exists():
        text = index.read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(text)
        index.unlink()


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace (or with None remove) tensors of a one-file checkpoint; `__` stands for a dot."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for key, value in changes.items():
        name = key.replace("__", ".")
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value
    save_file(tensors, path)
