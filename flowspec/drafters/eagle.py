"""EAGLE-1/2 drafter (arXiv 2401.15077, 2406.16858), incremental.

The head's row of node v takes v's token and its parent's feature, and its output both guesses v's
feature and, through the target's lm_head, v's children. One persistent cache: rows over true
features form its prefix, rows of guessed nodes its tree. When true features arrive, the rows of the
accepted nodes are computed anew over them (`absorb`); rows of surviving guesses stay as they are,
since their small error costs less than computing them again. Shapes: n rows, H hidden size, V
vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flowspec.acceptance.coupled import draft_scores
from flowspec.drafters.base import DraftJob, DraftSession, Proposal, draft_each
from flowspec.model.eagle_net import EagleNet
from flowspec.model.kv_cache import COMMITTED, TreeKVCache
from flowspec.model.llama import rope_angles, rope_frequencies
from flowspec.model.stage_model import FINAL_NORM
from flowspec.request import NO_NODE, NodeId, Request
from flowspec.tree import DraftTree, Node

MAX_ABSORBED_ROWS = 128  # per forward, so that the head's inbox is served in between
SPARE_ROWS = 2304  # tree rows, over twice the largest tree; dead ones go when these run out


class EagleDrafter:
    """An EAGLE head with the target's lm_head [V, H]."""

    name = "eagle"
    feature_layers: tuple[int, ...] = (FINAL_NORM,)

    def __init__(self, net: EagleNet, lm_head: Tensor) -> None:
        self.net = net
        self.lm_head = lm_head
        self.frequencies = rope_frequencies(net.config).to(lm_head.device)

    def open(
        self,
        request: Request,
        *,
        topk: int,
        coupled: bool,
        reuse: DraftSession | None = None,
        num_shared: int = 0,
    ) -> "EagleSession":
        """See Drafter.open."""
        assert not num_shared, "nothing is reusable yet"
        del reuse
        return EagleSession(self, request, topk=topk, coupled=coupled)

    def draft(self, jobs: Sequence[DraftJob]) -> list[list[Proposal]]:
        """See Drafter.draft."""
        return draft_each(jobs)


