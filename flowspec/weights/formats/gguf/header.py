"""Reads the header of a GGUF file: metadata and the places of tensors.

The file is not trusted. Every count and length is compared with the bytes that are left before it
is used, so that nothing is allocated for a claim; every tensor must lie within the file. Arrays
stay in the file until they are asked for.
"""

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_HEADER_BYTES = 256 << 20
_MAX_KEY_BYTES = (1 << 16) - 1
_MAX_NAME_BYTES = 256
_MAX_TEXT_BYTES = 4 << 20  # of one value, such as a chat template
_MAX_ITEM_BYTES = 1 << 16  # of one text in an array, such as a token
_MAX_ITEMS = 1 << 24
_MAX_DIMENSIONS = 4
_MAX_ALIGNMENT = 1 << 16
_LEAST_ENTRY_BYTES = 8 + 1 + 4 + 1  # key length, key, type, value
_LEAST_TENSOR_BYTES = 8 + 1 + 4 + 8 + 4 + 8  # name length, name, dimensions, one, type, offset
_TEXT, _ARRAY, _BOOL = 8, 9, 7
TENSOR_TYPES = (
    *("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"),
    *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS", "IQ1_S", "IQ1_M"),
    *("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4"),
)
_NUMBERS = {
    **{0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
}


@dataclass(frozen=True, slots=True)
class _ArrayPlace:
    """An array of the metadata: its element type and where its elements begin."""

    kind: int
    count: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPlace:
    """One tensor: its type by GGML's name, shape in torch's order, and bytes in the file."""

    name: str
    kind: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    num_bytes: int


@cache
def block_sizes() -> Mapping[str, tuple[int, int]]:
    """Return (values, bytes) of a block of each tensor type that is read, by GGML's name."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    return {kind: GGML_QUANT_SIZES[GGMLQuantizationType[kind]] for kind in TENSOR_TYPES}


class Header:
    """The metadata and tensors of one file. Values are looked up with a check of their type."""

    def __init__(
        self, path: Path, metadata: Mapping[str, Any], tensors: Mapping[str, TensorPlace]
    ) -> None:
        self.path = path
        self.tensors = tensors
        self._metadata = metadata

    @property
    def keys(self) -> frozenset[str]:
        """Return the keys of the metadata."""
        return frozenset(self._metadata)

    def number(self, key: str) -> float | None:
        """Return the finite number under `key`, None if absent. Raises ValueError for others."""
        value = self._metadata.get(key)
        if value is None:
            return None
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not math.isfinite(value)
        ):
            raise self._wrong(key, "a number")
        return value

    def whole(self, key: str, *, least: int = 0, most: int = (1 << 31) - 1) -> int | None:
        """Return the whole number under `key`, None if absent.

        An array of equal numbers, one for each layer, counts as that number. Raises ValueError for
        another type or a number out of range.
        """
        value = self._metadata.get(key)
        if isinstance(value, _ArrayPlace) and value.kind in _NUMBERS and 0 < value.count <= 1 << 16:
            found = sorted(set(self.numbers(key)))
            if len(found) > 1:
                raise ValueError(
                    f"{self.path}: {key} differs between layers ({found[:5]}), which is not "
                    "supported; use a checkpoint whose layers are all alike"
                )
            value = int(found[0]) if found[0] == int(found[0]) else found[0]
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
            raise self._wrong(key, f"a whole number from {least} to {most}")
        return value

    def text(self, key: str) -> str | None:
        """Return the text under `key`, None if absent. Raises ValueError for another type."""
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, str):
            raise self._wrong(key, "a text")
        return value

    def flag(self, key: str) -> bool | None:
        """Return the truth value under `key`, None if absent. Raises ValueError for others."""
        value = self._metadata.get(key)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(key, "true or false")
        return value

    def is_set(self, key: str) -> bool:
        """Whether `key` has a value other than 0, false and what is empty."""
        value = self._metadata.get(key)
        return value.count > 0 if isinstance(value, _ArrayPlace) else bool(value)

    def texts(self, key: str) -> list[str]:
        """Return the texts of an array; [] if absent. Raises ValueError for another type."""
        place = self._array(key, (_TEXT,), "an array of texts")
        if place is None:
            return []
        with self.path.open("rb") as file:
            cursor = _Cursor(self.path, file, place.offset)
            found = [cursor.raw_text(_MAX_ITEM_BYTES, key) for _ in range(place.count)]
        try:
            return [raw.decode() for raw in found]
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.path}: {key} has a text that is not UTF-8 ({error})") from None

    def numbers(self, key: str) -> list[float]:
        """Return the numbers of an array; [] if absent. Raises ValueError for another type."""
        place = self._array(key, tuple(_NUMBERS), "an array of numbers")
        if place is None:
            return []
        with self.path.open("rb") as file:
            kind = np.dtype(f"<{_NUMBERS[place.kind]}")
            cursor = _Cursor(self.path, file, place.offset)
            raw = cursor.take(place.count * kind.itemsize, key)
        return list(np.frombuffer(raw, kind).tolist())

    def _array(self, key: str, kinds: tuple[int, ...], needed: str) -> _ArrayPlace | None:
        value = self._metadata.get(key)
        if value is None:
            return None
        if not isinstance(value, _ArrayPlace) or value.kind not in kinds:
            raise self._wrong(key, needed)
        return value

    def _wrong(self, key: str, needed: str) -> ValueError:
        value = self._metadata[key]
        shown = "an array" if isinstance(value, _ArrayPlace) else repr(value)[:80]
        return ValueError(f"{self.path}: {key} is {shown}, needed: {needed}; fetch the file again")


class _Cursor:
    """Reads forward through the header; never beyond the file or the largest header."""

    def __init__(self, path: Path, file: BinaryIO, offset: int = 0) -> None:
        self._path = path
        self._file = file
        self._end = min(path.stat().st_size, _MAX_HEADER_BYTES)
        self.offset = offset
        file.seek(offset)

    @property
    def left(self) -> int:
        """Return the bytes that a header could still have."""
        return self._end - self.offset

    def take(self, count: int, what: str) -> bytes:
        """Read `count` bytes. Raises ValueError when the header cannot have so many."""
        self._check(count, what)
        raw = self._file.read(count)
        if len(raw) < count:
            raise ValueError(f"{self._path} became shorter while it was read; fetch it again")
        self.offset += count
        return raw

    def skip(self, count: int, what: str) -> None:
        """Pass over `count` bytes. Raises as `take` does."""
        self._check(count, what)
        self.offset += count
        self._file.seek(self.offset)

    def number(self, code: str, what: str) -> Any:
        """Read one little-endian number of a struct code."""
        return struct.unpack(f"<{code}", self.take(struct.calcsize(code), what))[0]

    def raw_text(self, most: int, what: str) -> bytes:
        """Read one text with its length before it."""
        return self.take(self._length(most, what), what)

    def skip_text(self, most: int, what: str) -> None:
        """Pass over one text."""
        self.skip(self._length(most, what), what)

    def text(self, most: int, what: str) -> str:
        """Read one text as UTF-8."""
        try:
            return self.raw_text(most, what).decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{self._path}: {what} is not UTF-8 ({error}); fetch the file again"
            ) from None

    def _length(self, most: int, what: str) -> int:
        length = int(self.number("Q", f"the length of {what}"))
        if length > most:
            raise ValueError(
                f"{self._path}: {what} claims {length} bytes, at most {most} are read; fetch the "
                "file again"
            )
        return length

    def _check(self, count: int, what: str) -> None:
        if count > self.left:
            raise ValueError(
                f"{self._path} is truncated or damaged at {what}: {count} bytes are needed at "
                f"{self.offset}, {max(self.left, 0)} are left; fetch it again"
            )


def read_gguf_header(path: Path) -> Header:
    """Read metadata and tensor places of one file. Raises ValueError naming what is wrong."""
    with path.open("rb") as file:
        cursor = _Cursor(path, file)
        num_tensors, num_entries = _read_counts(path, cursor)
        metadata: dict[str, Any] = {}
        for _ in range(num_entries):
            key = cursor.text(_MAX_KEY_BYTES, "a key of the metadata")
            if key in metadata:
                raise ValueError(f"{path} has the key {key[:80]!r} twice; fetch it again")
            metadata[key] = _read_value(path, cursor, key)
        raw = [_read_tensor(path, cursor) for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or not 0 < alignment <= _MAX_ALIGNMENT:
            raise ValueError(f"{path}: general.alignment is {alignment!r}; fetch the file again")
        base = -(-cursor.offset // alignment) * alignment
    return Header(path, metadata, _place_tensors(path, raw, base, alignment))


def _read_counts(path: Path, cursor: _Cursor) -> tuple[int, int]:
    """Return the numbers of tensors and of metadata entries."""
    if cursor.left < 24 or cursor.take(4, "the magic") != MAGIC:
        raise ValueError(f"{path} is not a GGUF file, or it is truncated; fetch it again")
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        big = version & 0xFFFF == 0
        what = "a big-endian file" if big else f"of version {version}"
        raise ValueError(
            f"{path} is {what}, read are little-endian files of version 2 or 3; convert it again "
            "with a current llama.cpp"
        )
    num_tensors, num_entries = cursor.number("Q", "the counts"), cursor.number("Q", "the counts")
    for count, least, what in (
        (num_tensors, _LEAST_TENSOR_BYTES, "tensors"),
        (num_entries, _LEAST_ENTRY_BYTES, "metadata entries"),
    ):
        if count > cursor.left // least:
            raise ValueError(
                f"{path} claims {count} {what}, which do not fit into its {cursor.left} bytes; "
                "it is damaged, fetch it again"
            )
    return num_tensors, num_entries


def _read_value(path: Path, cursor: _Cursor, key: str) -> Any:
    """Return a number, truth value or text, or the place of an array."""
    shown = key[:80]
    kind = cursor.number("I", f"the type of {shown}")
    if kind == _TEXT:
        return cursor.text(_MAX_TEXT_BYTES, shown)
    if kind == _ARRAY:
        return _pass_array(path, cursor, shown)
    if kind not in _NUMBERS:
        raise ValueError(f"{path}: {shown} has the unknown type {kind}; it is damaged")
    value = cursor.number(_NUMBERS[kind], shown)
    if kind != _BOOL:
        return value
    if value not in (0, 1):
        raise ValueError(f"{path}: {shown} is the truth value {value}; it is damaged")
    return bool(value)


def _pass_array(path: Path, cursor: _Cursor, key: str) -> _ArrayPlace:
    """Return where an array lies, after checking that the file has all of it."""
    kind = cursor.number("I", f"the type of {key}")
    count = int(cursor.number("Q", f"the length of {key}"))
    if kind != _TEXT and kind not in _NUMBERS:
        raise ValueError(f"{path}: {key} is an array of the unsupported type {kind}")
    item = 8 if kind == _TEXT else struct.calcsize(_NUMBERS[kind])
    if count > _MAX_ITEMS or count > cursor.left // item:
        raise ValueError(
            f"{path}: {key} claims {count} elements, which do not fit into the {cursor.left} bytes "
            "that are left; it is damaged, fetch it again"
        )
    place = _ArrayPlace(kind, count, cursor.offset)
    if kind == _TEXT:
        for _ in range(count):
            cursor.skip_text(_MAX_ITEM_BYTES, key)
    else:
        cursor.skip(count * item, key)
    return place


def _read_tensor(path: Path, cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Return name, shape in torch's order, type number and relative offset."""
    name = cursor.text(_MAX_NAME_BYTES, "a tensor's name")
    num_dimensions = cursor.number("I", name)
    if not 1 <= num_dimensions <= _MAX_DIMENSIONS:
        raise ValueError(f"{path}: tensor {name} claims {num_dimensions} dimensions; it is damaged")
    shape = struct.unpack(f"<{num_dimensions}Q", cursor.take(8 * num_dimensions, name))
    if not all(shape):
        raise ValueError(f"{path}: tensor {name} is empty ({list(shape)}); it is damaged")
    return name, shape[::-1], cursor.number("I", name), cursor.number("Q", name)


def _place_tensors(
    path: Path, raw: list[tuple[str, tuple[int, ...], int, int]], base: int, alignment: int
) -> dict[str, TensorPlace]:
    """Check types, sizes and places of all tensors against the file's size."""
    size = path.stat().st_size
    found: dict[str, TensorPlace] = {}
    for name, shape, number, offset in raw:
        kind, num_bytes = _tensor_bytes(path, name, shape, number)
        if name in found:
            raise ValueError(f"{path} has the tensor {name} twice; it is damaged, fetch it again")
        if offset % alignment or base + offset + num_bytes > size:
            raise ValueError(
                f"{path}: tensor {name} {list(shape)} of {kind} needs {num_bytes} bytes at "
                f"{base + offset}, the file has {size}; it is truncated or damaged, fetch it again"
            )
        found[name] = TensorPlace(
            name=name, kind=kind, shape=shape, file=path, offset=base + offset, num_bytes=num_bytes
        )
    end = base
    for tensor in sorted(found.values(), key=lambda one: one.offset):
        if tensor.offset < end:
            raise ValueError(f"{path}: bytes of {tensor.name} overlap others; fetch it again")
        end = tensor.offset + tensor.num_bytes
    return found


def _tensor_bytes(path: Path, name: str, shape: tuple[int, ...], number: int) -> tuple[str, int]:
    """Return the type's name and the tensor's size."""
    from gguf.constants import GGMLQuantizationType

    try:
        kind = GGMLQuantizationType(number).name
    except ValueError:
        kind = f"number {number}"
    if kind not in block_sizes():
        raise ValueError(
            f"{path}: tensor {name} has the type {kind}, which cannot be dequantized; use a file "
            f"of one of {', '.join(block_sizes())}"
        )
    values, num_bytes = block_sizes()[kind]
    if shape[-1] % values:
        raise ValueError(
            f"{path}: rows of tensor {name} have {shape[-1]} values, no multiple of the {values} "
            f"of a block of {kind}; it is damaged"
        )
    return kind, math.prod(shape) // values * num_bytes
