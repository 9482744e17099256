"""streaming with one mechanism taken away, to show what it is worth; for benchmarks only."""

from collections.abc import Sequence
from dataclasses import replace
from enum import Enum

from flowspec.head.session import Session
from flowspec.speculation.strategies.base import Outgoing
from flowspec.speculation.strategies.streaming import Streaming
from flowspec.speculation.tree import Node


class Without(Enum):
    """What the pipeline itself lacks; on the simulator's clock alone (simulator/ablated.py)."""

    PRUNING = "in-flight pruning"
    LAST_STAGE_VERDICT = "the verdict on the last stage"


class Draining(Streaming):
    """After a miss nothing is sent before all that was in flight is back."""

    def __init__(self) -> None:
        self.waits = False

    def next_segment(self, s: Session) -> Outgoing | None:
        """See Streaming."""
        self.waits = self.waits and not s.drained
        return None if self.waits else super().next_segment(s)

    def on_verdict(self, s: Session) -> None:
        """See Streaming."""
        super().on_verdict(s)
        self.waits = self.waits or not s.last_was_hit


class Ticking(Streaming):
    """In lock step: a segment enters when one has left, and not while the head drafts."""

    def next_segment(self, s: Session) -> Outgoing | None:
        """See Streaming."""
        if s.pipe.num_in_flight >= s.num_stages or s.pipe.draft_began_at is not None:
            return None
        return super().next_segment(s)

    def next_draft(self, s: Session) -> Sequence[Node]:
        """One forward a tick, before its segment is sent; then the stages compute."""
        return [] if s.pipe.num_in_flight >= s.num_stages else super().next_draft(s)


class Apart(Streaming):
    """True rows have a drafter forward of their own; guesses wait for it, segments as ever."""

    def next_draft(self, s: Session) -> Sequence[Node]:
        """See Streaming."""
        return [] if s.drafter.num_rows_ready else super().next_draft(s)


class Queued(Streaming):
    """One segment more than there are stages: it waits before the first stage, its rows chosen."""

    def most_in_flight(self, s: Session) -> int:
        """See Streaming."""
        return s.num_stages + 1


class Eager(Streaming):
    """A segment is chosen as soon as there are rows, not when the first stage can take it."""

    def may_wait(self, s: Session) -> bool:
        """See Streaming."""
        return False


class FixedSize(Streaming):
    """Segments are as large as they may be, whatever their rows cost the slowest stage."""

    def next_segment(self, s: Session) -> Outgoing | None:
        """See Streaming."""
        outgoing = super().next_segment(s)
        return None if outgoing is None else replace(outgoing, best_first=False)
