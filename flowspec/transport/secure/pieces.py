"""Cuts long frames into pieces and joins them, so that long frames of strangers can be refused.

libzmq applies one size limit to every frame of a connection, even before the peer has shown its
key. A message is a table (length of each frame, u32), followed by all frames, cut into pieces where
they are too long.
"""

import struct
from collections.abc import Sequence

from flowspec.protocol.codec import MAX_FRAME_BYTES, MAX_FRAMES, Frame, WireError

_LENGTH = struct.Struct("<I")


def cut(frames: Sequence[Frame], piece_bytes: int) -> list[Frame]:
    """Return a message to send: the table, then pieces of at most `piece_bytes`."""
    pieces: list[Frame] = [b"".join(_LENGTH.pack(len(frame)) for frame in frames)]
    for frame in frames:
        if len(frame) <= piece_bytes:
            pieces.append(frame)
            continue
        view = memoryview(frame)
        pieces += [view[at : at + piece_bytes] for at in range(0, len(view), piece_bytes)]
    return pieces


def join(pieces: Sequence[Frame]) -> list[Frame]:
    """Return the frames of a message that `cut` made. Raises WireError if it cannot have."""
    table, rest = memoryview(pieces[0]), list(pieces[1:])
    count, odd = divmod(len(table), _LENGTH.size)
    if odd or not 1 <= count <= MAX_FRAMES:
        raise WireError(f"a table has {len(table)} bytes, needed: 1 to {MAX_FRAMES} lengths")
    frames: list[Frame] = []
    rest.reverse()
    for (length,) in _LENGTH.iter_unpack(table):
        if length > MAX_FRAME_BYTES:
            raise WireError(f"a frame has {length} bytes, at most {MAX_FRAME_BYTES} are allowed")
        parts: list[Frame] = []
        missing = length
        while rest and (missing > 0 or not parts):
            missing -= len(rest[-1])
            parts.append(rest.pop())
        if missing or not parts:
            raise WireError(f"pieces do not add up to a frame of {length} bytes")
        frames.append(parts[0] if len(parts) == 1 else b"".join(parts))
    if rest:
        raise WireError(f"the message has {len(rest)} pieces more than its table says")
    return frames
