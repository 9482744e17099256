"""Manifest: the content of a split model, written last, so that its presence means completeness."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from flowspec.model.architecture import DTYPES, read_json
from flowspec.system.files import write_whole

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
HEAD_FOLDER = "head"
WEIGHTS_NAME = "model.safetensors"
_MAX_LAYERS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FileRecord:
    """The expected size and hash of one file."""

    sha256: str
    bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A split model; `layers[k]` is the number of layers of stage k+1, files are relative paths."""

    model_id: str
    architecture: str
    dtype: str
    layers: tuple[int, ...]
    files: Mapping[str, FileRecord]
    source: str  # fingerprint of the checkpoint it was made from
    model_hash: str
    format_version: int = FORMAT_VERSION

    @property
    def num_stages(self) -> int:
        """Return the number of stages, numbered from 1; rank 0 is the head."""
        return len(self.layers)

    def layer_range(self, stage: int) -> tuple[int, int]:
        """Return a stage's first layer and last layer (exclusive). Raises ValueError if unknown."""
        if not 1 <= stage <= self.num_stages:
            raise ValueError(
                f"there is no stage {stage}: {self.model_id} was split into {self.num_stages} "
                f"stages, numbered from 1; split it again with --stages {max(stage, 1)} or more"
            )
        return sum(self.layers[: stage - 1]), sum(self.layers[:stage])

    def stages_of(self, first: int, last: int) -> range:
        """Return the stages that together hold layers `first` to `last` (exclusive), and no others.

        Raises ValueError when the model was cut elsewhere.
        """
        ends = [sum(self.layers[:k]) for k in range(self.num_stages + 1)]
        if first >= last or first not in ends or last not in ends:
            raise ValueError(
                f"{self.model_id} was cut at layers {', '.join(map(str, ends))}, which gives no "
                f"layers {first} to {last}; split it again with every layer by itself"
            )
        return range(ends.index(first) + 1, ends.index(last) + 1)


def stage_folder(stage: int) -> str:
    """Return the name of the folder of stage 1..N."""
    return f"stage_{stage}"


def model_hash(
    files: Mapping[str, FileRecord], *, architecture: str, dtype: str, layers: tuple[int, ...]
) -> str:
    """Return the sha256 of every file and the plan; devices compare it before they cooperate."""
    content = {
        "architecture": architecture,
        "dtype": dtype,
        "layers": layers,
        "files": {name: record.sha256 for name, record in files.items()},
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file's content, as hex."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    return digest.hexdigest()


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically: after a power cut it is either complete or unchanged."""
    write_whole(path, json.dumps(content, indent=1) + "\n")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `manifest.json` of a split model."""
    write_json(folder / MANIFEST_NAME, asdict(manifest))


def read_manifest(folder: Path) -> Manifest:
    """Read and check `manifest.json` of a split model.

    Raises ValueError that says what is wrong.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise ValueError(
            f"{folder} has no {MANIFEST_NAME}: it is not a split model, or was interrupted; "
            "run `flowspec split` (again)"
        )
    content = read_json(path)
    try:
        return parse_manifest(content)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; split the model again") from error


def check_file(folder: Path, manifest: Manifest, name: str, *, verify: bool) -> Path:
    """Check the size of a file of a split model, with `verify` also its sha256; return its path.

    Raises ValueError when it is missing, of another size or of other content.
    """
    path, record = folder / name, manifest.files.get(name)
    if record is None:
        raise ValueError(f"{folder / MANIFEST_NAME} lists no {name}; split the model again")
    found = path.stat().st_size if path.is_file() else None
    if found != record.bytes:
        problem = "is missing" if found is None else f"has {found} bytes"
        raise ValueError(
            f"{path} {problem}, needed: {record.bytes} bytes; copy it again or split again"
        )
    if verify and file_sha256(path) != record.sha256:
        raise ValueError(
            f"{path} is corrupt: its sha256 differs from the manifest; copy it again or split again"
        )
    return path


def parse_files(content: Any) -> dict[str, FileRecord]:
    """Parse the `files` object of a manifest or journal. Raises ValueError for unsafe paths."""
    if not isinstance(content, dict):
        raise ValueError("files must be an object")
    return {_safe(name): _parse_record(name, value) for name, value in content.items()}


def parse_manifest(content: Mapping[str, Any]) -> Manifest:
    """Parse a manifest from untrusted JSON. Raises ValueError that says what is wrong."""
    version = content.get("format_version")
    if version != FORMAT_VERSION:
        raise ValueError(f"format_version is {version!r}, this program reads {FORMAT_VERSION}")
    texts = {key: content.get(key) for key in ("model_id", "architecture", "source", "model_hash")}
    for key, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{key} is {value!r}, needed: a text")
    if content.get("dtype") not in DTYPES:
        raise ValueError(f"dtype is {content.get('dtype')!r}, needed: {', '.join(DTYPES)}")
    unknown = set(content) - set(Manifest.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown keys {sorted(unknown)}")
    layers = _parse_layers(content.get("layers"))
    manifest = Manifest(
        model_id=str(texts["model_id"]),
        architecture=str(texts["architecture"]),
        dtype=content["dtype"],
        layers=layers,
        files=parse_files(content.get("files")),
        source=str(texts["source"]),
        model_hash=str(texts["model_hash"]),
    )
    for part in (HEAD_FOLDER, *(stage_folder(k + 1) for k in range(len(layers)))):
        for name in (WEIGHTS_NAME, "config.json"):
            if f"{part}/{name}" not in manifest.files:
                raise ValueError(f"files lacks {part}/{name}")
    expected = model_hash(
        manifest.files, architecture=manifest.architecture, dtype=manifest.dtype, layers=layers
    )
    if manifest.model_hash != expected:
        raise ValueError("model_hash does not match the listed files (was it edited?)")
    return manifest


def _parse_layers(value: Any) -> tuple[int, ...]:
    counts = value if isinstance(value, list) else []
    whole = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in counts)
    if not counts or not whole or sum(counts) > _MAX_LAYERS:
        raise ValueError(f"layers is {value!r}, needed: a list of layer counts above 0")
    return tuple(counts)


def _parse_record(name: str, value: Any) -> FileRecord:
    record = value if isinstance(value, dict) else {}
    sha256, size = record.get("sha256"), record.get("bytes")
    hexadecimal = isinstance(sha256, str) and len(sha256) == 64 and set(sha256) <= set(_HEX)
    if not hexadecimal or isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise ValueError(f"files[{name!r}] is {value!r}, needed: sha256 and bytes")
    return FileRecord(sha256=str(sha256), bytes=size)


_HEX = "0123456789abcdef"


def _safe(name: str) -> str:
    # A manifest may come from another machine, so it must name nothing outside its folder.
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or ":" in name:
        raise ValueError(f"files names {name!r}, needed: a path inside the folder")
    return name
