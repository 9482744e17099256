"""Splits a checkpoint into one folder per stage, tensor by tensor from file to file.

Layout: `head/` (embedding, lm_head, tokenizer), `stage_1/` .. `stage_N/`, `manifest.json`. The
manifest is written last, so a folder that has one is complete. Until then, a journal lists the
finished files, so that a rerun continues where the last run stopped. `split.lock` lets only one
process write at a time.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowspec.model.architecture import read_json
from flowspec.system.files import locked, replacing, whole_name
from flowspec.weights.checkpoint import Checkpoint
from flowspec.weights.formats import TensorReader
from flowspec.weights.manifest import (
    MANIFEST_NAME,
    FileRecord,
    Manifest,
    file_sha256,
    model_hash,
    parse_files,
    read_manifest,
    write_json,
    write_manifest,
)
from flowspec.weights.split_plan import OutputFile, SplitPlan, plan_split
from flowspec.weights.tensor_files import HashedWriter, converted, header_bytes

JOURNAL_NAME = "split.partial.json"
LOCK_NAME = "split.lock"
OnBytes = Callable[[int], None]


def run_split(
    plan: SplitPlan,
    out: Path,
    *,
    model_id: str,
    on_bytes: OnBytes = lambda _: None,
    on_wait: Callable[[str], None] = lambda _: None,
) -> Manifest:
    """Write `plan` to the folder `out`, or finish an interrupted run of the same plan.

    `on_bytes` is called with the number of bytes just done. Nothing is done if the same split is
    already complete. Only one process splits into a folder at a time; another process calls
    `on_wait` and waits for it. Raises ValueError when `out` holds anything else or the disk is too
    small, and TimeoutError when the other process makes no progress.
    """
    identity = _identity(plan)
    _check_names(plan, out, identity)
    manifest = _whole_split(plan, out, identity)
    if manifest is not None and not (out / JOURNAL_NAME).exists():
        on_bytes(plan.total_bytes)
        return manifest
    if not out.exists():
        _check_room(out, needed=plan.total_bytes)
    out.mkdir(parents=True, exist_ok=True)
    with locked(
        out / LOCK_NAME,
        doing=f"splitting a model into {out}",
        say=on_wait,
        progress=lambda: _sizes(out),
    ):
        return _split(plan, out, identity, model_id, on_bytes)


def _split(plan: SplitPlan, out: Path, identity: str, model_id: str, on_bytes: OnBytes) -> Manifest:
    """Run `run_split` in the one process that holds the folder's lock."""
    _check_names(plan, out, identity)
    _remove_partials(out)
    if (manifest := _whole_split(plan, out, identity)) is not None:
        on_bytes(plan.total_bytes)
        (out / JOURNAL_NAME).unlink(missing_ok=True)
        return manifest
    done = _finished_files(plan, out, identity)
    todo = [file for file in plan.files if file.name not in done]
    on_bytes(sum(plan.file_bytes(file) for file in plan.files if file.name in done))
    _check_room(out, needed=sum(plan.file_bytes(file) for file in todo))
    _write_journal(out, identity, done)
    # Without its manifest the folder is incomplete; damaged files were found in it.
    (out / MANIFEST_NAME).unlink(missing_ok=True)
    with TensorReader() as reader:
        for file in todo:
            done[file.name] = write_file(plan, out / file.name, file, reader, on_bytes)
            _write_journal(out, identity, done)
    architecture = plan.checkpoint.config.architecture
    manifest = Manifest(
        model_id=model_id,
        architecture=architecture,
        dtype=plan.dtype,
        layers=plan.layers,
        files=done,
        source=identity,
        model_hash=model_hash(
            done, architecture=architecture, dtype=plan.dtype, layers=plan.layers
        ),
    )
    write_manifest(out, manifest)
    (out / JOURNAL_NAME).unlink(missing_ok=True)
    return manifest


def is_split_of(manifest: Manifest, checkpoint: Checkpoint) -> bool:
    """Whether the split has exactly the bytes that this checkpoint would give.

    Reads the checkpoint's tensors only if everything else agrees.
    """
    if sum(manifest.layers) != checkpoint.config.num_layers:
        return False
    plan = plan_split(checkpoint, layers=manifest.layers, dtype=manifest.dtype)
    if {file.name for file in plan.files} != set(manifest.files):
        return False
    with TensorReader() as reader:
        return all(
            _sha256(_pieces(plan, file, reader)) == manifest.files[file.name].sha256
            for file in plan.files
        )


def _sha256(pieces: Iterator[bytes | memoryview]) -> str:
    digest = hashlib.sha256()
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()


def _identity(plan: SplitPlan) -> str:
    shape = f"{'+'.join(map(str, plan.layers))}:{plan.dtype}"
    return f"{plan.checkpoint.fingerprint()}:{shape}"


