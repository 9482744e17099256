"""Checkpoint: an unsplit model, found by id or path and checked against its own config."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowspec.model.architecture import DTYPES, ModelConfig, read_config
from flowspec.model.stage_model import StageModel
from flowspec.tokenizer import load_tokenizer
from flowspec.weights.formats import TensorReader, find_model
from flowspec.weights.formats.base import ModelFiles
from flowspec.weights.formats.hugging_face import TOKENIZER_FILES, read_tokenizer_files, some
from flowspec.weights.manifest import MANIFEST_NAME
from flowspec.weights.tensor_files import StoredTensor

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
_SMALL_FILES = ("*.json", "tokenizer.model", "merges.txt", "*.jinja")
_PART_NUMBER = re.compile(r"-\d{5}-of-\d{5}$")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole model on disk: its config and the place of each tensor that the config requires."""

    path: Path  # a folder, or a file that holds everything
    model: ModelFiles
    config: ModelConfig
    hf_config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    stored_dtype: str | None  # None if the tensors differ
    computes_values: bool = False  # from quantized ones, so that any dtype is as good as stored
    tokenizer_folder: Path | None = None  # in place of the model's own tokenizer

    @property
    def name(self) -> str:
        """Return the name of the folder, or of the file without suffix and number of a part."""
        if self.path.is_dir():
            return self.path.resolve().name
        return _PART_NUMBER.sub("", self.path.stem)

    def tokenizer_files(self) -> Mapping[str, bytes]:
        """Return the files of the tokenizer's folder, by name."""
        if self.tokenizer_folder is not None:
            return read_tokenizer_files(self.tokenizer_folder)
        return self.model.tokenizer_files()

    def check_tokenizer(self) -> None:
        """Raise ValueError when the tokenizer cannot be loaded, before anything is split."""
        if self.tokenizer_folder is not None:
            load_tokenizer(self.tokenizer_folder)
        else:
            self.model.check_tokenizer()

    def fingerprint(self) -> str:
        """Return a text that changes with any file of the checkpoint (by size and time)."""
        files = {tensor.file for tensor in self.tensors.values()}
        folders = {path.parent for path in files}
        own = self.tokenizer_folder
        if own is None:
            files |= {folder / name for folder in folders for name in TOKENIZER_FILES}
        content: dict[str, Any] = {"config": self.hf_config, "files": _stats(files)}
        if own is not None:
            content["tokenizer"] = _stats({own / name for name in TOKENIZER_FILES})
        elif self.computes_values:  # also with the way in which it is rebuilt
            content["tokenizer"] = {
                name: hashlib.sha256(raw).hexdigest()
                for name, raw in self.tokenizer_files().items()
            }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stats(files: set[Path]) -> dict[str, tuple[int, int]]:
    """Return size and time of the files that exist, by name."""
    stats = {path.name: path.resolve().stat() for path in files if path.exists()}
    return {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}


def resolve_model(name_or_path: str, *, offline: bool = False) -> Path:
    """Return the path of a model: the given folder or file, or the folder of an id in HF's cache.

    The id is fetched unless it is cached; `offline` (or the variable HF_HUB_OFFLINE=1) looks only
    into the cache. Raises ValueError when the name is neither a path nor an available id.
    """
    if (path := Path(name_or_path)).exists():
        return path
    folder = _fetch(name_or_path, [*_SMALL_FILES, "*.safetensors"], offline=offline)
    if not any(folder.glob("*.safetensors")):
        folder = _fetch(name_or_path, [*_SMALL_FILES, "*.bin"], offline=offline)
    return folder


def check_model(name_or_path: str, *, offline: bool = False) -> None:
    """Check that there is such a model, without fetching weights; raise ValueError otherwise.

    A folder must have the file that every model, split or not, begins with.
    """
    path = Path(name_or_path)
    if not path.exists():
        path = _fetch(name_or_path, ["config.json"], offline=offline)
    if not (path / MANIFEST_NAME).exists():
        read_model_config(path)


def read_model_config(path: Path) -> ModelConfig:
    """Read the config of an unsplit model, whose weights need not be there if it is a folder.

    Raises ValueError as `open_checkpoint` does.
    """
    if (path / "config.json").exists():
        return read_config(path)
    return find_model(path)[1].model_config()


def resolve_tokenizer(name_or_path: str, *, offline: bool = False) -> Path | None:
    """Return the folder of a tokenizer, None for an empty name. Raises as `resolve_model` does."""
    if not name_or_path or (path := Path(name_or_path)).is_dir():
        return path if name_or_path else None
    return _fetch(name_or_path, list(_SMALL_FILES), offline=offline)


