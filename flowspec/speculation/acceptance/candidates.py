"""Candidates: the children that the rows of a segment carry for the acceptance rule."""

from collections.abc import Sequence

from flowspec.protocol.messages import MAX_CANDIDATES, MAX_SUPPORT, Candidates
from flowspec.request import SamplingParams
from flowspec.speculation.acceptance import rule_of
from flowspec.speculation.acceptance.base import CandidateNeeds
from flowspec.speculation.tree import Node


def candidates_of(sampling: SamplingParams, nodes: Sequence[Node]) -> tuple[Candidates, ...]:
    """Return the present children of `nodes` in the order of proposal.

    Empty if the request's rule needs none. Of more than MAX_CANDIDATES children the first ones
    count. Raises ValueError if a drafter has drawn from more than MAX_SUPPORT tokens.
    """
    needs = rule_of(sampling).needs
    if needs is CandidateNeeds.NOTHING:
        return ()
    found = []
    for node in nodes:
        drawn_from = node.drawn_from if needs is CandidateNeeds.DISTRIBUTION else ()
        if len(drawn_from) > MAX_SUPPORT:
            raise ValueError(
                f"the children of node {node.id} were drawn from {len(drawn_from)} tokens, at most "
                f"{MAX_SUPPORT} are allowed; let the drafter cut its distribution first"
            )
        found.append(Candidates(tuple(node.children)[:MAX_CANDIDATES], drawn_from))
    return tuple(found)
