"""serial_pp: the whole draft tree as one segment, round by round.

What vLLM and SGLang do across pipeline ranks: one drafted tree, one trip, one verdict.
"""

from collections.abc import Sequence

from flowspec.head.session import Session
from flowspec.speculation.strategies.base import Outgoing, TreeRound
from flowspec.speculation.tree import Node


class SerialPp:
    """Draft, send all, wait, begin again."""

    def __init__(self) -> None:
        self.round = TreeRound()

    def next_segment(self, s: Session) -> Outgoing | None:
        """Root and tree together, when the tree is grown and the pipe empty."""
        if not (self.round.grown and s.round_over):
            return None
        return Outgoing(s.tree.best_unsent(len(s.tree)))

    def next_draft(self, s: Session) -> Sequence[Node]:
        """Grow the round's tree."""
        return self.round.next_draft(s) if s.round_over else []

    def on_verdict(self, s: Session) -> None:
        """The round is decided: draft anew from the new root."""
        self.round.restart(s)
