"""flowspec: the published algorithm (arXiv 2507.02620, sections 3.2 and 3.3), with its defaults.

A round begins with a tree of `num_draft_tokens` nodes, cut by score into segments. While every
verdict stays in the tree, each one triggers a re-draft of `EXPAND_SIZE` nodes from the new root,
with the new true features; what is new of it follows as one appended segment. A token outside the
tree ends the round: the pipe drains and the next tree is drafted before anything is sent. Scores
decide ties by age, so no node is sent without its parent, and every row is masked to its own path
(the official code errs in both).
"""

from collections.abc import Sequence

from flowspec.head.session import Session
from flowspec.speculation.strategies.base import Outgoing, ScoredRound
from flowspec.speculation.tree import Node, by_score

EXPAND_SIZE = 64  # nodes of a re-draft


class FlowSpec:
    """Continuous segments of one living tree, in rounds."""

    def __init__(self) -> None:
        self.round = ScoredRound()
        self.level = 0  # absolute position the re-draft has reached; 0: none is running
        self.deepest = 0
        self.redraft_again = False

    def next_segment(self, s: Session) -> Outgoing | None:
        """The first tree's segments, then whatever a finished re-draft has added."""
        if (first := self.round.next_segment(s)) is not None:
            return first
        if self.level or not self.round.grown:
            return None
        appended = s.tree.best_unsent(EXPAND_SIZE)
        return Outgoing(appended) if appended else None

    def next_draft(self, s: Session) -> Sequence[Node]:
        """Serial at a round's begin; afterwards the levels of the re-draft."""
        if not self.round.grown:
            return self.round.next_draft(s) if s.round_over else []
        if s.drafter.num_rows_ready:
            return []
        if self.redraft_again and not self.level:
            self.redraft_again = False
            self.level = s.tree.root.position
            self.deepest = self.level + s.config.num_draft_steps
        if not self.level or not s.tree.root.expanded:
            return []
        self.level = max(self.level, s.tree.root.position) + 1
        beam = s.tree.level(self.level, s.config.draft_topk) if self.level <= self.deepest else []
        if not beam:
            self._trim(s)
            self.level = 0
        return beam

    def on_verdict(self, s: Session) -> None:
        """In the tree: draft on from the new root. Off the tree: the round is over."""
        if s.last_was_hit:
            self.redraft_again = True
            return
        self.level, self.redraft_again = 0, False
        self.round.restart(s)

    def _trim(self, s: Session) -> None:
        """Of what was drafted but not sent, keep the best EXPAND_SIZE."""
        for node in sorted(s.tree.unsent(), key=by_score, reverse=True)[EXPAND_SIZE:]:
            if node.id in s.tree:
                s.tree.remove(node)
