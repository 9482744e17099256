"""The seam of an acceptance rule, which decides the token that follows a row of the tree.

A drafted child is accepted if it is that token. The rule sees the row's processed logits, the
candidates that were fixed when the row was sent, and the key of its noise. Children that the tree
got later only match the token that is already chosen. So a choice depends on the schedule of what
was sent, never on the order of arrival. Shapes: n rows, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from torch import Tensor

from flowspec.protocol.messages import Candidates


class CandidateNeeds(Enum):
    """The part of a row's candidates that a rule needs; nothing else travels."""

    NOTHING = "nothing"
    TOKENS = "tokens"
    DISTRIBUTION = "distribution"  # the tokens and their distribution


# (logits [n, V], positions [n], seed, candidates [n], or none if the rule needs none) -> tokens
# [n]; row k decides the token at positions[k]. The logits are divided by temperature and filtered,
# except at temperature 0, where the rule is greedy. All noise comes from `noise.uniforms` of seed
# and position, a rule's coins from NoiseStream.ACCEPT.
Choose: TypeAlias = Callable[[Tensor, Sequence[int], int, Sequence[Candidates]], list[int]]


@dataclass(frozen=True, slots=True)
class AcceptanceRule:
    """A row of the table.

    `is_exact`: each token is the one that the target alone would give, whatever was drafted. A rule
    that needs the DISTRIBUTION also needs a drafter that draws its children, and a tree that keeps
    all of them.
    """

    choose: Choose
    needs: CandidateNeeds
    is_exact: bool
    about: str
