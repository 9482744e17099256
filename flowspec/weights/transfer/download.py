"""A download's two ends: which parts to ask for next, and a thread that hashes and writes them."""

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
STALL_LIMIT_S = 60.0  # longest that a disk may write nothing


class Wanted:
    """Which parts are to be asked for, in order, and what comes next; `num_asked` have not come."""

    def __init__(self, partials: deque[Partial]) -> None:
        self._files = partials
        self._size = partials[0].size if partials else 0  # of the first: written or to be
        self._skip_whole()
        self._asked: Iterator[tuple[bytes, int, int]] = iter(())
        self.num_asked = 0
        self.start_over()

    def is_done(self) -> bool:
        """Whether all has come."""
        return not self._files

    def start_over(self) -> None:
        """What was asked for and has not come is asked for again."""
        self._asked, self.num_asked = self._rest(), 0

    def next_requests(self, num_unwritten: int) -> Iterator[tuple[bytes, int, int]]:
        """As many as the window allows; a disk that is behind narrows it."""
        while self.num_asked + num_unwritten < WINDOW:
            request = next(self._asked, None)
            if request is None:
                return
            self.num_asked += 1
            yield request

    def take(self, part: ChunkReply) -> Partial | None:
        """The file that a part goes on with; None where it is not the next one."""
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
                f"has a file of {part.total} bytes, {record.bytes} in its manifest; split the "
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
        """Files of which all had come in an earlier run need but their end."""
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
    """Hashes and writes beside the network. An error stops it and comes out of `check`."""

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
        self._thread.join(STALL_LIMIT_S)  # a disk that hangs keeps the thread, not the device

    @property
    def num_waiting(self) -> int:
        """Parts that have come and are not yet on disk."""
        return self._unwritten

    def put(self, partial: Partial, part: ChunkReply) -> None:
        """Append a part to its file; the window bounds how many wait."""
        with self._lock:
            self._unwritten += 1
        self._queue.put((partial, part))

    def check(self) -> None:
        """Raise what went wrong."""
        if self._error is not None:
            raise self._error

    def flush(self, tell: Callable[[], None]) -> None:
        """Until all is on disk; a slow disk is waited for as long as it writes.

        Raises ClusterError where it has written nothing for STALL_LIMIT_S.
        """
        told_at, left, moved_at = 0.0, self._unwritten, time.monotonic()
        while self._unwritten and self._error is None:
            if self._unwritten != left:
                left, moved_at = self._unwritten, time.monotonic()
            elif time.monotonic() - moved_at > STALL_LIMIT_S:
                raise ClusterError(
                    "this device",
                    f"its disk has written nothing for {STALL_LIMIT_S:.0f} s; check it (`dmesg`)",
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
            except Exception as error:  # whatever it was, `check` raises it
                self._error = error
            finally:
                with self._lock:
                    self._unwritten -= 1
