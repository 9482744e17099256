"""streaming: ours. Asynchronous, best-first, never drained.

Whenever the first stage can take a segment, it gets the best unsent nodes of the tree as known now.
The number of rows is the one with the most expected accepted tokens per time of the slowest stage.
The head drafts while the pipe verifies. A miss sends the known token at once; whatever is then in
flight is dead and is dropped where it is met.
"""

from collections.abc import Sequence
from math import log

from flowspec.head.session import Session
from flowspec.speculation.strategies.base import Outgoing
from flowspec.speculation.tree import Node

MOST_OVER = 1.5  # times its size a tree may grow before it is cut back to that


class Streaming:
    """Best nodes first, just in time."""

    def next_segment(self, s: Session) -> Outgoing | None:
        """The best nodes; one, where there is time to draft on before the first stage is free.

        How many of them pay, the head decides.
        """
        pipe = s.pipe
        most_in_flight = s.config.max_in_flight or self.most_in_flight(s)
        if pipe.num_waiting or pipe.num_in_flight_for(s.request.id) >= most_in_flight:
            return None
        drafts = pipe.draft_began_at is not None or bool(self.leaves(s))
        early = drafts and self.may_wait(s)
        least = _least(s)
        most = 1 if early else s.config.segment_size
        best = [n for n in s.tree.best_unsent(most) if n.score >= least]
        if not best:
            return None
        if drafts and len(best) == 1 and s.config.max_in_flight == 1:
            return None  # nothing may follow the known token: it takes its first guesses along
        return Outgoing(best, best_first=True, early=early)

    def most_in_flight(self, s: Session) -> int:
        """One segment per stage: more would wait, chosen before it had to be.

        Of other requests' prompts there may be more: who decodes does not wait for them all.
        """
        return max(2, s.num_stages)

    def may_wait(self, s: Session) -> bool:
        """While the first stage computes there is time to draft on, and then to choose better."""
        return s.pipe.first_stage_busy_s > s.pipe.draft_left_s

    def next_draft(self, s: Session) -> Sequence[Node]:
        """The most probable leaves, beside whatever true rows are due."""
        return self.leaves(s)

    def leaves(self, s: Session) -> Sequence[Node]:
        """The most probable ones, without end: what stops being worth a row is not drafted on.

        A text that is easy to guess is in flight many tokens deep, and a level takes a forward.
        """
        if len(s.tree) > MOST_OVER * s.config.num_draft_tokens:
            s.tree.keep_best(s.config.num_draft_tokens)
        least = _least(s)
        return [n for n in s.tree.best_unexpanded(s.config.draft_width) if n.score >= least]

    def on_verdict(self, s: Session) -> None:
        """Make room: guesses that were not worth a row until now give way to the new root's."""
        s.tree.keep_best(s.config.num_draft_tokens // 2)


def _least(s: Session) -> float:
    """The least score that is worth a row."""
    return log(s.config.min_score) if s.config.min_score else float("-inf")
