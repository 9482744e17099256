"""pruned_pp: FlowSpec without growth: score-ordered segments, a verdict and a pruning after each.

The round goes on while the truth is in the tree; the next one is drafted when the pipe has drained
(arXiv 2507.02620, ablation).
"""

from collections.abc import Sequence

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategies.base import ScoredRound
from flowspec.speculation.strategy import Outgoing, Rows, SegmentedRoundConfig
from flowspec.speculation.tree import Node


class PrunedPpConfig(SegmentedRoundConfig):
    """The defaults of the published ablation."""

    num_draft_tokens: Rows = 80
    refresh: bool = False


class PrunedPp:
    """Draft, send the best first, prune with every verdict, begin again when all is decided."""

    def __init__(self, config: PrunedPpConfig) -> None:
        self.round = ScoredRound(config)

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """The round's next segment."""
        return self.round.next_segment(request)

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Grow the round's tree, once the one before is decided."""
        if self.round.segments or not request.round_over:
            return []
        return self.round.next_draft(request)

    def on_verdict(self, request: RequestState) -> None:
        """Off the round's tree: what is left of it is dead."""
        root = request.tree.root
        if not root.sent and not any(root in segment for segment in self.round.segments):
            self.round.restart(request)
