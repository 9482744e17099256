"""What a drafter is to the head: it proposes children of tree nodes, one forward at a time."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flowspec.request import NodeId, Request
from flowspec.tree import DraftTree, Node


@dataclass(frozen=True, slots=True)
class Proposal:
    """Children proposed for one node: (token, log-probability of being the target's choice)."""

    node: NodeId
    children: tuple[tuple[int, float], ...]


class DraftSession(Protocol):
    """The drafter's side of one request. Methods that compute are `absorb` and `expand`."""

    num_rows_ready: int  # true tokens waiting to be absorbed (0: nothing to do)

    def accept(self, tokens: Sequence[int]) -> None:
        """Tokens now known to be true, behind those known before (first the prompt)."""

    def accept_features(self, layer: int, features: Mapping[int, Tensor]) -> None:
        """True features [H] by absolute position, each position once, any order."""

    def absorb(self, tree: DraftTree) -> Proposal | None:
        """One forward over true tokens; the root's children if it got as far as the root."""

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """One forward over alive nodes whose parents are expanded."""


class Drafter(Protocol):
    """A loaded draft model (or method)."""

    name: str
    feature_layers: tuple[int, ...]  # which of the target's hidden states it needs

    def open(self, request: Request, *, topk: int, coupled: bool) -> DraftSession:
        """Begin with a request; `topk` children per node, ranked by the shared noise if coupled."""


class NoDrafter:
    """Drafts nothing: for `ar`."""

    name = "none"
    feature_layers: tuple[int, ...] = ()

    def open(self, request: Request, *, topk: int, coupled: bool) -> "NoDraftSession":
        """A session that never has anything to say."""
        del request, topk, coupled
        return NoDraftSession()


class NoDraftSession:
    """See NoDrafter."""

    num_rows_ready = 0

    def accept(self, tokens: Sequence[int]) -> None:
        """Nothing depends on the text."""

    def accept_features(self, layer: int, features: Mapping[int, Tensor]) -> None:
        """No features were asked for."""

    def absorb(self, tree: DraftTree) -> Proposal | None:
        """Never called: num_rows_ready stays 0."""
        raise AssertionError("nothing was ready to absorb")

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """No children."""
        return [Proposal(node.id, ()) for node in nodes]
