"""Data messages as frames: a JSON header, and each tensor's bytes as a raw frame after it.

The header is the protocol's name, one byte with its version, and the message as JSON (see
schema.py). Nothing is pickled. Nothing is allocated for what a header claims: a tensor is a view of
a frame that has come, so its shape and dtype must account for each of the frame's bytes.
docs/wire_protocol.md describes the messages.
"""

import math
import warnings
from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from flowspec.protocol.messages import MAX_BATCH, MAX_ROWS, WireMessage
from flowspec.protocol.schema import MAX_DIMENSION, MessageCodec, TensorRef, WireError

__all__ = [
    "MAX_BATCH",
    "MAX_FRAMES",
    "MAX_FRAME_BYTES",
    "MAX_HEADER_BYTES",
    "MAX_ROWS",
    "PROTOCOL_VERSION",
    "Frame",
    "WireError",
    "decode",
    "encode",
    "encode_tensors",
]

PROTOCOL_VERSION = 5
MAX_HEADER_BYTES = 512 << 10  # 4096 rows take 250 KB at most
MAX_FRAME_BYTES = MAX_ROWS * MAX_DIMENSION * 4
MAX_FRAMES = 64

Frame: TypeAlias = bytes | memoryview

_MAGIC = b"FS"
_BEGIN = _MAGIC + bytes([PROTOCOL_VERSION])
_CODEC: MessageCodec[WireMessage] = MessageCodec(WireMessage, max_bytes=MAX_HEADER_BYTES)
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_DTYPE_NAMES: dict[torch.dtype, Any] = {dtype: name for name, dtype in _DTYPES.items()}

# Frames are read-only, and the tensors that view them are only read.
warnings.filterwarnings("ignore", message="The given buffer is not writable")


def encode(message: WireMessage) -> list[Frame]:
    """Return the frames of a message. A tensor that is contiguous on the CPU is not copied."""
    return [_on_host(frame) for frame in encode_tensors(message)]


def encode_tensors(message: WireMessage) -> list[Frame | Tensor]:
    """Encode like `encode`, but give each tensor as a flat tensor of bytes on its own device."""
    tensors = _Leaving()
    header = _BEGIN + _CODEC.encode(message, tensors)
    return [header, *tensors.frames]


def decode(frames: Sequence[Frame | Tensor]) -> WireMessage:
    """Return the message in `frames` of either encoder. Raises WireError naming what is wrong."""
    if not 1 <= len(frames) <= MAX_FRAMES:
        raise WireError(f"a message has 1 to {MAX_FRAMES} frames, not {len(frames)}")
    tensors = _Arrived(frames[1:])
    message = _CODEC.decode(_json_of(frames[0]), tensors)
    tensors.check_all_taken()
    return message


def _json_of(header: Frame | Tensor) -> bytes:
    """Return the JSON of a header after checking its beginning and length."""
    if isinstance(header, Tensor):
        raise WireError("the header is a tensor")
    begin = bytes(header[: len(_BEGIN)])
    if len(begin) < len(_BEGIN):
        raise WireError(f"header truncated: {len(begin)} bytes")
    if begin[:-1] != _MAGIC:
        raise WireError(f"not a FlowSpec frame: it begins with {begin[:-1]!r}")
    if begin[-1] != PROTOCOL_VERSION:
        raise WireError(
            f"protocol version {begin[-1]} received, this side speaks {PROTOCOL_VERSION}; "
            "install the same flowspec version on every device"
        )
    if len(header) > MAX_HEADER_BYTES:
        raise WireError(f"a header of {len(header)} bytes, at most {MAX_HEADER_BYTES} allowed")
    return bytes(header[len(_BEGIN) :])


class _Leaving:
    """Collects the tensors of a message that is being encoded."""

    def __init__(self) -> None:
        self.frames: list[Tensor] = []

    def put(self, tensor: Tensor) -> TensorRef:
        """Add a frame with the tensor's bytes; return the header's reference to it."""
        shape, name = tuple(tensor.shape), _DTYPE_NAMES[tensor.dtype]
        tensor = tensor.detach().contiguous()
        # A dimension of one element may keep any stride, which view(uint8) would refuse.
        flat = tensor.as_strided((tensor.numel(),), (1,))
        self.frames.append(flat.view(torch.uint8))
        return TensorRef(frame=len(self.frames), dtype=name, shape=shape)


class _Arrived:
    """Gives the frames of a message that is being decoded as tensors, each one once."""

    def __init__(self, frames: Sequence[Frame | Tensor]) -> None:
        self._frames: list[Frame | Tensor | None] = list(frames)

    def take(self, ref: TensorRef) -> Tensor:
        """Return the tensor that `ref` describes. Raises ValueError if its frame does not match."""
        if ref.frame > len(self._frames):
            raise ValueError(f"frame {ref.frame} is named, {len(self._frames)} follow the header")
        frame, self._frames[ref.frame - 1] = self._frames[ref.frame - 1], None
        if frame is None:
            raise ValueError(f"frame {ref.frame} is named twice")
        dtype = _DTYPES[ref.dtype]
        size = math.prod(ref.shape) * dtype.itemsize
        if len(frame) != size:
            raise ValueError(
                f"frame of {len(frame)} bytes, {size} expected for {ref.dtype} {list(ref.shape)}"
            )
        if isinstance(frame, Tensor):
            return frame.view(dtype).view(ref.shape)
        if not size:
            return torch.empty(ref.shape, dtype=dtype)
        return torch.frombuffer(frame, dtype=dtype).view(ref.shape)

    def check_all_taken(self) -> None:
        """Raise WireError if a frame belongs to no tensor of the message."""
        if left := sum(frame is not None for frame in self._frames):
            raise WireError(f"{left} of {len(self._frames)} frames after the header are not named")


def _on_host(frame: Frame | Tensor) -> Frame:
    if not isinstance(frame, Tensor):
        return frame
    array: Any = frame.cpu().numpy()
    return memoryview(array).cast("B") if len(array) else b""
