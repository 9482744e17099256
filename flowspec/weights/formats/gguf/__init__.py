"""The GGUF format of llama.cpp: one file, or a split set, with config, tokenizer and weights."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from flowspec.model.architecture import ModelConfig
from flowspec.tokenizer import SAMPLE, load_tokenizer
from flowspec.weights.formats.base import TensorSource
from flowspec.weights.formats.gguf.config import architecture_of, read_hf_config
from flowspec.weights.formats.gguf.header import Header, TensorPlace, read_gguf_header
from flowspec.weights.formats.gguf.tensors import GgufSource, named_tensors
from flowspec.weights.formats.gguf.tokenizer import (
    GIVE_TOKENIZER,
    rebuild_tokenizer,
    reference_ids,
)
from flowspec.weights.tensor_files import StoredTensor

SUFFIX = ".gguf"
_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_PARTS = 4096


@dataclass(frozen=True)
class GgufModel:
    """A file or a whole split set; each header is read once."""

    files: tuple[Path, ...]

    def hf_config(self) -> dict[str, Any]:
        """Return the config that the metadata and the tensors' names say."""
        return dict(self._config)

    def model_config(self) -> ModelConfig:
        """Return the config of the forward pass."""
        try:
            return ModelConfig.from_hf(self._config)
        except ValueError as error:
            raise ValueError(f"{self.files[0]}, read as a config.json: {error}") from error

    def tensors(self) -> dict[str, StoredTensor]:
        """Return the tensors with their Hugging Face names; `rope_freqs` is part of the config."""
        return named_tensors(
            self._places,
            num_heads=self._config["num_attention_heads"],
            num_kv_heads=self._config["num_key_value_heads"],
            paired=architecture_of(self._header) == "llama",
        )

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Rebuild the tokenizer's files from the metadata."""
        return self._tokenizer_files

    def check_tokenizer(self) -> None:
        """Load the rebuilt tokenizer; a text must come back whole from its tokens.

        The tokens of SentencePiece must be those of its own library.
        """
        with TemporaryDirectory(prefix="flowspec-gguf-") as folder:
            for name, content in self._tokenizer_files.items():
                (Path(folder) / name).write_bytes(content)
            try:
                tokenizer = load_tokenizer(folder)
            except ValueError as error:
                reason = str(error).replace(folder, str(self.files[0]))
                raise ValueError(
                    f"the tokenizer rebuilt from {self.files[0]} is not usable: {reason}; "
                    f"{GIVE_TOKENIZER}"
                ) from error
            ids = tokenizer.encode(SAMPLE, add_special_tokens=False)
            text = tokenizer.decode(ids, skip_special_tokens=False)
        needed = self._reference_ids()
        if text != SAMPLE or needed not in (None, ids):
            other = "" if needed in (None, ids) else f", and tokens {ids} where {needed} are needed"
            raise ValueError(
                f"the tokenizer rebuilt from {self.files[0]} makes {text!r} of {SAMPLE!r}{other}; "
                f"{GIVE_TOKENIZER}"
            )

    def _reference_ids(self) -> list[int] | None:
        try:
            return reference_ids(self._header, SAMPLE)
        except ValueError:
            raise
        except Exception as error:  # the library raises of several kinds
            raise ValueError(
                f"{self.files[0]}: sentencepiece cannot use its tokens ({error}); {GIVE_TOKENIZER}"
            ) from error

    @cached_property
    def _headers(self) -> tuple[Header, ...]:
        headers = tuple(read_gguf_header(path) for path in self.files)
        if len(headers) == 1:
            return headers
        for number, header in enumerate(headers):
            found = header.whole("split.no"), header.whole("split.count")
            if found != (number, len(headers)):
                raise ValueError(
                    f"{header.path} says that it is part {found[0]} (from 0) of {found[1]}, its "
                    f"name that it is part {number} of {len(headers)}; rename it, or fetch it again"
                )
        return headers

    @property
    def _header(self) -> Header:
        return self._headers[0]

    @cached_property
    def _places(self) -> dict[str, TensorPlace]:
        count = self._header.whole("split.count") or 1
        if count != len(self._headers):
            raise ValueError(
                f"{self.files[0]} is one of {count} parts; name it as llama.cpp does, "
                f"NAME-00001-of-{count:05d}.gguf, beside the others"
            )
        found: dict[str, TensorPlace] = {}
        for header in self._headers:
            if twice := found.keys() & header.tensors.keys():
                raise ValueError(f"{header.path} has {min(twice)}, which an earlier part has too")
            found |= header.tensors
        total = self._header.whole("split.tensors.count")
        if total not in (None, len(found)):
            raise ValueError(
                f"{self.files[0]} says that its parts have {total} tensors, they have "
                f"{len(found)}; fetch them again"
            )
        return found

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_hf_config(self._header, self._places)

    @cached_property
    def _tokenizer_files(self) -> Mapping[str, bytes]:
        return rebuild_tokenizer(self._header)


class GgufFormat:
    """Files that end in `.gguf`."""

    name = "gguf"
    suffix = SUFFIX
    file_names = ("*.gguf",)
    computes_values = True

    def find(self, path: Path) -> GgufModel | None:
        """Return the model of a file, of the split set that it belongs to, or of a folder."""
        if path.is_dir():
            found = sorted(one for one in path.iterdir() if one.suffix == SUFFIX)
            parts = [_PART.fullmatch(one.name) for one in found]
            stems = {(part["stem"], part["count"]) if part else one.name
                     for one, part in zip(found, parts, strict=True)}  # fmt: skip
            if not found:
                return None
            if len(stems) > 1:
                names = ", ".join(one.name for one in found[:8])
                raise ValueError(f"{path} has several GGUF models ({names}); name one of the files")
            path = found[0]
        if path.suffix != SUFFIX or not path.exists():
            return None
        return GgufModel(_parts(path))

    def open(self, file: Path) -> TensorSource:
        """Open one file."""
        return GgufSource(file)


def _parts(path: Path) -> tuple[Path, ...]:
    """Return the whole set that a file belongs to. Raises ValueError naming missing parts."""
    part = _PART.fullmatch(path.name)
    if part is None:
        return (path,)
    count = int(part["count"])
    if not 1 <= int(part["number"]) <= count <= _MAX_PARTS:
        raise ValueError(f"{path}: the parts of a set are numbered from 00001 to its count")
    names = [f"{part['stem']}-{k:05d}-of-{count:05d}{SUFFIX}" for k in range(1, count + 1)]
    if missing := [name for name in names if not (path.parent / name).exists()]:
        raise ValueError(
            f"{path.parent} lacks {len(missing)} of {count} parts: {', '.join(missing[:5])}; fetch "
            "them too"
        )
    return tuple(path.parent / name for name in names)


GGUF = GgufFormat()
