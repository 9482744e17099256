"""Drafting over the target's hidden states, as EAGLE heads do.

The row of node v takes v's token beside the hidden state of v's parent. Its output is a guess of
v's own hidden state, which gives v's children. True hidden states arrive late, in any order,
perhaps layer by layer; then `prefill` computes the rows of the accepted nodes again over them. Rows
of surviving guesses stay as they are, since their small error costs less than computing them again.
Shapes: n rows, H the head's hidden size, Ht the target's, F hidden-state layers.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowspec.model.architecture import ModelConfig
from flowspec.model.kv_cache import AttentionMetadata, JointAttentionMetadata, TreeKVCache
from flowspec.model.llama import Attend, Rope, rope_angles, rope_frequencies
from flowspec.request import NodeId
from flowspec.speculation.drafters.base import DraftJob, Opening, Proposal
from flowspec.speculation.drafters.cached import IncrementalDrafter, IncrementalSession, JobRows
from flowspec.speculation.tree import DraftTree, Node


class HiddenStateDrafter(IncrementalDrafter):
    """A head of one decoder layer over (token, hidden state of the token before)."""

    first_token = 1

    def __init__(self, config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.frequencies = rope_frequencies(config).to(device)

    def fuse(self, hidden_states: Tensor) -> Tensor:
        """Map true hidden states [n, F*Ht] to the head's input [n, H]."""
        return hidden_states

    @abstractmethod
    def rows(self, tokens: Tensor, hidden_states: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Map tokens [n] and hidden states [n, H] to guessed hidden states [n, H]."""

    def new_cache(self, capacity: int) -> TreeKVCache:
        """Return an empty cache for one request."""
        return TreeKVCache(
            num_layers=1,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
        )

    def open(self, opening: Opening) -> "HiddenStateSession":
        """Begin a session for one request."""
        return HiddenStateSession(self, opening)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata | JointAttentionMetadata,
        shares: Sequence[JobRows],
    ) -> Tensor:
        """Run the rows of all `shares` through the head; returns guessed hidden states [n, H]."""
        hidden_states = torch.cat(self._fused(shares))
        rope = rope_angles(self.frequencies, positions, self.dtype)
        return self.rows(tokens, hidden_states, rope, metadata.attend(0))

    def _fused(self, shares: Sequence[JobRows]) -> list[Tensor]:
        """Return the hidden states beside the tokens of the rows, in their order, as pieces [n, H].

        True hidden states of all shares are fused together.
        """
        given = [
            (rows is share.true, rows.hidden_states)
            for share in shares
            for rows in share.kinds
            if rows.hidden_states is not None
        ]
        true = [raw.to(self.device, self.dtype) for is_true, raw in given if is_true]
        fused = iter(self.fuse(torch.cat(true)).split([len(raw) for raw in true]) if true else ())
        return [next(fused) if is_true else raw for is_true, raw in given]


class HiddenStateSession(IncrementalSession):
    """One request's rows, guesses and true hidden states."""

    drafter: HiddenStateDrafter

    def __init__(self, drafter: HiddenStateDrafter, opening: Opening) -> None:
        super().__init__(drafter, opening)
        # True hidden states that are not prefilled yet, by position, then by layer.
        self.hidden_states: dict[int, dict[int, Tensor]] = {}
        if opening.num_cached_tokens:
            assert isinstance(opening.reuse, HiddenStateSession)
            for position in range(self.num_prefilled, opening.num_cached_tokens):
                self.hidden_states[position] = opening.reuse.hidden_states[position]
        self._guesses: dict[NodeId, Tensor] = {}  # guessed hidden states [H] of drafted nodes

    def accept_hidden_states(self, layer: int, hidden_states: Mapping[int, Tensor]) -> None:
        """Keep the true hidden states [Ht] of a layer, by absolute position."""
        asked = layer in self.drafter.aux_hidden_state_layers
        assert asked, f"hidden-state layer {layer} was not asked for"
        for position, hidden_state in hidden_states.items():
            self.hidden_states.setdefault(position, {})[layer] = hidden_state
        self._count_ready()

    def _num_complete(self) -> int:
        ready, last = self.num_prefilled, len(self.tokens) - 1
        layers = set(self.drafter.aux_hidden_state_layers)
        while ready < last and len(self.hidden_states.get(ready, ())) == len(layers):
            ready += 1
        return ready

    def _hidden_states_of_true(self, start: int, n: int) -> Tensor:
        layers = self.drafter.aux_hidden_state_layers
        rows = [self.hidden_states[position] for position in range(start, start + n)]
        return torch.stack([torch.cat([row[layer] for layer in layers]) for row in rows])

    def finish(
        self, job: DraftJob, share: JobRows, states: Tensor, logits: Tensor
    ) -> list[Proposal]:
        """Return the job's proposals, and keep the guessed hidden states of its nodes."""
        before = self.num_prefilled
        proposals = super().finish(job, share, states, logits)
        for position in range(before, self.num_prefilled):
            self.hidden_states.pop(position, None)
        return proposals

    def _hidden_states_of_guesses(self, nodes: Sequence[Node]) -> Tensor:
        return torch.stack([self._guesses[node.parent] for node in nodes])

    def _keep_rows(self, tree: DraftTree, *, path: Sequence[int]) -> None:
        super()._keep_rows(tree, path=path)
        self._guesses = {
            node: guess
            for node, guess in self._guesses.items()
            if node in self._rows or node in tree
        }

    def _record(self, nodes: Sequence[Node], states: Tensor, proposals: Sequence[Proposal]) -> None:
        del proposals
        for node, guess in zip(nodes, states, strict=True):
            self._guesses[node.id] = guess
