"""A base for drafters that compute nothing: look-up drafts and sessions that count rows."""

from collections.abc import Sequence

from flowspec.speculation.drafters.base import Draft, DraftJob, Lookup
from flowspec.speculation.tree import DraftTree, Node


class LookupDrafter:
    """A drafter whose drafts are ready at once."""

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Return a draft that only looks children up."""
        return Lookup(jobs)


class CountingSession:
    """A session that counts the rows that a real drafter would compute."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.num_rows_ready = 0

    def accept(self, tokens: Sequence[int]) -> None:
        """Take the accepted tokens."""
        self.tokens.extend(tokens)
        self.num_rows_ready += len(tokens)

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """Return the rows that a forward would compute."""
        del tree
        return self.num_rows_ready if nodes is None else len(nodes)

    def take_ready(self) -> None:
        """Count the ready rows as computed."""
        assert self.num_rows_ready > 0, "nothing was ready to prefill"
        self.num_rows_ready = 0
