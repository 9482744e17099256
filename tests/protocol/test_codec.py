"""What leaves is what arrives; what is no message is refused before it costs anything."""

import math
import struct
import tracemalloc
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowspec.protocol import codec
from flowspec.protocol.codec import WireError, decode, encode
from flowspec.protocol.messages import (
    AddRequest,
    Batch,
    Candidates,
    Exit,
    Failed,
    Features,
    FinishRequest,
    FreeRequest,
    Ping,
    Ready,
    Reroot,
    Reset,
    Segment,
    Started,
    Status,
    Stop,
    WireMessage,
    together,
)
from flowspec.request import NodeId, SamplingParams

HEADER_BYTES = 22
VERSION = codec.PROTOCOL_VERSION
U16, U32, U64 = (st.integers(0, 2**bits - 1) for bits in (16, 32, 64))
I32, I64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
F32 = st.floats(0, 2.0**90, width=32)
F64 = st.floats(0, 1e300)
TEXT = st.text("aZ \n\0é你😀", max_size=30)
DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@st.composite
def tensors(draw: st.DrawFn, rows: int) -> Tensor:
    """Hidden states [rows, H], also as views that do not lie contiguous."""
    size = draw(st.integers(1, 9))
    generator = torch.Generator().manual_seed(draw(U32))
    layout = draw(st.sampled_from(["plain", "transposed", "strided", "offset"]))
    shape = {"plain": (rows, size), "transposed": (size, rows), "strided": (rows, 2 * size)}
    base = torch.randn(shape.get(layout, (rows + 1, size)), generator=generator)
    base = base.to(draw(DTYPES))
    views = {"transposed": base.t(), "strided": base[:, ::2], "offset": base[1:]}
    return views.get(layout, base)


@st.composite
def rows(draw: st.DrawFn, *kinds: st.SearchStrategy[int]) -> list[tuple[int, ...]]:
    """As many values of each kind, from none to a few."""
    n = draw(st.integers(0, 6))
    return [tuple(draw(st.lists(kind, min_size=n, max_size=n))) for kind in kinds]


SAMPLING = st.builds(
    SamplingParams,
    temperature=st.just(0.0) | st.floats(1e-9, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1, exclude_max=True),
    seed=st.integers(0, 2**63 - 1),
    acceptance=st.text("aZ_-0", min_size=1, max_size=64),
)
REROOT = st.builds(Reroot, epoch=U32, request=U64, position=U32, parent=I64, token=I32)
OPEN = st.builds(
    AddRequest,
    epoch=U32,
    request=U64,
    capacity=U32,
    context=U32,
    sampling=SAMPLING,
    aux_hidden_state_layers=st.lists(I32, max_size=5).map(tuple),
    reuse=U64,
    num_cached_tokens=U32,
    num_prompt_tokens=U32,
)


@st.composite
def closes(draw: st.DrawFn) -> FinishRequest:
    """With and without a verdict, of the same request."""
    epoch, request, verdict = draw(U32), draw(U64), draw(st.none() | REROOT)
    known = None if verdict is None else replace(verdict, epoch=epoch, request=request)
    return FinishRequest(epoch=epoch, request=request, keep=draw(st.booleans()), verdict=known)


FIXED = st.one_of(
    closes(),
    st.builds(FreeRequest, epoch=U32, source=U16, number=U32, request=U64),
    st.builds(Reset, epoch=U32),
    REROOT,
    st.builds(Started, epoch=U32, request=U64, seq_no=U64),
    st.builds(Exit, epoch=U32, request=U64, seq_no=U64, rows=U32, slowest_rows=U32, slowest_ms=F32),
    st.builds(
        Status,
        stage=U32,
        busy_s=F64,
        num_segments=U64,
        num_rows_run=U64,
        num_rows_pruned=U64,
        num_requests=U32,
        kv_rows_used=U64,
        peak_memory_bytes=U64,
        num_closes=U64,
    ),
    st.builds(Ping, rank=I32),
    st.just(Stop()),
)
TEXTS = st.one_of(
    st.builds(Failed, epoch=U32, stage=I32, request=U64, text=TEXT),
    st.builds(Ready, stage=I32, model=TEXT, kv_rows=U64),
)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    """Also empty ones, ones without hidden states, with and without a verdict."""
    epoch, request = draw(U32), draw(U64)
    nodes, parents, tokens = draw(rows(I64, I64, I32))
    verdict = draw(st.none() | REROOT)
    return Segment(
        epoch=epoch,
        request=request,
        seq_no=draw(U64),
        nodes=tuple(map(NodeId, nodes)),
        parents=tuple(map(NodeId, parents)),
        tokens=tokens,
        hidden=draw(st.none() | tensors(len(nodes))),
        prefix=draw(st.booleans()),
        verify=draw(st.booleans()),
        slowest_rows=draw(U32),
        slowest_ms=draw(F32),
        verdict=None if verdict is None else replace(verdict, epoch=epoch, request=request),
    )


