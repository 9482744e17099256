"""pruned_pp: FlowSpec without growth: score-ordered segments, a verdict and a pruning after each.

The round goes on while the truth is in the tree; the next one is drafted when the pipe has drained
(arXiv 2507.02620, ablation).
"""

from collections.abc import Sequence

from flowspec.session import Session
from flowspec.strategies.base import Outgoing, TreeRound, pieces
from flowspec.tree import Node


class PrunedPp:
    """Draft, send the best first, prune with every verdict, begin again when all is decided."""

    def __init__(self) -> None:
        self.round = TreeRound()
        self.segments: list[list[Node]] = []

    def next_segment(self, s: Session) -> Outgoing | None:
        """What is still alive of the next segment."""
        if self.round.grown and s.round_over and not self.segments:
            best_first = s.tree.best_unsent(len(s.tree))
            self.segments = pieces(best_first, s.num_stages + 1, s.config.segment_size)
        while self.segments:
            alive = [node for node in self.segments.pop(0) if node.id in s.tree]
            if alive:
                return Outgoing(alive)
        return None

    def next_draft(self, s: Session) -> Sequence[Node]:
        """Grow the round's tree, once the one before is decided."""
        if self.segments or not s.round_over:
            return []
        return self.round.next_draft(s)

    def on_verdict(self, s: Session) -> None:
        """Off the round's tree: what is left of it is dead."""
        root = s.tree.root
        if not root.sent and not any(root in segment for segment in self.segments):
            self.segments.clear()
            self.round.restart(s)
