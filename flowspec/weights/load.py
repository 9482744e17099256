"""Loads weights from disk into modules: a stage of a split model, the whole model, the head's part.

Modules are made without memory (meta device) and use the mapped tensors directly. Devices and
dtypes are named as in torch; `dtype` None keeps the stored one.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from flowspec.model.architecture import DTYPES, ModelConfig, be_silent, read_config, read_json
from flowspec.model.linear import (
    Quantization,
    checkpoint_shapes,
    find_quantization,
    load_weights,
)
from flowspec.model.rope import Warn
from flowspec.model.stage_model import StageModel
from flowspec.weights.checkpoint import EMBEDDING, LM_HEAD, Checkpoint, open_checkpoint
from flowspec.weights.formats import TensorReader
from flowspec.weights.formats.hugging_face import TOKENIZER_FILES
from flowspec.weights.manifest import (
    HEAD_FOLDER,
    MANIFEST_NAME,
    WEIGHTS_NAME,
    Manifest,
    check_file,
    read_manifest,
    stage_folder,
)
from flowspec.weights.tensor_files import load_bin, read_header

Net = TypeVar("Net", bound=nn.Module)
_REMAP_BYTES = 32 << 20
_MAPPED = (".safetensors", ".bin")  # suffixes of files that `read_tensors` maps


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPart:
    """The head's part of the target: embed_tokens [V, H] and lm_head [V, H], the same when tied."""

    embed_tokens: Tensor
    lm_head: Tensor
    config: ModelConfig


def load_stage(
    folder: Path | str,
    stage: int,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    quantization: str = "none",
    verify: bool = True,
) -> StageModel:
    """Load stage 1..N of a split model; `verify` compares the files' sha256 with the manifest.

    Raises ValueError when there is no such stage, or when a file is missing, corrupt or another
    one.
    """
    first, last = read_manifest(Path(folder)).layer_range(stage)
    return load_stage_range(
        folder, first, last, device=device, dtype=dtype, quantization=quantization, verify=verify
    )


def load_stage_range(
    folder: Path | str,
    first: int,
    last: int,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    quantization: str = "none",
    verify: bool = True,
) -> StageModel:
    """Load layers `first` to `last` (exclusive) of a split model as one stage, across its parts.

    The range must begin and end where parts do; a model split into single layers allows every
    range. The first layer brings the embedding, the last one the norm and the lm_head. Only the
    folders of these parts are needed. `quantization` names how linear layers
    store their weight (flowspec/model/linear.py). Raises ValueError as `load_stage` does.
    """
    chosen = find_quantization(quantization)
    folder = Path(folder)
    manifest = read_manifest(folder)
    stages = manifest.stages_of(first, last)
    configs = [_stage_config(folder, manifest, stage, verify=verify) for stage in stages]
    model = _empty_stage(configs[0], first, last, chosen)
    tensors: dict[str, Tensor] = {}
    for stage in stages:
        path = check_file(folder, manifest, f"{stage_folder(stage)}/{WEIGHTS_NAME}", verify=verify)
        tensors.update(read_tensors(path, device=device, dtype=dtype))
    if configs[0].tie_word_embeddings and EMBEDDING in tensors:
        tensors.pop(LM_HEAD, None)  # this copy serves only a last part without embedding
    return _fill_stage(model, tensors, folder)


def _stage_config(folder: Path, manifest: Manifest, stage: int, *, verify: bool) -> ModelConfig:
    part = stage_folder(stage)
    # No warnings here: the head has already printed them.
    config = _part_config(folder, manifest, part, verify=verify, warn=be_silent)
    first, last = manifest.layer_range(stage)
    about = read_json(folder / stage_folder(stage) / "config.json").get("flowspec")
    found = about if isinstance(about, dict) else {}
    if (found.get("first_layer"), found.get("last_layer")) != (first, last):
        raise ValueError(
            f"{folder / stage_folder(stage)} was made for layers {found.get('first_layer')} to "
            f"{found.get('last_layer')}, the manifest says {first} to {last}; split again"
        )
    return config


