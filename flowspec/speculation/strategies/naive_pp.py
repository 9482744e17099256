"""naive_pp: the tree in chunks, one verdict per round: FlowSpec's baseline ("Chunk-PP").

Chunks are in level order; the stages work on different chunks at once, but nothing is pruned and
drafting waits for the verdict (arXiv 2507.02620, baselines).
"""

from collections.abc import Sequence

from flowspec.head.session import Session
from flowspec.speculation.strategies.base import Outgoing, TreeRound, pieces
from flowspec.speculation.tree import Node


class NaivePp:
    """Draft, send in chunks, wait for the last, begin again."""

    def __init__(self) -> None:
        self.round = TreeRound()
        self.chunks: list[list[Node]] = []

    def next_segment(self, s: Session) -> Outgoing | None:
        """The next chunk; only the last one asks for the verdict."""
        if self.round.grown and s.round_over:
            in_levels = sorted(s.tree.nodes.values(), key=lambda node: (node.position, node.id))
            self.chunks = pieces(in_levels, s.num_stages + 1, 1)
        if not self.chunks:
            return None
        chunk = self.chunks.pop(0)
        return Outgoing(chunk, verify=not self.chunks)

    def next_draft(self, s: Session) -> Sequence[Node]:
        """Grow the round's tree."""
        return self.round.next_draft(s) if s.round_over else []

    def on_verdict(self, s: Session) -> None:
        """The round is decided: draft anew from the new root."""
        self.round.restart(s)
