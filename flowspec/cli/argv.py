"""Hiding a secret that was given on the command line from `ps`."""

import ctypes
import sys
from pathlib import Path

TOKEN_OPTION = "--token"
_ARG_START, _ARG_END = 47, 48  # fields of /proc/PID/stat, from 0, see proc(5)


def hide_token() -> bool:
    """Overwrite the value of `--token` in the kernel's copy of the command line.

    Call this first of all: until then every user of this machine can read the token. `sys.argv`
    keeps it. Returns False if a token may still be visible, as on systems other than Linux.
    """
    words = [word.encode(errors="surrogateescape") for word in sys.orig_argv]
    if not any(_names_token(word) for word in words):
        return True
    if sys.platform != "linux":
        return False
    try:
        # the name of the command, in brackets, may hold anything
        stat = Path("/proc/self/stat").read_text(errors="replace").rpartition(")")[2].split()
        start, end = int(stat[_ARG_START - 2]), int(stat[_ARG_END - 2])
        shown = Path("/proc/self/cmdline").read_bytes()
    except (OSError, ValueError, IndexError):
        return False
    if not 0 < start < end or end - start < len(shown):
        return False
    for at, length in _token_values(shown):
        ctypes.memset(start + at, ord("*"), length)
    return True


def _names_token(word: bytes) -> bool:
    return word == TOKEN_OPTION.encode() or word.startswith(f"{TOKEN_OPTION}=".encode())


def _token_values(shown: bytes) -> list[tuple[int, int]]:
    """Return start and length of each value of `--token`; a zero byte ends each word."""
    found, at, is_value = [], 0, False
    for word in shown.split(b"\0"):
        if is_value:
            found.append((at, len(word)))
        elif word.startswith(f"{TOKEN_OPTION}=".encode()):
            skip = len(TOKEN_OPTION) + 1
            found.append((at + skip, len(word) - skip))
        is_value = word == TOKEN_OPTION.encode()
        at += len(word) + 1
    return found
