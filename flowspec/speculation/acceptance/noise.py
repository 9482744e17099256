"""Random numbers that are equal on every device: pure functions of seed, position and stream.

Philox is counter-based (Salmon et al., SC 2011): the key is the seed, the counter holds position
and stream. The streams are independent of one another.
"""

from enum import IntEnum

import numpy as np


class NoiseStream(IntEnum):
    """The uses of random numbers; the values are part of the protocol."""

    TARGET = 0  # the sample of the target's own distribution
    ACCEPT = 1  # an acceptance rule's coins
    DRAFT = 2  # children that a drafter draws from its own distribution


def uniforms(seed: int, position: int, count: int, stream: NoiseStream) -> np.ndarray:
    """Return `count` numbers in (0, 1), both ends excluded, for the token at `position`.

    The first numbers are the same whatever the count is.
    """
    # word 0 counts within the position
    counter = np.array([0, position, int(stream), 0], dtype=np.uint64)
    bits = np.random.Philox(key=seed, counter=counter).random_raw(count)
    # from the upper 52 bits: with one more the largest would round to 1
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
