"""A small language model as drafter (arXiv 2211.17192): same vocabulary, own cache, no features.

Its rows depend on tokens alone. So the row of a guess that came true is the true row: it moves into
the prefix and is not computed again, and a node drafted before keeps its children. Positions beyond
the model's context get no row; from there on it has nothing to propose.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from flowspec.model.architecture import ModelConfig
from flowspec.model.kv_cache import JointAttentionMetadata, TreeKVCache, Window
from flowspec.model.stage_model import StageModel
from flowspec.request import NO_NODE, NodeId
from flowspec.speculation.drafters.base import DraftJob, Opening, Proposal
from flowspec.speculation.drafters.cached import IncrementalDrafter, IncrementalSession, JobRows
from flowspec.speculation.tree import DraftTree, Node

SHOWN = 3  # of the tokens that differ between two vocabularies


class DraftModelDrafter(IncrementalDrafter):
    """A whole model; of its vocabulary the first `vocab_size` tokens are the target's."""

    name = "draft_model"

    def __init__(self, model: StageModel, *, vocab_size: int) -> None:
        self.model = model
        self.device = model.device
        self.max_positions = model.config.context_length
        self.vocab_size = min(vocab_size, model.config.vocab_size)

    def new_cache(self, capacity: int) -> TreeKVCache:
        """See IncrementalDrafter."""
        return self.model.new_cache(capacity)

    def open(self, opening: Opening) -> "DraftModelSession":
        """See Drafter.open."""
        return DraftModelSession(self, opening)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        window: Window | JointAttentionMetadata,
        shares: Sequence[JobRows],
    ) -> Tensor:
        """See IncrementalDrafter."""
        del shares
        # the target's padding has tokens that the draft model may not know
        known = tokens.clamp(max=self.model.config.vocab_size - 1)
        return self.model(known, positions, window)[0]

    def logits(self, states: Tensor) -> Tensor:
        """See IncrementalDrafter."""
        return self.model.logits(states)[:, : self.vocab_size]


class DraftModelSession(IncrementalSession):
    """One request's rows, and the children of those that are guesses."""

    def __init__(self, drafter: DraftModelDrafter, opening: Opening) -> None:
        super().__init__(drafter, opening)
        self._tip = NO_NODE  # node of the prefix's last row, if it is known
        self._drafted: dict[tuple[NodeId, int], NodeId] = {}  # nodes by parent and token
        self._children: dict[NodeId, tuple[tuple[int, float], ...]] = {}  # proposed, by node

    def finish(
        self, job: DraftJob, share: JobRows, states: Tensor, logits: Tensor
    ) -> list[Proposal]:
        """See IncrementalSession."""
        proposals = super().finish(job, share, states, logits)
        if share.true is not None:
            at_root = self._is_root(job.tree, self.num_absorbed)
            self._tip = job.tree.root.id if at_root else NO_NODE
        return proposals

    def _known_path(self, tree: DraftTree) -> list[int]:
        path: list[int] = []
        node = self._tip
        for token in self.tokens[self.num_absorbed :]:
            node = self._drafted.get((node, token), NO_NODE)
            if node not in self._rows:
                return path
            path.append(self._rows[node])
        # the tree may have dropped that node and guessed the same token again, under another id
        return path if node == tree.root.id else path[:-1]

    def _known_children(self, node: Node) -> tuple[tuple[int, float], ...] | None:
        if node.id in self._rows:
            return self._children[node.id]
        return super()._known_children(node)

    def _keep_rows(self, tree: DraftTree, *, path: Sequence[int]) -> None:
        super()._keep_rows(tree, path=path)
        rows = self._rows
        self._children = {node: own for node, own in self._children.items() if node in rows}
        self._drafted = {key: node for key, node in self._drafted.items() if node in rows}

    def _record(self, nodes: Sequence[Node], states: Tensor, proposals: Sequence[Proposal]) -> None:
        del states
        for node, proposal in zip(nodes, proposals, strict=True):
            if node.id not in self._rows:
                continue  # the root: its row is in the prefix
            self._drafted[node.parent, node.token] = node.id
            self._children[node.id] = proposal.children


def check_vocabulary(
    target: Mapping[str, int], draft: Mapping[str, int], draft_config: ModelConfig
) -> None:
    """The tokenizers' ids by token. Raises ValueError where a token has not the same id in both.

    Also where the draft model's embedding is smaller than its tokenizer; a larger one is padded.
    """
    ids = {**draft, **target}
    differ = [token for token in ids if target.get(token) != draft.get(token)]
    if differ:
        differ.sort(key=lambda token: (ids[token], token))
        shown = ", ".join(f"{t!r} ({_id(target, t)}, {_id(draft, t)})" for t in differ[:SHOWN])
        raise ValueError(
            f"the draft model's tokenizer is not the target's: {len(differ)} tokens differ, first "
            f"{shown} (its id there, its id here); take a draft model of the target's family"
        )
    needed = max(draft.values(), default=-1) + 1
    if draft_config.vocab_size < needed:
        raise ValueError(
            f"the draft model has embeddings for {draft_config.vocab_size} tokens, its tokenizer "
            f"has {needed}; the folder holds parts of two models"
        )


def _id(vocabulary: Mapping[str, int], token: str) -> str:
    return str(vocabulary[token]) if token in vocabulary else "none"
