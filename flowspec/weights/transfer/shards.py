"""Weight transfer from the head's disk to those of the devices; only missing files are sent.

The head has the model split into single layers. A device requests files by their sha256, in parts,
over the cluster's encrypted transport. An interrupted file continues where it stopped.
"""

import hashlib
import json
import logging
import os
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from flowspec.request import ClusterError
from flowspec.transport.chunks import CHUNK_BYTES, ChunkClient, ChunkReply, ChunkServer
from flowspec.transport.secure.keys import Keys
from flowspec.transport.secure.tally import Tally
from flowspec.weights.manifest import FileRecord, Manifest, parse_manifest, read_manifest
from flowspec.weights.transfer.cache import Partial, ShardCache, WrongHashError, shard_files
from flowspec.weights.transfer.download import HEAD_NAME, Wanted, Writer

TICK_S = 0.2
UNWRITTEN_WAIT_S = 0.002  # pause while the disk is behind and nothing is in flight
BUSY_WAIT_S = 1.0
MAX_MANIFEST_BYTES = 4 << 20
MAX_OPEN_FILES = 16
UNREADABLE = "file not readable"

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class FetchProgress:
    """A device's progress; `cached_bytes` of `done_bytes` were there before."""

    done_bytes: int
    total_bytes: int
    cached_bytes: int


OnProgress = Callable[[FetchProgress], None]


class ShardServer:
    """Serves the stage files of a split model and its manifest, in a thread, until `close`.

    Requests name hashes, so no other file can be requested. Raises ValueError when `split_folder`
    is not a split model or the address is not available.
    """

    def __init__(self, split_folder: Path, address: str, keys: Keys) -> None:
        self.manifest = read_manifest(split_folder)
        self._manifest_json = json.dumps(asdict(self.manifest), sort_keys=True).encode()
        self.manifest_sha256 = hashlib.sha256(self._manifest_json).hexdigest()
        shards = range(1, self.manifest.num_stages + 1)
        self._paths = {
            bytes.fromhex(record.sha256): split_folder / name
            for name, record in shard_files(self.manifest, shards).items()
        }
        self._files: OrderedDict[bytes, int] = OrderedDict()
        self._server = ChunkServer(address, keys, self._read)
        self.address = self._server.address
        self._failed = Tally(log, "shard server")
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="shard-server")
        self._thread.start()

    def refusals(self) -> dict[str, int]:
        """Return the connections refused and requests dropped, by reason."""
        return {**self._server.refusals(), **self._server.dropped.counts()}

    def close(self) -> None:
        """End the thread; devices that are still fetching keep their received parts."""
        self._closing.set()
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                self._server.serve(TICK_S)
        finally:
            self._server.close()
            for handle in self._files.values():
                os.close(handle)

    def _read(self, digest: bytes, offset: int, length: int) -> tuple[bytes, int] | None:
        if digest.hex() == self.manifest_sha256:
            return self._manifest_json[offset : offset + length], len(self._manifest_json)
        if digest not in self._paths or offset >= 2**62:
            return None
        try:
            handle = self._open(digest)
            return os.pread(handle, length, offset), os.fstat(handle).st_size
        except OSError as error:
            self._failed.add(UNREADABLE, f"{self._paths[digest]}: {error.strerror}")
            return None

    def _open(self, digest: bytes) -> int:
        if digest not in self._files:
            if len(self._files) >= MAX_OPEN_FILES:
                os.close(self._files.popitem(last=False)[1])
            self._files[digest] = os.open(self._paths[digest], os.O_RDONLY | os.O_CLOEXEC)
        self._files.move_to_end(digest)
        return self._files[digest]


def fetch_manifest(address: str, keys: Keys, sha256: str, timeout_s: float) -> Manifest:
    """Fetch the manifest with the sha256 that the head has sent. Raises ClusterError."""
    if len(sha256) != 64 or not set(sha256) <= set("0123456789abcdef"):
        raise ClusterError(HEAD_NAME, f"sent {sha256[:80]!r} as the sha256 of its manifest")
    client, content = ChunkClient(address, keys), b""
    digest, end = bytes.fromhex(sha256), time.monotonic() + timeout_s
    try:
        client.ask(digest, 0, CHUNK_BYTES)
        while time.monotonic() < end:
            parts, is_new = client.receive(TICK_S)
            for part in parts:
                if part.offset != len(content) or part.digest != digest:
                    continue
                _check_known(part, "manifest")
                if part.busy:
                    time.sleep(BUSY_WAIT_S)
                    client.ask(digest, len(content), CHUNK_BYTES)
                    continue
                content += b"".join(part.pieces or ())
                if len(content) == part.total or part.total > MAX_MANIFEST_BYTES:
                    return _open_manifest(content, sha256)
                client.ask(digest, len(content), CHUNK_BYTES)
            if is_new:
                client.ask(digest, len(content), CHUNK_BYTES)
    finally:
        client.close()
    raise ClusterError(HEAD_NAME, f"sent no manifest within {timeout_s:.0f} s from {address}")


