"""Texts and times on the wire: bounded, whole characters, numbers that are numbers."""

import pytest

from flowspec.protocol import schema
from flowspec.protocol.codec import WireError, decode
from flowspec.protocol.messages import Exit, Failed, Ready
from tests.protocol.test_codec import SEGMENT, as_bytes


def test_texts_are_bounded() -> None:
    """A long error text is cut by its sender, and refused from one that does not cut."""
    (frame,) = as_bytes(Failed(stage=1, request=0, text="é" * (schema.MAX_TEXT + 10)))
    arrived = decode([frame])
    assert isinstance(arrived, Failed)
    assert arrived.text == "é" * schema.MAX_TEXT
    with pytest.raises(WireError, match="failed.text: String should have at most"):
        decode([frame[:-2] + b'x"}'])
    (frame,) = as_bytes(Ready(stage=1, model="m" * 200))
    with pytest.raises(WireError, match="ready.model: String should have at most"):
        decode([frame.replace(b"mm", b"mmm", 1)])


def test_texts_that_utf8_cannot_hold_still_travel() -> None:
    """File names with stray bytes reach error texts; the error must reach the head anyway."""
    (frame,) = as_bytes(Failed(stage=1, request=0, text="no file \udcff.bin"))
    arrived = decode([frame])
    assert isinstance(arrived, Failed)
    assert arrived.text == "no file ?.bin"


@pytest.mark.parametrize("bad", [b"\xff", b"\xc3", b"\\ud800", b"\\x00"])
def test_what_is_no_text_is_refused(bad: bytes) -> None:
    """Stray bytes and half characters are no JSON."""
    (frame,) = as_bytes(Failed(stage=1, request=0, text="here"))
    with pytest.raises(WireError, match="Invalid JSON"):
        decode([frame.replace(b"here", bad)])


@pytest.mark.parametrize("value", [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"null", b"-1.0"])
def test_times_are_numbers(value: bytes) -> None:
    """A NaN would poison the averages that the head plans with."""
    left = Exit(request=1, seq_no=2, rows=3, slowest_rows=4, slowest_ms=0.5)
    for message, time in ((left, b"0.5"), (SEGMENT, b"0.0")):
        header, *rest = as_bytes(message)
        with pytest.raises(WireError, match="slowest_ms: Input should be"):
            decode([header.replace(time, value), *rest])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_time_that_is_none_does_not_arrive(value: float) -> None:
    """A time that is not finite is refused, even if its sender holds one by a bug."""
    message = Exit(request=1, seq_no=2, rows=3, slowest_rows=4, slowest_ms=value)
    with pytest.raises(WireError, match="exit.slowest_ms"):
        decode(as_bytes(message))
