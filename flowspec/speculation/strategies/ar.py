"""ar: plain pipeline, one token per trip."""

from collections.abc import Sequence

from flowspec.head.session import Session
from flowspec.speculation.strategies.base import Outgoing
from flowspec.speculation.tree import Node


class Ar:
    """Send the root; its verdict is the next root."""

    def next_segment(self, s: Session) -> Outgoing | None:
        """The root, once."""
        return None if s.tree.root.sent else Outgoing([s.tree.root])

    def next_draft(self, s: Session) -> Sequence[Node]:
        """Nothing is ever drafted."""
        del s
        return []

    def on_verdict(self, s: Session) -> None:
        """Nothing to prepare."""
