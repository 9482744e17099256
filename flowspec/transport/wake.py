"""Wake: ends a wait for messages from another thread."""

import contextlib
import socket


class Wake:
    """A file descriptor that is readable from `set` to `clear`."""

    def __init__(self) -> None:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def fileno(self) -> int:
        """Return the descriptor for a poller."""
        return self._reader.fileno()

    def set(self) -> None:
        """Make it readable; any thread may call this, also after `close`."""
        with contextlib.suppress(OSError):  # full: it is readable already
            self._writer.send(b"\0")

    def clear(self) -> None:
        """Make it unreadable until the next `set`."""
        with contextlib.suppress(BlockingIOError):
            while len(self._reader.recv(1024)) == 1024:
                pass

    def close(self) -> None:
        """Close its sockets."""
        self._reader.close()
        self._writer.close()
