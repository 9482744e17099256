"""Messages between ranks as lines of text, in words that stay when the code is renamed.

Two checkouts, or a checkout and a committed file, are compared by these lines. The two tables below
map classes and attributes to words; a rename in the code only changes these tables. Times and
hidden states are left out, because they depend on the machine.
"""

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from flowspec.protocol import messages as wire
from flowspec.protocol.sequencing import SequenceNumbers

# class: (its word, word of each field: attribute)
MESSAGES: Mapping[type, tuple[str, Mapping[str, str]]] = {
    wire.AddRequest: (
        "open",
        {
            "request": "request",
            "capacity": "capacity",
            "context": "context",
            "layers": "aux_hidden_state_layers",
            "reuse": "reuse",
            "shared": "num_cached_tokens",
        },
    ),
    wire.FinishRequest: ("close", {"request": "request", "keep": "keep", "verdict": "verdict"}),
    wire.FreeRequest: ("abandon", {"request": "request"}),
    wire.Reset: ("reset", {}),
    wire.Reroot: (
        "verdict",
        {"request": "request", "at": "position", "after": "parent", "token": "token"},
    ),
    wire.Started: ("started", {"request": "request", "seq": "seq_no"}),
    wire.Exit: (
        "left",
        {"request": "request", "seq": "seq_no", "rows": "rows", "slowest_rows": "slowest_rows"},
    ),
    wire.HiddenStates: ("hidden", {"request": "request", "layer": "layer", "nodes": "nodes"}),
    wire.Status: (
        "status",
        {
            "stage": "stage",
            "segments": "num_segments",
            "rows": "num_rows_run",
            "pruned": "num_rows_pruned",
            "requests": "num_requests",
            "kv_rows": "num_kv_tokens_used",
            "closes": "num_closes",
        },
    ),
    wire.Failed: ("failed", {"stage": "stage", "request": "request", "text": "text"}),
    wire.Ready: ("ready", {"stage": "stage", "kv_rows": "num_kv_tokens"}),
    wire.Ping: ("ping", {"rank": "rank"}),
    wire.Stop: ("stop", {}),
}
# of the segments that travel in a message
SEGMENT: Mapping[str, str] = {
    "request": "request",
    "seq": "seq_no",
    "prompt": "prefix",
    "ask": "verify",
    "nodes": "nodes",
    "parents": "parents",
    "tokens": "tokens",
    "slowest_rows": "slowest_rows",
    "verdict": "verdict",
}


class MessageLog:
    """The messages of one run in the order in which they were sent, one line each.

    A line has sender and receiver (0 is the head), the number in its sequence, the epoch, the kind
    and the fields. The position of a row is its parent's plus one, so it follows from the lines
    before; `at` shows it for the reader.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.counts: dict[str, int] = {}  # number of messages by kind
        self._numbers: dict[int, SequenceNumbers] = {}
        self._positions: dict[tuple[int, int, int], int] = {}  # by epoch, request and node

    @property
    def text(self) -> str:
        """Return all lines."""
        return "".join(f"{line}\n" for line in self.lines)

    @property
    def digest(self) -> str:
        """Return a hash that is equal for the same messages in the same order."""
        return sha256(self.text.encode()).hexdigest()

    def add(self, source: int, to: int, message: Any) -> None:
        """Record a message that rank `source` sends to rank `to`."""
        numbers = self._numbers.setdefault(source, SequenceNumbers(source))
        numbered: Any = numbers.number(to, message)
        segments = wire.segments_of(message)
        if segments:
            kind = "segment"
            rows = " + ".join(self._segment(segment, message.epoch) for segment in segments)
        else:
            assert type(message) in MESSAGES, f"{type(message).__name__} has no row in MESSAGES"
            kind, fields = MESSAGES[type(message)]
            rows = _fields(message, fields)
            if kind == "hidden":
                rows += f" at={_numbers(self._at(message, message.epoch))}"
        where = f"{source}>{to}"
        if (number := getattr(numbered, "number", None)) is not None:
            where += f" #{number} epoch={message.epoch}"
        self.counts[kind] = self.counts.get(kind, 0) + 1
        self.lines.append(f"{where} {kind} {rows}".rstrip())

    def _segment(self, segment: Any, epoch: int) -> str:
        for node, parent in zip(segment.nodes, segment.parents, strict=True):
            # the parent of a prompt row is a position
            above = self._positions.get((epoch, segment.request, parent), parent)
            self._positions[epoch, segment.request, node] = above + 1
        return f"{_fields(segment, SEGMENT)} at={_numbers(self._at(segment, epoch))}"

    def _at(self, message: Any, epoch: int) -> list[int]:
        return [self._positions[epoch, message.request, node] for node in message.nodes]


def _fields(message: Any, fields: Mapping[str, str]) -> str:
    return " ".join(f"{word}={_value(getattr(message, name))}" for word, name in fields.items())


def _value(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, wire.Reroot):
        return f"{value.position}/{value.parent}/{value.token}"
    if isinstance(value, bool):
        return str(int(value))
    return _numbers(value) if isinstance(value, tuple) else str(value)


def _numbers(numbers: Sequence[int]) -> str:
    """Join numbers with commas; consecutive ones become first..last."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}..{b}" for a, b in runs) or "-"
