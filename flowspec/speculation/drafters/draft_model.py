"""A small language model as drafter (arXiv 2211.17192), with the target's vocabulary.

It needs no hidden states: its rows depend on tokens alone. So the row of a guess that came true is
the true row. It moves into the prefix without being computed again, and a node drafted before keeps
its children. Positions beyond the model's context get no row; from there on it proposes nothing.
"""

from collections.abc import Mapping, Sequence

from torch import Tensor

from flowspec.model.architecture import ModelConfig
from flowspec.model.kv_cache import AttentionMetadata, JointAttentionMetadata, TreeKVCache
from flowspec.model.stage_model import StageModel
from flowspec.request import NO_NODE, NodeId
from flowspec.speculation.drafters.base import DraftJob, Opening, Proposal
from flowspec.speculation.drafters.cached import IncrementalDrafter, IncrementalSession, JobRows
from flowspec.speculation.tree import DraftTree, Node

SHOWN = 3  # tokens that a message shows of two different vocabularies


class DraftModelDrafter(IncrementalDrafter):
    """A whole model; the first `vocab_size` tokens of its vocabulary are the target's."""

    name = "draft_model"

    def __init__(self, model: StageModel, *, vocab_size: int) -> None:
        self.model = model
        self.device = model.device
        self.max_positions = model.config.context_length
        self.vocab_size = min(vocab_size, model.config.vocab_size)

    def new_cache(self, capacity: int) -> TreeKVCache:
        """Return an empty cache for one request."""
        return self.model.new_cache(capacity)

    def open(self, opening: Opening) -> "DraftModelSession":
        """Begin a session for one request."""
        return DraftModelSession(self, opening)

    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata | JointAttentionMetadata,
        shares: Sequence[JobRows],
    ) -> Tensor:
        """Run the rows of all `shares` through the model; returns states [n, H]."""
        del shares
        # The target's padding has tokens that the draft model may not have.
        known = tokens.clamp(max=self.model.config.vocab_size - 1)
        return self.model(known, positions, metadata)[0]

    def logits(self, states: Tensor) -> Tensor:
        """Return logits [n, Vd] of the tokens that follow states [n, H]."""
        return self.model.logits(states)[:, : self.vocab_size]


class DraftModelSession(IncrementalSession):
    """One request's rows, and the children of its guesses."""

    def __init__(self, drafter: DraftModelDrafter, opening: Opening) -> None:
        super().__init__(drafter, opening)
        self._tip = NO_NODE  # node of the prefix's last row, if known
        self._drafted: dict[tuple[NodeId, int], NodeId] = {}  # nodes by parent and token
        self._children: dict[NodeId, tuple[tuple[int, float], ...]] = {}  # proposed, by node

    def finish(
        self, job: DraftJob, share: JobRows, states: Tensor, logits: Tensor
    ) -> list[Proposal]:
        """Return the job's proposals, and keep those of guesses for later."""
        proposals = super().finish(job, share, states, logits)
        if share.true is not None:
            at_root = self._is_root(job.tree, self.num_prefilled)
            self._tip = job.tree.root.id if at_root else NO_NODE
        return proposals

    def _known_path(self, tree: DraftTree) -> list[int]:
        path: list[int] = []
        node = self._tip
        for token in self.tokens[self.num_prefilled :]:
            node = self._drafted.get((node, token), NO_NODE)
            if node not in self._rows:
                return path
            path.append(self._rows[node])
        # The tree may have dropped a node and guessed its token again under another id.
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
                continue  # the root, whose row is in the prefix
            self._drafted[node.parent, node.token] = node.id
            self._children[node.id] = proposal.children


def check_vocabulary(
    target: Mapping[str, int], draft: Mapping[str, int], draft_config: ModelConfig
) -> None:
    """Raise ValueError unless each token has the same id in both tokenizers.

    Also raises if the draft model's embedding is smaller than its tokenizer; a larger one is
    padded.
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