@st.composite
def feature_messages(draw: st.DrawFn) -> Features:
    """Features of a few nodes."""
    (nodes,) = draw(rows(I64))
    return Features(
        epoch=draw(U32),
        request=draw(U64),
        layer=draw(I32),
        nodes=tuple(map(NodeId, nodes)),
        hidden=draw(tensors(len(nodes))),
    )


SEGMENTS = st.lists(segments(), min_size=2, max_size=4, unique_by=lambda one: one.request)


def in_one_epoch(parts: list[Segment]) -> tuple[Segment, ...]:
    """As a batch holds them."""
    epoch = parts[0].epoch
    verdicts = [p.verdict and replace(p.verdict, epoch=epoch) for p in parts]
    return tuple(replace(p, epoch=epoch, verdict=v) for p, v in zip(parts, verdicts, strict=True))


BATCHES = SEGMENTS.map(in_one_epoch).map(together)
COUNTED = st.one_of(
    FIXED, OPEN, segments(), BATCHES, feature_messages()
)  # kinds whose length is known
MESSAGES = st.one_of(COUNTED, TEXTS)


def same(a: WireMessage, b: WireMessage) -> bool:
    """Equal in type and every field, tensors by dtype, shape and bits."""

    def equal(x: Any, y: Any) -> bool:
        if isinstance(x, Tensor) and isinstance(y, Tensor):
            return x.dtype == y.dtype and torch.equal(x, y)
        if x and isinstance(x, tuple) and isinstance(x[0], Segment):
            return len(x) == len(y) and all(map(same, x, y))
        return bool(x == y) and type(x) is type(y)

    return type(a) is type(b) and all(
        equal(getattr(a, f.name), getattr(b, f.name)) for f in fields(a)
    )


def as_bytes(message: WireMessage) -> list[bytes]:
    """The frames as a socket would give them."""
    return [bytes(frame) for frame in encode(message)]


SEGMENT = Segment(
    request=1,
    seq_no=2,
    nodes=(NodeId(3), NodeId(4)),
    parents=(NodeId(2), NodeId(3)),
    tokens=(5, 6),
    hidden=torch.ones(2, 4, dtype=torch.bfloat16),
)
FEATURES = Features(request=1, layer=-1, nodes=(NodeId(3),), hidden=torch.ones(1, 4))


@given(MESSAGES)
@settings(max_examples=200)
def test_round_trip(message: WireMessage) -> None:
    """Every kind survives the wire, every dtype and layout of hidden states included."""
    assert same(decode(as_bytes(message)), message)


def test_every_kind_is_covered() -> None:
    """A new message kind must get a strategy above."""
    made = {
        FinishRequest,
        FreeRequest,
        Reset,
        Reroot,
        Started,
        Exit,
        Status,
        Ping,
        Stop,
        Failed,
        Ready,
        AddRequest,
    }
    assert set(codec._KINDS) == made | {Segment, Features, Batch}


def test_bytes_are_pinned() -> None:
    """Two versions that both say protocol 5 must mean the same bytes."""
    frames = as_bytes(
        Reroot(epoch=9, source=2, number=8, request=5, position=7, parent=NodeId(3), token=11)
    )
    assert [f.hex() for f in frames] == [
        "4653" "05" "04" "09000000" "0200" "08000000" "0500000000000000"
        "07000000" "0300000000000000" "0b000000"
    ]  # fmt: skip
    header, ids, hidden = as_bytes(SEGMENT)
    assert header[:4].hex() == "46530502"
    assert ids == struct.pack("<4q2i", 3, 4, 2, 3, 5, 6)
    assert hidden == b"\x80\x3f" * 8


def test_contiguous_hidden_is_not_copied() -> None:
    """Hidden states are most of the bytes; they go out from where they lie, and come in so too."""
    hidden = torch.randn(4, 8)
    frame = encode(replace(FEATURES, nodes=(1, 2, 3, 4), hidden=hidden))[2]
    assert np.frombuffer(frame, dtype=np.uint8).ctypes.data == hidden.data_ptr()
    frames = as_bytes(SEGMENT)
    arrived = decode(frames)
    assert isinstance(arrived, Segment)
    assert arrived.hidden is not None
    assert arrived.hidden.data_ptr() == np.frombuffer(frames[2], dtype=np.uint8).ctypes.data


@given(COUNTED)
@settings(max_examples=30)
def test_every_truncation_is_refused(message: WireMessage) -> None:
    """A cut at any byte of any frame, and any byte too many, is seen."""
    frames = as_bytes(message)
    for number, frame in enumerate(frames):
        for length in range(len(frame)):
            with pytest.raises(WireError):
                decode([*frames[:number], frame[:length], *frames[number + 1 :]])
        with pytest.raises(WireError):
            decode([*frames[:number], frame + b"\0", *frames[number + 1 :]])


