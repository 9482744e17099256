"""Checkpoint formats: the table of those that are read, and reading by it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType

from flowspec.weights.formats.base import CheckpointFormat, ModelFiles, TensorSource
from flowspec.weights.formats.gguf import GGUF
from flowspec.weights.formats.hugging_face import BIN, SAFETENSORS
from flowspec.weights.tensor_files import StoredTensor

# In a folder with files of several formats, the first one is read.
FORMATS: Mapping[str, CheckpointFormat] = {one.name: one for one in (SAFETENSORS, BIN, GGUF)}


def find_model(path: Path) -> tuple[CheckpointFormat, ModelFiles]:
    """Return the format and the files of the model at `path`, a folder or a file.

    Raises ValueError when there is none.
    """
    for one in FORMATS.values():
        if (model := one.find(path)) is not None:
            return one, model
    names = ", ".join(name for one in FORMATS.values() for name in one.file_names)
    if not path.is_dir():
        raise ValueError(f"{path} is no model; needed: a folder with one of {names}, or a .gguf")
    found = sorted(file.name for file in path.iterdir())[:12]
    raise ValueError(f"{path} has none of {names}; found: {found}")


def format_of(file: Path) -> CheckpointFormat:
    """Return the format of a weight file."""
    return next(one for one in FORMATS.values() if one.suffix == file.suffix)


class TensorReader:
    """Yields tensors' values in pieces; keeps one source file open at a time."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._source: TensorSource | None = None

    def __enter__(self) -> "TensorReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._close()

    def pieces(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Yield the values of `tensor`, as `TensorSource.pieces` does."""
        if self._source is None or tensor.file != self._path:
            self._close()
            self._source, self._path = format_of(tensor.file).open(tensor.file), tensor.file
        yield from self._source.pieces(tensor)

    def _close(self) -> None:
        source, self._source, self._path = self._source, None, None
        if source is not None:
            source.close()
