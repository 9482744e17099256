"""Drafting over the target's features, as EAGLE heads do.

The row of node v takes v's token beside the feature of v's parent; its output is the guess of v's
own feature, and gives v's children. True features arrive late, in any order, perhaps layer by
layer; then the rows of the accepted nodes are computed anew over them (`absorb`). Rows of surviving
guesses stay as they are, since their small error costs less than computing them again. Shapes: n
rows, H the head's hidden size, Ht the target's, F feature layers.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowspec.model.architecture import ModelConfig
from flowspec.model.kv_cache import JointAttentionMetadata, TreeKVCache, Window
from flowspec.model.llama import Attend, Rope, rope_angles, rope_frequencies
from flowspec.request import NodeId
from flowspec.speculation.drafters.base import DraftJob, Opening, Proposal
from flowspec.speculation.drafters.cached import IncrementalDrafter, IncrementalSession, JobRows
from flowspec.speculation.tree import DraftTree, Node


class FeatureDrafter(IncrementalDrafter):
    """A head of one decoder layer over (token, feature of the token before)."""

    first_token = 1

    def __init__(self, config: ModelConfig, *, device: torch.device, dtype: torch.dtype) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self.frequencies = rope_frequencies(config).to(device)

    def fuse(self, features: Tensor) -> Tensor:
        """True features [n, F*Ht] as the head takes them [n, H]."""
        return features

    @abstractmethod
    def rows(self, tokens: Tensor, features: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Tokens [n] over features [n, H]: guessed features [n, H]."""

    def new_cache(self, capacity: int) -> TreeKVCache:
        """See IncrementalDrafter."""
        return TreeKVCache(
            num_layers=1,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            capacity=capacity,
            dtype=self.dtype,
            device=self.device,
        )

    def open(self, opening: Opening) -> "FeatureSession":
        """See Drafter.open."""
        return FeatureSession(self, opening)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        window: Window | JointAttentionMetadata,
        shares: Sequence[JobRows],
    ) -> Tensor:
        """See IncrementalDrafter."""
        features = torch.cat(self._fused(shares))
        rope = rope_angles(self.frequencies, positions, self.dtype)
        return self.rows(tokens, features, rope, window.attend(0))

    def _fused(self, shares: Sequence[JobRows]) -> list[Tensor]:
        """What is beside the tokens of the rows, in their order; true features are fused together.

        Pieces [n, H].
        """
        given = [
            (rows is share.true, rows.features)
            for share in shares
            for rows in share.kinds
            if rows.features is not None
        ]
        true = [raw.to(self.device, self.dtype) for is_true, raw in given if is_true]
        fused = iter(self.fuse(torch.cat(true)).split([len(raw) for raw in true]) if true else ())
        return [next(fused) if is_true else raw for is_true, raw in given]


class FeatureSession(IncrementalSession):
    """One request's rows, guesses and true features."""

    drafter: FeatureDrafter

    def __init__(self, drafter: FeatureDrafter, opening: Opening) -> None:
        super().__init__(drafter, opening)
        # true features not absorbed yet: by position, then by layer
        self.features: dict[int, dict[int, Tensor]] = {}
        if opening.num_cached_tokens:
            assert isinstance(opening.reuse, FeatureSession)
            for position in range(self.num_absorbed, opening.num_cached_tokens):
                self.features[position] = opening.reuse.features[position]
        self._guesses: dict[NodeId, Tensor] = {}  # guessed features [H] of drafted nodes

    def accept_features(self, layer: int, features: Mapping[int, Tensor]) -> None:
        """See DraftSession.accept_features."""
        asked = layer in self.drafter.aux_hidden_state_layers
        assert asked, f"feature layer {layer} was not asked for"
        for position, feature in features.items():
            self.features.setdefault(position, {})[layer] = feature
        self._count_ready()

    def _num_complete(self) -> int:
        ready, last = self.num_absorbed, len(self.tokens) - 1
        layers = set(self.drafter.aux_hidden_state_layers)
        while ready < last and len(self.features.get(ready, ())) == len(layers):
            ready += 1
        return ready

    def _features_of_true(self, start: int, n: int) -> Tensor:
        layers = self.drafter.aux_hidden_state_layers
        rows = [self.features[position] for position in range(start, start + n)]
        return torch.stack([torch.cat([row[layer] for layer in layers]) for row in rows])

    def finish(
        self, job: DraftJob, share: JobRows, states: Tensor, logits: Tensor
    ) -> list[Proposal]:
        """See IncrementalSession."""
        before = self.num_absorbed
        proposals = super().finish(job, share, states, logits)
        for position in range(before, self.num_absorbed):
            self.features.pop(position, None)
        return proposals

    def _features_of_guesses(self, nodes: Sequence[Node]) -> Tensor:
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
