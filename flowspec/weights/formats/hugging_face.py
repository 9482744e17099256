"""The formats of Hugging Face folders: `config.json` beside weights as safetensors or `.bin`."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowspec.model.architecture import ModelConfig, read_config, read_json
from flowspec.tokenizer import load_tokenizer
from flowspec.weights.formats.base import TensorSource
from flowspec.weights.tensor_files import (
    CHUNK_BYTES,
    StoredTensor,
    load_bin,
    read_bin_header,
    read_header,
)

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "generation_config.json",
    "chat_template.jinja",
    "added_tokens.json",
)
# Old Llama files also store the RoPE frequencies, which follow from the config.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"
_REMAP_BYTES = 128 << 20


def read_tokenizer_files(folder: Path) -> dict[str, bytes]:
    """Return the tokenizer's files of a folder, by name."""
    found = {name: folder / name for name in TOKENIZER_FILES}
    return {name: path.read_bytes() for name, path in found.items() if path.exists()}


class _SafetensorsSource:
    def __init__(self, path: Path) -> None:
        self._file = path.open("rb", buffering=0)

    def pieces(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Yield the bytes as they lie in the file."""
        self._file.seek(tensor.offset)
        buffers = [memoryview(bytearray(min(CHUNK_BYTES, tensor.num_bytes))) for _ in range(2)]
        left, turn = tensor.num_bytes, 0
        while left:
            count = self._file.readinto(buffers[turn][: min(left, CHUNK_BYTES)])
            if not count:
                raise ValueError(f"{tensor.file} is truncated at {tensor.name}; fetch it again")
            yield buffers[turn][:count]
            left, turn = left - count, 1 - turn

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _BinSource:
    """A mapped `.bin` file, mapped anew from time to time.

    Touched pages count as memory of this process until they are unmapped.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._mapped = load_bin(path)
        self._touched_bytes = 0

    def pieces(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Yield the bytes in row-major order."""
        if self._touched_bytes > _REMAP_BYTES:
            self._mapped = {}
            self._mapped, self._touched_bytes = load_bin(self._path), 0
        self._touched_bytes += tensor.num_bytes
        yield from _cut(self._mapped[tensor.name])

    def close(self) -> None:
        """Unmap the file."""
        self._mapped = {}


def _cut(tensor: Tensor) -> Iterator[memoryview]:
    raw = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    for start in range(0, len(raw), CHUNK_BYTES):
        yield raw[start : start + CHUNK_BYTES]


@dataclass(frozen=True, slots=True)
class _HfFolder:
    """A folder with `config.json`, weights and tokenizer."""

    folder: Path
    files: tuple[Path, ...]
    read: Callable[[Path], dict[str, StoredTensor]]

    def hf_config(self) -> dict[str, Any]:
        """Return the content of `config.json`."""
        return read_json(self.folder / "config.json")

    def model_config(self) -> ModelConfig:
        """Read `config.json` and the end tokens of `generation_config.json`."""
        return read_config(self.folder)

    def tensors(self) -> dict[str, StoredTensor]:
        """Read the headers of all files."""
        stored: dict[str, StoredTensor] = {}
        for path in self.files:
            for name, tensor in self.read(path).items():
                if name in stored:
                    raise ValueError(f"{name} is both in {stored[name].file.name} and {path.name}")
                if not name.endswith(_IGNORED_SUFFIX):
                    stored[name] = tensor
        return stored

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Read the files as they are."""
        return read_tokenizer_files(self.folder)

    def check_tokenizer(self) -> None:
        """Load the tokenizer."""
        load_tokenizer(self.folder)


@dataclass(frozen=True, slots=True)
class HfFormat:
    """Weights of one kind in a Hugging Face folder, in one file or in shards with an index."""

    name: str
    suffix: str
    file_names: tuple[str, str]  # one file; the index of shards
    read: Callable[[Path], dict[str, StoredTensor]]
    source: Callable[[Path], TensorSource]
    computes_values: bool = False

    def find(self, path: Path) -> _HfFolder | None:
        """Return the folder's model, if its weights are of this kind."""
        whole, index = (path / name for name in self.file_names)
        if whole.exists():
            return _HfFolder(path, (whole,), self.read)
        return _HfFolder(path, self._shards(index), self.read) if index.exists() else None

    def open(self, file: Path) -> TensorSource:
        """Open one weight file."""
        return self.source(file)

    def _shards(self, index: Path) -> tuple[Path, ...]:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index} has no weight_map; fetch it again")
        names = sorted({str(name) for name in weight_map.values()})
        for name in names:
            if Path(name).name != name or not name.endswith(self.suffix):
                raise ValueError(f"{index} names {name!r}, needed: a {self.suffix} file beside it")
        missing = [name for name in names if not (index.parent / name).exists()]
        if missing:
            raise ValueError(
                f"{index.parent} lacks {len(missing)} of {len(names)} shards: {some(missing)}; "
                "fetch them again"
            )
        return tuple(index.parent / name for name in names)


def some(names: list[str] | set[str]) -> str:
    """Return at most five of these names in order, and how many more there are."""
    ordered = sorted(names)
    rest = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + rest


SAFETENSORS = HfFormat(
    name="safetensors",
    suffix=".safetensors",
    file_names=("model.safetensors", "model.safetensors.index.json"),
    read=read_header,
    source=_SafetensorsSource,
)
BIN = HfFormat(
    name="bin",
    suffix=".bin",
    file_names=("pytorch_model.bin", "pytorch_model.bin.index.json"),
    read=read_bin_header,
    source=_BinSource,
)
