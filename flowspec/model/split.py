"""Splitting a checkpoint into one folder per stage, tensor by tensor from file to file.

Layout: `head/` (embedding, lm_head, tokenizer), `stage_1/` .. `stage_N/`, `manifest.json`. The
manifest is written last: a folder with one is whole. Until then a journal names the files that are
finished, so that a rerun goes on where the last one stopped.
"""

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from flowspec.model.config import read_json
from flowspec.model.manifest import (
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
from flowspec.model.source import Checkpoint
from flowspec.model.split_plan import OutputFile, SplitPlan, plan_split
from flowspec.model.tensor_files import (
    HashedWriter,
    TensorReader,
    converted,
    header_bytes,
)

JOURNAL_NAME = "split.partial.json"
_PARTIAL = ".partial"
OnBytes = Callable[[int], None]


def run_split(
    plan: SplitPlan, out: Path, *, model_id: str, on_bytes: OnBytes = lambda _: None
) -> Manifest:
    """Write `plan` to the folder `out`, or finish what an interrupted run of the same plan left.

    `on_bytes` is called with the number of bytes just done. Nothing is done where the same split is
    whole already. Raises ValueError when `out` holds anything else or the disk is too small.
    """
    identity = _identity(plan)
    done = _finished_files(plan, out, identity)
    todo = [file for file in plan.files if file.name not in done]
    on_bytes(sum(plan.file_bytes(file) for file in plan.files if file.name in done))
    if todo or not (out / MANIFEST_NAME).exists():
        _check_room(out, needed=sum(plan.file_bytes(file) for file in todo))
        out.mkdir(parents=True, exist_ok=True)
        _write_journal(out, identity, done)
        # Without its manifest the folder is not whole; damaged files were found in it.
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
    if todo or not (out / MANIFEST_NAME).exists():
        write_manifest(out, manifest)
    (out / JOURNAL_NAME).unlink(missing_ok=True)
    return manifest


def is_split_of(manifest: Manifest, checkpoint: Checkpoint) -> bool:
    """Whether the split has the very bytes that this checkpoint would give, wherever it was made.

    Reads the checkpoint where everything else agrees.
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


def _finished_files(plan: SplitPlan, out: Path, identity: str) -> dict[str, FileRecord]:
    """Files of an earlier run of the same plan that are whole; clears away what it left half done.

    Raises ValueError when `out` holds another split or anything foreign.
    """
    if not out.exists():
        return {}
    if not out.is_dir():
        raise ValueError(f"{out} is a file; give --out a folder")
    present = {str(path.relative_to(out)) for path in out.rglob("*") if not path.is_dir()}
    whole = MANIFEST_NAME in present
    if not whole and JOURNAL_NAME not in present:
        if present:
            raise ValueError(
                f"{out} is not empty (it has {sorted(present)[0]}) and no split of this program; "
                "give another --out, or empty it"
            )
        return {}
    found, records = _earlier_run(out, whole=whole)
    if found != identity:
        raise ValueError(
            f"{out} has a split of another checkpoint, layer plan or dtype; give another --out, "
            f"or remove it"
        )
    planned = {file.name for file in plan.files}
    own = {MANIFEST_NAME, JOURNAL_NAME, *planned}
    for name in present - own:
        if name.removesuffix(_PARTIAL) not in own:
            raise ValueError(f"{out / name} is no part of this split; move it away")
        (out / name).unlink()
    return {
        name: record
        for name, record in records.items()
        if name in planned and _is_whole(out / name, record, by_content=not whole)
    }


def _earlier_run(out: Path, *, whole: bool) -> tuple[str, dict[str, FileRecord]]:
    if whole:
        manifest = read_manifest(out)
        return manifest.source, dict(manifest.files)
    journal = read_json(out / JOURNAL_NAME)
    try:
        return str(journal.get("source")), parse_files(journal.get("files"))
    except ValueError as error:
        raise ValueError(f"{out / JOURNAL_NAME}: {error}; remove {out} and split again") from error


def _is_whole(path: Path, record: FileRecord, *, by_content: bool) -> bool:
    # A finished split is only measured, so that asking again is quick; loading checks its hashes.
    if not path.is_file() or path.stat().st_size != record.bytes:
        return False
    return not by_content or file_sha256(path) == record.sha256


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
    """Write one file of a plan to `path`, which is there whole or not at all; what it has become.

    Raises ValueError where the checkpoint changes meanwhile, or a value does not fit the dtype.
    """
    path.parent.mkdir(exist_ok=True)
    partial = path.with_name(path.name + _PARTIAL)
    try:
        with HashedWriter(partial) as writer:
            for piece in _pieces(plan, file, reader):
                writer.write(piece)
                on_bytes(len(piece))
            record = FileRecord(sha256=writer.sha256(), bytes=writer.num_bytes)
        partial.replace(path)
    except BaseException:
        # Also on Ctrl-C. What a kill leaves is cleared by the rerun.
        with suppress(OSError):
            partial.unlink()
        raise
    return record


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