@pytest.mark.parametrize(
    ("byte", "value", "message"),
    [
        (0, b"X", "not a FlowSpec frame"),
        (2, b"\x01", "protocol version 1"),
        (3, b"\x00", "unknown message kind 0"),
        (3, b"\xff", "unknown message kind 255"),
        (3, b"\x04", "Reroot has 1 frames"),
        (HEADER_BYTES + 12, b"\x08", "unknown flags"),
        (HEADER_BYTES + 13, b"\x03", "unknown dtype"),
    ],
)
def test_wrong_header_bytes_are_named(byte: int, value: bytes, message: str) -> None:
    """The error says which field is wrong, so that a version clash does not look like noise."""
    header, ids, hidden = as_bytes(SEGMENT)
    header = header[:byte] + value + header[byte + 1 :]
    with pytest.raises(WireError, match=message):
        decode([header, ids, hidden])


@pytest.mark.parametrize("message", [SEGMENT, FEATURES, Stop()])
def test_wrong_number_of_frames(message: WireMessage) -> None:
    """Frames missing or too many."""
    frames = as_bytes(message)
    for wrong in ([], frames[:-1], [*frames, b""], [*frames, b"", b"", b""]):
        with pytest.raises(WireError):
            decode(wrong)


def oversized(count: int, size: int) -> list[list[bytes]]:
    """Segment and Features that claim `count` rows of `size` elements and bring a few bytes."""
    head = struct.Struct("<2sBBIHIQ")
    segment = head.pack(b"FS", VERSION, 2, 0, 0, 0, 1)
    segment += struct.pack("<QIBBIIfIqi", 0, count, 2, 0, size, 0, 0.0, 0, 0, 0)
    features = head.pack(b"FS", VERSION, 7, 0, 0, 0, 1) + struct.pack("<iIBI", 0, count, 0, size)
    return [[segment, b"\0" * 20, b"\0" * 4], [features, b"\0" * 8, b"\0" * 4]]


@pytest.mark.parametrize("kind", [0, 1], ids=["segment", "features"])
@pytest.mark.parametrize(
    ("count", "size", "message"),
    [
        (2**32 - 1, 1, "4294967295 rows"),
        (codec.MAX_ROWS + 1, 1, "rows, at most"),
        (1, 2**32 - 1, "hidden size 4294967295"),
        (1, codec.MAX_HIDDEN + 1, "hidden size"),
        (codec.MAX_ROWS, codec.MAX_HIDDEN, "expected from its counts"),
        (1, codec.MAX_HIDDEN, "expected from its counts"),
    ],
)
def test_claimed_sizes_allocate_nothing(kind: int, count: int, size: int, message: str) -> None:
    """A few bytes that claim gigabytes are refused before any of them is allocated."""
    frames = oversized(count, size)[kind]
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=message):
            decode(frames)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("count", [200, 255])
def test_open_with_missing_layers(count: int) -> None:
    """The list of feature layers must be there in full."""
    (frame,) = as_bytes(AddRequest(request=1, capacity=2, context=3))
    with pytest.raises(WireError, match="AddRequest"):
        decode([frame[:-1] + bytes([count])])


@pytest.mark.parametrize(
    ("offset", "value"), [(8, math.nan), (8, -1.0), (28, 0.0), (28, math.nan), (36, 1.0)]
)
def test_open_checks_its_sampling(offset: int, value: float) -> None:
    """Temperature, top-p and min-p from the network are checked as those of a user."""
    (frame,) = as_bytes(AddRequest(request=1, capacity=2, context=3))
    at = HEADER_BYTES + offset
    with pytest.raises(WireError, match="AddRequest"):
        decode([frame[:at] + struct.pack("<d", value) + frame[at + 8 :]])


@given(st.lists(st.binary(max_size=120), max_size=5))
@settings(max_examples=200)
def test_noise_is_refused(frames: list[bytes]) -> None:
    """Bytes of another protocol raise WireError and nothing else."""
    with pytest.raises(WireError):
        decode(frames)


@given(MESSAGES, st.data())
@settings(max_examples=150)
def test_damaged_messages_raise_nothing_but_wire_errors(
    message: WireMessage, data: st.DataObject
) -> None:
    """Bytes changed behind a right beginning: another message, or WireError; never a crash."""
    frames = [bytearray(frame) for frame in as_bytes(message)]
    for _ in range(data.draw(st.integers(1, 4))):
        frame = data.draw(st.sampled_from([f for f in frames if len(f)]))
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    with suppress(WireError):
        decode([bytes(frame) for frame in frames])


@given(st.binary(max_size=100), st.integers(0, 20), st.integers(1, 3))
@settings(max_examples=200)
def test_noise_behind_a_right_beginning(body: bytes, kind: int, count: int) -> None:
    """The same for random bodies of every kind."""
    frames = [
        struct.pack("<2sBBIHIQ", b"FS", VERSION, kind, 0, 0, 0, 7) + body,
        body,
        body[:40],
    ][:count]
    with suppress(WireError):
        decode(frames)


def test_candidates_are_not_dropped_in_silence() -> None:
    """A row without its candidates would be another choice; so the segment does not leave."""
    rows = replace(SEGMENT, candidates=(Candidates((3,)),) * len(SEGMENT.nodes))
    with pytest.raises(WireError, match="candidates have no place in a frame yet"):
        encode(rows)
