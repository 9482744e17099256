"""Weight cache on a device's disk: files named by their sha256, and models linked from them.

`shards/<sha256>` are complete files, `shards/<sha256>.partial` the received part of one;
`models/<model hash>/` is laid out as a split folder and consists of links. Nothing is written
elsewhere.
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
from flowspec.weights.formats import TensorReader
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

HERE = "this device"
RESERVE_BYTES = 64 << 20  # left free for other programs
LOCK_NAME = ".lock"  # in `models`: held while links are made
LOCK_LIMIT_S = 10.0
_READ_BYTES = 1 << 20
_HEX = frozenset("0123456789abcdef")
_FULL = (errno.ENOSPC, errno.EDQUOT)

log = logging.getLogger(__name__)


class WrongHashError(Exception):
    """A file differs from its manifest; `resumed` means that part of it came in an earlier run."""

    def __init__(self, record: FileRecord, *, resumed: bool) -> None:
        super().__init__(record.sha256)
        self.record, self.resumed = record, resumed


def cache_folder() -> Path:
    """Return `$XDG_CACHE_HOME/flowspec`, else `~/.cache/flowspec`. Raises ValueError if no home."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # the XDG specification says to ignore a relative path
    if Path(base).is_absolute():
        return Path(base) / "flowspec"
    return home_folder(instead="XDG_CACHE_HOME") / ".cache" / "flowspec"


def shard_files(manifest: Manifest, shards: Iterable[int]) -> dict[str, FileRecord]:
    """Return the files of stages `shards` (from 1): name in a split folder -> record.

    Raises ValueError when there is no such stage.
    """
    names = []
    for shard in shards:
        manifest.layer_range(shard)
        names += [f"{stage_folder(shard)}/{name}" for name in ("config.json", WEIGHTS_NAME)]
    return {name: manifest.files[name] for name in names}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheProblem:
    """A reason why a cache is not usable; `is_fatal` means that no layers can be used from it."""

    found: str
    fix: str
    is_fatal: bool = True


def find_problem(root: Path) -> CacheProblem | None:
    """Try all that a transfer does in `root`: make folders, write, lock, rename, link.

    Returns None if everything works. The folders and the lock of `models` stay, because other
    processes may use them. A full disk is fatal only if the cache holds no layers yet.
    """
    shards, models = root / "shards", root / "models"
    elsewhere = "set XDG_CACHE_HOME (or join --cache) to a folder that you own on a disk with space"
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
        fix=f"free some space, or {elsewhere}",
        is_fatal=not _has_layers(shards),
    )


class _Failed(NamedTuple):
    """The step that failed, its path, and the system's error."""

    doing: str
    path: Path
    error: OSError


def _try_out(shards: Path, models: Path) -> _Failed | None:
    """Try every step; return the one that failed. The test files are removed again."""
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
        os.fsync(handle)  # some disks report only here that they are full
        doing = "locking a file"
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        doing = "renaming a file"
        made[0].replace(made[1])
        doing, path = "making a link", models
        made[2].symlink_to(Path("../shards") / made[1].name)
        made[2].stat()
        doing, path = f"opening {models / LOCK_NAME}", models / LOCK_NAME
        # if another process holds it, locking works
        with path.open("w") as lock, contextlib.suppress(BlockingIOError):
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
    """Return the system's reason, with the owner of the file or folder if that is the cause."""
    error = failed.error
    if error.errno in (errno.ENOTDIR, errno.EEXIST):
        paths = (root / "shards", root / "models", root, *root.parents)
        file = next((path for path in paths if path.is_file()), root)
        return f"{file} is a file"
    if error.errno not in (errno.EACCES, errno.EPERM):
        return str(error.strerror)
    for path in (failed.path, *failed.path.absolute().parents):
        with contextlib.suppress(OSError):  # it does not exist, or this user may not see it
            return f"{error.strerror}, {path} belongs to {_user_name(path.stat().st_uid)}"
    return str(error.strerror)


