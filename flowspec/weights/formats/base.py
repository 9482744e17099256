"""The seam of checkpoint formats: what a kind of file must offer so that a model can be split."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from flowspec.model.architecture import ModelConfig
from flowspec.weights.tensor_files import StoredTensor


class TensorSource(Protocol):
    """One open weight file, read tensor by tensor through a small buffer."""

    def pieces(self, tensor: StoredTensor) -> Iterator[memoryview]:
        """Yield the values of `tensor` in row-major order, in pieces, in its `dtype`.

        A piece holds whole values, and is valid until the next but one is read. Raises ValueError
        when the file has become shorter since its header was read.
        """

    def close(self) -> None:
        """Close the file."""


class ModelFiles(Protocol):
    """The files of one model. Every method raises ValueError that names what is wrong."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Return the weight files."""

    def hf_config(self) -> dict[str, Any]:
        """Return the model's config in the keys of a Hugging Face `config.json`."""

    def model_config(self) -> ModelConfig:
        """Return the config of the forward pass, with every end token that the files name."""

    def tensors(self) -> dict[str, StoredTensor]:
        """Return every tensor by its Hugging Face name; only headers are read."""

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Return the files of a tokenizer folder, by name; none where there is no tokenizer."""

    def check_tokenizer(self) -> None:
        """Raise ValueError when the tokenizer is missing, damaged or of an unsupported kind."""


class CheckpointFormat(Protocol):
    """One row of the table of formats."""

    @property
    def name(self) -> str:
        """Return the name of the format."""

    @property
    def suffix(self) -> str:
        """Return the suffix of its weight files."""

    @property
    def file_names(self) -> tuple[str, ...]:
        """Return the names that its weight files have in a model folder, for messages."""

    @property
    def computes_values(self) -> bool:
        """Whether values are computed from what is stored, so that they have no dtype of theirs."""

    def find(self, path: Path) -> ModelFiles | None:
        """Return the model at `path`, a file or a folder; None if it has none of this format.

        Raises ValueError when a file of the set is missing, or when there are several models.
        """

    def open(self, file: Path) -> TensorSource:
        """Open one weight file."""
