"""Messages arrive as they were sent, and bytes that are no message are refused cheaply."""

import json
import re
import tracemalloc
from contextlib import suppress
from dataclasses import fields, replace
from typing import Any, get_args

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
    DraftContext,
    DraftSubtree,
    Exit,
    Failed,
    FinishRequest,
    FreeRequest,
    HiddenStates,
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

BEGIN = b"FS" + bytes([codec.PROTOCOL_VERSION])
U32, COUNT = st.integers(0, 2**32 - 1), st.integers(0, 2**62)
I32, I64 = st.integers(-(2**31), 2**31 - 1), st.integers(-(2**63), 2**63 - 1)
TIMES = st.floats(0, 1e12)
TEXT = st.text('aZ \n\0"\\é你😀', max_size=30)
KINDS = [kind.__dataclass_fields__["kind"].default for kind in get_args(WireMessage)]
NAMES = sorted({name for kind in get_args(WireMessage) for name in kind.__dataclass_fields__})
KEYS = st.sampled_from([*NAMES, *KINDS, "frame", "dtype", "shape", "x"])
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
    """Return equally many values of each kind, from none to a few."""
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
REROOT = st.builds(Reroot, epoch=U32, request=COUNT, position=U32, parent=I64, token=I32)
OPEN = st.builds(
    AddRequest,
    epoch=U32,
    request=COUNT,
    capacity=U32,
    context=U32,
    sampling=SAMPLING,
    aux_hidden_state_layers=st.lists(I32, max_size=5).map(tuple),
    reuse=COUNT,
    num_cached_tokens=U32,
    num_prompt_tokens=U32,
)


@st.composite
def closes(draw: st.DrawFn) -> FinishRequest:
    """Return segments with and without a verdict of the same request."""
    epoch, request, verdict = draw(U32), draw(COUNT), draw(st.none() | REROOT)
    known = None if verdict is None else replace(verdict, epoch=epoch, request=request)
    return FinishRequest(epoch=epoch, request=request, keep=draw(st.booleans()), verdict=known)


FIXED = st.one_of(
    closes(),
    st.builds(FreeRequest, epoch=U32, source=U32, number=U32, request=COUNT),
    st.builds(Reset, epoch=U32),
    REROOT,
    st.builds(Started, epoch=U32, request=COUNT, seq_no=COUNT),
    st.builds(
        Exit, epoch=U32, request=COUNT, seq_no=COUNT, rows=U32, slowest_rows=U32, slowest_ms=TIMES
    ),
    st.builds(
        Status,
        stage=U32,
        busy_s=TIMES,
        num_segments=COUNT,
        num_rows_run=COUNT,
        num_rows_pruned=COUNT,
        num_requests=U32,
        num_kv_tokens_used=COUNT,
        peak_memory_bytes=COUNT,
        num_closes=COUNT,
    ),
    st.builds(Ping, rank=I32),
    st.just(Stop()),
)
TEXTS = st.one_of(
    st.builds(Failed, epoch=U32, stage=I32, request=COUNT, text=TEXT),
    st.builds(Ready, stage=I32, model=TEXT, num_kv_tokens=COUNT),
)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    """Return segments, also empty ones and ones without hidden states."""
    epoch, request = draw(U32), draw(COUNT)
    nodes, parents, tokens = draw(rows(I64, I64, I32))
    verdict = draw(st.none() | REROOT)
    return Segment(
        epoch=epoch,
        request=request,
        seq_no=draw(COUNT),
        nodes=tuple(map(NodeId, nodes)),
        parents=tuple(map(NodeId, parents)),
        tokens=tokens,
        hidden=draw(st.none() | tensors(len(nodes))),
        prefix=draw(st.booleans()),
        verify=draw(st.booleans()),
        slowest_rows=draw(U32),
        slowest_ms=draw(TIMES),
        verdict=None if verdict is None else replace(verdict, epoch=epoch, request=request),
        candidates=draw(st.just(()) | candidates(len(nodes))),
    )


