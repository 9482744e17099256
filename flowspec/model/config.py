"""ModelConfig: what the decoder needs to know, read from a HF `config.json`.

What the block in `llama.py` does not compute is refused by name here, so that a model which loads
is a model that runs as its authors meant.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ARCHITECTURES = ("LlamaForCausalLM", "Qwen2ForCausalLM")
DTYPES = ("float32", "float16", "bfloat16")

# A key that contains one of these words changes the forward pass when it is switched on. Qwen2 and
# Llama files hold some of them switched off.
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
    "alibi",
    "quantization_config",
    "compression_config",
    "auto_map",
)
_NEUTRAL_AT_ONE = ("multiplier", "scale", "scaling")
# Sizes up to which a model's shapes can be written down without overflow and its layers listed.
_LARGEST = {
    "num_hidden_layers": 10_000,
    "hidden_size": 1 << 20,
    "num_attention_heads": 1 << 16,
    "num_key_value_heads": 1 << 16,
    "head_dim": 1 << 16,
    "intermediate_size": 1 << 24,
    "vocab_size": 1 << 24,
}
_LARGEST_OTHER = (1 << 31) - 1
_LLAMA3_KEYS = (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3RopeScaling:
    """RoPE scaling type `llama3` (Llama 3.1 and later)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


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
    rope_scaling: Llama3RopeScaling | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False
    max_position_embeddings: int = 2048
    dtype: str = "float32"
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Check what relates one size to another; ValueError names the key of config.json."""
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"config.json: num_attention_heads {self.num_heads} is no multiple of "
                f"num_key_value_heads {self.num_kv_heads}; every query head needs one key head"
            )
        if self.head_dim % 2:
            raise ValueError(f"config.json: head_dim {self.head_dim} is odd; RoPE rotates pairs")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> "ModelConfig":
        """Read the content of a HF `config.json`, of transformers 4 or 5.

        Raises ValueError naming the key for what is missing, out of range or not supported.
        """
        architecture = _architecture(hf)
        _refuse_features(hf)
        hidden = positive_int(hf, "hidden_size")
        heads = positive_int(hf, "num_attention_heads")
        if hf.get("head_dim") is None and hidden % heads:
            raise ValueError(
                f"config.json: hidden_size {hidden} is no multiple of num_attention_heads {heads} "
                "and there is no head_dim; add head_dim"
            )
        qwen2 = architecture == "Qwen2ForCausalLM"
        rope_theta, rope_scaling = _rope(hf)
        config = cls(
            architecture=architecture,
            vocab_size=positive_int(hf, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=positive_int(hf, "intermediate_size"),
            num_layers=positive_int(hf, "num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=positive_int(hf, "num_key_value_heads", heads),
            head_dim=positive_int(hf, "head_dim", hidden // heads),
            rms_norm_eps=_positive_number(hf, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            # Qwen2 has biases on q, k and v by definition; its config has no switch for them.
            qkv_bias=qwen2 or _flag(hf, "attention_bias"),
            output_bias=not qwen2 and _flag(hf, "attention_bias"),
            mlp_bias=not qwen2 and _flag(hf, "mlp_bias"),
            tie_word_embeddings=_flag(hf, "tie_word_embeddings"),
            max_position_embeddings=positive_int(hf, "max_position_embeddings", 2048),
            dtype=_dtype(hf),
            bos_token_id=next(iter(_token_ids(hf, "bos_token_id")), None),
            eos_token_ids=_token_ids(hf, "eos_token_id"),
        )
        _check_layer_types(hf, config.num_layers)
        return config


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; ValueError when it is missing, damaged or no object."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path} does not exist; is {path.parent} a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:  # the last: brackets without end
        raise ValueError(f"{path} cannot be read as JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, needed: a JSON object")
    return content


def read_config(folder: Path) -> ModelConfig:
    """Read `config.json` of a model folder, and the end tokens `generation_config.json` adds.

    Raises ValueError as `ModelConfig.from_hf`.
    """
    config = ModelConfig.from_hf(read_json(folder / "config.json"))
    generation = folder / "generation_config.json"
    if not generation.exists():
        return config
    # Llama 3 chat models list their end-of-turn tokens only there.
    extra = _token_ids(read_json(generation), "eos_token_id")
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


def _refuse_features(hf: Mapping[str, Any]) -> None:
    """Whatever would change the forward pass and is not built, by the name of its key."""
    for key, value in hf.items():
        if any(word in key for word in _FEATURE_WORDS) and not _is_off(key, value):
            raise ValueError(
                f"config.json: {key} = {value!r} is not supported; use an unquantised checkpoint "
                f"of plain {' or '.join(ARCHITECTURES)}"
            )
    activation = hf.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(f"config.json: hidden_act {activation!r} is not supported, only 'silu'")
    # Qwen2 files name a window and switch it off beside it.
    windowed = hf.get("use_sliding_window", hf.get("sliding_window") is not None)
    if windowed:
        raise ValueError(
            "config.json: use_sliding_window / sliding_window is on; only full attention is "
            "supported"
        )
    if hf.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ValueError(
            f"config.json: partial_rotary_factor {hf['partial_rotary_factor']!r} is not supported, "
            "only 1"
        )


def _is_off(key: str, value: Any) -> bool:
    if value is None or value is False or value in ({}, [], ""):
        return True
    neutral = 1 if any(word in key for word in _NEUTRAL_AT_ONE) else 0
    return not isinstance(value, bool) and isinstance(value, int | float) and value == neutral


def _check_layer_types(hf: Mapping[str, Any], num_layers: int) -> None:
    types = hf.get("layer_types")
    if types is None:
        return
    if not isinstance(types, list) or set(map(str, types)) - {"full_attention"}:
        raise ValueError(f"config.json: layer_types {types!r}; supported: only full_attention")
    if len(types) != num_layers:
        raise ValueError(
            f"config.json: layer_types names {len(types)} layers, num_hidden_layers is {num_layers}"
        )


def _rope(hf: Mapping[str, Any]) -> tuple[float, Llama3RopeScaling | None]:
    """Base and scaling, from `rope_parameters` (transformers 5) or `rope_scaling` (before)."""
    rope: dict[str, Any] = {}
    for key in ("rope_scaling", "rope_parameters"):
        part = hf.get(key) or {}
        if not isinstance(part, Mapping):
            raise ValueError(f"config.json: {key} is {part!r}, needed: an object or null")
        rope.update({name: value for name, value in part.items() if value is not None})
    theta = _positive_number({"rope_theta": hf.get("rope_theta"), **rope}, "rope_theta", 10000.0)
    named_type = rope.pop("type", "default")
    kind = rope.pop("rope_type", named_type)
    rope.pop("rope_theta", None)
    if rope.pop("partial_rotary_factor", 1) != 1:
        raise ValueError("config.json: partial_rotary_factor of RoPE is not supported, only 1")
    if kind not in ("default", "llama3"):
        raise ValueError(f"config.json: RoPE type {kind!r} is not supported: default, llama3")
    unknown = set(rope) - set(_LLAMA3_KEYS if kind == "llama3" else ())
    if unknown:
        raise ValueError(
            f"config.json: RoPE keys {sorted(unknown)} mean nothing for rope_type {kind!r}; "
            "name the type they belong to (llama3) or remove them"
        )
    if kind == "default":
        return theta, None
    scaling = Llama3RopeScaling(
        factor=_positive_number(rope, "factor"),
        low_freq_factor=_positive_number(rope, "low_freq_factor"),
        high_freq_factor=_positive_number(rope, "high_freq_factor"),
        original_max_position_embeddings=positive_int(rope, "original_max_position_embeddings"),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise ValueError(
            f"config.json: low_freq_factor {scaling.low_freq_factor} must be below "
            f"high_freq_factor {scaling.high_freq_factor}"
        )
    return theta, scaling


def _dtype(hf: Mapping[str, Any]) -> str:
    named = hf.get("dtype") or hf.get("torch_dtype") or "float32"
    name = str(named).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"config.json: dtype {named!r} is not supported: {', '.join(DTYPES)}")
    return name


def _token_ids(hf: Mapping[str, Any], key: str) -> tuple[int, ...]:
    value = hf.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < 1 << 31 for i in ids):
        raise ValueError(f"{key} is {value!r}, needed: a token id or a list of them")
    return tuple(ids)


def positive_int(hf: Mapping[str, Any], key: str, default: int | None = None) -> int:
    """A size from a config.json, `default` where it is missing; ValueError naming the key."""
    value = hf.get(key)
    value = default if value is None else value
    most = _LARGEST.get(key, _LARGEST_OTHER)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= most:
        raise ValueError(
            f"config.json: {key} is {value!r}, needed: a whole number above 0, at most {most}"
        )
    return value


def _positive_number(hf: Mapping[str, Any], key: str, default: float | None = None) -> float:
    value = hf.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise ValueError(f"config.json: {key} is {value!r}, needed: a number above 0")
    return float(value)


def _flag(hf: Mapping[str, Any], key: str) -> bool:
    value = hf.get(key)
    if value is not None and not isinstance(value, bool):
        raise ValueError(f"config.json: {key} is {value!r}, needed: true or false")
    return bool(value)
