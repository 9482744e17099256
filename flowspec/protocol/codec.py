"""Messages as bytes. No pickle: fixed little-endian headers and arrays.

A message is one to three frames: header, ids, hidden; a batch is its header and the frames of its
segments. Sizes are checked against the limits and the
frames' lengths before anything is allocated; arrays are views into the frames. Shapes: n rows, H
hidden size. docs/wire_protocol.md has the layouts.
"""

import math
import struct
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowspec.protocol.messages import (
    AddRequest,
    Batch,
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
    stamped,
)
from flowspec.request import SamplingParams

PROTOCOL_VERSION = 5
MAX_ROWS = 4096
MAX_BATCH = 16  # segments in a batch, so requests in it
MAX_HIDDEN = 65536
MAX_TEXT_BYTES = 65536
MAX_FRAME_BYTES = MAX_ROWS * MAX_HIDDEN * 4
MAX_FRAMES = 1 + 3 * MAX_BATCH

Frame: TypeAlias = bytes | memoryview


class WireError(ValueError):
    """A frame that cannot be a message of this protocol version."""


_MAGIC = b"FS"
_HEAD = struct.Struct("<2sBBIHIQ")  # magic, version, kind, epoch, source, number, request
_OPEN = struct.Struct("<IIdIQddQIIBB")
_VERDICT = struct.Struct("<BIqi")  # whether one follows
_CLOSE = struct.Struct("<B")
_BATCH = struct.Struct("<B")
_SEGMENT = struct.Struct("<QIBBIIfIqi")
_REROOT = struct.Struct("<Iqi")
_STARTED = struct.Struct("<Q")
_EXIT = struct.Struct("<QIIf")
_FEATURES = struct.Struct("<iIBI")
_STATUS = struct.Struct("<IdQQQIQQQ")
_READY = struct.Struct("<Q")
_RANK = struct.Struct("<i")
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def encode(message: WireMessage) -> list[Frame]:
    """Frames of a message; `hidden` is not copied where it lies contiguous on the CPU."""
    return [_on_host(frame) for frame in encode_tensors(message)]


def encode_tensors(message: WireMessage) -> list[Frame | Tensor]:
    """Like `encode`, but `hidden` is a flat tensor of bytes on the device where it lies."""
    kind = _KINDS[type(message)]
    fields = (getattr(message, name, 0) for name in ("epoch", "source", "number", "request"))
    head = _HEAD.pack(_MAGIC, PROTOCOL_VERSION, kind.number, *fields)
    return [*kind.encode(head, message)]


