"""flowspec: the published algorithm (arXiv 2507.02620, sections 3.2 and 3.3), with its defaults.

A round begins with a tree of `num_draft_tokens` nodes, cut by score into segments. While every
verdict stays in the tree, each one triggers a re-draft of `EXPAND_SIZE` nodes from the new root
with the new true hidden states; the new nodes follow as one appended segment. A token outside the
tree ends the round: the pipe drains, and the next tree is drafted before anything is sent. Of equal
scores the elder node wins, so no node is sent without its parent, and every row is masked to its
own path (the official code errs in both).
"""

from collections.abc import Sequence

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategies.base import ScoredRound
from flowspec.speculation.strategy import Outgoing, Rows, SegmentedRoundConfig
from flowspec.speculation.tree import Node, by_score

EXPAND_SIZE = 64  # nodes of a re-draft


class FlowSpecConfig(SegmentedRoundConfig):
    """The published defaults."""

    num_draft_tokens: Rows = 80


class FlowSpec:
    """Sends continuous segments of one living tree, in rounds."""

    def __init__(self, config: FlowSpecConfig) -> None:
        self.config = config
        self.round = ScoredRound(config)
        self.level = 0  # absolute position the re-draft has reached; 0: none is running
        self.deepest = 0
        self.redraft_again = False

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Return the first tree's segments, then the nodes that a finished re-draft has added."""
        if (first := self.round.next_segment(request)) is not None:
            return first
        if self.level or not self.round.grown:
            return None
        appended = request.tree.best_unsent(EXPAND_SIZE)
        return Outgoing(appended) if appended else None

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Return the next level: of a round's first tree, later of the re-draft."""
        if not self.round.grown:
            return self.round.next_draft(request) if request.round_over else []
        if request.drafter.num_rows_ready:
            return []
        if self.redraft_again and not self.level:
            self.redraft_again = False
            self.level = request.tree.root.position
            self.deepest = self.level + self.config.num_draft_steps
        if not self.level or not request.tree.root.expanded:
            return []
        self.level = max(self.level, request.tree.root.position) + 1
        beam = (
            request.tree.level(self.level, self.config.draft_topk)
            if self.level <= self.deepest
            else []
        )
        if not beam:
            self._trim(request)
            self.level = 0
        return beam

    def on_verdict(self, request: RequestState) -> None:
        """Draft on from the new root if it was in the tree; otherwise end the round."""
        if request.last_was_hit:
            self.redraft_again = True
            return
        self.level, self.redraft_again = 0, False
        self.round.restart(request)

    def _trim(self, request: RequestState) -> None:
        """Keep the best EXPAND_SIZE of the unsent nodes."""
        for node in sorted(request.tree.unsent(), key=by_score, reverse=True)[EXPAND_SIZE:]:
            if node.id in request.tree:
                request.tree.remove(node)
