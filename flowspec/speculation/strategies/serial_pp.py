"""serial_pp: the whole draft tree as one segment, round by round.

vLLM and SGLang do this across pipeline ranks: one drafted tree, one pass, one verdict.
"""

from collections.abc import Sequence

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategies.base import TreeRound
from flowspec.speculation.strategy import Outgoing, RoundConfig
from flowspec.speculation.tree import Node


class SerialPp:
    """Drafts, sends all, waits, and begins again."""

    def __init__(self, config: RoundConfig) -> None:
        self.round = TreeRound(config)

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Return root and tree together, when the tree is grown and the pipe empty."""
        if not (self.round.grown and request.round_over):
            return None
        return Outgoing(request.tree.best_unsent(len(request.tree)))

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Grow the round's tree."""
        return self.round.next_draft(request) if request.round_over else []

    def on_verdict(self, request: RequestState) -> None:
        """Draft anew from the new root: the round is decided."""
        self.round.restart(request)
