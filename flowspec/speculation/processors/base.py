"""The seam of a logits processor, which changes the target's logits at a node of the tree.

A filter needs the logits alone. A path processor also needs the tokens before: it keeps a state per
node of the tree, forked from the parent's, so that no path is walked twice. Shapes: n rows, V
vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from flowspec.request import NodeId, SamplingParams


class PathState(Protocol):
    """A processor's state at one node; it never changes, since siblings share their parent's."""

    def fork(self, token: int) -> "PathState":
        """Return the state at the child with `token`."""

    def apply(self, logits: Tensor) -> Tensor:
        """Return the processed logits [V] of the token after this node; `logits` stays as it is.

        At least one token must stay above -inf.
        """


@dataclass(frozen=True, slots=True)
class LogitsFilter:
    """A processor without state: logits [n, V] -> logits [n, V], for rows of one request.

    It sees the results of the filters before it in the table. The likeliest token always stays, so
    that greedy decoding needs no filter.
    """

    applies: Callable[[SamplingParams], bool]
    apply: Callable[[Tensor, SamplingParams], Tensor]
    about: str


@dataclass(frozen=True, slots=True)
class PathProcessor:
    """A processor with a state per node. It runs before the filters, also at temperature 0.

    `begin` gives the state after a prompt. The tokens of the answer are then forked one by one,
    including those that were generated before a stage was lost.
    """

    applies: Callable[[SamplingParams], bool]
    begin: Callable[[SamplingParams, Sequence[int]], PathState]
    about: str


@dataclass(frozen=True, slots=True)
class StateChain:
    """The states of several processors at one node, applied one after the other."""

    states: tuple[PathState, ...]

    def fork(self, token: int) -> "StateChain":
        """Return the chain with each state forked."""
        return StateChain(tuple(state.fork(token) for state in self.states))

    def apply(self, logits: Tensor) -> Tensor:
        """Apply the states in the order of the table."""
        for state in self.states:
            logits = state.apply(logits)
        return logits


class PathStates:
    """The states at the nodes of one request's tree.

    The last stage has one for its alive rows. A drafter on the head may keep its own for the nodes
    that it expands, to draft what the target's processors leave.
    """

    def __init__(self, tip: PathState) -> None:
        self._tip = tip  # at the newest committed node
        self._nodes: dict[NodeId, PathState] = {}

    def __len__(self) -> int:
        return len(self._nodes)

    def at(self, node: NodeId) -> PathState:
        """Return the state at an entered node, or else at the newest committed one."""
        return self._nodes.get(node, self._tip)

    def enter(self, node: NodeId, parent: NodeId, token: int) -> None:
        """Add a node whose parent was entered before or is the newest committed one."""
        self._nodes[node] = self.at(parent).fork(token)

    def follow(self, path: Iterable[tuple[NodeId, int]]) -> PathState:
        """Return the state at the end of a path of (node, token) below the newest committed node.

        Missing nodes on the way are entered. On the head the path is `((n.id, n.token) for n in
        tree.path(node))`.
        """
        state = self._tip
        for node, token in path:
            found = self._nodes.get(node)
            if found is None:
                found = self._nodes[node] = state.fork(token)
            state = found
        return state

    def reroot(self, tip: NodeId, alive: Iterable[NodeId]) -> None:
        """Commit the path down to `tip`; of the other nodes those in `alive` stay."""
        self._tip = self.at(tip)
        self._nodes = {node: self._nodes[node] for node in alive if node in self._nodes}