def fetch_shards(
    address: str,
    keys: Keys,
    manifest: Manifest,
    shards: Sequence[int],
    cache: ShardCache,
    on_progress: OnProgress = lambda _: None,
    timeout_s: float = 30.0,
) -> None:
    """Fetch what `cache` lacks of stages `shards` (from 1) of a split model, and link it there.

    Afterwards `cache.folder(manifest)` can be loaded; every file's sha256 has been compared, even
    of those that were there before, so loading need not verify. `on_progress` is called at least
    every second and may raise to end the transfer. Raises ClusterError when the head sends nothing
    for `timeout_s` or a wrong file, or when the disk is full or fails; received parts stay for the
    next try.
    """
    wanted = {record.sha256: record for record in shard_files(manifest, shards).values()}
    fetch = _Fetch(address, keys, cache, on_progress, timeout_s)
    fetch.total = sum(record.bytes for record in wanted.values())
    missing = []
    for record in wanted.values():
        if cache.has(record, verify=True):
            fetch.done += record.bytes
            fetch.cached += record.bytes
        else:
            missing.append(record)
        fetch.tell()
    if missing:
        cache.check_room(sum(max(0, r.bytes - cache.partial_bytes(r)) for r in missing))
        fetch.run(missing)
    cache.link(manifest, shards)
    fetch.tell()


class _Fetch:
    """One call of `fetch_shards`: parts in flight, progress, and the time to give up."""

    def __init__(
        self,
        address: str,
        keys: Keys,
        cache: ShardCache,
        on_progress: OnProgress,
        timeout_s: float,
    ) -> None:
        self._address, self._keys, self._cache = address, keys, cache
        self._on_progress, self._timeout_s = on_progress, timeout_s
        self.total = self.done = self.cached = 0
        self._moved_at = time.monotonic()

    def tell(self) -> None:
        """Report the progress."""
        self._on_progress(
            FetchProgress(done_bytes=self.done, total_bytes=self.total, cached_bytes=self.cached)
        )

    def run(self, missing: Sequence[FileRecord]) -> None:
        """Fetch all files, in this process or by waiting for another that uses the same cache."""
        left = list(missing)
        again: set[str] = set()
        self.cached += sum(min(self._cache.partial_bytes(r), r.bytes) for r in left)
        while left:
            self.done = self.total - sum(record.bytes for record in left)
            mine = [partial for r in left if (partial := self._cache.open_partial(r))]
            try:
                with Writer() as writer:
                    if mine:
                        self._fetch(mine, writer)
            except WrongHashError as error:
                if not error.resumed or error.record.sha256 in again:
                    raise ClusterError(
                        HEAD_NAME,
                        f"sent a file of {error.record.bytes} bytes, but its sha256 is not the "
                        f"{error.record.sha256[:12]}... of its manifest; split the model "
                        "again there, or check its disk",
                    ) from None
                again.add(error.record.sha256)  # the part of an earlier run may be the wrong one
            finally:
                for partial in mine:
                    partial.close()
            left = [record for record in left if not self._cache.has(record)]
            if left and not mine:
                self._await_others(left)

    def _fetch(self, partials: Sequence[Partial], writer: "Writer") -> None:
        client = ChunkClient(self._address, self._keys)
        self._moved_at = time.monotonic()
        try:
            self.done += sum(partial.size for partial in partials)
            self._pump(client, deque(partials), writer)
            writer.flush(self.tell)
        finally:
            client.close()

    def _pump(self, client: ChunkClient, waiting: deque[Partial], writer: "Writer") -> None:
        wanted = Wanted(waiting)
        told_at = asked_at = 0.0
        while not wanted.is_done():
            now = time.monotonic()
            for request in wanted.next_requests(writer.num_waiting):
                client.ask(*request)
                asked_at = now
            if now - told_at > TICK_S:
                told_at = now
                self.tell()
            parts, is_new = client.receive(TICK_S if wanted.num_asked else UNWRITTEN_WAIT_S)
            for part in parts:
                _check_known(part, "file")
                if part.busy:
                    time.sleep(BUSY_WAIT_S)
                    is_new = True
                elif (partial := wanted.take(part)) is not None:
                    writer.put(partial, part)
                    self.done += part.num_bytes
                    self._moved_at = time.monotonic()
            writer.check()
            now = time.monotonic()
            # A part may be lost although the connection stands; on a slow link it may only be late.
            if is_new or now - max(asked_at, self._moved_at) > self._timeout_s / 2:
                wanted.start_over()
            self._give_up_if_late(now)

    def _give_up_if_late(self, now: float) -> None:
        if now - self._moved_at > self._timeout_s:
            raise ClusterError(
                HEAD_NAME,
                f"sent no weights for {self._timeout_s:.0f} s ({self.done} of {self.total} bytes "
                f"are here and kept); is it still running and reachable at {self._address}?",
            )

    def _await_others(self, left: Sequence[FileRecord]) -> None:
        """Wait until one of these files is complete, or the process that fetches it is gone."""
        sizes: list[int] = []
        self._moved_at = time.monotonic()
        while True:
            if any(self._cache.has(record) for record in left):
                return
            now_sizes = [self._cache.partial_bytes(record) for record in left]
            if now_sizes != sizes:
                sizes, self._moved_at = now_sizes, time.monotonic()
            self.tell()
            self._give_up_if_late(time.monotonic())
            time.sleep(TICK_S)
            partial = self._cache.open_partial(left[0])
            if partial is not None:
                partial.close()
                return


def _check_known(part: ChunkReply, what: str) -> None:
    if part.pieces is None and not part.busy:
        raise ClusterError(
            HEAD_NAME, f"has no {what} {part.digest.hex()[:12]}...; it now serves another model"
        )


def _open_manifest(content: bytes, sha256: str) -> Manifest:
    if hashlib.sha256(content).hexdigest() != sha256:
        raise ClusterError(HEAD_NAME, "sent a manifest of another sha256 than announced")
    try:
        fields = json.loads(content)
        return parse_manifest(fields if isinstance(fields, dict) else {})
    except (ValueError, RecursionError) as error:
        raise ClusterError(HEAD_NAME, f"sent an invalid manifest: {error}") from None
