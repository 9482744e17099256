"""Batches on the wire: segments of several requests in one message."""

from dataclasses import replace

import pytest

from flowspec.protocol import codec
from flowspec.protocol.codec import WireError, decode
from flowspec.protocol.messages import Batch
from tests.protocol.test_codec import FEATURES, SEGMENT, as_bytes


def test_a_batch_is_refused_where_it_makes_no_sense() -> None:
    """Too many, too few, doubled, or something else than segments in it."""
    header, *parts = as_bytes(Batch(segments=(SEGMENT, replace(SEGMENT, request=2))))
    assert isinstance(decode([header, *parts]), Batch)
    features = as_bytes(FEATURES)
    for wrong in (
        [header],
        [header, *parts[:3]],
        [header, *parts[:3], *parts[:3]],
        [header, *parts[:3], *features],
        [header, *parts[:3], *as_bytes(replace(SEGMENT, epoch=1, request=2))],
        [*as_bytes(Batch(epoch=1, segments=(SEGMENT,)))],
        [header, header, *parts[:2], *parts[:3]],
        [header[:-1] + b"\0"],
        [header[:-1] + bytes([codec.MAX_BATCH + 1]), *parts * (codec.MAX_BATCH // 2 + 1)],
    ):
        with pytest.raises(WireError):
            decode(wrong)


def test_a_batch_has_no_more_rows_than_a_segment_may() -> None:
    """Each segment within the limit, all together beyond it."""
    many = codec.MAX_ROWS // 2 + 1
    nodes = tuple(range(many))
    one = replace(SEGMENT, nodes=nodes, parents=nodes, tokens=nodes, hidden=None)
    with pytest.raises(WireError, match="more than 4096 rows"):
        decode(as_bytes(Batch(segments=(one, replace(one, request=2)))))
