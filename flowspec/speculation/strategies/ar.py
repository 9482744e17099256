"""ar: plain pipeline, one token per trip."""

from collections.abc import Sequence

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategy import Outgoing, StrategyConfig
from flowspec.speculation.tree import Node


class Ar:
    """Send the root; its verdict is the next root."""

    def __init__(self, config: StrategyConfig) -> None:
        del config

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """The root, once."""
        return None if request.tree.root.sent else Outgoing([request.tree.root])

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Nothing is ever drafted."""
        del request
        return []

    def on_verdict(self, request: RequestState) -> None:
        """Nothing to prepare."""
