"""serial_pp: the whole draft tree as one segment, round by round.

What vLLM and SGLang do across pipeline ranks: one drafted tree, one trip, one verdict.
"""

from collections.abc import Sequence

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategies.base import TreeRound
from flowspec.speculation.strategy import Outgoing, RoundConfig
from flowspec.speculation.tree import Node


class SerialPp:
    """Draft, send all, wait, begin again."""

    def __init__(self, config: RoundConfig) -> None:
        self.round = TreeRound(config)

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Root and tree together, when the tree is grown and the pipe empty."""
        if not (self.round.grown and request.round_over):
            return None
        return Outgoing(request.tree.best_unsent(len(request.tree)))

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Grow the round's tree."""
        return self.round.next_draft(request) if request.round_over else []

    def on_verdict(self, request: RequestState) -> None:
        """The round is decided: draft anew from the new root."""
        self.round.restart(request)
