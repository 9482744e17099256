"""The two ends of a download: which parts to request next, and a thread that hashes and writes."""

import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

from flowspec.request import ClusterError
from flowspec.transport.chunks import CHUNK_BYTES, WINDOW, ChunkReply
from flowspec.weights.transfer.cache import Partial

HEAD_NAME = "head"
TELL_S = 0.2
STALL_LIMIT_S = 60.0  # longest time without progress of the disk


class Wanted:
    """The parts to request, in order, and the next to arrive; `num_asked` are in flight."""

    def __init__(self, partials: deque[Partial]) -> None:
        self._files = partials
        # bytes of the first file, written or to be
        self._size = partials[0].size if partials else 0
        self._skip_whole()
        self._asked: Iterator[tuple[bytes, int, int]] = iter(())
        self.num_asked = 0
        self.start_over()

    def is_done(self) -> bool:
        """Whether everything has come."""
        return not self._files

    def start_over(self) -> None:
        """Request again what was requested and has not come."""
        self._asked, self.num_asked = self._rest(), 0

    def next_requests(self, num_unwritten: int) -> Iterator[tuple[bytes, int, int]]:
        """Yield as many requests as the window allows; unwritten parts make it smaller."""
        while self.num_asked + num_unwritten < WINDOW:
            request = next(self._asked, None)
            if request is None:
                return
            self.num_asked += 1
            yield request

    def take(self, part: ChunkReply) -> Partial | None:
        """Return the file that a part continues; None if it is not the next part."""
        if not self._files or part.pieces is None:
            return None
        partial = self._files[0]
        record = partial.record
        expected = min(CHUNK_BYTES, record.bytes - self._size)
        if part.digest.hex() != record.sha256 or part.offset != self._size:
            return None
        if part.num_bytes != expected or part.total != record.bytes:
            raise ClusterError(
                HEAD_NAME,
                f"has a file of {part.total} bytes, but {record.bytes} in its manifest; split the "
                "model again there",
            )
        self.num_asked = max(0, self.num_asked - 1)
        self._size += part.num_bytes
        if self._size == record.bytes:
            self._files.popleft()
            self._size = self._files[0].size if self._files else 0
            self._skip_whole()
        return partial

    def _skip_whole(self) -> None:
        """Skip files whose bytes all came in an earlier run: they only need to be finished."""
        while self._files and self._files[0].size == self._files[0].record.bytes:
            self._files.popleft().finish()
            self._size = self._files[0].size if self._files else 0

    def _rest(self) -> Iterator[tuple[bytes, int, int]]:
        for index, partial in enumerate(list(self._files)):
            at = self._size if index == 0 else partial.size
            digest = bytes.fromhex(partial.record.sha256)
            while at < partial.record.bytes:
                length = min(CHUNK_BYTES, partial.record.bytes - at)
                yield digest, at, length
                at += length


class Writer:
    """Hashes and writes in a thread; an error stops it, and `check` raises that error."""

    def __init__(self) -> None:
        self._queue: queue.Queue[tuple[Partial, ChunkReply] | None] = queue.Queue()
        self._error: Exception | None = None
        self._unwritten = 0
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, daemon=True, name="shard-writer")

    def __enter__(self) -> "Writer":
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._queue.put(None)
        # if the disk hangs, the thread stays behind, but the device goes on
        self._thread.join(STALL_LIMIT_S)

    @property
    def num_waiting(self) -> int:
        """Return the number of parts that have come and are not on disk yet."""
        return self._unwritten

    def put(self, partial: Partial, part: ChunkReply) -> None:
        """Append a part to its file; the window limits how many wait."""
        with self._lock:
            self._unwritten += 1
        self._queue.put((partial, part))

    def check(self) -> None:
        """Raise the error of the thread, if any."""
        if self._error is not None:
            raise self._error

    def flush(self, tell: Callable[[], None]) -> None:
        """Wait until everything is on disk, as long as the disk makes progress.

        Raises ClusterError when it has written nothing for STALL_LIMIT_S.
        """
        told_at, left, moved_at = 0.0, self._unwritten, time.monotonic()
        while self._unwritten and self._error is None:
            if self._unwritten != left:
                left, moved_at = self._unwritten, time.monotonic()
            elif time.monotonic() - moved_at > STALL_LIMIT_S:
                raise ClusterError(
                    "this device",
                    f"the disk has written nothing for {STALL_LIMIT_S:.0f} s; check it (`dmesg`)",
                )
            if time.monotonic() - told_at > TELL_S:
                told_at = time.monotonic()
                tell()
            time.sleep(0.005)
        self.check()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            partial, part = item
            try:
                if self._error is None:
                    partial.write(part.pieces or ())
                    if partial.size == partial.record.bytes:
                        partial.finish()
            except Exception as error:  # `check` raises it, whatever it is
                self._error = error
            finally:
                with self._lock:
                    self._unwritten -= 1
