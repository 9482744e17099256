"""The tree of a drafting round and its segments, which several strategies share."""

from collections.abc import Sequence
from math import ceil

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategy import Outgoing, RoundConfig, SegmentedRoundConfig
from flowspec.speculation.tree import Node


class TreeRound:
    """One round's tree, grown level by level as in EAGLE-2 (arXiv 2406.16858, section 4).

    Level 1 is the root's `draft_topk` children. Then the `draft_topk` best nodes of the newest
    level are expanded, `num_draft_steps` times. The `num_draft_tokens` best of all nodes are kept,
    with their ancestors.
    """

    def __init__(self, config: RoundConfig) -> None:
        self.config = config
        self.depth = 0
        self.grown = False

    def restart(self, request: RequestState) -> None:
        """Begin again from the root."""
        request.drop_tree()
        self.depth, self.grown = 0, False

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Return the next beam; none if true rows or the root's children are due, or when grown."""
        if self.grown or not request.tree.root.expanded or request.drafter.num_rows_ready:
            return []
        if self.depth < self.config.num_draft_steps:
            self.depth += 1
            level = request.tree.root.position + self.depth
            beam = request.tree.level(level, self.config.draft_topk)
            if beam:
                return beam
        self.grown = True
        request.tree.keep_best(self.config.num_draft_tokens)
        return []


class ScoredRound(TreeRound):
    """A round whose tree is sent best nodes first, in N + 1 segments (FlowSpec)."""

    def __init__(self, config: SegmentedRoundConfig) -> None:
        super().__init__(config)
        self.segment_size = config.segment_size
        self.segments: list[list[Node]] = []

    def restart(self, request: RequestState) -> None:
        """Begin again from the root; the rest of the tree's segments is dead."""
        super().restart(request)
        self.segments.clear()

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Return the living nodes of the next segment; segments are cut when the pipe is empty."""
        if self.grown and request.round_over and not self.segments:
            best_first = request.tree.best_unsent(len(request.tree))
            self.segments = pieces(best_first, request.num_stages + 1, self.segment_size)
        while self.segments:
            alive = [node for node in self.segments.pop(0) if node.id in request.tree]
            if alive:
                return Outgoing(alive)
        return None


def pieces(nodes: Sequence[Node], count: int, least: int) -> list[list[Node]]:
    """Cut `nodes` into at most `count` near-equal runs of at least `least`, except the last."""
    size = max(ceil(len(nodes) / count), min(least, len(nodes)), 1)
    return [list(nodes[start : start + size]) for start in range(0, len(nodes), size)]