def decode(frames: Sequence[Frame | Tensor]) -> WireMessage:
    """The message in `frames`, as of either encoder. Raises WireError naming what is wrong."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError(f"a message has 1 to {MAX_FRAMES} frames, not {len(frames)}")
    views: list[Any] = [f if isinstance(f, Tensor) else memoryview(f) for f in frames]
    header = views[0]
    if len(header) < _HEAD.size:
        raise WireError(f"header truncated: {len(header)} bytes, at least {_HEAD.size} needed")
    magic, version, number, epoch, source, count, request = _HEAD.unpack_from(header)
    if magic != _MAGIC:
        raise WireError(f"not a FlowSpec frame: it begins with {bytes(magic)!r}")
    if version != PROTOCOL_VERSION:
        raise WireError(
            f"protocol version {version} received, this side speaks {PROTOCOL_VERSION}; "
            "install the same flowspec version on every device"
        )
    kind = _BY_NUMBER.get(number)
    if kind is None:
        raise WireError(f"unknown message kind {number}")
    if kind.num_frames and len(frames) != kind.num_frames:
        raise WireError(f"{kind.name} has {kind.num_frames} frames, {len(frames)} came")
    message = kind.decode(request, header[_HEAD.size :], views[1:])
    if isinstance(message, Batch) and message.epoch != epoch:
        raise WireError(f"Batch: epoch {epoch} with segments of epoch {message.epoch}")
    return stamped(message, epoch=epoch, source=source, number=count)


def _unpack(
    name: str, layout: struct.Struct, body: memoryview, *, rest: bool = False
) -> tuple[Any, ...]:
    if len(body) < layout.size or (len(body) > layout.size and not rest):
        raise WireError(f"{name}: {len(body)} header bytes, {layout.size} needed")
    values = layout.unpack_from(body)
    if not all(math.isfinite(value) for value in values if isinstance(value, float)):
        raise WireError(f"{name}: a number that is none, or infinite")
    return values


def _expect(name: str, frame: memoryview, size: int) -> None:
    if len(frame) != size:
        raise WireError(f"{name}: frame of {len(frame)} bytes, {size} expected from its counts")


def _check_counts(name: str, rows: int, hidden_size: int, dtype: int) -> None:
    if rows > MAX_ROWS:
        raise WireError(f"{name}: {rows} rows, at most {MAX_ROWS} allowed")
    if hidden_size > MAX_HIDDEN:
        raise WireError(f"{name}: hidden size {hidden_size}, at most {MAX_HIDDEN} allowed")
    if dtype >= len(_DTYPES):
        raise WireError(f"{name}: unknown dtype code {dtype}")


def _tensor_bytes(tensor: Tensor) -> Tensor:
    tensor = tensor.detach().contiguous()
    # a dimension of one element may keep any stride, which view(uint8) would refuse
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)


def _on_host(frame: Frame | Tensor) -> Frame:
    if not isinstance(frame, Tensor):
        return frame
    array: Any = frame.cpu().numpy()
    return memoryview(array).cast("B") if len(array) else b""


def _tensor(frame: memoryview | Tensor, rows: int, hidden_size: int, dtype: torch.dtype) -> Tensor:
    if isinstance(frame, Tensor):
        return frame.view(dtype).view(rows, hidden_size)
    if not len(frame):
        return torch.empty(rows, hidden_size, dtype=dtype)
    return torch.frombuffer(frame, dtype=dtype).view(rows, hidden_size)


# Frames are read-only and so is the use of the tensors that look into them.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def _encode_open(head: bytes, m: AddRequest) -> list[Frame]:
    s = m.sampling
    fixed = _OPEN.pack(
        m.capacity,
        m.context,
        s.temperature,
        s.top_k,
        s.seed,
        s.top_p,
        s.min_p,
        m.reuse,
        m.num_cached_tokens,
        m.num_prompt_tokens,
        len(m.aux_hidden_state_layers),
        len(rule := s.acceptance.encode()),
    )
    layers = struct.pack(f"<{len(m.aux_hidden_state_layers)}i", *m.aux_hidden_state_layers)
    return [head + fixed + layers + rule]


def _decode_open(request: int, body: memoryview, _: list[memoryview]) -> AddRequest:
    fields = _unpack("AddRequest", _OPEN, body, rest=True)
    (
        capacity,
        context,
        temperature,
        top_k,
        seed,
        top_p,
        min_p,
        reuse,
        num_cached_tokens,
        num_prompt_tokens,
        num_layers,
        rule_bytes,
    ) = fields
    _expect("AddRequest", body[_OPEN.size :], 4 * num_layers + rule_bytes)
    layers = body[_OPEN.size : _OPEN.size + 4 * num_layers]
    try:
        sampling = SamplingParams(
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            acceptance=bytes(body[_OPEN.size + 4 * num_layers :]).decode(),
        )
    except ValueError as error:
        raise WireError(f"AddRequest: {error}") from None
    return AddRequest(
        request=request,
        capacity=capacity,
        context=context,
        sampling=sampling,
        aux_hidden_state_layers=struct.unpack(f"<{num_layers}i", layers),
        reuse=reuse,
        num_cached_tokens=num_cached_tokens,
        num_prompt_tokens=num_prompt_tokens,
    )


def _verdict_fields(verdict: Reroot) -> tuple[int, int, int]:
    return verdict.position, verdict.parent, verdict.token


def _encode_segment(head: bytes, m: Segment) -> list[Frame | Tensor]:
    if m.candidates:
        raise WireError("Segment: candidates have no place in a frame yet")
    ids = np.array([*m.nodes, *m.parents], dtype="<i8").tobytes()
    ids += np.array(m.tokens, dtype="<i4").tobytes()
    size = 0 if m.hidden is None else m.hidden.shape[1]
    dtype = 0 if m.hidden is None else _DTYPES.index(m.hidden.dtype)
    flags = m.prefix | m.verify << 1 | (m.verdict is not None) << 2
    known = (0, 0, 0) if m.verdict is None else _verdict_fields(m.verdict)
    fixed = _SEGMENT.pack(
        m.seq_no, len(m.nodes), flags, dtype, size, m.slowest_rows, m.slowest_ms, *known
    )
    hidden: Frame | Tensor = b"" if m.hidden is None else _tensor_bytes(m.hidden)
    return [head + fixed, ids, hidden]


def _decode_segment(request: int, body: memoryview, frames: list[memoryview]) -> Segment:
    seq_no, n, flags, dtype, size, slowest_rows, slowest_ms, position, parent, token = _unpack(
        "Segment", _SEGMENT, body
    )
    _check_counts("Segment", n, size, dtype)
    if flags > 7:
        raise WireError(f"Segment: unknown flags {flags:#x}")
    ids, hidden = frames
    _expect("Segment ids", ids, 20 * n)
    _expect("Segment hidden", hidden, n * size * _DTYPES[dtype].itemsize)
    nodes = np.frombuffer(ids, dtype="<i8", count=2 * n).tolist()
    return Segment(
        request=request,
        seq_no=seq_no,
        nodes=tuple(nodes[:n]),
        parents=tuple(nodes[n:]),
        tokens=tuple(np.frombuffer(ids, dtype="<i4", offset=16 * n).tolist()),
        hidden=_tensor(hidden, n, size, _DTYPES[dtype]) if size else None,
        prefix=bool(flags & 1),
        verify=bool(flags & 2),
        slowest_rows=slowest_rows,
        slowest_ms=slowest_ms,
        verdict=(
            Reroot(request=request, position=position, parent=parent, token=token)
            if flags & 4
            else None
        ),
    )


def _encode_batch(head: bytes, m: Batch) -> list[Frame | Tensor]:
    frames: list[Frame | Tensor] = [head + _BATCH.pack(len(m.segments))]
    for segment in m.segments:
        frames.extend(encode_tensors(segment))
    return frames


def _decode_batch(_: int, body: memoryview, frames: list[memoryview]) -> Batch:
    (count,) = _unpack("Batch", _BATCH, body)
    if not 1 <= count <= MAX_BATCH or len(frames) != 3 * count:
        raise WireError(
            f"Batch: {count} segments in {len(frames)} frames; 1 to {MAX_BATCH} with 3 each"
        )
    parts = [decode(frames[3 * i : 3 * i + 3]) for i in range(count)]
    segments = tuple(part for part in parts if isinstance(part, Segment))
    if len(segments) < count:
        raise WireError("Batch: holds another kind of message than segments")
    if len({segment.epoch for segment in segments}) > 1:
        raise WireError("Batch: segments of two epochs")
    if len({segment.request for segment in segments}) < count:
        raise WireError("Batch: two segments of one request")
    if sum(len(segment.nodes) for segment in segments) > MAX_ROWS:
        raise WireError(f"Batch: more than {MAX_ROWS} rows")
    return Batch(epoch=segments[0].epoch, segments=segments)


def _encode_close(head: bytes, m: FinishRequest) -> list[Frame]:
    known = (0, 0, 0) if m.verdict is None else _verdict_fields(m.verdict)
    verdict = _VERDICT.pack(m.verdict is not None, *known)
    return [head + _CLOSE.pack(m.keep) + verdict]


def _decode_close(request: int, body: memoryview, _: list[memoryview]) -> FinishRequest:
    (keep,) = _unpack("FinishRequest", _CLOSE, body, rest=True)
    known, position, parent, token = _unpack("FinishRequest", _VERDICT, body[_CLOSE.size :])
    if keep > 1 or known > 1:
        raise WireError(f"FinishRequest: flags {keep}, {known}, each 0 or 1")
    verdict = Reroot(request=request, position=position, parent=parent, token=token)
    return FinishRequest(request=request, keep=bool(keep), verdict=verdict if known else None)


def _encode_features(head: bytes, m: Features) -> list[Frame | Tensor]:
    dtype = _DTYPES.index(m.hidden.dtype)
    fixed = _FEATURES.pack(m.layer, len(m.nodes), dtype, m.hidden.shape[1])
    return [head + fixed, np.array(m.nodes, dtype="<i8").tobytes(), _tensor_bytes(m.hidden)]


def _decode_features(request: int, body: memoryview, frames: list[memoryview]) -> Features:
    layer, n, dtype, size = _unpack("Features", _FEATURES, body)
    _check_counts("Features", n, size, dtype)
    nodes, hidden = frames
    _expect("Features nodes", nodes, 8 * n)
    _expect("Features hidden", hidden, n * size * _DTYPES[dtype].itemsize)
    return Features(
        request=request,
        layer=layer,
        nodes=tuple(np.frombuffer(nodes, dtype="<i8").tolist()),
        hidden=_tensor(hidden, n, size, _DTYPES[dtype]),
    )


def _encode_text(stage: int, text: str) -> bytes:
    raw = text.encode(errors="replace")[:MAX_TEXT_BYTES]  # file names may hold stray bytes
    return _RANK.pack(stage) + raw.decode(errors="ignore").encode()  # no half character at the cut


def _decode_text(name: str, body: memoryview) -> tuple[int, str]:
    (stage,) = _unpack(name, _RANK, body, rest=True)
    raw = bytes(body[_RANK.size :])
    if len(raw) > MAX_TEXT_BYTES:
        raise WireError(f"{name}: text of {len(raw)} bytes, at most {MAX_TEXT_BYTES} allowed")
    try:
        return stage, raw.decode()
    except UnicodeDecodeError as error:
        raise WireError(f"{name}: {error}") from None


def _decode_failed(request: int, body: memoryview, _: list[memoryview]) -> Failed:
    stage, text = _decode_text("Failed", body)
    return Failed(stage=stage, request=request, text=text)


def _encode_ready(head: bytes, m: Ready) -> list[Frame]:
    return [head + _READY.pack(m.kv_rows) + _encode_text(m.stage, m.model)]


def _decode_ready(_: int, body: memoryview, __: list[memoryview]) -> Ready:
    (kv_rows,) = _unpack("Ready", _READY, body, rest=True)
    stage, model = _decode_text("Ready", body[_READY.size :])
    return Ready(stage=stage, model=model, kv_rows=kv_rows)


@dataclass(frozen=True, slots=True)
class _Kind:
    name: str
    number: int
    num_frames: int  # 0: as many as it says
    encode: Callable[[bytes, Any], Sequence[Frame | Tensor]]
    decode: Callable[[int, memoryview, list[memoryview]], WireMessage]


def _plain(cls: type, number: int, layout: struct.Struct, *fields: str) -> _Kind:
    """A message of one frame whose fields are all numbers."""
    with_request = "request" in cls.__dataclass_fields__  # type: ignore[attr-defined]

    def encode_plain(head: bytes, m: Any) -> list[Frame]:
        return [head + layout.pack(*(getattr(m, name) for name in fields))]

    def decode_plain(request: int, body: memoryview, _: list[memoryview]) -> WireMessage:
        values = dict(zip(fields, _unpack(cls.__name__, layout, body), strict=True))
        return cls(request=request, **values) if with_request else cls(**values)

    return _Kind(cls.__name__, number, 1, encode_plain, decode_plain)


_KINDS: dict[type, _Kind] = {
    AddRequest: _Kind("AddRequest", 1, 1, _encode_open, _decode_open),
    Segment: _Kind("Segment", 2, 3, _encode_segment, _decode_segment),
    FinishRequest: _Kind("FinishRequest", 3, 1, _encode_close, _decode_close),
    Reroot: _plain(Reroot, 4, _REROOT, "position", "parent", "token"),
    Started: _plain(Started, 5, _STARTED, "seq_no"),
    Exit: _plain(Exit, 6, _EXIT, "seq_no", "rows", "slowest_rows", "slowest_ms"),
    Features: _Kind("Features", 7, 3, _encode_features, _decode_features),
    Status: _plain(
        Status,
        8,
        _STATUS,
        "stage",
        "busy_s",
        "num_segments",
        "num_rows_run",
        "num_rows_pruned",
        "num_requests",
        "kv_rows_used",
        "peak_memory_bytes",
        "num_closes",
    ),
    Failed: _Kind(
        "Failed", 9, 1, lambda head, m: [head + _encode_text(m.stage, m.text)], _decode_failed
    ),
    Ready: _Kind("Ready", 10, 1, _encode_ready, _decode_ready),
    Ping: _plain(Ping, 11, _RANK, "rank"),
    Stop: _plain(Stop, 12, struct.Struct("<")),
    Batch: _Kind("Batch", 13, 0, _encode_batch, _decode_batch),
    FreeRequest: _plain(FreeRequest, 14, struct.Struct("<")),
    Reset: _plain(Reset, 15, struct.Struct("<")),
}
_BY_NUMBER = {kind.number: kind for kind in _KINDS.values()}