def _user_name(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _has_layers(shards: Path) -> bool:
    """Whether the cache holds a complete file."""
    try:
        return any(len(path.name) == 64 and set(path.name) <= _HEX for path in shards.iterdir())
    except OSError:
        return False


def _make_folders(*folders: Path) -> None:
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


class ShardCache:
    """The cache in folder `root`. Several processes may use it at the same time.

    Raises ValueError when it cannot be used.
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
        """Return the split folder of a model; what `link` has put there can be loaded."""
        return self._models / _hex(manifest.model_hash)

    def has(self, record: FileRecord, *, verify: bool = False) -> bool:
        """Whether a file is here and complete; `verify` removes a file of other content."""
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
        """Open the received part of a file, to continue it; None while another process holds it."""
        path = self._shards / f"{_hex(record.sha256)}.partial"
        try:
            return Partial.open(path, record)
        except OSError as error:
            raise _disk_error(path, error) from None

    def partial_bytes(self, record: FileRecord) -> int:
        """Return the bytes of a file received so far, by any process."""
        try:
            return (self._shards / f"{_hex(record.sha256)}.partial").stat().st_size
        except OSError:
            return 0

    def check_room(self, needed: int) -> None:
        """Raise ClusterError when the disk has too little space for so many more bytes."""
        try:
            self._make_folders()  # the cache of a running device may have been cleared
            free = shutil.disk_usage(self._shards).free
        except OSError as error:
            raise _disk_error(self._shards, error) from None
        if needed and free < needed + RESERVE_BYTES:
            raise ClusterError(
                HERE,
                f"too little disk for its layers in {self.root}: needed {needed / 1e9:.2f} GB and "
                f"{RESERVE_BYTES / 1e9:.2f} GB in reserve, free {free / 1e9:.2f} GB; free some, or "
                "set XDG_CACHE_HOME to a folder on a larger disk",
            )

    def link(self, manifest: Manifest, shards: Iterable[int]) -> Path:
        """Link complete files into a split folder with its manifest; return that folder."""
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
        """Take these shards, as far as present, from a split of the model or the whole model.

        Files of a split stay in place; from a whole model, the layers are cut out. The content of
        all is compared with the manifest. Returns the names of files that `folder` does not have;
        `on_bytes` is called with the bytes done. Raises ValueError when `folder` is neither.
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
        plan = plan_split(checkpoint, layers=manifest.layers, dtype=manifest.dtype, has_head=False)
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
    """A partly received file, locked against other processes. Bytes are appended in order."""

    def __init__(self, path: Path, record: FileRecord, handle: int) -> None:
        self.record = record
        self._path, self._handle = path, handle
        self._digest = hashlib.sha256()
        self.size = self.resumed_bytes = self._read_back()

    @classmethod
    def open(cls, path: Path, record: FileRecord) -> "Partial | None":
        """Open and lock the file; return None if another process holds the lock."""
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # before it was locked, it may have become complete or been removed
            if os.fstat(handle).st_ino != path.stat().st_ino:
                raise BlockingIOError
        except (BlockingIOError, FileNotFoundError):
            os.close(handle)
            return None
        return cls(path, record, handle)

    def write(self, pieces: Iterable[memoryview]) -> None:
        """Append pieces. Raises ClusterError when the disk is full; what was written stays."""
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
        """Make it the complete file. If it is another one, remove it and raise WrongHashError."""
        if self.size != self.record.bytes or self._digest.hexdigest() != self.record.sha256:
            self._path.unlink(missing_ok=True)
            raise WrongHashError(self.record, resumed=self.resumed_bytes > 0)
        try:
            os.fsync(self._handle)
            self._path.replace(self._path.with_suffix(""))
        except OSError as error:
            raise _disk_error(self._path, error) from None

    def close(self) -> None:
        """Unlock and close it; the received part stays for the next time."""
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
            f"the disk is full while writing to {path.parent}; the received part stays: free some "
            "and join again, or set XDG_CACHE_HOME to a folder on a larger disk",
        )
    return ClusterError(HERE, f"cannot write to {path.parent}: {error.strerror}; check the disk")


def _await_lock(handle: int) -> None:
    """Lock a file that others hold only while they make some links."""
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
    """Return the text if it is a sha256, so that it is safe as a file name; else ValueError."""
    if len(text) != 64 or not set(text) <= _HEX:
        raise ValueError(f"{text[:80]!r} is not a sha256; do not trust this manifest")
    return text
