"""ModelConfig: the decoder's sizes and switches, read from a HF `config.json`.

Features that the block in `llama.py` does not compute are refused by name here, so that a model
that loads runs as its authors meant.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flowspec.model.config_fields import (
    flag,
    positive_number,
    token_ids,
    whole_number,
    without_empty,
)
from flowspec.model.rope import FactorsRopeScaling, RopeScaling, Warn, read_rope
from flowspec.request import LONGEST_CONTEXT

DTYPES = ("float32", "float16", "bfloat16")
_log = logging.getLogger(__name__)
_told: set[str] = set()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Family:
    """The fixed properties of an architecture; None: a switch in config.json decides."""

    qkv_bias: bool | None = None
    output_bias: bool | None = None
    mlp_bias: bool | None = False
    qk_norm: bool = False
    head_dim: int | None = None  # if config.json names none; None: hidden size over heads
    max_positions: int = 32768  # if config.json names none


_FAMILIES = {
    "LlamaForCausalLM": _Family(mlp_bias=None, max_positions=2048),
    "MistralForCausalLM": _Family(qkv_bias=False, output_bias=False, max_positions=131072),
    "Qwen2ForCausalLM": _Family(qkv_bias=True, output_bias=False),
    "Qwen3ForCausalLM": _Family(qk_norm=True, head_dim=128),
}
ARCHITECTURES = tuple(_FAMILIES)

# A key with one of these words changes the forward pass when it is switched on. Files of supported
# models hold some of them switched off.
_FEATURE_WORDS = (
    "softcap",
    "expert",
    "multiplier",
    "logit_scale",
    "logits_scaling",
    "scale_emb",
    "scale_depth",
    "query_pre_attn_scalar",
    "qk_norm",
    "qk_layernorm",
    "attention_chunk_size",
    "no_rope_layer",
    "parallel_residual",
    "rope_interleaved",
    "alibi",
    "quantization_config",
    "compression_config",
    "auto_map",
)
_NEUTRAL_AT_ONE = ("multiplier", "scale", "scaling")
_LENGTH_KEYS = (  # beside max_position_embeddings
    *("n_positions", "max_seq_len", "seq_length", "model_max_length", "max_sequence_length"),
    *("max_seq_length", "seq_len"),
)
_KEYS_READ = """
architectures attention_bias bos_token_id dtype eos_token_id flowspec head_dim hidden_act
hidden_size intermediate_size layer_types max_position_embeddings max_window_layers mlp_bias
num_attention_heads num_hidden_layers num_key_value_heads original_max_position_embeddings
partial_rotary_factor rms_norm_eps rope_parameters rope_scaling rope_theta sliding_window
tie_word_embeddings torch_dtype use_sliding_window vocab_size
"""
# These say nothing about the forward pass, or (biases) nothing that the tensors do not.
_KEYS_IDLE = """
_name_or_path _attn_implementation _attn_implementation_autoset attention_dropout
attn_implementation bias chunk_size_feed_forward do_sample embd_pdrop hidden_dropout id2label
initializer_range is_decoder
is_encoder_decoder is_llama_config label2id max_length model_type
output_attentions output_hidden_states pad_token_id pretraining_tp problem_type qkv_bias
resid_pdrop return_dict task_specific_params temperature tokenizer_class top_k top_p torchscript
transformers_version unk_token_id unsloth_fixed unsloth_version use_bfloat16 use_cache
"""
_KNOWN_KEYS = frozenset((_KEYS_READ + _KEYS_IDLE).split()) | frozenset(_LENGTH_KEYS)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Sizes and switches of one decoder-only model; sizes in elements."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    windows: tuple[int | None, ...] = ()  # positions each layer sees, None: all; (): all in all
    qk_norm: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048  # before RoPE scaling, unless the scaling includes it
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check sizes against one another. Raises ValueError naming the key of config.json."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_heads} is no multiple of "
                f"num_key_value_heads {self.num_kv_heads}; every query head needs one key head"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd; RoPE rotates pairs")
        if isinstance(self.rope_scaling, FactorsRopeScaling) and (
            len(self.rope_scaling.factors) != self.head_dim // 2
        ):
            raise ValueError(
                f"config.json: RoPE has {len(self.rope_scaling.factors)} factors, needed: "
                f"{self.head_dim // 2}, half of head_dim"
            )
        if self.windows and len(self.windows) != self.num_layers:
            raise ValueError(f"{len(self.windows)} windows for {self.num_layers} layers")

    @property
    def context_length(self) -> int:
        """Tokens of prompt and answer together that the model was made for."""
        length = self.max_position_embeddings
        if self.rope_scaling is not None:
            length = self.rope_scaling.context_length(length)
        return min(max(length, 1), LONGEST_CONTEXT)

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any], *, warn: Warn | None = None) -> "ModelConfig":
        """Read the content of a HF `config.json`, of transformers 4 or 5.

        `warn` receives notes for the user; by default they are logged once per process. Raises
        ValueError naming a key that is missing, out of range or not supported.
        """
        warn = warn or _warn_of_config
        hf = without_empty(hf, keep=("sliding_window",))
        architecture = _architecture(hf)
        family = _FAMILIES[architecture]
        if sentence := next(unsupported_features(hf), None):
            raise ValueError(f"config.json: {sentence}")
        if unknown := unknown_keys(hf):
            warn(f"nothing is known of {', '.join(unknown)}; the model runs as if they were not "
                 "there")  # fmt: skip
        hidden = whole_number(hf, "hidden_size")
        heads = whole_number(hf, "num_attention_heads")
        if hf.get("head_dim") is None and family.head_dim is None and hidden % heads:
            raise ValueError(
                f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads} "
                "and there is no head_dim; add head_dim"
            )
        num_layers = whole_number(hf, "num_hidden_layers")
        max_positions = whole_number(hf, "max_position_embeddings", family.max_positions)
        rope_theta, rope_scaling = read_rope(hf, max_positions=max_positions, warn=warn)

        def switch(fixed: bool | None, key: str) -> bool:
            return flag(hf, key) if fixed is None else fixed

        return cls(
            architecture=architecture,
            vocab_size=whole_number(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=whole_number(hf, "intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=whole_number(hf, "num_key_value_heads", heads),
            head_dim=whole_number(hf, "head_dim", family.head_dim or hidden // heads),
            rms_norm_eps=positive_number(hf, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            windows=_windows(hf, architecture, num_layers),
            qk_norm=family.qk_norm,
            qkv_bias=switch(family.qkv_bias, "attention_bias"),
            output_bias=switch(family.output_bias, "attention_bias"),
            mlp_bias=switch(family.mlp_bias, "mlp_bias"),
            tie_word_embeddings=flag(hf, "tie_word_embeddings"),
            max_position_embeddings=_positions(hf, family),
            dtype=_dtype(hf),
            bos_token_id=next(iter(token_ids(hf, "bos_token_id")), None),
            eos_token_ids=token_ids(hf, "eos_token_id"),
        )


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file. Raises ValueError if missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; is {path.parent} a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:  # RecursionError: brackets without end
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, needed: a JSON object")
    return content


def warn_once(text: str) -> None:
    """Log a warning, once per process.

    A model's config is read often: before a split, after it, and for each drafter.
    """
    if text not in _told:
        _told.add(text)
        _log.warning("%s", text)


def _warn_of_config(text: str) -> None:
    warn_once(f"config.json: {text}")


def be_silent(text: str) -> None:
    """Ignore a warning, for parts of a model whose config the head has read already."""
    del text


def read_config(folder: Path, *, warn: Warn | None = None) -> ModelConfig:
    """Read `config.json` of a model folder, and the end tokens of `generation_config.json`.

    Warns and raises ValueError as `ModelConfig.from_hf` does.
    """
    config = ModelConfig.from_hf(read_json(folder / "config.json"), warn=warn)
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    # Llama 3 chat models list their end-of-turn tokens only there.
    extra = token_ids(read_json(generation), "eos_token_id")
    eos = dict.fromkeys((*config.eos_token_ids, *extra))
    return replace(config, eos_token_ids=tuple(eos))


def _architecture(hf: Mapping[str, Any]) -> str:
    named = hf.get("architectures") or []
    if isinstance(named, list) and len(named) == 1 and named[0] in ARCHITECTURES:
        return str(named[0])
    found = named or f"none (model_type {hf.get('model_type')!r})"
    raise ValueError(
        f"config.json: architectures is {found}; supported: {', '.join(ARCHITECTURES)}"
    )


def unsupported_features(hf: Mapping[str, Any]) -> Iterator[str]:
    """Yield a sentence for each key that would change the forward pass and is not supported."""
    for key, value in hf.items():
        if any(word in key for word in _FEATURE_WORDS) and not _is_off(key, value):
            yield _refusal(key, value)
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        yield f"hidden_act {activation!r} is not supported, only 'silu'"
    if hf.get("partial_rotary_factor", 1) != 1:
        yield f"partial_rotary_factor {hf['partial_rotary_factor']!r} is not supported, only 1"


def _refusal(key: str, value: Any) -> str:
    if key == "auto_map":
        return (
            "auto_map: the checkpoint brings code of its own, which is never run here; if the "
            "model is a plain one of its architecture, delete auto_map"
        )
    if key in ("quantization_config", "compression_config"):
        method = value.get("quant_method") if isinstance(value, Mapping) else value
        return (
            f"{key}: the checkpoint is quantised ({method}); use the checkpoint that it was made "
            "from, in float32, float16 or bfloat16"
        )
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return (
        f"{key} = {shown} is not supported: it changes what the model computes; use a checkpoint "
        f"of plain {' or '.join(ARCHITECTURES)}"
    )


def unknown_keys(hf: Mapping[str, Any]) -> list[str]:
    """Return the keys without a known meaning; refusing them would reject every author's note."""
    return [
        key
        for key in sorted(hf.keys() - _KNOWN_KEYS)
        if not any(word in key for word in _FEATURE_WORDS)  # those are off, or were refused
    ]