@st.composite
def candidates(draw: st.DrawFn, count: int) -> tuple[Candidates, ...]:
    """One entry for each of `count` rows, with and without the distribution they come from."""
    drawn = st.tuples(I32, st.floats(0, 1))
    entry = st.builds(
        Candidates,
        tokens=st.lists(I32, max_size=3).map(tuple),
        drawn_from=st.lists(drawn, max_size=3).map(tuple),
    )
    return tuple(draw(st.lists(entry, min_size=count, max_size=count)))


@st.composite
def subtrees(draw: st.DrawFn) -> DraftSubtree:
    """Guesses whose parents come before them."""
    count = draw(st.integers(0, 5))
    return DraftSubtree(
        epoch=draw(U32),
        request=draw(COUNT),
        position=draw(COUNT),
        path=draw(st.lists(I32, max_size=3).map(tuple)),
        parents=tuple(draw(st.integers(-1, place - 1)) for place in range(count)),
        tokens=tuple(draw(st.lists(I32, min_size=count, max_size=count))),
        logprobs=tuple(draw(st.lists(st.floats(-50, 0), min_size=count, max_size=count))),
    )


@st.composite
def hidden_state_messages(draw: st.DrawFn) -> HiddenStates:
    """Hidden states of a few nodes."""
    (nodes,) = draw(rows(I64))
    return HiddenStates(
        epoch=draw(U32),
        request=draw(COUNT),
        layer=draw(I32),
        nodes=tuple(map(NodeId, nodes)),
        hidden=draw(tensors(len(nodes))),
    )


SEGMENTS = st.lists(segments(), min_size=2, max_size=4, unique_by=lambda one: one.request)


def in_one_epoch(parts: list[Segment]) -> tuple[Segment, ...]:
    """Return segments that fit one batch."""
    epoch = parts[0].epoch
    verdicts = [p.verdict and replace(p.verdict, epoch=epoch) for p in parts]
    return tuple(replace(p, epoch=epoch, verdict=v) for p, v in zip(parts, verdicts, strict=True))


