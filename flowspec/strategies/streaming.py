"""streaming: ours. Asynchronous, best-first, never drained.

Whenever the first stage can take a segment, it gets the best unsent nodes of the tree as known now.
The number of rows is the one with the most expected accepted tokens per time of the slowest stage.
The head drafts while the pipe verifies. A miss sends the known token at once; whatever is then in
flight is dead and is dropped where it is met.
"""

from collections.abc import Sequence
from itertools import accumulate
from math import exp, log

from flowspec.session import Session
from flowspec.strategies.base import Outgoing
from flowspec.tree import Node


class Streaming:
    """Best nodes first, just in time."""

    def next_segment(self, s: Session) -> Outgoing | None:
        """At most one segment waits before the first stage."""
        if s.num_waiting or s.num_in_flight >= (s.config.max_in_flight or s.num_stages + 1):
            return None
        if s.first_stage_busy_s > s.draft_s and self.next_draft(s):
            return None  # there is time to draft on, and then to choose better
        least = log(s.config.min_score) if s.config.min_score else float("-inf")
        best = [n for n in s.tree.best_unsent(s.config.segment_size) if n.score >= least]
        return Outgoing(best[: _best_size(s, best)]) if best else None

    def next_draft(self, s: Session) -> Sequence[Node]:
        """The most probable leaves, while the tree holds less than the pipe can take soon."""
        stock = sum(1 for _ in s.tree.unsent())
        if stock >= 4 * s.config.segment_size or len(s.tree) >= s.config.tree_size:
            return []
        least = log(s.config.min_score) if s.config.min_score else float("-inf")
        return [n for n in s.tree.best_unexpanded(s.config.topk) if n.score >= least]

    def on_verdict(self, s: Session) -> None:
        """Make room: guesses that were not worth a row until now give way to the new root's."""
        s.tree.keep_best(s.config.tree_size // 2)


def _best_size(s: Session, best: Sequence[Node]) -> int:
    """The number of rows n with the largest expected gain per time, sum(p_1..p_n) / t(n)."""
    gains = accumulate(exp(node.score) for node in best)
    rates = [gain / s.cost.milliseconds(n) for n, gain in enumerate(gains, start=1)]
    return max(range(len(rates)), key=rates.__getitem__) + 1
