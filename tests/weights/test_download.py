"""Tests the thread that writes a download."""

import threading

import pytest

from flowspec.request import ClusterError
from flowspec.transport.chunks import ChunkReply
from flowspec.weights.transfer import download


class HangingFile:
    """A file that blocks until it is released, and then fails."""

    def __init__(self) -> None:
        self.released = threading.Event()

    def write(self, pieces: object) -> None:
        """Block, then fail."""
        self.released.wait(5.0)
        raise OSError("released")


def test_a_disk_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch):
    """Neither unwritten parts nor the thread are waited for without end."""
    monkeypatch.setattr(download, "STALL_LIMIT_S", 0.1)
    file = HangingFile()
    part = ChunkReply(digest=b"", offset=0, total=1, pieces=[memoryview(b"x")])
    try:
        with download.Writer() as writer:
            writer.put(file, part)
            with pytest.raises(ClusterError, match="written nothing"):
                writer.flush(lambda: None)
    finally:
        file.released.set()
