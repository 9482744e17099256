"""Wake: ends a wait for messages from another thread."""

import contextlib
import socket


class Wake:
    """Readable from `set` to `clear`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """For a poller."""
        return self._reader.fileno()

    def set(self) -> None:
        """From any thread; harmless once closed."""
        with contextlib.suppress(OSError):  # full: it is readable already
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Until the next `set`."""
        with contextlib.suppress(BlockingIOError):
            while len(self._reader.recv(1024)) == 1024:
                pass

    def close(self) -> None:
        """Give up its sockets."""
        self._reader.close()
        self._writer.close()
