"""Tensors of a GGUF file under their Hugging Face names, dequantized piece by piece."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from flowspec.weights.formats.gguf.config import ROPE_FACTORS
from flowspec.weights.formats.gguf.header import TensorPlace, block_sizes
from flowspec.weights.tensor_files import StoredTensor

_PIECE_VALUES = 1 << 20  # dequantized at a time: large enough for numpy, small beside a tensor
_DTYPES = {"F16": "float16", "BF16": "bfloat16"}  # stored as they are; others become float32
_TOP = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GgufTensor(StoredTensor):
    """One tensor of a GGUF file; `dtype` is that of its values once read.

    `paired_heads` above 0 says that each of so many heads' rows lie in pairs (0, d/2, 1, d/2 + 1,
    ...), as interleaved RoPE wants them; they are put back into Hugging Face's order.
    """

    kind: str
    paired_heads: int


def hf_name(name: str) -> str | None:
    """Return the Hugging Face name of a tensor; None if no supported family has it."""
    stem, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias"):
        return None
    if stem in _TOP:
        return f"{_TOP[stem]}.{leaf}"
    block, _, part = stem.removeprefix("blk.").partition(".")
    is_index = block.isascii() and block.isdigit() and len(block) < 6 and block == str(int(block))
    if not stem.startswith("blk.") or not is_index or part not in _IN_BLOCK:
        return None
    return f"model.layers.{block}.{_IN_BLOCK[part]}.{leaf}"


def named_tensors(
    places: Mapping[str, TensorPlace], *, num_heads: int, num_kv_heads: int, paired: bool
) -> dict[str, StoredTensor]:
    """Return the tensors by their Hugging Face names; `paired` as llama.cpp stores "llama" files.

    Raises ValueError naming tensors that no supported family has.
    """
    named = {name: hf_name(name) for name in places if name != ROPE_FACTORS}
    if unknown := sorted(name for name, hf in named.items() if hf is None):
        rest = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        why = (
            "mixtures of experts are not supported"
            if "_exps" in "".join(unknown)
            else ("only plain Llama, Mistral, Qwen2 and Qwen3 models are supported")
        )
        raise ValueError(
            f"{places[unknown[0]].file} has the tensors {', '.join(unknown[:5])}{rest}: {why}; use "
            "another checkpoint"
        )
    heads = {".self_attn.q_proj.": num_heads, ".self_attn.k_proj.": num_kv_heads}
    found: dict[str, StoredTensor] = {}
    for name, hf in named.items():
        assert hf is not None
        place = places[name]
        own = next((count for part, count in heads.items() if part in hf), 0) if paired else 0
        if own and place.shape[0] % (2 * own):
            raise ValueError(
                f"{place.file}: {name} has {place.shape[0]} rows, no multiple of 2 for each of "
                f"{own} heads; fetch the file again"
            )
        found[hf] = GgufTensor(
            name=hf,
            dtype=_DTYPES.get(place.kind, "float32"),
            shape=place.shape,
            file=place.file,
            offset=place.offset,
            kind=place.kind,
            paired_heads=own,
        )
    return found


class GgufSource:
    """One open GGUF file."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def pieces(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Yield the values row by row, dequantized to float32 unless they are stored in 16 bits.

        Whole heads at a time where their rows change places.
        """
        assert isinstance(tensor, GgufTensor)
        values, block_bytes = block_sizes()[tensor.kind]
        # Norms and biases are one row, unless their values change places as rows do.
        is_vector = len(tensor.shape) == 1
        width = (1 if tensor.paired_heads else tensor.shape[0]) if is_vector else tensor.shape[-1]
        row_bytes = width // values * block_bytes
        num_rows = tensor.num_values // width
        step = max(1, _PIECE_VALUES // width)
        if tensor.paired_heads:
            head = num_rows // tensor.paired_heads
            step = max(1, step // head) * head
        self._file.seek(tensor.offset)
        for start in range(0, num_rows, step):
            count = min(step, num_rows - start)
            rows = np.frombuffer(self._read(tensor, count * row_bytes), np.uint8)
            rows = rows.reshape(count, row_bytes)
            if tensor.paired_heads:
                rows = _unpaired(rows, head)
            yield _values(rows, tensor.kind)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _read(self, tensor: StoredTensor, count: int) -> bytearray:
        buffer = bytearray(count)
        view = memoryview(buffer)
        while view:
            got = self._file.readinto(view)
            if not got:
                raise ValueError(f"{tensor.file} is truncated at {tensor.name}; fetch it again")
            view = view[got:]
        return buffer


def _unpaired(rows: NDArray[np.uint8], head: int) -> NDArray[np.uint8]:
    """Put rows [heads * head, bytes] that lie in pairs back: first halves, then second halves."""
    paired = rows.reshape(-1, head // 2, 2, rows.shape[1])
    return np.ascontiguousarray(paired.swapaxes(1, 2)).reshape(rows.shape)


def _values(rows: NDArray[np.uint8], kind: str) -> memoryview:
    """Return the values of rows [n, bytes] as bytes of their dtype."""
    if kind in ("F32", "F16", "BF16"):
        return rows.reshape(-1).data
    from gguf.constants import GGMLQuantizationType
    from gguf.quants import dequantize

    with np.errstate(all="ignore"):  # damaged blocks may overflow
        found = dequantize(rows, GGMLQuantizationType[kind])
    return np.ascontiguousarray(found, dtype=np.float32).reshape(-1).view(np.uint8).data