BATCHES = SEGMENTS.map(in_one_epoch).map(together)
CONTEXTS = st.builds(
    DraftContext,
    epoch=U32,
    request=COUNT,
    position=COUNT,
    tokens=st.lists(I32, max_size=5).map(tuple),
    is_over=st.booleans(),
)
COUNTED = st.one_of(
    FIXED, OPEN, segments(), BATCHES, hidden_state_messages(), CONTEXTS, subtrees()
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
HIDDEN_STATES = HiddenStates(request=1, layer=-1, nodes=(NodeId(3),), hidden=torch.ones(1, 4))


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
    assert set(get_args(WireMessage)) == made | {
        Segment,
        HiddenStates,
        Batch,
        DraftContext,
        DraftSubtree,
    }


def test_bytes_are_pinned() -> None:
    """Two versions that both say protocol 5 must mean the same bytes."""
    frames = as_bytes(
        Reroot(epoch=9, source=2, number=8, request=5, position=7, parent=NodeId(3), token=11)
    )
    assert frames == [
        b'FS\x05{"epoch":9,"source":2,"number":8,"kind":"reroot","request":5,"position":7,'
        b'"parent":3,"token":11}'
    ]
    header, hidden = as_bytes(SEGMENT)
    assert header == (
        b'FS\x05{"epoch":0,"source":0,"number":0,"kind":"segment","request":1,"seq_no":2,'
        b'"nodes":[3,4],"parents":[2,3],"tokens":[5,6],'
        b'"hidden":{"frame":1,"dtype":"bfloat16","shape":[2,4]},"prefix":false,"verify":true,'
        b'"slowest_rows":0,"slowest_ms":0.0,"verdict":null}'
    )
    assert hidden == b"\x80\x3f" * 8


def test_contiguous_hidden_is_not_copied() -> None:
    """Hidden states are most of the bytes; they go out from where they lie, and come in so too."""
    hidden = torch.randn(4, 8)
    frame = encode(replace(HIDDEN_STATES, nodes=(1, 2, 3, 4), hidden=hidden))[1]
    assert np.frombuffer(frame, dtype=np.uint8).ctypes.data == hidden.data_ptr()
    frames = as_bytes(SEGMENT)
    arrived = decode(frames)
    assert isinstance(arrived, Segment)
    assert arrived.hidden is not None
    assert arrived.hidden.data_ptr() == np.frombuffer(frames[1], dtype=np.uint8).ctypes.data


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
    ("old", "new", "message"),
    [
        (b"FS", b"XS", "not a FlowSpec frame"),
        (b"FS\x05", b"FS\x04", "protocol version 4 received, this side speaks 5"),
        (b"FS\x05", b"FS\xff", "protocol version 255 received, this side speaks 5"),
        (b"FS\x05{", b"FS\x05", "Invalid JSON"),
        (b'"segment"', b'"pickle"', "'pickle' found using 'kind'"),
        (b'"segment"', b'"stop"', "stop.epoch: Unexpected keyword"),
        (b'"kind":"segment",', b"", "kind"),
        (b'"seq_no":2,', b"", "segment.seq_no: Field required"),
        (b'"seq_no":2', b'"seq_no":2,"extra":1', "segment.extra: Unexpected keyword"),
        (b'"seq_no":2', b'"seq_no":-1', "segment.seq_no: .* greater than or equal to 0"),
        (b'"seq_no":2', b'"seq_no":2.0', "segment.seq_no: .* valid integer"),
        (b'"seq_no":2', b'"seq_no":"2"', "segment.seq_no: .* valid integer"),
        (b'"verify":true', b'"verify":1', "segment.verify: .* valid boolean"),
        (b'"tokens":[5,6]', b'"tokens":[5,4294967296]', "segment.tokens.1: "),
        (b'"tokens":[5,6]', b'"tokens":[5]', "2 nodes, 2 parents, 1 tokens"),
        (b"bfloat16", b"float64", "segment.hidden.dtype: "),
        (b'"frame":1', b'"frame":0', "segment.hidden.frame: "),
        (b'"frame":1', b'"frame":2', "frame 2 is named, 1 follow the header"),
        (b"[2,4]", b"[2,5]", "frame of 16 bytes, 20 expected for bfloat16"),
        (b"[2,4]", b"[4,2]", r"hidden states of shape \[4, 2\] for 2 nodes"),
        (b"[2,4]", b"[8]", r"hidden states of shape \[8\] for 2 nodes"),
        (b'{"frame":1,"dtype":"bfloat16","shape":[2,4]}', b"null", "1 of 1 frames after"),
        (b"null", b'{"request":2,"position":1,"parent":1,"token":1}', "verdict"),
        (
            b'"verdict":null',
            b'"verdict":{"kind":"reroot","request":2,"position":1,"parent":1,"token":1}',
            "a verdict on request 2 in a message on 1",
        ),
    ],
)
def test_what_is_wrong_in_a_header_is_named(old: bytes, new: bytes, message: str) -> None:
    """The error says which field is wrong, so that a version clash does not look like noise."""
    header, hidden = as_bytes(SEGMENT)
    assert old in header
    with pytest.raises(WireError, match=message):
        decode([header.replace(old, new, 1), hidden])


def test_a_frame_serves_one_tensor() -> None:
    """Two tensors that look into one frame are refused."""
    batch = Batch(segments=(SEGMENT, replace(SEGMENT, request=2)))
    header, first, second = as_bytes(batch)
    with pytest.raises(WireError, match="frame 1 is named twice"):
        decode([header.replace(b'"frame":2', b'"frame":1'), first, second])


@pytest.mark.parametrize("message", [SEGMENT, HIDDEN_STATES, Stop()])
def test_wrong_number_of_frames(message: WireMessage) -> None:
    """Frames missing or too many."""
    frames = as_bytes(message)
    for wrong in ([], frames[:-1], [*frames, b""], [*frames, b"", b"", b""]):
        with pytest.raises(WireError):
            decode(wrong)


