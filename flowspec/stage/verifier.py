"""Verifier: on the last stage, walks the true path as far as the logits that are there reach."""

from collections.abc import Sequence

from flowspec.request import NO_NODE, NodeId


class Verifier:
    """Knows, of one request, which rows came by and which token the target chooses after each."""

    def __init__(self) -> None:
        self.tip = NO_NODE  # newest node known to be true whose successor is announced
        self.next_token = -1
        self._choices: dict[NodeId, int] = {}
        self._children: dict[tuple[NodeId, int], NodeId] = {}

    def begin(self, last: NodeId, choice: int) -> None:
        """The prompt ends with node `last`; the target goes on with `choice`."""
        self.tip, self.next_token = last, choice

    def observe(
        self,
        nodes: Sequence[NodeId],
        parents: Sequence[NodeId],
        tokens: Sequence[int],
        choices: Sequence[int],
    ) -> None:
        """Rows of a segment, and the token the target chooses after each of them."""
        for node, parent, token, choice in zip(nodes, parents, tokens, choices, strict=True):
            self._choices[node] = choice
            self._children[parent, token] = node

    def walk(self) -> bool:
        """Move the tip down while the tree holds the truth; True if it moved.

        Then `tip` is the newest accepted node and `next_token` what follows it.
        """
        start = self.tip
        while (child := self._children.get((self.tip, self.next_token))) is not None:
            self.tip, self.next_token = child, self._choices[child]
        if self.tip == start:
            return False
        # Whatever is verified and not on the path is dead; rows below the tip have yet to come.
        self._choices.clear()
        self._children.clear()
        return True
