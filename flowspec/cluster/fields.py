"""What texts, counts and times of a control message may be, and how strictly they are read."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

MAX_MESSAGE_BYTES = 1 << 20
MAX_ASK_BYTES = (
    16 << 20
)  # a conversation alone may be so long: over 100 bytes for each of 128k tokens
MAX_STAGES = 256

Name = Annotated[str, Field(max_length=200)]
Words = Annotated[str, Field(max_length=4000)]
Text = Annotated[str, Field(max_length=MAX_MESSAGE_BYTES // 4)]
LongText = Annotated[str, Field(max_length=MAX_ASK_BYTES)]
Count = Annotated[int, Field(ge=0, le=2**62)]
Seconds = Annotated[float, Field(ge=0.0, le=1e12, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0.0, le=1e18, allow_inf_nan=False)]


class Strict(BaseModel):
    """Nothing is converted, an unknown key is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