@pytest.mark.parametrize("message", [SEGMENT, HIDDEN_STATES], ids=["segment", "hidden states"])
@pytest.mark.parametrize(
    ("shape", "error"),
    [
        ((2**32 - 1, 1), "hidden.shape.0: "),
        ((2**80, 1), "hidden.shape.0: "),
        ((1, codec.MAX_DIMENSION + 1), "hidden.shape.1: "),
        ((codec.MAX_ROWS, codec.MAX_DIMENSION), "bytes, [0-9]+ expected for"),
        ((codec.MAX_DIMENSION,) * 4, "bytes, [0-9]+ expected for"),
        ((1,) * 5, "hidden.shape: Tuple should have at most 4 items"),
    ],
)
def test_claimed_sizes_allocate_nothing(
    message: Segment | HiddenStates, shape: tuple[int, ...], error: str
) -> None:
    """A few bytes that claim gigabytes are refused before any of them is allocated."""
    header, hidden = as_bytes(message)
    start, _, rest = header.partition(b'"shape":')
    header = start + b'"shape":' + str(list(shape)).encode() + rest[rest.index(b"]") + 1 :]
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=error):
            decode([header, hidden])
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def lists_of(item: bytes, num_bytes: int) -> bytes:
    """A JSON list of `item` in about `num_bytes`."""
    return b"[" + b",".join([item] * (num_bytes // (len(item) + 1))) + b"]"


START = b'{"kind":"segment","request":1,"seq_no":1,"nodes":'
LONG = codec.MAX_HEADER_BYTES - 200


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (START + lists_of(b"1", LONG), "Tuple should have at most 4096"),
        (START + lists_of(b'""', LONG), "segment.nodes.0: "),
        (b'{"kind":"batch","segments":' + lists_of(b"{}", LONG), r"batch.segments.0\."),
        (
            b'{"kind":"stop"' + b"".join(b',"%x":0' % n for n in range(LONG // 9)),
            "are wrong or unk",
        ),
        (
            b'{"kind":"failed","stage":1,"request":0,"text":"' + b"x" * LONG + b'"',
            "text: String should have at most",
        ),
        (b'{"kind":"' + b"x" * LONG + b'"', "Input tag 'xxx"),
        (b" " * codec.MAX_HEADER_BYTES, "a header of .* bytes, at most"),
        (b"[" * 5000, "Invalid JSON: recursion limit"),
        (b'{"kind":"ping","rank":' + b"9" * 5000, "Invalid JSON|rank"),
    ],
)
def test_long_headers_are_refused_in_one_line(body: bytes, error: str) -> None:
    """A message with a hundred thousand errors takes proportional memory and names one."""
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match=error) as caught:
            decode([BEGIN + body + b"}"])
        assert tracemalloc.get_traced_memory()[1] < 32 * len(body) + 100_000
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", "NaN"),
        ("temperature", "-1.0"),
        ("temperature", "1e999"),
        ("top_p", "0.0"),
        ("top_p", "NaN"),
        ("min_p", "1.0"),
        ("top_k", str(2**31)),
        ("seed", str(10**30)),
        ("seed", "-1"),
    ],
)
def test_open_checks_its_sampling(field: str, value: str) -> None:
    """Sampling parameters from the network are checked as those of a user."""
    (frame,) = as_bytes(AddRequest(request=1, capacity=2, context=3))
    wrong = re.sub(rf'"{field}":[^,}}]+'.encode(), f'"{field}":{value}'.encode(), frame)
    assert wrong != frame
    with pytest.raises(WireError, match=r"add_request\.sampling"):
        decode([wrong])


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


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.binary(max_size=100) | st.dictionaries(KEYS, JSON).map(json.dumps).map(str.encode), U32)
@settings(max_examples=300)
def test_noise_behind_a_right_beginning(body: bytes, count: int) -> None:
    """The same for random bodies: bytes, and JSON with the keys of real messages."""
    with suppress(WireError):
        decode([BEGIN + body, body, body[:40]][: 1 + count % 3])


@given(MESSAGES, st.data())
@settings(max_examples=300)
def test_damaged_fields_raise_nothing_but_wire_errors(
    message: WireMessage, data: st.DataObject
) -> None:
    """Right JSON with a field replaced, dropped or added, also deep inside."""
    header, *rest = as_bytes(message)
    content = json.loads(header[len(BEGIN) :])
    inner = content
    while data.draw(st.booleans()):
        below = [v for v in inner.values() if isinstance(v, dict)]
        if not below:
            break
        inner = data.draw(st.sampled_from(below))
    key = data.draw(st.sampled_from(sorted(inner)) | KEYS)
    if data.draw(st.booleans()):
        inner.pop(key, None)
    else:
        inner[key] = data.draw(JSON)
    with suppress(WireError):
        decode([BEGIN + json.dumps(content).encode(), *rest])