def load_whole(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    quantization: str = "none",
    verify: bool = True,
) -> StageModel:
    """Load the target alone: all layers, embedding and lm_head, of a checkpoint or a split model.

    Raises ValueError as `open_checkpoint` and `load_stage_range` do.
    """
    chosen = find_quantization(quantization)
    folder = Path(folder)
    tensors: dict[str, Tensor] = {}
    if (folder / MANIFEST_NAME).exists():
        manifest = read_manifest(folder)
        config = _part_config(folder, manifest, HEAD_FOLDER, verify=verify)
        names = [f"{stage_folder(k + 1)}/{WEIGHTS_NAME}" for k in range(manifest.num_stages)]
        for name in names:
            path = check_file(folder, manifest, name, verify=verify)
            tensors.update(read_tensors(path, device=device, dtype=dtype))
    else:
        checkpoint = open_checkpoint(folder)
        config = checkpoint.config
        tensors = _read_checkpoint(checkpoint, device=device, dtype=dtype)
    if config.tie_word_embeddings:
        tensors.pop(LM_HEAD, None)
    return _fill_stage(_empty_stage(config, 0, config.num_layers, chosen), tensors, folder)


def _read_checkpoint(
    checkpoint: Checkpoint, *, device: torch.device | str, dtype: str | None
) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, mapped where its format allows."""
    dtype = dtype or checkpoint.stored_dtype
    if dtype is None or dtype not in DTYPES:
        what = "mixes dtypes" if dtype is None else f"cannot be loaded as {dtype!r}"
        raise ValueError(f"{checkpoint.path} {what}; choose one ({', '.join(DTYPES)})")
    tensors: dict[str, Tensor] = {}
    files = sorted({tensor.file for tensor in checkpoint.tensors.values()})
    if all(path.suffix in _MAPPED for path in files):
        for path in files:
            tensors.update(read_tensors(path, device=device, dtype=dtype))
        return tensors
    with TensorReader() as reader:
        for name, stored in checkpoint.tensors.items():
            values = torch.empty(stored.num_values, dtype=getattr(torch, dtype), device=device)
            done = 0
            for piece in reader.pieces(stored):
                part = torch.frombuffer(piece, dtype=getattr(torch, stored.dtype))
                values[done : done + len(part)] = part
                done += len(part)
            tensors[name] = values.view(stored.shape)
    return tensors


def load_head_part(
    folder: Path | str,
    *,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
    verify: bool = True,
) -> HeadPart:
    """Load the head's embedding and lm_head from `head/` of a split model.

    Raises ValueError when a file is missing, corrupt or another one.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    config = _part_config(folder, manifest, HEAD_FOLDER, verify=verify)
    _check_tokenizer_files(folder, manifest, verify=verify)
    path = check_file(folder, manifest, f"{HEAD_FOLDER}/{WEIGHTS_NAME}", verify=verify)
    tensors = read_tensors(path, device=device, dtype=dtype)
    shape = (config.vocab_size, config.hidden_size)
    expected = (
        {EMBEDDING: shape} if config.tie_word_embeddings else {EMBEDDING: shape, LM_HEAD: shape}
    )
    check_tensors(expected, tensors, path)
    embedding = tensors[EMBEDDING]
    return HeadPart(embed_tokens=embedding, lm_head=tensors.get(LM_HEAD, embedding), config=config)


