"""A strategy is two small decisions: what goes into the pipe next, and what to draft next."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Protocol

from flowspec.head.session import Session
from flowspec.speculation.tree import Node


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Nodes to send as one segment, parents first; without `verify` the verdict waits."""

    nodes: Sequence[Node]
    verify: bool = True
    best_first: bool = False  # the head may send fewer, the first of them, and ask again for more
    early: bool = False  # best first, and drafting on before the slot comes would choose better


class Strategy(Protocol):
    """One per request. Both methods are asked whenever something changed."""

    def next_segment(self, s: Session) -> Outgoing | None:
        """What to send now, or nothing yet."""

    def next_draft(self, s: Session) -> Sequence[Node]:
        """Nodes to expand in one drafter forward now, or none.

        True rows that are due run in the same forward; one that is to know them first waits.
        """

    def on_verdict(self, s: Session) -> None:
        """The tree has just been re-rooted; s.last_was_hit says whether the token was drafted."""


class TreeRound:
    """One round's tree, grown level by level as EAGLE-2 does (arXiv 2406.16858, section 4).

    Level 1 is the root's `draft_topk` children; then the `draft_topk` best of the newest level are
    expanded, `num_draft_steps` times; the `num_draft_tokens` best of all are kept. Ancestors of a
    kept node are kept.
    """

    def __init__(self) -> None:
        self.depth = 0
        self.grown = False

    def restart(self, s: Session) -> None:
        """Begin again from the root."""
        s.drop_tree()
        self.depth, self.grown = 0, False

    def next_draft(self, s: Session) -> Sequence[Node]:
        """The next beam; empty while true rows or the root's children are due, and when grown."""
        if self.grown or not s.tree.root.expanded or s.drafter.num_rows_ready:
            return []
        if self.depth < s.config.num_draft_steps:
            self.depth += 1
            beam = s.tree.level(s.tree.root.position + self.depth, s.config.draft_topk)
            if beam:
                return beam
        self.grown = True
        s.tree.keep_best(s.config.num_draft_tokens)
        return []


class ScoredRound(TreeRound):
    """A round whose tree is handed out best nodes first, in N + 1 segments (FlowSpec)."""

    def __init__(self) -> None:
        super().__init__()
        self.segments: list[list[Node]] = []

    def restart(self, s: Session) -> None:
        """Begin again from the root; what is left of the tree's segments is dead."""
        super().restart(s)
        self.segments.clear()

    def next_segment(self, s: Session) -> Outgoing | None:
        """What lives of the next segment; they are cut when the tree is grown, the pipe empty."""
        if self.grown and s.round_over and not self.segments:
            best_first = s.tree.best_unsent(len(s.tree))
            self.segments = pieces(best_first, s.num_stages + 1, s.config.segment_size)
        while self.segments:
            alive = [node for node in self.segments.pop(0) if node.id in s.tree]
            if alive:
                return Outgoing(alive)
        return None


def pieces(nodes: Sequence[Node], count: int, least: int) -> list[list[Node]]:
    """At most `count` near-equal runs of `nodes`, at least `least` in each but the last."""
    size = max(ceil(len(nodes) / count), min(least, len(nodes)), 1)
    return [list(nodes[start : start + size]) for start in range(0, len(nodes), size)]
