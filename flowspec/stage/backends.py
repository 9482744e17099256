"""The table of stage backends. A new backend takes one file with its class and one row here."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowspec.model.backend import StageBackend
from flowspec.weights.load import load_stage_range


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSource:
    """The source of a stage's layers, and the form in which they are kept."""

    folder: Path  # of the split model
    first_layer: int
    last_layer: int  # exclusive
    device: str = "cpu"
    dtype: str | None = None  # None: as stored
    quantization: str = "none"  # a row of flowspec/model/linear.py's table
    verify: bool = True  # compare the files with the manifest


@dataclass(frozen=True, slots=True)
class BackendSpec:
    """How a backend is loaded. `load` raises ValueError naming what is missing or does not fit."""

    load: Callable[[StageSource], StageBackend[Any]]
    about: str


def _load_torch(source: StageSource) -> StageBackend[Any]:
    return load_stage_range(
        source.folder,
        source.first_layer,
        source.last_layer,
        device=source.device,
        dtype=source.dtype,
        quantization=source.quantization,
        verify=source.verify,
    )


BACKENDS: dict[str, BackendSpec] = {
    "torch": BackendSpec(_load_torch, "this process, with torch"),
}


def find_backend(name: str) -> BackendSpec:
    """Return a row of the table. Raises ValueError listing the known names."""
    if name not in BACKENDS:
        raise ValueError(f"unknown stage backend {name!a}; known: {', '.join(BACKENDS)}")
    return BACKENDS[name]
