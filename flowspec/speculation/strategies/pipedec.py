"""pipedec: one tree level per pipeline step (PipeDec, arXiv 2504.04104).

A level of at most `segment_size` nodes enters the pipe while the drafter grows the next one below
it. Each returning level moves the root by one; a miss begins again with the known token alone.
"""

from collections.abc import Sequence

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategy import DraftingConfig, Outgoing, Rows
from flowspec.speculation.tree import Node


class PipeDecConfig(DraftingConfig):
    """The parameters; a level is a segment."""

    num_draft_tokens: Rows = 256
    segment_size: Rows = 16  # most nodes of a level
    draft_topk: Rows = 16
    refresh: bool = False


class PipeDec:
    """Keeps one level per stage in the pipe."""

    def __init__(self, config: PipeDecConfig) -> None:
        self.config = config

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Return the newest level's best nodes, when the first stage is free."""
        if request.pipe.num_waiting or request.num_in_flight > request.num_stages:
            return None
        level = request.tree.best_unsent(self.config.segment_size)
        return Outgoing(level) if level else None

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Return the level that was just sent, all at once."""
        if request.drafter.num_rows_ready or any(True for _ in request.tree.unsent()):
            return []
        deepest = max(node.position for node in request.tree.nodes.values() if node.expandable)
        if deepest == request.tree.root.position:
            return []  # the root's own children come with its true hidden state
        level = request.tree.level(deepest, self.config.segment_size)
        return [] if any(node.expanded for node in level) else level

    def on_verdict(self, request: RequestState) -> None:
        """Do nothing: the tree is pruned already, and the pipe is never drained."""
