"""Ablations: `streaming` without one mechanism each, to show its worth; for benchmarks only."""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategies.streaming import Streaming, StreamingConfig
from flowspec.speculation.strategy import Outgoing
from flowspec.speculation.tree import Node


class Without(Enum):
    """What the pipeline itself lacks; only the simulator can do that (simulator/ablated.py)."""

    PRUNING = "in-flight pruning"
    LAST_STAGE_VERDICT = "the verdict on the last stage"


class Draining(Streaming):
    """Sends nothing after a miss until everything in flight has come back."""

    def __init__(self, config: StreamingConfig) -> None:
        super().__init__(config)
        self.waits = False

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Send nothing while the pipe drains."""
        self.waits = self.waits and not request.drained
        return None if self.waits else super().next_segment(request)

    def on_verdict(self, request: RequestState) -> None:
        """Wait after a miss."""
        super().on_verdict(request)
        self.waits = self.waits or not request.last_was_hit


class Ticking(Streaming):
    """Works in lock step: a segment enters when one has left, and not while the head drafts."""

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Wait for a free place and for the drafter."""
        pipe = request.pipe
        if pipe.num_in_flight >= request.num_stages or pipe.draft_began_at is not None:
            return None
        return super().next_segment(request)

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Expand one level per step, before its segment is sent; then the stages compute."""
        if request.pipe.num_in_flight >= request.num_stages:
            return []
        return super().next_draft(request)


class Apart(Streaming):
    """Gives true rows a drafter forward of their own; guesses wait for it."""

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Wait while true rows are due."""
        return [] if request.drafter.num_rows_ready else super().next_draft(request)


class Queued(Streaming):
    """Sends one segment more than there are stages; it waits before the first stage."""

    def most_in_flight(self, request: RequestState) -> int:
        """One segment more than there are stages."""
        return request.num_stages + 1


class Eager(Streaming):
    """Chooses a segment as soon as there are rows, not when the first stage can take it."""

    def may_wait(self, request: RequestState) -> bool:
        """Never wait for a better choice."""
        return False


class FixedSize(Streaming):
    """Sends the largest allowed segments, whatever their rows cost the slowest stage."""

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Forbid the scheduler to cut the segment."""
        outgoing = super().next_segment(request)
        return None if outgoing is None else replace(outgoing, best_first=False)
