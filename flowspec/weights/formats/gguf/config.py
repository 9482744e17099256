"""Turns the metadata of a GGUF file into the keys of a Hugging Face `config.json`."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from flowspec.model.architecture import warn_once
from flowspec.weights.formats.gguf.header import Header, TensorPlace

ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
ROPE_FACTORS = "rope_freqs.weight"
_KEYS = """
vocab_size context_length embedding_length block_count feed_forward_length attention.head_count
attention.causal attention.head_count_kv attention.key_length attention.value_length
attention.sliding_window attention.layer_norm_rms_epsilon rope.dimension_count
rope.freq_base rope.scale_linear
rope.scaling.type rope.scaling.factor rope.scaling.original_context_length rope.scaling.attn_factor
rope.scaling.yarn_attn_factor rope.scaling.yarn_beta_fast rope.scaling.yarn_beta_slow
rope.scaling.yarn_ext_factor
"""
_KEYS_IDLE = "rope.scaling.finetuned tensor_data_layout"
_KNOWN_KEYS = frozenset((_KEYS + _KEYS_IDLE).split())
# A key with one of these words changes the forward pass, unless its value is neutral.
_FEATURE_WORDS = (
    *("expert", "softcap", "scale", "clamp", "alibi", "parallel_residual", "rope.", "nextn"),
    *("_swa", "shared_kv", "temperature", "lora_rank", "norm_epsilon", "swin_norm", "altup"),
)
# Tokens that end an answer besides those that the metadata names, where they are control tokens.
_END_TEXTS = ("<|eot_id|>", "<|im_end|>", "<|eom_id|>", "<|endoftext|>", "<|end_of_text|>")
_END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
CONTROL = 3  # of tokenizer.ggml.token_type


def architecture_of(header: Header) -> str:
    """Return the file's architecture by llama.cpp's name. Raises ValueError if not supported."""
    name = header.text("general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(
            f"{header.path}: the architecture {name!r} is not supported: "
            f"{', '.join(ARCHITECTURES)} (and Mistral as 'llama'); use a model of one of these"
        )
    return name


def read_hf_config(header: Header, tensors: Mapping[str, TensorPlace]) -> dict[str, Any]:
    """Return the config of a model with these tensors. Raises ValueError naming the key."""
    arch = architecture_of(header)
    _check_keys(header, arch)
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{header.path} has no matrix token_embd.weight; fetch the file again")
    hidden = _needed(header, f"{arch}.embedding_length", most=1 << 20)
    heads = _needed(header, f"{arch}.attention.head_count", most=1 << 16)
    context = _needed(header, f"{arch}.context_length")
    head_dim = _head_dim(header, arch, hidden, heads)
    blocks = _needed(header, f"{arch}.block_count", most=10_000)
    if (last := f"blk.{blocks - 1}.attn_norm.weight") not in tensors:
        raise ValueError(
            f"{header.path}: {arch}.block_count is {blocks}, but there is no {last}; fetch it again"
        )
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURES[arch]],
        "model_type": arch,
        "hidden_act": "silu",
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden,
        "intermediate_size": _needed(header, f"{arch}.feed_forward_length", most=1 << 24),
        "num_hidden_layers": blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": header.whole(f"{arch}.attention.head_count_kv", least=1) or heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": _as_written(header, f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(header, arch, tensors.get(ROPE_FACTORS), head_dim // 2),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_down.bias" in tensors,
        "bos_token_id": header.whole("tokenizer.ggml.bos_token_id"),
        "eos_token_id": end_tokens(header),
        "torch_dtype": "float32",
    }
    if config["rms_norm_eps"] is None:
        raise ValueError(f"{header.path} lacks {arch}.attention.layer_norm_rms_epsilon")
    window = header.whole(f"{arch}.attention.sliding_window") or 0
    if 0 < window < context:
        if arch != "llama":
            raise ValueError(
                f"{header.path}: {arch}.attention.sliding_window is {window}, and the file does "
                "not say which layers have it; use the Hugging Face checkpoint of this model"
            )
        config |= {"architectures": ["MistralForCausalLM"], "sliding_window": window}
    return config


def end_tokens(header: Header) -> list[int]:
    """Return the ids of all tokens that end an answer, as llama.cpp collects them."""
    named = [header.whole(f"tokenizer.ggml.{key}") for key in _END_KEYS]
    found = dict.fromkeys(token for token in named if token is not None)
    kinds = header.numbers("tokenizer.ggml.token_type")
    for token, text in enumerate(header.texts("tokenizer.ggml.tokens")[: len(kinds)]):
        if text in _END_TEXTS and kinds[token] == CONTROL:
            found.setdefault(token)
    return list(found)


def _check_keys(header: Header, arch: str) -> None:
    """Refuse keys that change the forward pass and are not built; warn of unknown ones."""
    if header.flag(f"{arch}.attention.causal") is False:
        raise ValueError(f"{header.path} is no language model: {arch}.attention.causal is false")
    unknown = []
    for key in sorted(header.keys):
        own = key.removeprefix(f"{arch}.")
        if own == key or own in _KNOWN_KEYS:
            continue
        if not any(word in own for word in _FEATURE_WORDS):
            unknown.append(key)
        elif header.is_set(key) and not ("scale" in own and header.number(key) == 1):
            raise ValueError(
                f"{header.path}: {key} is set, which changes what the model computes and is not "
                f"supported; use a checkpoint of a plain {' or '.join(ARCHITECTURES)}"
            )
    if unknown:
        warn_once(
            f"{header.path}: nothing is known of {', '.join(unknown)}; the model runs as if they "
            "were not there"
        )


def _needed(header: Header, key: str, *, most: int = (1 << 31) - 1) -> int:
    value = header.whole(key, least=1, most=most)
    if value is None:
        raise ValueError(f"{header.path} lacks the key {key}; convert it again with llama.cpp")
    return value


def _head_dim(header: Header, arch: str, hidden: int, heads: int) -> int:
    """Return the size of a head, which keys, values and RoPE must agree on."""
    stated = header.whole(f"{arch}.attention.key_length", least=1, most=1 << 16)
    if stated is None and hidden % heads:
        raise ValueError(
            f"{header.path}: {arch}.embedding_length {hidden} is no multiple of the {heads} heads "
            f"and there is no {arch}.attention.key_length; convert it again with llama.cpp"
        )
    size = stated or hidden // heads
    for key in ("attention.value_length", "rope.dimension_count"):
        other = header.whole(f"{arch}.{key}", least=1)
        if other not in (None, size):
            raise ValueError(
                f"{header.path}: {arch}.{key} is {other}, heads have {size}; only equal ones are "
                "supported"
            )
    return size


def _as_written(header: Header, key: str) -> float | None:
    """Return a number that was stored as float32 as its author wrote it: 1e-05, not 9.99e-06."""
    value = header.number(key)
    if value is None or abs(value) > float(np.finfo(np.float32).max):
        return value
    return float(str(np.float32(value)))


def _rope(
    header: Header, arch: str, place: TensorPlace | None, num_frequencies: int
) -> dict[str, Any]:
    """Return the block `rope_parameters`."""
    prefix = f"{arch}.rope.scaling"
    kind = header.text(f"{prefix}.type") or "none"
    factor = _as_written(header, f"{prefix}.factor")
    if factor is None and (factor := _as_written(header, f"{arch}.rope.scale_linear")) is not None:
        kind = "linear"
    rope: dict[str, Any] = {"rope_theta": _as_written(header, f"{arch}.rope.freq_base") or 10000.0}
    factors = _factors(place, num_frequencies) if place is not None else []
    if kind == "none" or factor in (None, 0, 1):
        own = {"rope_type": "factors", "factors": factors} if set(factors) - {1.0} else {}
        return {**rope, **(own or {"rope_type": "default"})}
    if kind not in ("linear", "yarn") or factors:
        what = f"with {ROPE_FACTORS} " if factors else ""
        raise ValueError(
            f"{header.path}: {prefix}.type {kind!r} {what}is not supported, only none, linear and "
            f"yarn, or {ROPE_FACTORS} alone; use another checkpoint"
        )
    rope |= {"rope_type": kind, "factor": factor}
    return rope if kind == "linear" else {**rope, **_yarn(header, prefix, float(factor or 1.0))}


def _yarn(header: Header, prefix: str, factor: float) -> dict[str, Any]:
    """Return yarn's own parameters, those that differ from its defaults."""
    if header.number(f"{prefix}.yarn_ext_factor") not in (None, -1, 1):
        raise ValueError(f"{header.path}: {prefix}.yarn_ext_factor is not supported, only 1")
    found: dict[str, Any] = {
        "original_max_position_embeddings": header.whole(
            f"{prefix}.original_context_length", least=1
        ),
        "beta_fast": _as_written(header, f"{prefix}.yarn_beta_fast"),
        "beta_slow": _as_written(header, f"{prefix}.yarn_beta_slow"),
    }
    for key in ("attn_factor", "yarn_attn_factor"):
        weight = _as_written(header, f"{prefix}.{key}")
        if weight not in (None, 1):  # of the factor that yarn has anyway
            assert weight is not None
            found["attention_factor"] = weight * (1.0 + 0.1 * math.log(max(factor, 1.0)))
    return {key: value for key, value in found.items() if value is not None}


def _factors(place: TensorPlace, num_frequencies: int) -> list[float]:
    """Return the divisors of the base frequencies; raises ValueError unless one for each."""
    if place.kind != "F32" or place.shape != (num_frequencies,):
        raise ValueError(
            f"{place.file}: {ROPE_FACTORS} is {list(place.shape)} of {place.kind}, needed: "
            f"[{num_frequencies}] of F32; fetch the file again"
        )
    with place.file.open("rb") as file:
        file.seek(place.offset)
        raw = file.read(place.num_bytes)
    factors = np.frombuffer(raw, "<f4")
    if len(factors) != num_frequencies or not all(math.isfinite(x) and x > 0 for x in factors):
        raise ValueError(f"{place.file}: {ROPE_FACTORS} holds numbers that are not above 0")
    return [float(str(x)) for x in factors]
