"""Checkpoint: an unsplit HF model, found by id or folder and checked against its own config."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from flowspec.model.architecture import DTYPES, ModelConfig, read_config, read_json
from flowspec.model.stage_model import StageModel
from flowspec.weights.manifest import MANIFEST_NAME
from flowspec.weights.tensor_files import StoredTensor, TensorReader, read_bin_header, read_header

EMBEDDING = "model.embed_tokens.weight"
LM_HEAD = "lm_head.weight"
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
_WEIGHT_FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
_SMALL_FILES = ("*.json", "tokenizer.model", "merges.txt", "*.jinja")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A whole model on disk: its config and the place of each tensor that the config requires."""

    folder: Path
    config: ModelConfig
    hf_config: Mapping[str, Any]
    tensors: Mapping[str, StoredTensor]
    stored_dtype: str | None  # None if the tensors differ

    def fingerprint(self) -> str:
        """Return a text that changes with any file of the checkpoint (by size and time)."""
        files = {tensor.file for tensor in self.tensors.values()}
        folders = {path.parent for path in files}
        files |= {folder / name for folder in folders for name in TOKENIZER_FILES}
        files = {path for path in files if path.exists()}
        stats = {path.name: path.resolve().stat() for path in files}
        content = {
            "config": self.hf_config,
            "files": {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()},
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def resolve_model(name_or_path: str, *, offline: bool = False) -> Path:
    """Return the folder of a model: the given folder, or the folder of the HF id in HF's cache.

    The id is fetched unless it is cached; `offline` (or the variable HF_HUB_OFFLINE=1) looks only
    into the cache. Raises ValueError when the name is neither a folder nor an available id.
    """
    if (folder := Path(name_or_path)).is_dir():
        return folder
    folder = _fetch(name_or_path, [*_SMALL_FILES, "*.safetensors"], offline=offline)
    if not any(folder.glob("*.safetensors")):
        folder = _fetch(name_or_path, [*_SMALL_FILES, "*.bin"], offline=offline)
    return folder


def check_model(name_or_path: str, *, offline: bool = False) -> None:
    """Check that there is such a model, without fetching weights; raise ValueError otherwise.

    A folder must have the file that every model, split or not, begins with.
    """
    folder = Path(name_or_path)
    if not folder.is_dir():
        folder = _fetch(name_or_path, ["config.json"], offline=offline)
    if not (folder / MANIFEST_NAME).exists():
        read_config(folder)


def _fetch(name: str, patterns: list[str], *, offline: bool) -> Path:
    """Return the folder in HF's cache with these files of the id `name`. Raises ValueError."""
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


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read the config and headers of a HF model folder; no tensor is read.

    Raises ValueError that names the key, file or tensor that is missing, unknown, damaged or of
    another shape than the config says.
    """
    hf_config = read_json(folder / "config.json")
    config = read_config(folder)
    stored: dict[str, StoredTensor] = {}
    for path in _weight_files(folder):
        read = read_bin_header if path.suffix == ".bin" else read_header
        for name, tensor in read(path).items():
            if name in stored:
                raise ValueError(f"{name} is both in {stored[name].file.name} and {path.name}")
            if not name.endswith(_IGNORED_SUFFIX):
                stored[name] = tensor
    _check_tensors(folder, config, stored)
    if config.tie_word_embeddings and LM_HEAD in stored:
        _check_tied(stored[EMBEDDING], stored.pop(LM_HEAD))
    dtypes = {tensor.dtype for tensor in stored.values()}
    return Checkpoint(
        folder=folder,
        config=config,
        hf_config=hf_config,
        tensors=stored,
        stored_dtype=next(iter(dtypes)) if len(dtypes) == 1 else None,
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


def _weight_files(folder: Path) -> list[Path]:
    for name in _WEIGHT_FILES:
        path = folder / name
        if not path.exists():
            continue
        return _shards(path) if name.endswith(".json") else [path]
    found = sorted(path.name for path in folder.iterdir())[:12]
    raise ValueError(f"{folder} has none of {', '.join(_WEIGHT_FILES)}; found: {found}")


def _shards(index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map; fetch it again")
    names = sorted({str(name) for name in weight_map.values()})
    suffix = ".bin" if ".bin." in index.name else ".safetensors"
    for name in names:
        if Path(name).name != name or not name.endswith(suffix):
            raise ValueError(f"{index} names {name!r}, needed: a {suffix} file beside it")
    missing = [name for name in names if not (index.parent / name).exists()]
    if missing:
        raise ValueError(
            f"{index.parent} lacks {len(missing)} of {len(names)} shards: {_some(missing)}; "
            "fetch them again"
        )
    return [index.parent / name for name in names]


def _check_tensors(folder: Path, config: ModelConfig, stored: Mapping[str, StoredTensor]) -> None:
    expected = part_shapes(config, first_layer=0, last_layer=config.num_layers)
    allowed = {*expected, LM_HEAD} if config.tie_word_embeddings else set(expected)
    if missing := expected.keys() - stored.keys():
        raise ValueError(
            f"{folder} lacks {len(missing)} tensors that its config.json requires: "
            f"{_some(missing)}; fetch the checkpoint again, or correct config.json"
        )
    if unknown := stored.keys() - allowed:
        raise ValueError(
            f"{folder} holds {len(unknown)} tensors that {config.architecture} does not have: "
            f"{_some(unknown)}; is config.json this model's?"
        )
    for name, tensor in stored.items():
        shape = expected.get(name, expected[EMBEDDING])
        if tensor.shape != shape:
            raise ValueError(
                f"{tensor.file}: {name} is {list(tensor.shape)}, config.json asks for "
                f"{list(shape)}; is config.json this model's?"
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


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - 5} more" if len(ordered) > 5 else ""
    return ", ".join(ordered[:5]) + rest
