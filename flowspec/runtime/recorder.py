"""Trace: records what one process did and when; switched off, it costs nothing.

The event loop records every message, computation and wait, so the cores need no tracing code. Each
process keeps its own records on its own clock; flowspec/tracing/timeline.py joins them afterwards.
Times are in seconds.
"""

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, TypeAlias

from flowspec.protocol.codec import encode
from flowspec.protocol.messages import (
    HEAD,
    Exit,
    HiddenStates,
    Message,
    RequestOutput,
    Reroot,
    Submit,
    TokensOut,
    WireMessage,
    segments_of,
)
from flowspec.runtime.core import Work

MAX_RECORDS = 2_000_000  # of one process; later records are counted and dropped
FLUSH_RESTING = 256  # records that an idle process writes at once: about 1 ms
FLUSH_ALWAYS = 16_384  # most records held in memory

Record: TypeAlias = Sequence[Any]  # the first item is its kind; Recorder lists them


class Trace:
    """Tracing that is off; Recorder is tracing that is on."""

    def worked(self, start: float, end: float, work: Work) -> None:
        """Record that a computation ran."""

    def waited(self, start: float, end: float) -> None:
        """Record that the process only waited for messages."""

    def hosted(self, start: float, end: float) -> None:
        """Record time of the program itself. In a real process, the gaps are this time."""

    def sent(self, now: float, to: int, message: Message) -> None:
        """Record that a message was handed to the transport."""

    def received(self, now: float, message: Message) -> None:
        """Record that a message is about to be handled."""

    def rest(self) -> None:
        """Write records now: there is nothing else to do."""

    def close(self) -> None:
        """End the trace: no more records come."""


OFF = Trace()


class Recorder(Trace):
    """Records of one process, in memory or, with `path`, in a file of JSON lines.

    The first is ["process", rank, process id, clock]. Then follow, in order of their end:
    ["work", start, end, kind, rows, context, requests, nodes, segments],
    ["wait", start, end], ["host", start, end], ["send", when, to, key, bytes, details],
    ["receive", when, key, details], and last ["end", records dropped].

    A segment is [request, seq_no, nodes] where it ran, and [request, seq_no, nodes, parents,
    tokens, prefix] where the head sent it. `size_of` gives the bytes of a message on an emulated
    link; by default they are those of its frames.
    """

    def __init__(
        self,
        rank: int,
        *,
        path: Path | None = None,
        clock: str = "monotonic",
        max_records: int = MAX_RECORDS,
        size_of: Callable[[Message], float] | None = None,
    ) -> None:
        self.rank = rank
        self.records: list[Record] = [("process", rank, os.getpid(), clock)]
        self.num_dropped = 0
        self._room = max_records
        self._size_of = size_of or encoded_size
        self._file: IO[str] | None = path.open("w") if path is not None else None

    def worked(self, start: float, end: float, work: Work) -> None:
        """Record a computation, with its request, nodes and segments."""
        about = work.about
        segments = [(s.request, s.seq_no, s.nodes) for s in about.get("segments", ())]
        nodes = about.get("nodes", ())
        self._add(
            "work",
            start,
            end,
            *(work.kind, work.rows, work.context, about.get("requests", ()), nodes, segments),
        )

    def waited(self, start: float, end: float) -> None:
        """Record a wait for messages."""
        self._add("wait", start, end)

    def hosted(self, start: float, end: float) -> None:
        """Record time of the program itself."""
        self._add("host", start, end)

    def sent(self, now: float, to: int, message: Message) -> None:
        """Record a message that was sent, with its size in bytes."""
        size = self._size_of(message) if isinstance(message, WireMessage) else 0
        details = describe(message, whole=self.rank == HEAD)
        self._add("send", now, to, message_key(message), size, details)

    def received(self, now: float, message: Message) -> None:
        """Record a message that was received."""
        self._add("receive", now, message_key(message), describe(message, whole=False))

    def rest(self) -> None:
        """Write the waiting records if there are enough of them."""
        if len(self.records) >= FLUSH_RESTING:
            self._write()

    def close(self) -> None:
        """Write all records and close the file."""
        if self._room < 0:
            return
        self._room = -1
        self.records.append(("end", self.num_dropped))
        self._write()
        if self._file is not None:
            self._file.close()

    def _add(self, *record: Any) -> None:
        if self._room <= 0:
            self.num_dropped += 1
            return
        self._room -= 1
        self.records.append(record)
        if len(self.records) >= FLUSH_ALWAYS:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            return
        self._file.writelines(json.dumps(r, separators=(",", ":")) + "\n" for r in self.records)
        self._file.flush()
        self.records.clear()


def encoded_size(message: Message) -> int:
    """Return the bytes of a message's frames."""
    assert isinstance(message, WireMessage)
    return sum(len(frame) for frame in encode(message))


def trace_path(folder: Path, rank: int) -> Path:
    """Return the file in which rank `rank` writes its records."""
    return folder / f"rank-{rank}.jsonl"


def open_trace(path: Path | None, rank: int) -> Trace:
    """Return a recorder that writes to `path`, or the trace that is off when `path` is None."""
    return OFF if path is None else Recorder(rank, path=path)


def message_key(message: Message) -> tuple[Any, ...]:
    """Return a message's key, equal at both ends; equal keys between two ranks keep order."""
    if segments := segments_of(message):
        return "Segment", segments[0].request, segments[0].seq_no
    ids = (getattr(message, name, None) for name in ("request", "stage", "seq_no", "position"))
    known = [number for number in ids if isinstance(number, int)]
    if isinstance(message, HiddenStates):
        known += [message.layer, *message.nodes[:1]]
    return type(message).__name__, *known


def describe(message: Message, *, whole: bool) -> dict[str, Any]:
    """Return a trace's details of a message; `whole` adds all of a segment but hidden states."""
    if segments := segments_of(message):
        if whole:
            return {
                "segments": [
                    (s.request, s.seq_no, s.nodes, s.parents, s.tokens, s.prefix) for s in segments
                ]
            }
        return {"segments": [(s.request, s.seq_no, len(s.nodes)) for s in segments]}
    match message:
        case Reroot():
            return {"position": message.position, "parent": message.parent, "token": message.token}
        case Exit():
            return {"rows": message.rows}
        case HiddenStates():
            return {"layer": message.layer, "rows": len(message.nodes)}
        case TokensOut():
            return {"tokens": len(message.tokens)}
        case Submit():
            return {"request": message.request.id, "prompt": len(message.request.prompt_tokens)}
        case RequestOutput():
            return {"reason": message.reason.value}
    return {}
