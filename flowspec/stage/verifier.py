"""Verifier: walks down the true path on the last stage as far as logits are known."""

from collections.abc import Sequence

from flowspec.request import NO_NODE, NodeId


class Verifier:
    """Knows the rows of one request and the token that the target chooses after each."""

    def __init__(self) -> None:
        self.tip = NO_NODE  # the newest true node whose successor is announced
        self.next_token = -1
        self._choices: dict[NodeId, int] = {}
        self._children: dict[tuple[NodeId, int], NodeId] = {}

    def begin(self, last: NodeId, choice: int) -> None:
        """Begin after the prompt's last node `last`, which the token `choice` follows."""
        self.tip, self.next_token = last, choice

    def observe(
        self,
        nodes: Sequence[NodeId],
        parents: Sequence[NodeId],
        tokens: Sequence[int],
        choices: Sequence[int],
    ) -> None:
        """Record the rows of a segment and the token that the target chooses after each."""
        for node, parent, token, choice in zip(nodes, parents, tokens, choices, strict=True):
            self._choices[node] = choice
            self._children[parent, token] = node

    def walk(self) -> bool:
        """Move the tip down while the tree holds the truth; return whether it moved.

        Then `tip` is the newest accepted node and `next_token` is the token after it.
        """
        start = self.tip
        while (child := self._children.get((self.tip, self.next_token))) is not None:
            self.tip, self.next_token = child, self._choices[child]
        if self.tip == start:
            return False
        # Every verified row off the path is dead; rows below the tip have yet to come.
        self._choices.clear()
        self._children.clear()
        return True
