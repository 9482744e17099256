"""Batches on the wire: segments of several requests in one message."""

import json
from dataclasses import replace
from typing import Any

import pytest

from flowspec.protocol import codec
from flowspec.protocol.codec import WireError, decode
from flowspec.protocol.messages import Batch, Segment
from tests.protocol.test_codec import BEGIN, HIDDEN_STATES, SEGMENT, as_bytes

BARE = replace(SEGMENT, hidden=None)


def batch_of(parts: list[dict[str, Any]], **changes: Any) -> bytes:
    """A batch's header with these segments, whatever they are."""
    (header,) = as_bytes(Batch(segments=(BARE,)))
    content = {**json.loads(header[len(BEGIN) :]), "segments": parts, **changes}
    return BEGIN + json.dumps(content).encode()


def part(message: Any = BARE, **changes: Any) -> dict[str, Any]:
    """A message as a batch's header would hold it."""
    content: dict[str, Any] = json.loads(as_bytes(message)[0][len(BEGIN) :])
    return {**content, **changes}


def test_each_segment_has_a_frame_for_its_hidden_states() -> None:
    """A batch is one header and the tensors."""
    batch = Batch(segments=(SEGMENT, replace(BARE, request=2), replace(SEGMENT, request=3)))
    frames = as_bytes(batch)
    assert len(frames) == 3
    arrived = decode(frames)
    assert isinstance(arrived, Batch)
    assert [segment.hidden is None for segment in arrived.segments] == [False, True, False]


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (batch_of([]), "segments: Tuple should have at least 1"),
        (batch_of([part(), part()]), "two segments of one request"),
        (batch_of([part(), part(epoch=1, request=2)]), "another epoch"),
        (batch_of([part()], epoch=1), "another epoch"),
        (batch_of([part(HIDDEN_STATES)]), "segments.0"),
        (batch_of([part(), {"kind": "stop"}]), r"segments\.1"),
        (
            batch_of([part(request=n) for n in range(1, codec.MAX_BATCH + 2)]),
            "segments: Tuple should have at most 16",
        ),
    ],
)
def test_a_batch_is_refused_where_it_makes_no_sense(frame: bytes, message: str) -> None:
    """Too many, too few, doubled, or something else than segments in it."""
    with pytest.raises(WireError, match=message):
        decode([frame])


def test_a_batch_with_a_frame_missing_is_refused() -> None:
    """Each tensor needs its own."""
    frames = as_bytes(Batch(segments=(SEGMENT, replace(SEGMENT, request=2))))
    with pytest.raises(WireError, match="frame 2 is named, 1 follow"):
        decode(frames[:-1])


def test_a_batch_has_no_more_rows_than_a_segment_may() -> None:
    """Each segment within the limit, all together beyond it: refused by both sides."""
    many = list(range(codec.MAX_ROWS // 2 + 1))
    one = part(nodes=many, parents=many, tokens=many)
    assert isinstance(decode([BEGIN + json.dumps(one).encode()]), Segment)
    with pytest.raises(WireError, match="4098 rows in all, at most 4096"):
        decode([batch_of([one, {**one, "request": 2}])])
    nodes = tuple(many)
    big = replace(BARE, nodes=nodes, parents=nodes, tokens=nodes)
    with pytest.raises(ValueError, match="4098 rows in all"):
        Batch(segments=(big, replace(big, request=2)))