def _fetch(name: str, patterns: list[str], *, offline: bool) -> Path:
    """Return the folder in HF's cache with these files of the id `name`. Raises ValueError."""
    if name.endswith(".gguf"):
        raise ValueError(f"there is no file {name}")
    if not _HUB_ID.fullmatch(name):
        raise ValueError(f"{name} is neither a folder nor a Hugging Face id (name or owner/name)")
    # Imported here, because a worker that is sent its layers needs no hub client.
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                name,
                allow_patterns=patterns,
                ignore_patterns=["*/*", "consolidated*"],
                local_files_only=offline,
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ValueError(
            f"{name} is not a folder here, and fetching it as a Hugging Face id failed "
            f"({reason}); give a folder, or download it where the hub is reachable "
            "(`hf download`, `hf auth login` for gated models) and set HF_HUB_OFFLINE=1"
        ) from error


def open_checkpoint(path: Path, *, tokenizer: Path | None = None) -> Checkpoint:
    """Read the config and headers of a model, a folder or a file; no tensor is read.

    `tokenizer` is a folder whose tokenizer takes the place of the model's own. Raises ValueError
    that names the key, file or tensor that is missing, unknown, damaged or of another shape than
    the config says.
    """
    found, model = find_model(path)
    hf_config = model.hf_config()
    config = model.model_config()
    stored = model.tensors()
    _check_tensors(path, config, stored, "metadata" if found.computes_values else "config.json")
    if tokenizer is not None:  # with it go the end tokens of generation_config.json
        hf_config = {**hf_config, "eos_token_id": list(config.eos_token_ids)}
    if config.tie_word_embeddings and LM_HEAD in stored:
        _check_tied(stored[EMBEDDING], stored.pop(LM_HEAD))
    dtypes = {tensor.dtype for tensor in stored.values()}
    one = next(iter(dtypes)) if len(dtypes) == 1 else None
    return Checkpoint(
        path=path,
        model=model,
        config=config,
        hf_config=hf_config,
        tensors=stored,
        stored_dtype=one or ("float32" if found.computes_values else None),
        computes_values=found.computes_values,
        tokenizer_folder=tokenizer,
    )


def part_shapes(
    config: ModelConfig, *, first_layer: int, last_layer: int
) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of the tensors of a stage with these layers.

    A tied lm_head is left out if the stage has the embedding.
    """
    with torch.device("meta"):
        stage = StageModel(
            config,
            first_layer=first_layer,
            last_layer=last_layer,
            with_embedding=first_layer == 0,
            with_head=last_layer == config.num_layers,
        )
    return {name: tuple(tensor.shape) for name, tensor in stage.named_parameters()}


def _check_tensors(
    path: Path, config: ModelConfig, stored: Mapping[str, StoredTensor], source: str
) -> None:
    """Compare names, shapes and dtypes with the config, which `source` holds. Raises ValueError."""
    expected = part_shapes(config, first_layer=0, last_layer=config.num_layers)
    allowed = {*expected, LM_HEAD} if config.tie_word_embeddings else set(expected)
    if missing := expected.keys() - stored.keys():
        raise ValueError(
            f"{path} lacks {len(missing)} tensors that its {source} requires: "
            f"{some(set(missing))}; fetch the checkpoint again, or correct {source}"
        )
    if unknown := stored.keys() - allowed:
        raise ValueError(
            f"{path} holds {len(unknown)} tensors that {config.architecture} does not have: "
            f"{some(set(unknown))}; is {source} this model's?"
        )
    for name, tensor in stored.items():
        shape = expected.get(name, expected[EMBEDDING])
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.file}: {name} is {list(tensor.shape)}, {source} asks for "
                f"{list(shape)}; is {source} this model's?"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"{tensor.file}: {name} is stored as {tensor.dtype}, supported: "
                f"{', '.join(DTYPES)}; use an unquantised checkpoint"
            )


def _check_tied(embedding: StoredTensor, lm_head: StoredTensor) -> None:
    """Accept a tied lm_head that is stored too if it equals the embedding; else ValueError."""
    same = embedding.dtype == lm_head.dtype
    with TensorReader() as one, TensorReader() as other:
        same = same and all(
            a == b for a, b in zip(one.pieces(embedding), other.pieces(lm_head), strict=True)
        )
    if not same:
        raise ValueError(
            "config.json says tie_word_embeddings, but the stored lm_head.weight is not the "
            "embedding; set tie_word_embeddings to false"
        )
