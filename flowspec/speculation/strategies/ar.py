"""ar: plain pipeline decoding; one token per pass through the pipeline."""

from collections.abc import Sequence

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategy import Outgoing, StrategyConfig
from flowspec.speculation.tree import Node


class Ar:
    """Sends the root; its verdict is the next root."""

    def __init__(self, config: StrategyConfig) -> None:
        del config

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Return the root, once."""
        return None if request.tree.root.sent else Outgoing([request.tree.root])

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Return no nodes: nothing is ever drafted."""
        del request
        return []

    def on_verdict(self, request: RequestState) -> None:
        """Do nothing."""
