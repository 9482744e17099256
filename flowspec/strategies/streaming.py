"""streaming: ours. Asynchronous, best-first, never drained.

Whenever the first stage can take a segment, it gets the best unsent nodes of the tree as known now.
The number of rows is the one with the most expected accepted tokens per time of the slowest stage.
The head drafts while the pipe verifies. A miss sends the known token at once; whatever is then in
flight is dead and is dropped where it is met.
"""

from collections.abc import Sequence
from math import log

from flowspec.session import Session
from flowspec.strategies.base import Outgoing
from flowspec.tree import Node


class Streaming:
    """Best nodes first, just in time."""

    def next_segment(self, s: Session) -> Outgoing | None:
        """At most one trip waits before the first stage; how many rows pay, the head decides."""
        pipe = s.pipe
        if pipe.num_waiting or pipe.num_in_flight >= (s.config.max_in_flight or s.num_stages + 1):
            return None
        least = log(s.config.min_score) if s.config.min_score else float("-inf")
        best = [n for n in s.tree.best_unsent(s.config.segment_size) if n.score >= least]
        if not best:
            return None
        # while the first stage computes, there is time to draft on, and then to choose better
        early = pipe.first_stage_busy_s > pipe.draft_s and bool(self.next_draft(s))
        return Outgoing(best, best_first=True, early=early)

    def next_draft(self, s: Session) -> Sequence[Node]:
        """The most probable leaves, while the tree holds less than the pipe can take soon."""
        stock = len(s.tree) - s.tree.num_sent
        if stock >= 4 * s.config.segment_size or len(s.tree) >= s.config.tree_size:
            return []
        least = log(s.config.min_score) if s.config.min_score else float("-inf")
        return [n for n in s.tree.best_unexpanded(s.config.topk) if n.score >= least]

    def on_verdict(self, s: Session) -> None:
        """Make room: guesses that were not worth a row until now give way to the new root's."""
        s.tree.keep_best(s.config.tree_size // 2)
