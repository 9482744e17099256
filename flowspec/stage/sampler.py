"""Sampler: chooses the tokens of one request on the last stage."""

from collections.abc import Iterable, Sequence

from torch import Tensor

from flowspec.protocol.messages import AddRequest, Segment
from flowspec.request import NodeId
from flowspec.speculation.acceptance import choose
from flowspec.speculation.processors import begin_path
from flowspec.speculation.processors.base import PathStates


class Sampler:
    """The committed tokens of a request, and the processors' states at its nodes if there are any.

    `cached` are the tokens of the committed rows of a reused request. Tokens are kept for every
    request, since a later request that reuses them may need other processors.
    """

    def __init__(self, opened: AddRequest, cached: Sequence[int] = ()) -> None:
        assert len(cached) == opened.num_cached_tokens, "the tokens of cached rows are not here"
        self.sampling = opened.sampling
        self.tokens = list(cached)
        self._num_prompt_tokens = opened.num_prompt_tokens
        self._states: PathStates | None = None

    @property
    def num_states(self) -> int:
        """Number of tree nodes with a state."""
        return 0 if self._states is None else len(self._states)

    def extend(self, tokens: Sequence[int], *, is_end: bool) -> None:
        """Append tokens of the prefix; after the last ones (`is_end`) the states begin."""
        self.tokens += tokens
        if is_end:
            count = self._num_prompt_tokens or len(self.tokens)
            begun = begin_path(self.sampling, self.tokens[:count], self.tokens[count:])
            self._states = None if begun is None else PathStates(begun)

    def enter(self, segment: Segment) -> None:
        """Add rows of the tree, parents first."""
        if self._states is not None:
            for row in zip(segment.nodes, segment.parents, segment.tokens, strict=True):
                self._states.enter(*row)

    def reroot(self, path: Iterable[int], tip: NodeId, alive: Iterable[NodeId]) -> None:
        """Commit the tokens `path` down to node `tip`; of the other nodes those in `alive` stay."""
        self.tokens += path
        if self._states is not None:
            self._states.reroot(tip, alive)

    def choose(self, logits: Tensor, positions: Sequence[int], segment: Segment) -> list[int]:
        """Choose the target's tokens at `positions` [n] from logits [n, V] of the last rows.

        These are all rows of the segment, or the last row of a prefix. Returns n token ids.
        """
        states = []
        if self._states is not None:
            states = [self._states.at(node) for node in segment.nodes[-len(positions) :]]
        return choose(
            logits, positions, self.sampling, states=states, candidates=segment.candidates
        )
