"""What drafters have in common that compute nothing: a drafter of lookups, and its sessions."""

from collections.abc import Sequence

from flowspec.speculation.drafters.base import Draft, DraftJob, Lookup
from flowspec.speculation.tree import DraftTree, Node


class LookupDrafter:
    """Its drafts are there at once."""

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """See Drafter.begin."""
        return Lookup(jobs)


class CountingSession:
    """Counts the rows that a real drafter would compute."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_rows_ready = 0

    def accept(self, tokens: Sequence[int]) -> None:
        """See DraftSession.accept."""
        self.tokens.extend(tokens)
        self.num_rows_ready += len(tokens)

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """See DraftSession."""
        del tree
        return self.num_rows_ready if nodes is None else len(nodes)

    def take_ready(self) -> None:
        """Absorb what was ready."""
        assert self.num_rows_ready > 0, "nothing was ready to absorb"
        self.num_rows_ready = 0
