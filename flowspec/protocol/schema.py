"""The common part of both protocols: bounded field types, and the codec to and from JSON.

A message is a dataclass or pydantic model with a field `kind` that names it. Its fields are its
wire format: a new field needs a type with bounds and nothing else. pydantic validates strictly: it
converts nothing, and refuses unknown keys and numbers that are not finite. This module does not
import torch: a client of a head has no tensors, and importing torch takes seconds.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    AfterValidator,
    ConfigDict,
    FailFast,
    Field,
    PlainSerializer,
    TypeAdapter,
    ValidationError,
    ValidationInfo,
)
from pydantic import FieldSerializationInfo as SerializationInfo

MAX_TEXT = 65536  # characters
MAX_DIMENSION = 65536  # of a tensor
MAX_ERRORS = 50  # that are read before one is named
MAX_ERROR_TEXT = 300  # characters of an error

M = TypeVar("M")

UInt32 = Annotated[int, Field(ge=0, le=2**32 - 1)]
Int32 = Annotated[int, Field(ge=-(2**31), le=2**31 - 1)]
INT64 = Field(ge=-(2**63), le=2**63 - 1)
Int64 = Annotated[int, INT64]
Count = Annotated[int, Field(ge=0, le=2**62)]
Seconds = Annotated[float, Field(ge=0.0, le=1e12, allow_inf_nan=False)]
Milliseconds = Annotated[float, Field(ge=0.0, le=1e15, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0.0, le=1e18, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=200)]


class WireError(ValueError):
    """Bytes that are not a message of this protocol version."""


def _sendable(text: str) -> str:
    """Cut the text to MAX_TEXT characters; stray bytes that UTF-8 cannot hold become "?"."""
    return text[:MAX_TEXT].encode(errors="replace").decode()


# A text that its sender cuts. A receiver refuses a longer one.
CutText = Annotated[str, Field(max_length=MAX_TEXT), PlainSerializer(_sendable, return_type=str)]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """The header's description of a tensor, whose bytes are a frame of their own."""

    frame: Annotated[int, Field(ge=1, le=255)]  # its place in the message; the header is frame 0
    dtype: Literal["float32", "float16", "bfloat16"]
    shape: Annotated[
        tuple[Annotated[int, Field(ge=0, le=MAX_DIMENSION)], ...], Field(max_length=4), FailFast()
    ]


def _put(tensor: Any, info: SerializationInfo) -> TensorRef:
    context: Any = info.context
    ref: TensorRef = context.put(tensor)
    return ref


def _take(ref: TensorRef, info: ValidationInfo) -> Any:
    context: Any = info.context
    return context.take(ref)


# A field of this type holds a torch tensor. The codec's context has its bytes: `put(tensor)` adds a
# frame while a message is encoded, `take(ref)` gives the tensor while one is decoded.
TensorField = Annotated[
    TensorRef, AfterValidator(_take), PlainSerializer(_put, return_type=TensorRef)
]


class MessageCodec(Generic[M]):
    """Converts the messages of one union to JSON and back; `kind` tells its members apart."""

    def __init__(self, union: Any, *, max_bytes: int, error: type[WireError] = WireError) -> None:
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        tagged: Any = Annotated[union, Field(discriminator="kind")]
        self.adapter: TypeAdapter[M] = TypeAdapter(tagged, config=config)
        self._max_bytes, self._error = max_bytes, error

    def encode(self, message: M, context: Any = None) -> bytes:
        """Return the message as JSON. `context` takes its tensors.

        Raises PydanticSerializationError if a field holds another type than its own, which only a
        bug of the sender can cause.
        """
        return self.adapter.dump_json(message, context=context, warnings="error")

    def decode(self, frame: bytes, context: Any = None, *, max_bytes: int = 0) -> M:
        """Return the message in a frame of at most `max_bytes` (0: the codec's own limit).

        `context` has its tensors. Raises the codec's error, which names the wrong field.
        """
        limit = max_bytes or self._max_bytes
        if len(frame) > limit:
            raise self._error(f"a header of {len(frame)} bytes, at most {limit} allowed")
        try:
            return self.adapter.validate_json(frame, context=context)
        except ValidationError as error:
            raise self._error(first_error(error)) from None


def first_error(error: ValidationError) -> str:
    """Return the first error with its place in the message: `segment.tokens.3: ...`."""
    if (count := error.error_count()) > MAX_ERRORS:
        return f"message: {count} fields are wrong or unknown"  # listing them would take memory
    first = error.errors(include_input=False, include_url=False, include_context=False)[0]
    where = ".".join(str(part) for part in first["loc"])[:100]
    return f"{where or 'message'}: {first['msg'][:MAX_ERROR_TEXT]}"
