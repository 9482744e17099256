"""Reads the headers of checkpoint files, and writes safetensors files piece by piece.

Tensors' bytes pass through one small buffer (flowspec/weights/formats reads them). torch maps
`.bin` files; `weights_only=True` runs no code in them.
"""

import hashlib
import json
import math
import os
import pickle  # only for the error of a refused `.bin`; nothing is unpickled
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

# Small enough for the processor's cache between read and write; 16 MiB is slower.
CHUNK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100 << 20
_MAX_DIMENSIONS = 16
_ALIGNMENT = 64
_DTYPE_CODES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_CODE_OF = {name: code for code, name in _DTYPE_CODES.items()}
_OTHER_SIZES = {"F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1}
_OTHER_SIZES |= {"F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "U32": 4, "U64": 8}
ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """The place of one tensor; `offset` is into the file, 0 for `.bin`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int

    @property
    def num_values(self) -> int:
        """Return the number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Return the size of the values in `dtype` (0 for a dtype that no stage can hold)."""
        return self.num_values * ITEM_BYTES.get(self.dtype, 0)


def read_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a safetensors file, by name.

    Raises ValueError when the file is truncated, damaged or not a safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > _MAX_HEADER_BYTES:
            raise ValueError(f"{path} is not a safetensors file, or it is damaged; fetch it again")
        text = file.read(length)
    if len(text) < length:
        raise ValueError(f"{path} is truncated inside its header; fetch it again")
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path} has a damaged header ({error}); fetch it again") from error
    end = 8 + length
    for tensor, num_bytes in sorted(tensors, key=lambda pair: (pair[0].offset, pair[1])):
        if tensor.offset != end:
            raise ValueError(f"{path}: bytes of {tensor.name} overlap or leave a gap; fetch again")
        end += num_bytes
    if size != end:
        problem = "truncated" if size < end else "longer than its header says"
        raise ValueError(f"{path} is {problem}: {size} bytes, needed {end}; fetch it again")
    return {tensor.name: tensor for tensor, _ in tensors}


def _stored(path: Path, name: str, entry: Mapping[str, Any], base: int) -> tuple[StoredTensor, int]:
    code, shape, (start, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
    numbers = (*shape, start, end)
    if len(shape) > _MAX_DIMENSIONS or not all(_is_size(n) for n in numbers):
        raise ValueError(f"tensor {name} has sizes {numbers[:_MAX_DIMENSIONS]}")
    if not isinstance(code, str):
        raise ValueError(f"tensor {name} has dtype {code!r}")
    dtype = _DTYPE_CODES.get(code, code)
    item = ITEM_BYTES.get(dtype) or _OTHER_SIZES.get(code)
    if item is not None and math.prod(shape) * item != end - start:
        raise ValueError(f"tensor {name} {list(shape)} of {code} does not fill {end - start} bytes")
    return StoredTensor(
        name=name, dtype=dtype, shape=shape, file=path, offset=base + start
    ), end - start


def _is_size(n: Any) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63


def load_bin(path: Path) -> dict[str, Tensor]:
    """Map the tensors of a `.bin` file. Raises ValueError when it holds anything else."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than tensors, and running code from a checkpoint is refused; "
            "use its safetensors version"
        ) from error
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{path} is truncated, damaged or in the format before torch 1.6 ({reason}); "
            "fetch it again, or re-save it with a current torch"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(t, Tensor) for t in content.values()):
        raise ValueError(f"{path} is not a state dict of tensors; use the safetensors version")
    return content


def read_bin_header(path: Path) -> dict[str, StoredTensor]:
    """Return the tensors of a `.bin` file, by name. Raises ValueError as `load_bin` does."""
    return {
        name: StoredTensor(
            name=name,
            dtype=str(tensor.dtype).removeprefix("torch."),
            shape=tuple(tensor.shape),
            file=path,
            offset=0,
        )
        for name, tensor in load_bin(path).items()
    }


def converted(
    pieces: Iterator[memoryview], tensor: StoredTensor, dtype: str
) -> Iterator[memoryview]:
    """Convert the values to another dtype. Raises ValueError if float16 cannot hold one."""
    source, target = getattr(torch, tensor.dtype), getattr(torch, dtype)
    for piece in pieces:
        values = torch.frombuffer(piece, dtype=source)
        narrow = values.to(target)
        if not torch.equal(narrow.isfinite(), values.isfinite()):
            raise ValueError(
                f"{tensor.name} has values that {dtype} cannot hold; use --dtype bfloat16 or "
                "float32"
            )
        yield narrow.view(torch.uint8).numpy().data


def header_bytes(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """Return the header of a safetensors file with `tensors` (name -> dtype, shape) in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * ITEM_BYTES[dtype]
        header[name] = {
            "dtype": _CODE_OF[dtype],
            "shape": list(shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Aligned data lets a device compute directly on the mapped file.
    text += b" " * (-(8 + len(text)) % _ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class HashedWriter:
    """Writes a file while a second thread hashes it (hashlib releases the interpreter lock)."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def __enter__(self) -> "HashedWriter":
        self._file = self._path.open("wb", buffering=0)
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._pending: Future[None] | None = None
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._pool.shutdown()
        self._file.close()

    def write(self, piece: bytes | memoryview) -> None:
        """Append `piece`, which must not change until the next call returns."""
        self._wait()
        self._pending = self._pool.submit(self._digest.update, piece)
        view = memoryview(piece)
        while view:
            view = view[self._file.write(view) :]
        self.num_bytes += len(piece)

    def finish(self) -> str:
        """Sync the file to disk; return the sha256 of everything written, as hex."""
        os.fsync(self._file.fileno())
        self._wait()
        return self._digest.hexdigest()

    def _wait(self) -> None:
        if self._pending is not None:
            self._pending.result()
