"""Texts and times on the wire: bounded, whole characters, numbers that are numbers."""

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings

from flowspec.protocol import codec
from flowspec.protocol.codec import WireError, decode
from flowspec.protocol.messages import Exit, Failed, Ready, WireMessage
from tests.protocol.test_codec import HEADER_BYTES, SEGMENT, TEXTS, as_bytes


@given(TEXTS)
@settings(max_examples=20)
def test_text_messages_need_their_fixed_part(message: WireMessage) -> None:
    """A text may have any length, what stands before it may not."""
    (frame,) = as_bytes(message)
    for length in range(HEADER_BYTES + (12 if isinstance(message, Ready) else 4)):
        with pytest.raises(WireError):
            decode([frame[:length]])


def test_texts_are_bounded() -> None:
    """A long error text is cut by its sender, and refused from one that does not cut."""
    (frame,) = as_bytes(Failed(stage=1, request=0, text="é" * codec.MAX_TEXT_BYTES))
    arrived = decode([frame])
    assert isinstance(arrived, Failed)
    assert arrived.text.startswith("é")
    assert len(arrived.text.encode()) <= codec.MAX_TEXT_BYTES + 2
    with pytest.raises(WireError, match="text of"):
        decode([frame + b"x"])


def test_texts_that_utf8_cannot_hold_still_travel() -> None:
    """File names with stray bytes reach error texts; the error must reach the head anyway."""
    (frame,) = as_bytes(Failed(stage=1, request=0, text="no file \udcff.bin"))
    arrived = decode([frame])
    assert isinstance(arrived, Failed)
    assert arrived.text.startswith("no file ")


def test_a_text_that_was_cut_arrives_as_it_left() -> None:
    """The cut leaves no half character behind, and what is no text is refused."""
    (frame,) = as_bytes(Failed(stage=1, request=0, text="x" + "é" * codec.MAX_TEXT_BYTES))
    arrived = decode([frame])
    assert isinstance(arrived, Failed)
    assert arrived.text == "x" + "é" * ((codec.MAX_TEXT_BYTES - 1) // 2)
    with pytest.raises(WireError, match="Failed"):
        decode([frame[:-1] + b"\xff"])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_times_are_numbers(value: float) -> None:
    """A NaN would poison the averages that the head plans with."""
    for message in (
        Exit(request=1, seq_no=2, rows=3, slowest_rows=4, slowest_ms=value),
        replace(SEGMENT, slowest_ms=value),
    ):
        with pytest.raises(WireError, match="a number that is none"):
            decode(as_bytes(message))
