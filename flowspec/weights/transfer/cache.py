"""Weights on a device's disk, each file under its own sha256, and models put together from them.

`shards/<sha256>` are whole files, `shards/<sha256>.partial` what has come of one so far;
`models/<model hash>/` is laid out as a split folder, of links. Nothing is written elsewhere.
"""

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import pwd
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from flowspec.request import ClusterError
from flowspec.system.files import partial_path, remove_stale
from flowspec.system.home import home_folder
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.manifest import (
    MANIFEST_NAME,
    WEIGHTS_NAME,
    FileRecord,
    Manifest,
    file_sha256,
    read_manifest,
    stage_folder,
    write_manifest,
)
from flowspec.weights.split import write_to
from flowspec.weights.split_plan import plan_split
from flowspec.weights.tensor_files import TensorReader

HERE = "this device"
RESERVE_BYTES = 64 << 20  # left free for everybody else
LOCK_NAME = ".lock"  # in `models`: held while links are made
LOCK_LIMIT_S = 10.0
_READ_BYTES = 1 << 20
_HEX = frozenset("0123456789abcdef")
_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


class WrongHashError(Exception):
    """A file is not what the manifest says; `resumed`: part of it came in an earlier run."""

    def __init__(self, record: FileRecord, *, resumed: bool) -> None:
        super().__init__(record.sha256)
        self.record, self.resumed = record, resumed


def cache_folder() -> Path:
    """`$XDG_CACHE_HOME/flowspec`, else `~/.cache/flowspec`. Raises ValueError without a home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # by the XDG specification, a relative path is to be ignored
    if Path(base).is_absolute():
        return Path(base) / "flowspec"
    return home_folder(instead="XDG_CACHE_HOME") / ".cache" / "flowspec"


def shard_files(manifest: Manifest, shards: Iterable[int]) -> dict[str, FileRecord]:
    """Name in a split folder -> record, of the files of stages `shards` (from 1).

    Raises ValueError where there is no such stage.
    """
    names = []
    for shard in shards:
        manifest.layer_range(shard)
        names += [f"{stage_folder(shard)}/{name}" for name in ("config.json", WEIGHTS_NAME)]
    return {name: manifest.files[name] for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheProblem:
    """What is in the way of using a cache. `is_fatal`: no layers can be used from it at all."""

    found: str
    fix: str
    is_fatal: bool = True


def find_problem(root: Path) -> CacheProblem | None:
    """Try in `root` what getting layers does there: make folders, write, lock, rename, link.

    The folders and the lock of `models` stay; other processes may use them by then.

    None where all of it works. A disk that is full is fatal only where no layers are there yet.
    """
    shards, models = root / "shards", root / "models"
    elsewhere = "set XDG_CACHE_HOME (or join --cache) to a folder of yours on a disk with room"
    failed = _try_out(shards, models)
    if failed is not None and failed.error.errno not in _FULL:
        found = f"the cache {root} cannot be used: {failed.doing} fails: {_why(root, failed)}"
        return CacheProblem(found=found, fix=elsewhere)
    free = shutil.disk_usage(shards).free if failed is None else 0
    if free >= RESERVE_BYTES:
        return None
    return CacheProblem(
        found=f"the disk of the cache {root} is full: free {free / 1e6:.0f} MB, needed "
        f"{RESERVE_BYTES / 1e6:.0f} MB and the layers",
        fix=f"free some, or {elsewhere}",
        is_fatal=not _has_layers(shards),
    )


class _Failed(NamedTuple):
    """What was being done to which path, and the system's answer."""

    doing: str
    path: Path
    error: OSError


def _try_out(shards: Path, models: Path) -> _Failed | None:
    """What failed, and how; the files that were made for it are removed again."""
    made: list[Path] = []
    handle, doing, path = -1, "making folders", shards
    try:
        _make_folders(shards)
        path = models
        _make_folders(models)
        doing, path = "writing", shards
        handle, name = tempfile.mkstemp(prefix=".check-", dir=shards)
        made = [Path(name), Path(f"{name}.renamed"), models / f"{Path(name).name}.link"]
        os.write(handle, bytes(4096))
        os.fsync(handle)  # some disks say only then that they are full
        doing = "locking a file"
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doing = "renaming a file"
        made[0].replace(made[1])
        doing, path = "making a link", models
        made[2].symlink_to(Path("../shards") / made[1].name)
        made[2].stat()
        doing, path = f"opening {models / LOCK_NAME}", models / LOCK_NAME
        with path.open("w") as lock, contextlib.suppress(BlockingIOError):  # held: it can be locked
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return _Failed(doing, path, error)
    finally:
        if handle >= 0:
            os.close(handle)
        for file in made:
            with contextlib.suppress(OSError):
                file.unlink()
    return None


