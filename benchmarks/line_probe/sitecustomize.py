"""Records which lines of a package a process executes, and when; Python imports this at its start.

This applies to every process with this folder on PYTHONPATH, and to its children. At its end, it
writes a file into LINE_PROBE_OUT: its arguments and, by file below LINE_PROBE_PACKAGE, each line
with the milliseconds of the monotonic clock at which it ran. All processes share that clock.
"""

import atexit
import json
import os
import sys
import threading
from time import monotonic_ns
from types import FrameType
from typing import Any

_PACKAGE = os.environ.get("LINE_PROBE_PACKAGE", "")
_OUT = os.environ.get("LINE_PROBE_OUT", "")
_ticks: dict[tuple[str, int], list[int]] = {}


def _called(frame: FrameType, event: str, argument: Any) -> Any:
    del event, argument
    return _stepped if frame.f_code.co_filename.startswith(_PACKAGE) else None


def _stepped(frame: FrameType, event: str, argument: Any) -> Any:
    del argument
    if event == "line":
        now = monotonic_ns() // 1_000_000
        seen = _ticks.setdefault((frame.f_code.co_filename, frame.f_lineno), [])
        if not seen or seen[-1] != now:
            seen.append(now)
    return _stepped


def _write() -> None:
    sys.settrace(None)
    lines: dict[str, list[tuple[int, list[int]]]] = {}
    for (path, line), ticks in list(_ticks.items()):
        lines.setdefault(os.path.relpath(path, _PACKAGE), []).append((line, ticks))
    data = {"arguments": sys.argv, "lines": lines}
    with open(os.path.join(_OUT, f"{os.getpid()}.json"), "w") as file:
        json.dump(data, file)


if _PACKAGE and _OUT:
    atexit.register(_write)
    threading.settrace(_called)
    sys.settrace(_called)
