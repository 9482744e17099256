"""Trace: what one process did and when, recorded by its driver; off, it costs nothing.

The driver sees every message, every computation and every wait, so the cores need not know. Each
process keeps its own records on its own clock; flowspec/tracing/timeline.py puts them together
afterwards. Times in seconds.
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
    Features,
    Message,
    RequestOutput,
    Reroot,
    Submit,
    TokensOut,
    WireMessage,
    segments_of,
)
from flowspec.runtime.core import Work

MAX_RECORDS = 2_000_000  # of one process; what comes later is counted and dropped
FLUSH_RESTING = 256  # records waiting to be written when a process has nothing to do: about 1 ms
FLUSH_ALWAYS = 16_384  # most records held in memory

Record: TypeAlias = Sequence[Any]  # its kind first; see Recorder


class Trace:
    """Tracing that is off; Recorder is tracing that is on."""

    def worked(self, start: float, end: float, work: Work) -> None:
        """A computation ran."""

    def waited(self, start: float, end: float) -> None:
        """There was nothing to do but wait for messages."""

    def hosted(self, start: float, end: float) -> None:
        """The program itself took time; a real process's is what no other record covers."""

    def sent(self, now: float, to: int, message: Message) -> None:
        """A message was handed over."""

    def received(self, now: float, message: Message) -> None:
        """A message is about to be handled."""

    def rest(self) -> None:
        """There is nothing to do: a good moment to write."""

    def close(self) -> None:
        """No more records come."""


OFF = Trace()


class Recorder(Trace):
    """Records of one process: in memory, or with `path` in a file of JSON lines.

    ["process", rank, process id, clock], then in order of their end
    ["work", start, end, kind, rows, context, requests, nodes, segments],
    ["wait", start, end], ["host", start, end], ["send", when, to, key, bytes, details],
    ["receive", when, key, details], and last ["end", records dropped]. A segment is
    [request, seq_no, nodes] where it ran and [request, seq_no, nodes, parents, tokens, prefix]
    where it was sent by the head. A message's bytes are those of its frames, or what `size_of`
    says (an emulated link's).
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
        """See Trace."""
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
        """See Trace."""
        self._add("wait", start, end)

    def hosted(self, start: float, end: float) -> None:
        """See Trace."""
        self._add("host", start, end)

    def sent(self, now: float, to: int, message: Message) -> None:
        """See Trace."""
        size = self._size_of(message) if isinstance(message, WireMessage) else 0
        details = describe(message, whole=self.rank == HEAD)
        self._add("send", now, to, message_key(message), size, details)

    def received(self, now: float, message: Message) -> None:
        """See Trace."""
        self._add("receive", now, message_key(message), describe(message, whole=False))

    def rest(self) -> None:
        """See Trace."""
        if len(self.records) >= FLUSH_RESTING:
            self._write()

    def close(self) -> None:
        """See Trace."""
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
    """Bytes of a message's frames."""
    assert isinstance(message, WireMessage)
    return sum(len(frame) for frame in encode(message))


def trace_path(folder: Path, rank: int) -> Path:
    """Where rank `rank` writes its records."""
    return folder / f"rank-{rank}.jsonl"


def open_trace(path: Path | None, rank: int) -> Trace:
    """A recorder into `path`, or tracing that is off."""
    return OFF if path is None else Recorder(rank, path=path)


def message_key(message: Message) -> tuple[Any, ...]:
    """What a message is known by at both of its ends; equal keys between two ranks keep order."""
    if segments := segments_of(message):
        return "Segment", segments[0].request, segments[0].seq_no
    ids = (getattr(message, name, None) for name in ("request", "stage", "seq_no", "position"))
    known = [number for number in ids if isinstance(number, int)]
    if isinstance(message, Features):
        known += [message.layer, *message.nodes[:1]]
    return type(message).__name__, *known


def describe(message: Message, *, whole: bool) -> dict[str, Any]:
    """What a trace says of a message; of segments everything but hidden states if `whole`."""
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
        case Features():
            return {"layer": message.layer, "rows": len(message.nodes)}
        case TokensOut():
            return {"tokens": len(message.tokens)}
        case Submit():
            return {"request": message.request.id, "prompt": len(message.request.prompt_tokens)}
        case RequestOutput():
            return {"reason": message.reason.value}
    return {}
