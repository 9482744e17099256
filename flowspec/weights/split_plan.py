"""Plans a split: which tensors and texts go into which file of which stage's folder."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from flowspec.model.architecture import DTYPES
from flowspec.weights.checkpoint import (
    EMBEDDING,
    LM_HEAD,
    Checkpoint,
    part_shapes,
)
from flowspec.weights.manifest import HEAD_FOLDER, WEIGHTS_NAME, stage_folder
from flowspec.weights.tensor_files import ITEM_BYTES, StoredTensor


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputFile:
    """One file to write: tensors (name there -> tensor here), or ready content."""

    name: str
    tensors: Mapping[str, StoredTensor]
    content: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPlan:
    """Everything that a split will write; nothing has been written yet."""

    checkpoint: Checkpoint
    layers: tuple[int, ...]
    dtype: str
    files: tuple[OutputFile, ...]

    def file_bytes(self, file: OutputFile) -> int:
        """Return the bytes of one file's tensors or content, without its header."""
        if not file.tensors:
            return len(file.content)
        return sum(
            tensor.num_bytes // ITEM_BYTES[tensor.dtype] * ITEM_BYTES[self.dtype]
            for tensor in file.tensors.values()
        )

    @property
    def total_bytes(self) -> int:
        """Return the bytes to write, which the progress adds up to."""
        return sum(self.file_bytes(file) for file in self.files)


def even_layers(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Return the layers per stage, as even as possible; the last stages get fewer.

    The last stage also has the lm_head. Raises ValueError unless 1 <= num_stages <= num_layers.
    """
    if not 1 <= num_stages <= num_layers:
        raise ValueError(
            f"--stages {num_stages}: the model has {num_layers} layers, so 1 to {num_layers} "
            "stages are possible"
        )
    each, rest = divmod(num_layers, num_stages)
    return tuple(each + (k < rest) for k in range(num_stages))


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse `8+8+8+8` as numbers. Raises ValueError for any other text."""
    parts = text.replace(" ", "").split("+")
    good = (part.isascii() and part.isdigit() and len(part) < 7 and int(part) for part in parts)
    if not all(good):
        raise ValueError(
            f"--layers {text[:80]!a}: write layer counts of 1 or more joined by +, as in 8+8+8+8"
        )
    return tuple(int(part) for part in parts)


def plan_split(
    checkpoint: Checkpoint,
    *,
    layers: tuple[int, ...],
    dtype: str | None = None,
    has_head: bool = True,
) -> SplitPlan:
    """Decide which tensors go into which file; `dtype` None keeps the stored one.

    Without `has_head` the head's files, and so the tokenizer, are left out.
    Raises ValueError when `layers` does not add up to the model, or the dtype is unsupported or
    mixed.
    """
    config = checkpoint.config
    if sum(layers) != config.num_layers or any(count < 1 for count in layers):
        raise ValueError(
            f"--layers {'+'.join(map(str, layers))} adds up to {sum(layers)}, the model has "
            f"{config.num_layers} layers and every stage needs at least one"
        )
    dtype = dtype or checkpoint.stored_dtype
    if dtype is None:
        found = sorted({tensor.dtype for tensor in checkpoint.tensors.values()})
        raise ValueError(f"the checkpoint mixes {', '.join(found)}; choose one with --dtype")
    if dtype not in DTYPES:
        raise ValueError(f"--dtype {dtype!r} is not supported: {', '.join(DTYPES)}")
    head = _head_files(checkpoint, layers, dtype) if has_head else ()
    files = (*head, *_stage_files(checkpoint, layers, dtype))
    return SplitPlan(checkpoint=checkpoint, layers=layers, dtype=dtype, files=files)


def _head_files(
    checkpoint: Checkpoint, layers: tuple[int, ...], dtype: str
) -> Iterator[OutputFile]:
    names = [name for name in (EMBEDDING, LM_HEAD) if name in checkpoint.tensors]
    tensors = {name: checkpoint.tensors[name] for name in names}
    yield OutputFile(name=f"{HEAD_FOLDER}/{WEIGHTS_NAME}", tensors=tensors)
    about = {"part": "head", "num_stages": len(layers)}
    yield _config_file(checkpoint, HEAD_FOLDER, dtype, about)
    for name, content in checkpoint.tokenizer_files().items():
        yield OutputFile(name=f"{HEAD_FOLDER}/{name}", tensors={}, content=content)


def _stage_files(
    checkpoint: Checkpoint, layers: tuple[int, ...], dtype: str
) -> Iterator[OutputFile]:
    stored = checkpoint.tensors
    for stage, end in enumerate(accumulate(layers), start=1):
        first = end - layers[stage - 1]
        names = part_shapes(checkpoint.config, first_layer=first, last_layer=end)
        # A stage without the embedding gets a copy of it as its tied lm_head.
        tensors = {name: stored.get(name) or stored[EMBEDDING] for name in names}
        in_file_order = sorted(tensors, key=lambda n: (tensors[n].file, tensors[n].offset))
        yield OutputFile(
            name=f"{stage_folder(stage)}/{WEIGHTS_NAME}",
            tensors={name: tensors[name] for name in in_file_order},
        )
        about = {
            "part": "stage",
            "stage": stage,
            "num_stages": len(layers),
            "first_layer": first,
            "last_layer": end,
        }
        yield _config_file(checkpoint, stage_folder(stage), dtype, about)


def _config_file(
    checkpoint: Checkpoint, folder: str, dtype: str, about: Mapping[str, object]
) -> OutputFile:
    content = {**checkpoint.hf_config, "torch_dtype": dtype, "flowspec": about}
    if "dtype" in content:
        content["dtype"] = content.pop("torch_dtype")
    text = json.dumps(content, indent=1, sort_keys=True) + "\n"
    return OutputFile(name=f"{folder}/config.json", tensors={}, content=text.encode())
