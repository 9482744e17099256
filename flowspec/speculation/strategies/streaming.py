"""streaming: this project's own strategy: asynchronous, best nodes first, never drained.

Whenever the first stage can take a segment, it gets the best unsent nodes of the present tree. The
number of rows is the one with the most expected accepted tokens per time of the slowest stage. The
head drafts while the pipe verifies. A miss sends the known token at once; rows in flight are then
dead and are dropped by the first stage that knows.
"""

from collections.abc import Sequence
from math import log
from typing import Annotated

from pydantic import Field

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategy import MAX_ROWS, DraftingConfig, Outgoing, Rows
from flowspec.speculation.tree import Node

MOST_OVER = 1.5  # times its size that a tree may grow to before it is cut back


class StreamingConfig(DraftingConfig):
    """The parameters: large segments of a large tree, which the scheduler cuts as rows pay."""

    num_draft_tokens: Rows = 800
    segment_size: Rows = 80  # most tree rows in a segment
    draft_topk: Rows = 20
    draft_width: Rows = 20  # nodes expanded per drafter forward
    min_score: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.001
    coupled_drafting: bool = True
    calibrate: bool = True
    # Segments in the pipe at once. 0: one per stage (at least two), or, if head and stages share a
    # machine, as many as its cores compute at the same time.
    max_in_flight: Annotated[int, Field(ge=0, le=MAX_ROWS)] = 0


class Streaming:
    """Sends the best nodes first, as late as possible."""

    def __init__(self, config: StreamingConfig) -> None:
        self.config = config
        self.least = log(config.min_score) if config.min_score else float("-inf")

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Return the best nodes; only the first, marked `early`, while a later choice is better.

        The scheduler decides how many of them pay.
        """
        pipe = request.pipe
        limit = self.config.max_in_flight or pipe.max_in_flight
        most_in_flight = limit or self.most_in_flight(request)
        if pipe.num_waiting or pipe.num_in_flight_for(request.id) >= most_in_flight:
            return None
        drafts = pipe.draft_began_at is not None or bool(self.leaves(request))
        early = drafts and self.may_wait(request)
        most = 1 if early else self.config.segment_size
        best = [n for n in request.tree.best_unsent(most) if n.score >= self.least]
        if not best:
            return None
        if drafts and len(best) == 1 and limit == 1:
            return None  # nothing may follow the known token: it takes its first guesses along
        return Outgoing(best, best_first=True, early=early)

    def most_in_flight(self, request: RequestState) -> int:
        """Return the limit of segments in flight: one per stage, since more would wait in a queue.

        Prefill of other requests does not count against the limit.
        """
        return max(2, request.num_stages)

    def may_wait(self, request: RequestState) -> bool:
        """Return whether the first stage computes long enough to draft and choose better."""
        return request.pipe.first_stage_busy_s > request.draft_left_s

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Return the most probable leaves; true rows that are due run beside them."""
        return self.leaves(request)

    def leaves(self, request: RequestState) -> Sequence[Node]:
        """Return the most probable unexpanded nodes that are worth a row, at any depth.

        The in-flight part of a predictable text is many tokens deep, and a level takes a forward.
        """
        if len(request.tree) > MOST_OVER * self.config.num_draft_tokens:
            request.tree.keep_best(self.config.num_draft_tokens)
        best = request.tree.best_unexpanded(self.config.draft_width)
        return [node for node in best if node.score >= self.least]

    def on_verdict(self, request: RequestState) -> None:
        """Make room: drop guesses that are not worth a row for those below the new root."""
        request.tree.keep_best(self.config.num_draft_tokens // 2)
