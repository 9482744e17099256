"""Greedy choice: the likeliest token follows. Temperature 0 uses it."""

from collections.abc import Sequence

from torch import Tensor

from flowspec.protocol.messages import Candidates
from flowspec.speculation.acceptance.base import AcceptanceRule, CandidateNeeds


def choose(
    logits: Tensor, positions: Sequence[int], seed: int, candidates: Sequence[Candidates]
) -> list[int]:
    """Return the arg-max [n] of logits [n, V], without noise."""
    del positions, seed, candidates
    return logits.argmax(-1).tolist()


GREEDY = AcceptanceRule(choose, CandidateNeeds.NOTHING, is_exact=True, about="the likeliest token")
