"""GGUF files of tiny models, written with the `gguf` package in the way llama.cpp's converter does.

Names, the order of rows, types of tokens and keys come from `gguf` or from the converter's
formulas, not from the reader under test.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from torch import Tensor
from transformers import PreTrainedModel

from tests.support.vocabularies import CORPUS, byte_level, write_sentencepiece

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant]"
# Where the float16 scales of a block lie, for types that `gguf` cannot quantize.
_SCALES = {
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)},
    **{"IQ4_NL": (0,), "IQ4_XS": (0,)},
}


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    kind: str = "F32",
    *,
    tokenizer: str = "smollm",
    parts: int = 1,
    keys: dict[str, Any] | None = None,
    extra: str = "",
    corpus: Sequence[str] = CORPUS,
    vocab_size: int = 340,
) -> Path:
    """Write `model` with its matrices as `kind`, norms and biases as F32.

    `tokenizer` is the name of a pre-tokenizer, "llama" for SentencePiece, or "" for none. `keys`
    adds or (None) removes metadata; `extra` names one tensor more. Returns the path of the file,
    or of the first of `parts`. The tokenizer is trained on `corpus`.
    """
    config = model.config
    arch = ARCHITECTURES[config.model_type]
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[arch.upper()], config.num_hidden_layers)
    metadata = {
        **_config_keys(arch, config),
        **_tokenizer_keys(path.parent, tokenizer, corpus, vocab_size),
    }
    metadata |= keys or {}
    tensors: dict[str, tuple[np.ndarray, Kind]] = {}
    if "llama3" in str(config.rope_parameters):
        tensors["rope_freqs.weight"] = (llama3_factors(config), Kind.F32)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        own = names.get_name(name, (".weight", ".bias"))
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
        count = heads.get(name.split(".")[-2]) if arch == "llama" else None
        rows = weight if count is None else paired(weight, count)
        tensors[own] = encoded(rows.float().numpy(), kind if weight.dim() == 2 else "F32")
    if extra:
        tensors[extra] = (np.ones((4, 4), np.float32), Kind.F32)
    if parts == 1:
        _write(path, arch, metadata, tensors)
        return path
    return _write_parts(path, arch, metadata, tensors, parts)


def paired(weight: Tensor, num_heads: int) -> Tensor:
    """Reorder the rows of each head for interleaved RoPE, as the converter does."""
    shape = (num_heads, 2, weight.shape[0] // num_heads // 2, *weight.shape[1:])
    return weight.reshape(shape).swapaxes(1, 2).reshape(weight.shape)


def encoded(values: np.ndarray, kind: str) -> tuple[np.ndarray, Kind]:
    """Return rows [n, m] as stored; random blocks where `gguf` has no quantization.

    Rows that are no multiple of a block become F16.
    """
    per_block, num_bytes = gguf.GGML_QUANT_SIZES[Kind[kind]]
    if values.shape[-1] % per_block:
        return encoded(values, "F16")
    if kind not in _SCALES:
        return gguf.quantize(values, Kind[kind]), Kind[kind]
    rng = np.random.default_rng(abs(int(values.sum() * 1000)))
    shape = (values.shape[0], values.shape[1] // per_block, num_bytes)
    blocks = rng.integers(0, 256, shape, dtype=np.uint8)
    for at in _SCALES[kind]:
        scales = rng.uniform(1e-5, 1e-4, shape[:2]).astype(np.float16)
        blocks[..., at : at + 2] = scales[..., None].view(np.uint8)
    return blocks.reshape(values.shape[0], -1), Kind[kind]


def llama3_factors(config: Any) -> np.ndarray:
    """Return the divisors of the frequencies, by the converter's formula."""
    rope = config.rope_parameters
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    frequencies = 1.0 / rope["rope_theta"] ** (np.arange(0, dim, 2) / dim)
    old, factor = rope["original_max_position_embeddings"], rope["factor"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    found = []
    for wave in 2 * np.pi / frequencies:
        if wave < old / high:
            found.append(1.0)
        elif wave > old / low:
            found.append(factor)
        else:
            smooth = (old / wave - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


def _config_keys(arch: str, config: Any) -> dict[str, Any]:
    head_dim = getattr(config, "head_dim", None)
    rope = config.rope_parameters
    found = {
        "vocab_size": config.vocab_size,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "attention.key_length": head_dim,
        "attention.value_length": head_dim,
        "rope.dimension_count": head_dim,
        "rope.freq_base": float(rope["rope_theta"]),
    }
    if rope["rope_type"] in ("linear", "yarn"):
        found |= {"rope.scaling.type": rope["rope_type"], "rope.scaling.factor": rope["factor"]}
        original = rope.get("original_max_position_embeddings")
        found["rope.scaling.original_context_length"] = original
    if config.model_type == "mistral":
        found["attention.sliding_window"] = config.sliding_window
    return {f"{arch}.{key}": value for key, value in found.items()}


def _tokenizer_keys(
    folder: Path, name: str, corpus: Sequence[str], vocab_size: int
) -> dict[str, Any]:
    if not name:
        return {}
    prefix = "tokenizer.ggml"
    found = {"tokenizer.chat_template": TEMPLATE, f"{prefix}.add_bos_token": False}
    if name == "llama":
        place = write_sentencepiece(folder / "spm", corpus=corpus, vocab_size=vocab_size)
        return found | _sentencepiece_keys(place, prefix)
    special = ("<s>", "</s>", "<|im_end|>")
    trained = byte_level(corpus, vocab_size=vocab_size, special=special)
    content = json.loads(trained.to_str())["model"]
    vocab = sorted(content["vocab"], key=content["vocab"].get)
    return {
        **found,
        f"{prefix}.model": "gpt2",
        f"{prefix}.pre": name,
        f"{prefix}.tokens": vocab,
        f"{prefix}.token_type": [3 if token in special else 1 for token in vocab],
        f"{prefix}.merges": [" ".join(merge) for merge in content["merges"]],
        f"{prefix}.bos_token_id": 0,
        f"{prefix}.eos_token_id": 1,
    }


def _sentencepiece_keys(place: Path, prefix: str) -> dict[str, Any]:
    from sentencepiece import SentencePieceProcessor

    own = SentencePieceProcessor(model_file=str(place / "tokenizer.model"))
    kinds = {own.is_control: 3, own.is_unknown: 2, own.is_byte: 6, own.is_unused: 5}
    tokens = range(own.get_piece_size())
    return {
        f"{prefix}.model": "llama",
        f"{prefix}.pre": "default",
        f"{prefix}.tokens": [own.id_to_piece(i) for i in tokens],
        f"{prefix}.scores": [own.get_score(i) for i in tokens],
        f"{prefix}.token_type": [
            next((kind for asks, kind in kinds.items() if asks(i)), 1) for i in tokens
        ],
        f"{prefix}.bos_token_id": own.bos_id(),
        f"{prefix}.eos_token_id": own.eos_id(),
        f"{prefix}.unknown_token_id": own.unk_id(),
    }


def _write(path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, arch)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif value is not None:
            writer.add_array(key, value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _write_parts(
    path: Path, arch: str, metadata: dict[str, Any], tensors: dict[str, Any], parts: int
) -> Path:
    paths = [
        path.with_name(f"{path.stem}-{k:05d}-of-{parts:05d}.gguf") for k in range(1, parts + 1)
    ]
    names = list(tensors)
    for number, place in enumerate(paths):
        own = {"split.no": number, "split.count": parts, "split.tensors.count": len(names)}
        here = {name: tensors[name] for name in names[number::parts]}
        _write(place, arch, {**(metadata if number == 0 else {}), **own}, here)
    return paths[0]