def _is_off(key: str, value: Any) -> bool:
    if value is None or value is False or value in ({}, [], ""):
        return True
    neutral = 1 if any(word in key for word in _NEUTRAL_AT_ONE) else 0
    return not isinstance(value, bool) and isinstance(value, int | float) and value == neutral


def _positions(hf: Mapping[str, Any], family: _Family) -> int:
    """Return the least of the lengths that the file names, or the family's default."""
    others = [hf[key] for key in _LENGTH_KEYS if key in hf]
    lengths = [value for value in others if type(value) is int and value > 0]
    if "max_position_embeddings" in hf:
        lengths.append(whole_number(hf, "max_position_embeddings"))
    return min(lengths, default=family.max_positions)


def _windows(hf: Mapping[str, Any], architecture: str, num_layers: int) -> tuple[int | None, ...]:
    """Return the positions that each layer sees (None: all) as transformers reads it.

    Returns () if all layers see all positions. Raises ValueError for layer types that are unknown
    or contradict the window.
    """
    size, first = _window(hf, architecture)
    types = hf.get("layer_types")
    if types is None:
        sliding = [size is not None and layer >= first for layer in range(num_layers)]
    else:
        known = ("full_attention", "sliding_attention")
        if not isinstance(types, list) or any(kind not in known for kind in types):
            raise ValueError(f"config.json: layer_types {types!r}; supported: {', '.join(known)}")
        if len(types) != num_layers:
            raise ValueError(
                f"config.json: layer_types names {len(types)} layers, num_hidden_layers is "
                f"{num_layers}"
            )
        sliding = [kind == "sliding_attention" for kind in types]
        mistral = architecture == "MistralForCausalLM"
        if (size is None and any(sliding)) or (mistral and size is not None and not all(sliding)):
            raise ValueError(
                f"config.json: layer_types {types!r} do not go with sliding_window {size} of "
                f"{architecture}; remove one of the two"
            )
    return tuple(size if slides else None for slides in sliding) if any(sliding) else ()


def _window(hf: Mapping[str, Any], architecture: str) -> tuple[int | None, int]:
    """Return the sliding window (None: off) and the first layer that has it by default."""
    if architecture == "MistralForCausalLM":
        # It is on if the key is missing; only null switches it off.
        off = hf.get("sliding_window", 0) is None
        return None if off else whole_number(hf, "sliding_window", 4096), 0
    if architecture == "LlamaForCausalLM":
        if flag(hf, "use_sliding_window", default=hf.get("sliding_window") is not None):
            raise ValueError(
                "config.json: use_sliding_window / sliding_window is on, but LlamaForCausalLM has "
                "no window; remove them, or name the architecture that they belong to"
            )
        return None, 0
    # Qwen files name a window even if it is switched off beside it.
    if not flag(hf, "use_sliding_window"):
        return None, 0
    return whole_number(hf, "sliding_window"), whole_number(hf, "max_window_layers", 28, least=0)


def _dtype(hf: Mapping[str, Any]) -> str:
    named = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    name = str(named).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"config.json: dtype {named!r} is not supported: {', '.join(DTYPES)}")
    return name