def read_tensors(
    path: Path, *, device: torch.device | str = "cpu", dtype: str | None = None
) -> dict[str, Tensor]:
    """Return all tensors of a safetensors or `.bin` file, mapped where nothing has to change.

    Raises ValueError when the file is damaged or `dtype` is not one of DTYPES.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not supported: {', '.join(DTYPES)}")
    target = None if dtype is None else getattr(torch, dtype)

    def place(tensor: Tensor) -> Tensor:
        # Integer tables, such as a vocabulary map, keep their type.
        return tensor.to(device, target if tensor.is_floating_point() else None)

    if path.suffix == ".bin":
        stored = load_bin(path)
        return {name: place(tensor) for name, tensor in stored.items() if not _is_ignored(name)}
    return _read_safetensors(path, place)


def _is_ignored(name: str) -> bool:
    return name.endswith("rotary_emb.inv_freq")


def _read_safetensors(path: Path, place: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return all tensors after `place`: the mapped tensors themselves, or copies."""
    left = [name for name in read_header(path) if not _is_ignored(name)]
    tensors: dict[str, Tensor] = {}
    while left:
        copied_bytes = 0
        try:
            with safe_open(path, framework="pt") as file:
                # Pages that were copied from count as memory until they are unmapped.
                while left and copied_bytes < _REMAP_BYTES:
                    name = left.pop()
                    mapped = file.get_tensor(name)
                    tensors[name] = place(mapped)
                    copied_bytes += mapped.nbytes if tensors[name] is not mapped else 0
        except SafetensorError as error:
            raise ValueError(f"{path} cannot be read ({error}); fetch it again") from error
    return tensors


def check_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor], where: Path
) -> None:
    """Check that names and shapes are equal; ValueError names the first that differ."""
    missing, unknown = (
        sorted(expected.keys() - found.keys()),
        sorted(found.keys() - expected.keys()),
    )
    if missing or unknown:
        raise ValueError(
            f"{where}: missing tensors {missing[:5]}, unexpected tensors {unknown[:5]} "
            f"({len(missing)} and {len(unknown)} in all)"
        )
    for name, shape in expected.items():
        if tuple(found[name].shape) != shape:
            raise ValueError(f"{where}: {name} is {list(found[name].shape)}, needed: {list(shape)}")


def fill(model: Net, tensors: Mapping[str, Tensor], where: Path) -> Net:
    """Make `tensors` the parameters of `model`, for inference.

    Raises ValueError unless they fit.
    """
    check_tensors(checkpoint_shapes(model), tensors, where)
    load_weights(model, tensors)
    return model.eval()


def _part_config(
    folder: Path, manifest: Manifest, part: str, *, verify: bool, warn: Warn | None = None
) -> ModelConfig:
    check_file(folder, manifest, f"{part}/config.json", verify=verify)
    config = read_config(folder / part, warn=warn)
    if config.num_layers != sum(manifest.layers) or config.architecture != manifest.architecture:
        raise ValueError(
            f"{folder / part}/config.json is of a {config.architecture} with {config.num_layers} "
            f"layers, the manifest of a {manifest.architecture} with {sum(manifest.layers)}; "
            "split again"
        )
    return config


def _check_tokenizer_files(folder: Path, manifest: Manifest, *, verify: bool) -> None:
    """Check that the tokenizer's files are those of the manifest: they decide a text's tokens."""
    for name in (f"{HEAD_FOLDER}/{file}" for file in TOKENIZER_FILES):
        if name in manifest.files:
            check_file(folder, manifest, name, verify=verify)
        elif (folder / name).exists():
            raise ValueError(
                f"{folder / name} is not part of this split and would change its tokenizer; remove "
                "it, or put it beside the unsplit model and split that again"
            )


def _empty_stage(
    config: ModelConfig, first: int, last: int, quantization: Quantization
) -> StageModel:
    with torch.device("meta"):
        return StageModel(
            config,
            first_layer=first,
            last_layer=last,
            with_embedding=first == 0,
            with_head=last == config.num_layers,
            quantization=quantization,
        )


def _fill_stage(model: StageModel, tensors: Mapping[str, Tensor], where: Path) -> StageModel:
    fill(model, tensors, where)
    if LM_HEAD not in tensors and model.lm_head is not None:
        model.lm_head.weight = model.get_parameter(EMBEDDING)
    return model