def _why(root: Path, failed: _Failed) -> str:
    """The system's reason, and whose file or folder it is or what is no folder."""
    error = failed.error
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        paths = (root / "shards", root / "models", root, *root.parents)
        file = next((path for path in paths if path.is_file()), root)
        return f"{file} is a file"
    if error.errno not in (errno.EACCES, errno.EPERM):
        return str(error.strerror)
    for path in (failed.path, *failed.path.absolute().parents):
        with contextlib.suppress(OSError):  # it is not there, or hidden from this user
            return f"{error.strerror}, {path} belongs to {_user_name(path.stat().st_uid)}"
    return str(error.strerror)


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _has_layers(shards: Path) -> bool:
    """Whether a whole file is in the cache."""
    try:
        return any(len(path.name) == 64 and set(path.name) <= _HEX for path in shards.iterdir())
    except OSError:
        return False


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


class ShardCache:
    """The cache in folder `root`. Several processes may use one at the same time.

    Raises ValueError where nothing can be kept in it.
    """

    def __init__(self, root: Path | None = None) -> None:
        self.root = root or cache_folder()
        self._shards, self._models = self.root / "shards", self.root / "models"
        problem = find_problem(self.root)
        if problem is not None and problem.is_fatal:
            raise ValueError(f"{problem.found}; {problem.fix}")
        if problem is not None:
            log.warning("%s; %s", problem.found, problem.fix)

    def _make_folders(self) -> None:
        _make_folders(self._shards, self._models)

    def folder(self, manifest: Manifest) -> Path:
        """The split folder of a model; what `link` has put there can be loaded."""
        return self._models / _hex(manifest.model_hash)

    def has(self, record: FileRecord, *, verify: bool = False) -> bool:
        """Whether a file is here whole; with `verify` one of other content is removed."""
        path = self._shards / _hex(record.sha256)
        try:
            if path.stat().st_size == record.bytes and not (
                verify and file_sha256(path) != record.sha256
            ):
                return True
        except OSError:
            return False
        path.unlink(missing_ok=True)
        return False

    def open_partial(self, record: FileRecord) -> "Partial | None":
        """What there is of a file, to go on with; None while another process is at it."""
        path = self._shards / f"{_hex(record.sha256)}.partial"
        try:
            return Partial.open(path, record)
        except OSError as error:
            raise _disk_error(path, error) from None

    def partial_bytes(self, record: FileRecord) -> int:
        """How much of a file has come so far, whoever fetches it."""
        try:
            return (self._shards / f"{_hex(record.sha256)}.partial").stat().st_size
        except OSError:
            return 0

    def check_room(self, needed: int) -> None:
        """Raises ClusterError where the disk is too small for so many bytes more."""
        try:
            self._make_folders()  # somebody may have cleared the cache of a device that runs
            free = shutil.disk_usage(self._shards).free
        except OSError as error:
            raise _disk_error(self._shards, error) from None
        if needed and free < needed + RESERVE_BYTES:
            raise ClusterError(
                HERE,
                f"too little disk for its layers in {self.root}: needed {needed / 1e9:.2f} GB and "
                f"{RESERVE_BYTES / 1e9:.2f} GB to spare, free {free / 1e9:.2f} GB; free some, or "
                "set XDG_CACHE_HOME to a folder on a larger disk",
            )

    def link(self, manifest: Manifest, shards: Iterable[int]) -> Path:
        """Lay out whole files as a split folder, with its manifest; that folder."""
        folder = self.folder(manifest)
        try:
            with (self._models / LOCK_NAME).open("w") as lock:
                _await_lock(lock.fileno())
                self._lay_out(folder, manifest, shards)
                remove_stale(folder)
        except OSError as error:
            raise _disk_error(folder, error) from None
        return folder

    def _lay_out(self, folder: Path, manifest: Manifest, shards: Iterable[int]) -> None:
        for name, record in shard_files(manifest, shards).items():
            part = (folder / name).parent
            part.mkdir(parents=True, exist_ok=True, mode=0o700)
            _put_link(folder / name, Path("../../../shards") / record.sha256)
        if not (folder / MANIFEST_NAME).exists():
            write_manifest(folder, manifest)

    def adopt(
        self,
        folder: Path,
        manifest: Manifest,
        shards: Sequence[int],
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> list[str]:
        """Take what `folder`, a split of the model or the model itself, has of these shards.

        Files of a split stay where they are; of a whole model, the layers are cut out. All are
        compared with the manifest by content. Returns the names of the files that it has not;
        `on_bytes` is told how much is done. Raises ValueError where `folder` is neither.
        """
        wanted = shard_files(manifest, shards)
        left = {name: record for name, record in wanted.items() if not self.has(record)}
        if (folder / MANIFEST_NAME).exists():
            self._adopt_split(folder, left, on_bytes)
        elif left:
            self._adopt_checkpoint(folder, manifest, left, on_bytes)
        return [name for name, record in wanted.items() if not self.has(record)]

    def _adopt_split(
        self, folder: Path, wanted: dict[str, FileRecord], on_bytes: Callable[[int], None]
    ) -> None:
        own = {record.sha256: name for name, record in read_manifest(folder).files.items()}
        for record in wanted.values():
            path = folder.resolve() / own.get(record.sha256, "")
            if path.is_file() and file_sha256(path) == record.sha256:
                _put_link(self._shards / _hex(record.sha256), path)
                on_bytes(record.bytes)

    def _adopt_checkpoint(
        self,
        folder: Path,
        manifest: Manifest,
        wanted: dict[str, FileRecord],
        on_bytes: Callable[[int], None],
    ) -> None:
        checkpoint = open_checkpoint(folder)
        if checkpoint.config.num_layers != sum(manifest.layers):
            return
        plan = plan_split(checkpoint, layers=manifest.layers, dtype=manifest.dtype)
        remove_stale(self._shards)
        files = [file for file in plan.files if file.name in wanted]
        self.check_room(sum(plan.file_bytes(file) for file in files))
        with TensorReader() as reader:
            for file in files:
                record = wanted[file.name]
                made = partial_path(self._shards / _hex(record.sha256))
                try:
                    if write_to(plan, made, file, reader, on_bytes) == record:
                        made.replace(self._shards / record.sha256)
                finally:
                    made.unlink(missing_ok=True)


class Partial:
    """A file that is coming, locked against other processes. Bytes are appended in order."""

    def __init__(self, path: Path, record: FileRecord, handle: int) -> None:
        self.record = record
        self._path, self._handle = path, handle
        self._digest = hashlib.sha256()
        self.size = self.resumed_bytes = self._read_back()

    @classmethod
    def open(cls, path: Path, record: FileRecord) -> "Partial | None":
        """Open and lock, or None where another process holds the lock."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # it may have become the whole file, or been removed, before the lock was had
            if os.fstat(handle).st_ino != path.stat().st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(handle)
            return None
        return cls(path, record, handle)

    def write(self, pieces: Iterable[memoryview]) -> None:
        """Append. Raises ClusterError where the disk is full; what was written stays."""
        for piece in pieces:
            view = piece
            while view:
                try:
                    count = os.write(self._handle, view)
                except OSError as error:
                    raise _disk_error(self._path, error) from None
                self._digest.update(view[:count])
                self.size += count
                view = view[count:]

    def finish(self) -> None:
        """Make it the whole file, for good; WrongHashError (and it is removed) where it is not."""
        if self.size != self.record.bytes or self._digest.hexdigest() != self.record.sha256:
            self._path.unlink(missing_ok=True)
            raise WrongHashError(self.record, resumed=self.resumed_bytes > 0)
        try:
            os.fsync(self._handle)
            self._path.replace(self._path.with_suffix(""))
        except OSError as error:
            raise _disk_error(self._path, error) from None

    def close(self) -> None:
        """Let go of it; what has come stays for the next time."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def _read_back(self) -> int:
        size = os.fstat(self._handle).st_size
        if size > self.record.bytes:
            os.ftruncate(self._handle, 0)
            return 0
        buffer = memoryview(bytearray(_READ_BYTES))
        while count := os.readv(self._handle, [buffer]):
            self._digest.update(buffer[:count])
        return size


def _disk_error(path: Path, error: OSError) -> ClusterError:
    if error.errno in _FULL:
        return ClusterError(
            HERE,
            f"the disk is full while writing to {path.parent}; what has come is kept: free some "
            "and join again, or set XDG_CACHE_HOME to a folder on a larger disk",
        )
    return ClusterError(HERE, f"cannot write to {path.parent}: {error.strerror}; check the disk")


def _await_lock(handle: int) -> None:
    """Lock a file that others hold for as long as making some links takes."""
    end = time.monotonic() + LOCK_LIMIT_S
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > end:
                raise OSError(errno.EBUSY, "another process holds its lock") from None
            time.sleep(0.02)


def _put_link(path: Path, target: Path) -> None:
    if path.is_symlink() and path.readlink() == target:
        return
    partial = path.with_name(f"{path.name}.{os.getpid()}.link")
    partial.unlink(missing_ok=True)
    partial.symlink_to(target)
    partial.replace(path)


def _hex(text: str) -> str:
    """The text, which is to be a file name, if it is a sha256 and nothing else."""
    if len(text) != 64 or not set(text) <= _HEX:
        raise ValueError(f"{text[:80]!r} is no sha256; the manifest is not to be trusted")
    return text