def _check_names(plan: SplitPlan, out: Path, identity: str) -> None:
    """Raise ValueError when `out` holds anything that this program would not have put there.

    What a killed run leaves is always known: its lock exists before all else, and an unfinished
    file is named after its final one.
    """
    if not out.exists():
        return
    if not out.is_dir():
        raise ValueError(f"{out} is a file, but --out needs a folder")
    marks = {LOCK_NAME, MANIFEST_NAME, JOURNAL_NAME}
    present = {name: whole_name(name) for name in _sizes(out)}
    ours = bool(marks & present.keys())
    own = marks | ({file.name for file in plan.files} if ours else set())
    foreign = sorted(name for name in present if present[name] not in own)
    if foreign and ours:
        _check_same(_source(out) or identity, identity, out)  # this error says more
        raise ValueError(f"{out / foreign[0]} is not part of this split; move it away")
    if foreign:
        raise ValueError(
            f"{out} is not empty (it has {foreign[0]}) and not a split of this program; "
            "give another --out, or empty it"
        )


def _whole_split(plan: SplitPlan, out: Path, identity: str) -> Manifest | None:
    """Return the manifest if this split is complete. Raises ValueError for another split.

    Only the sizes of files are checked, so that this is quick; loading checks their hashes.
    """
    if not (out / MANIFEST_NAME).exists():
        return None
    manifest = read_manifest(out)
    _check_same(manifest.source, identity, out)
    whole = all(
        file.name in manifest.files and _has_size(out / file.name, manifest.files[file.name])
        for file in plan.files
    )
    return manifest if whole else None


def _finished_files(plan: SplitPlan, out: Path, identity: str) -> dict[str, FileRecord]:
    """Return the complete files of an earlier run of the plan. Raises ValueError as above."""
    if (out / MANIFEST_NAME).exists():  # some file was damaged later
        records = read_manifest(out).files
    elif (out / JOURNAL_NAME).exists():
        source, records = _read_journal(out)
        _check_same(source, identity, out)
    else:
        return {}
    planned = {file.name for file in plan.files}
    return {
        name: record
        for name, record in records.items()
        if name in planned
        and _has_size(out / name, record)
        and file_sha256(out / name) == record.sha256
    }


def _source(out: Path) -> str:
    """Return the fingerprint of a folder's checkpoint and plan; empty if unknown."""
    if (out / MANIFEST_NAME).exists():
        return read_manifest(out).source
    return _read_journal(out)[0] if (out / JOURNAL_NAME).exists() else ""


def _check_same(source: str, identity: str, out: Path) -> None:
    if source != identity:
        raise ValueError(
            f"{out} holds a split of another checkpoint, layer plan or dtype; give another --out, "
            f"or remove it"
        )


def _remove_partials(out: Path) -> None:
    """Remove the partial files of killed runs; holding the lock, no other process writes."""
    for name in _sizes(out):
        if whole_name(name) != name:
            (out / name).unlink(missing_ok=True)


def _sizes(out: Path) -> dict[str, int]:
    """Return the bytes of each file in a folder, by relative path; files may vanish meanwhile."""
    found = {}
    for path in out.rglob("*"):
        with suppress(FileNotFoundError):
            if not path.is_dir():
                found[path.relative_to(out).as_posix()] = path.lstat().st_size
    return found


def _read_journal(out: Path) -> tuple[str, Mapping[str, FileRecord]]:
    journal = read_json(out / JOURNAL_NAME)
    try:
        return str(journal.get("source")), parse_files(journal.get("files"))
    except ValueError as error:
        raise ValueError(f"{out / JOURNAL_NAME}: {error}; remove {out} and split again") from error


def _has_size(path: Path, record: FileRecord) -> bool:
    return path.is_file() and path.stat().st_size == record.bytes


def _check_room(out: Path, *, needed: int) -> None:
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ValueError(
            f"too little disk for {out}: needed {needed / 1e9:.2f} GB, free {free / 1e9:.2f} GB; "
            "free some, give another --out, or a smaller --dtype"
        )


def _write_journal(out: Path, identity: str, done: Mapping[str, FileRecord]) -> None:
    files: dict[str, Any] = {name: asdict(record) for name, record in done.items()}
    write_json(out / JOURNAL_NAME, {"source": identity, "files": files})


def write_file(
    plan: SplitPlan, path: Path, file: OutputFile, reader: TensorReader, on_bytes: OnBytes
) -> FileRecord:
    """Write one file of a plan to `path` atomically; return its size and hash.

    Raises ValueError when the checkpoint changes meanwhile, or a value does not fit the dtype.
    """
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as partial:
        return write_to(plan, partial, file, reader, on_bytes)


def write_to(
    plan: SplitPlan, path: Path, file: OutputFile, reader: TensorReader, on_bytes: OnBytes
) -> FileRecord:
    """Write one file of a plan directly to `path`, piece by piece. Raises as `write_file` does."""
    with HashedWriter(path) as writer:
        for piece in _pieces(plan, file, reader):
            writer.write(piece)
            on_bytes(len(piece))
        return FileRecord(sha256=writer.finish(), bytes=writer.num_bytes)


def _pieces(
    plan: SplitPlan, file: OutputFile, reader: TensorReader
) -> Iterator[bytes | memoryview]:
    if not file.tensors:
        yield file.content
        return
    yield header_bytes({n: (plan.dtype, tensor.shape) for n, tensor in file.tensors.items()})
    for tensor in file.tensors.values():
        pieces = reader.pieces(tensor)
        yield from (pieces if tensor.dtype == plan.dtype else converted(pieces, tensor, plan.dtype))
