"""Merges n-gram branches from the text so far into any drafter's tree, without a forward.

The model drafter proposes as ever. If it has proposed a node's children, the n-gram session's
proposal for the same node is merged into them. Otherwise `merge_branches` adds n-gram branches
without a forward: below a root whose hidden states are still on their way, and deeper than the
drafter has come. The drafter can expand a merged node once it has proposed its parent's children
(`Node.expandable`); its own proposal then replaces the n-gram one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from heapq import heapify, heappop, heappush
from math import exp, log

from torch import Tensor

from flowspec.request import NodeId
from flowspec.runtime.failures import attempt
from flowspec.speculation.drafters.base import (
    Drafter,
    DraftJob,
    DraftSession,
    Opening,
    Proposal,
    Proposed,
    Subtree,
)
from flowspec.speculation.drafters.ngram.drafter import NgramDrafter, NgramSession
from flowspec.speculation.tree import DraftTree, Node

# Sources of a child besides the drafter's own name; each is calibrated by itself.
MERGED = "merged"  # from the text, at a node that the drafter has not expanded
AGREED = "agreed"  # proposed by both
OUTSIDER = "outsider"  # from the text, and not among the drafter's best

WIDTH = 3  # children from the text per node; more are rarely worth a row
MAX_DEPTH = 16  # tokens below the root, since repeated text would go on for ever
MAX_MERGED = 48  # rows per call
LEAST_SCORE = 0.02  # path probability of a merged node; less would displace the drafter's own nodes
LEAST_LEFT = 1e-4  # probability that a drafter leaves to tokens it has not named


class MergedDrafter:
    """The drafter `base` with n-gram branches from the text."""

    def __init__(self, base: Drafter) -> None:
        self.base = base
        self.name = base.name
        self.aux_hidden_state_layers = base.aux_hidden_state_layers
        self.ngram = NgramDrafter()

    def open(self, opening: Opening) -> "MergedSession":
        """Begin a session for one request."""
        before = opening.reuse
        if isinstance(before, MergedSession):
            opening = replace(opening, reuse=before.base)
        return MergedSession(self.base.open(opening), self.ngram.open(opening), self.name)

    def begin(self, jobs: Sequence[DraftJob]) -> "MergedDraft":
        """Begin the base drafter's forward with all jobs."""
        return MergedDraft(self.base, jobs)


class MergedDraft:
    """The base drafter's forward, whose proposals are merged with those from the text."""

    def __init__(self, base: Drafter, jobs: Sequence[DraftJob]) -> None:
        self._parts: list[tuple[MergedSession, DraftTree]] = []
        inner = []
        for job in jobs:
            assert isinstance(job.session, MergedSession), "a session of another drafter"
            self._parts.append((job.session, job.tree))
            inner.append(replace(job, session=job.session.base))
        self._base = base.begin(inner)
        self.looked_up = self._base.looked_up

    def run(self) -> None:
        """Run the base drafter's forward."""
        self._base.run()

    def finish(self) -> list[Proposed]:
        """Return the merged proposals of each job, or the exception that ended it."""
        return [
            own if isinstance(own, Exception) else attempt(partial(_merge_all, session, tree, own))
            for (session, tree), own in zip(self._parts, self._base.finish(), strict=True)
        ]


def _merge_all(
    session: "MergedSession", tree: DraftTree, proposals: Sequence[Proposal | Subtree]
) -> list[Proposal | Subtree]:
    return [session.merged(one, tree) if isinstance(one, Proposal) else one for one in proposals]


class MergedSession:
    """The base drafter's session and the n-gram session of the same request."""

    def __init__(self, base: DraftSession, ngram: NgramSession, name: str) -> None:
        self.base, self.ngram, self.name = base, ngram, name
        self._asked: set[NodeId] = set()  # nodes that the present text was asked about

    @property
    def num_rows_ready(self) -> int:
        """The base drafter's number of rows; the text is read on the way."""
        return self.base.num_rows_ready

    @property
    def num_reusable(self) -> int:
        """The base drafter's number."""
        return self.base.num_reusable

    def accept(self, tokens: Sequence[int]) -> None:
        """Append true tokens in both sessions."""
        self.base.accept(tokens)
        self.ngram.accept(tokens)
        self._asked.clear()

    def accept_hidden_states(self, layer: int, hidden_states: Mapping[int, Tensor]) -> None:
        """Pass the hidden states to the base drafter's session."""
        self.base.accept_hidden_states(layer, hidden_states)

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """Return the base drafter's number of rows."""
        return self.base.num_rows(tree, nodes)

    def prefill(self, tree: DraftTree) -> Proposal | None:
        """Run the base drafter's forward over true tokens, and merge the root's proposal."""
        proposal = self.base.prefill(tree)
        return None if proposal is None else self.merged(proposal, tree)

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """Run the base drafter's forward over nodes, and merge the proposals."""
        return [self.merged(proposal, tree) for proposal in self.base.expand(nodes, tree)]

    def merged(self, proposal: Proposal, tree: DraftTree) -> Proposal:
        """Return the drafter's proposal merged with that from the text for the same node.

        If the text ends before the tree's root (its last verdict went beyond), there is nothing to
        merge.
        """
        if proposal.node not in tree or self.ngram.num_tokens != tree.root.position + 1:
            return proposal
        return merge(proposal, self.ngram.propose(tree[proposal.node], tree), self.name)

    def merge_branches(
        self,
        tree: DraftTree,
        grow: Callable[[Proposal], Sequence[Node]],
        *,
        most: int,
        min_score: float,
    ) -> None:
        """Offer up to `most` branch nodes to `grow`, below the most probable nodes first.

        None has a path probability below `min_score`. `grow` adds the children it wants to the tree
        and returns them.
        """
        deepest, left = tree.root.position + MAX_DEPTH, min(most, MAX_MERGED)
        least = log(max(min_score, LEAST_SCORE))
        heap = [(-n.score, n.id) for n in tree.nodes.values() if self._open(n, least)]
        heapify(heap)
        while heap and left > 0:
            node = tree[heappop(heap)[1]]
            self._asked.add(node.id)
            children = self.ngram.propose(node, tree).children[: min(WIDTH, left)]
            children = tuple(c for c in children if node.score + c[1] >= least)
            if not children or node.position >= deepest:
                continue
            for new in grow(Proposal(node.id, children, (MERGED,) * len(children))):
                left -= 1
                if self._open(new, least):
                    heappush(heap, (-new.score, new.id))

    def _open(self, node: Node, least: float) -> bool:
        return not node.expanded and node.score >= least and node.id not in self._asked


def merge(own: Proposal, text: Proposal, name: str) -> Proposal:
    """Merge two proposals for one node, best first, each child with its source.

    A child in both keeps the higher of its two probabilities. A child that only the text proposes
    gets its share of the probability that the drafter has left for tokens it has not named.
    """
    probable = dict(own.children)
    left = log(max(LEAST_LEFT, 1.0 - sum(exp(p) for p in probable.values())))
    sources = dict.fromkeys(probable, name)
    for token, logprob in text.children:
        if token in probable:
            probable[token] = max(probable[token], logprob)
            sources[token] = AGREED
        else:
            probable[token] = logprob + left
            sources[token] = OUTSIDER
    best_first = sorted(probable.items(), key=lambda child: -child[1])
    return Proposal(own.node, tuple(best_first), tuple(sources[t] for t, _ in best_first))
