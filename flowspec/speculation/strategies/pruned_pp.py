"""pruned_pp: FlowSpec without growth: segments in score order, pruned after each verdict.

The round goes on while the true path is in the tree. The next one is drafted when the pipe has
drained (arXiv 2507.02620, ablation).
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
    """Drafts, sends the best first, prunes with every verdict, and begins again at the end."""

    def __init__(self, config: PrunedPpConfig) -> None:
        self.round = ScoredRound(config)

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Return the round's next segment."""
        return self.round.next_segment(request)

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Grow the round's tree, once the one before is decided."""
        if self.round.segments or not request.round_over:
            return []
        return self.round.next_draft(request)

    def on_verdict(self, request: RequestState) -> None:
        """Drop the rest of the round's tree if the token was not in it."""
        root = request.tree.root
        if not root.sent and not any(root in segment for segment in self.round.segments):
            self.round.restart(request)
