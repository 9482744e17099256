"""pruned_pp: FlowSpec without growth: score-ordered segments, a verdict and a pruning after each.

The round goes on while the truth is in the tree; the next one is drafted when the pipe has drained
(arXiv 2507.02620, ablation).
"""

from collections.abc import Sequence

from flowspec.head.session import Session
from flowspec.speculation.strategies.base import Outgoing, ScoredRound
from flowspec.speculation.tree import Node


class PrunedPp:
    """Draft, send the best first, prune with every verdict, begin again when all is decided."""

    def __init__(self) -> None:
        self.round = ScoredRound()

    def next_segment(self, s: Session) -> Outgoing | None:
        """The round's next segment."""
        return self.round.next_segment(s)

    def next_draft(self, s: Session) -> Sequence[Node]:
        """Grow the round's tree, once the one before is decided."""
        if self.round.segments or not s.round_over:
            return []
        return self.round.next_draft(s)

    def on_verdict(self, s: Session) -> None:
        """Off the round's tree: what is left of it is dead."""
        root = s.tree.root
        if not root.sent and not any(root in segment for segment in self.round.segments):
            self.round.restart(s)
