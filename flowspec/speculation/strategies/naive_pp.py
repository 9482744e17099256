"""naive_pp: FlowSpec's baseline "Chunk-PP": the tree in chunks, one verdict per round.

Chunks are in level order. The stages work on different chunks at once, but nothing is pruned and
drafting waits for the verdict (arXiv 2507.02620, baselines).
"""

from collections.abc import Sequence

from flowspec.head.request_state import RequestState
from flowspec.speculation.strategies.base import TreeRound, pieces
from flowspec.speculation.strategy import Outgoing, RoundConfig, Rows
from flowspec.speculation.tree import Node


class NaivePpConfig(RoundConfig):
    """The defaults of the published baseline."""

    num_draft_tokens: Rows = 80


class NaivePp:
    """Drafts, sends in chunks, waits for the last one, and begins again."""

    def __init__(self, config: NaivePpConfig) -> None:
        self.round = TreeRound(config)
        self.chunks: list[list[Node]] = []

    def next_segment(self, request: RequestState) -> Outgoing | None:
        """Return the next chunk; only the last one asks for the verdict."""
        if self.round.grown and request.round_over:
            in_levels = sorted(
                request.tree.nodes.values(), key=lambda node: (node.position, node.id)
            )
            self.chunks = pieces(in_levels, request.num_stages + 1, 1)
        if not self.chunks:
            return None
        chunk = self.chunks.pop(0)
        return Outgoing(chunk, verify=not self.chunks)

    def next_draft(self, request: RequestState) -> Sequence[Node]:
        """Grow the round's tree."""
        return self.round.next_draft(request) if request.round_over else []

    def on_verdict(self, request: RequestState) -> None:
        """Draft anew from the new root: the round is decided."""
        self.round.restart(request)
