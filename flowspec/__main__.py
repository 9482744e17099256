"""`python -m flowspec <command>` and `flowspec <command>`.

Importing takes most of a short command's time, so signals are taken before anything is imported,
and until flowspec/system/signals.py takes them.
"""

import _signal  # built in: the module `signal` takes longer to import than all of this
import os
import select
from types import FrameType

_WRITABLE_S = 0.2  # a stopped terminal, or a pipe that nobody reads, takes no line
_NAMES = {1: "SIGHUP", 2: "SIGINT", 15: "SIGTERM"}


def _end(number: int, frame: FrameType | None) -> None:
    """Nothing is to be undone yet."""
    try:
        if select.select([], [2], [], _WRITABLE_S)[1]:
            os.write(2, f"error: ended by {_NAMES[number]}\n".encode())
    finally:
        os._exit(128 + number)


def main() -> None:
    """The entry point."""
    for number in _NAMES:
        if _signal.getsignal(number) is not _signal.SIG_IGN:
            _signal.signal(number, _end)
    from flowspec.cli.main import main as run_command

    run_command()


if __name__ == "__main__":
    main()
