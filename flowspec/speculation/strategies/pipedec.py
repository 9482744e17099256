"""pipedec: one tree level per tick (PipeDec, arXiv 2504.04104).

A level of at most `segment_size` nodes enters the pipe while the drafter grows the next one below
it. Each returning level moves the root by one; a miss begins again with the known token alone.
"""

from collections.abc import Sequence

from flowspec.head.session import Session
from flowspec.speculation.strategies.base import Outgoing
from flowspec.speculation.tree import Node


class PipeDec:
    """Keep one level per stage in the pipe."""

    def next_segment(self, s: Session) -> Outgoing | None:
        """The newest level's best nodes, when the first stage is free."""
        if s.pipe.num_waiting or s.num_in_flight > s.num_stages:
            return None
        level = s.tree.best_unsent(s.config.segment_size)
        return Outgoing(level) if level else None

    def next_draft(self, s: Session) -> Sequence[Node]:
        """The level just sent, all at once."""
        if s.drafter.num_rows_ready or any(True for _ in s.tree.unsent()):
            return []
        deepest = max(node.position for node in s.tree.nodes.values() if node.expandable)
        if deepest == s.tree.root.position:
            return []  # the root's own children come with its true feature
        level = s.tree.level(deepest, s.config.segment_size)
        return [] if any(node.expanded for node in level) else level

    def on_verdict(self, s: Session) -> None:
        """The tree is pruned already; the pipe is never drained."""