class EagleSession:
    """One request's rows, guesses and true features."""

    num_reusable = 0

    def __init__(
        self, drafter: EagleDrafter, request: Request, *, topk: int, coupled: bool
    ) -> None:
        self.drafter = drafter
        self.sampling = request.sampling
        self.topk, self.coupled = topk, coupled
        config = drafter.net.config
        self.cache = TreeKVCache(
            num_layers=1,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            capacity=len(request.prompt) + request.max_new_tokens + SPARE_ROWS,
            dtype=drafter.lm_head.dtype,
            device=drafter.lm_head.device,
        )
        self.tokens: list[int] = []  # all that is known to be true, the root last
        self.features: dict[int, Tensor] = {}  # true features not absorbed yet, by position
        self.num_absorbed = 0  # rows in the prefix: those of tokens[1 : num_absorbed + 1]
        self.num_rows_ready = 0
        self._rows: dict[NodeId, int] = {}  # guessed nodes in the cache's tree
        self._guesses: dict[NodeId, Tensor] = {}  # their guessed features [H]
        self._owners: list[NodeId] = []  # node of each tree row
        self._positions: list[int] = []  # RoPE position of each tree row

    def accept(self, tokens: Sequence[int]) -> None:
        """See DraftSession.accept."""
        self.tokens.extend(tokens)
        self._count_ready()

    def accept_features(self, layer: int, features: Mapping[int, Tensor]) -> None:
        """See DraftSession.accept_features."""
        assert layer == FINAL_NORM, f"feature layer {layer} was not asked for"
        self.features.update(features)
        self._count_ready()

    def absorb(self, tree: DraftTree) -> Proposal | None:
        """See DraftSession.absorb."""
        start, n = self.num_absorbed, min(self.num_rows_ready, MAX_ABSORBED_ROWS)
        features = torch.stack([self.features.pop(start + i) for i in range(n)])
        tokens = self.tokens[start + 1 : start + 1 + n]
        first = self.cache.num_tree_rows
        chain = [COMMITTED, *range(first, first + n - 1)]
        guesses, logits = self._forward(tokens, features, range(start, start + n), chain)
        self.num_absorbed += n
        self._count_ready()
        at_root = self.num_absorbed == len(self.tokens) - 1 and len(tree) > 0
        self._keep_rows(tree, path=range(first, first + n))
        if not at_root:
            return None
        self._guesses[tree.root.id] = guesses[-1]
        return self._propose([tree.root], logits[-1:])[0]

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """See DraftSession.expand."""
        room = self.cache.capacity - self.cache.prefix_length - self.cache.num_tree_rows
        if room < len(nodes) + MAX_ABSORBED_ROWS:
            self._keep_rows(tree, path=())
        parents = [self._rows.get(node.parent, COMMITTED) for node in nodes]
        features = torch.stack([self._guesses[node.parent] for node in nodes])
        positions = [node.position - 1 for node in nodes]
        first = self.cache.num_tree_rows
        tokens = [node.token for node in nodes]
        guesses, logits = self._forward(tokens, features, positions, parents)
        for row, (node, guess) in enumerate(zip(nodes, guesses, strict=True), start=first):
            if node.id in self._rows:  # drafted again: the newer guess stands
                self._owners[self._rows[node.id]] = NO_NODE
            self._rows[node.id] = row
            self._owners.append(node.id)
            self._positions.append(positions[row - first])
            self._guesses[node.id] = guess
        return self._propose(nodes, logits)

    def _count_ready(self) -> None:
        have = self.num_absorbed
        while have in self.features and have + 1 < len(self.tokens):
            have += 1
        self.num_rows_ready = have - self.num_absorbed

    @torch.inference_mode()
    def _forward(
        self,
        tokens: Sequence[int],
        features: Tensor,
        positions: Sequence[int],
        parents: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """Rows of `tokens` [n] over `features` [n, H]: guessed features [n, H], logits [n, V]."""
        device = self.drafter.lm_head.device
        window = self.cache.append_tree(parents)
        where = torch.tensor(list(positions), device=device)
        rope = rope_angles(self.drafter.frequencies, where, features.dtype)
        ids = torch.tensor(tokens, device=device)
        guesses = self.drafter.net(ids, features.to(device), rope, window.attend(0))
        return guesses, torch.nn.functional.linear(guesses, self.drafter.lm_head)

    def _keep_rows(self, tree: DraftTree, *, path: Sequence[int]) -> None:
        """Commit `path`; keep the rows of living nodes and of those that lead to them.

        What is absorbed is in the prefix now: its guessed row goes, or it would be seen twice.
        """
        living = [row for row, node in enumerate(self._owners) if node in tree]
        rows = self.cache.with_ancestors(living)
        keep = [row for row in rows if self._positions[row] >= self.num_absorbed]
        self.cache.reroot(path, keep)
        self._owners = [self._owners[row] for row in keep]
        self._positions = [self._positions[row] for row in keep]
        self._rows = {node: row for row, node in enumerate(self._owners)}
        alive = set(self._rows)
        self._guesses = {
            node: guess for node, guess in self._guesses.items() if node in alive or node in tree
        }

    def _propose(self, nodes: Sequence[Node], logits: Tensor) -> list[Proposal]:
        positions = [node.position + 1 for node in nodes]
        scores = draft_scores(logits, positions, self.sampling, coupled=self.coupled)
        best = scores.topk(min(self.topk, scores.shape[-1]), dim=-1)
        values, tokens = best.values.tolist(), best.indices.tolist()
        return [
            Proposal(
                node.id,
                tuple((t, v) for t, v in zip(ts, vs, strict=True) if v > float("-inf")),
            )
            for node, ts, vs in zip(nodes, tokens, values, strict=True)
        ]
