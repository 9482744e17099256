"""The common part of draft models: a tree cache per request, and one forward for many requests.

Row i of the cache's prefix belongs to true token i + `first_token` (1 for heads that set a token
beside its parent's hidden state, 0 for plain language models) and has RoPE position i. Guessed
nodes are tree rows behind it. `prefill` computes true rows for newly known tokens and keeps the
rows of living guesses; `expand` adds rows of guesses. Both go through `IncrementalDrafter.begin`,
where the rows of all jobs run together, so that the weights are read once. Shapes: n rows, H hidden
size, V vocabulary, Vd the draft model's vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from flowspec.model.kv_cache import (
    COMMITTED,
    AttentionMetadata,
    JointAttentionMetadata,
    TreeKVCache,
)
from flowspec.request import NO_NODE, NodeId
from flowspec.runtime.failures import attempt
from flowspec.speculation.acceptance.gumbel_coupled import draft_scores
from flowspec.speculation.drafters.base import DraftJob, Opening, Proposal, Proposed, draft
from flowspec.speculation.tree import DraftTree, Node

MAX_PREFILL_ROWS = 128  # per request and forward, so that the head can process messages in between
SPARE_ROWS = 2304  # tree rows, over twice the largest tree; dead ones go when these run out
UNLIMITED = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """n rows of one kind in a forward: true rows or guesses."""

    tokens: Sequence[int] = ()
    positions: Sequence[int] = ()  # for RoPE
    parents: Sequence[int] = ()  # tree rows as in TreeKVCache.append_tree
    hidden_states: Tensor | None = None  # [n, ...], of drafters that need them
    asked: Sequence[Node] = ()  # nodes of the last rows, whose children are asked for
    known: Sequence[Proposal] = ()  # proposals that need no row
    path: Sequence[int] = ()  # of true rows: the tree rows that become true
    num_prefilled: int = 0  # of true rows: their number after the forward


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRows:
    """One job's rows in a forward, as entered in its session's cache: true rows, then guesses.

    Guesses see the guessed rows of their path, even if its true rows are computed beside them.
    """

    true: Rows | None  # None: nothing is prefilled
    guesses: Rows
    metadata: AttentionMetadata | None  # None where there are no rows

    @property
    def kinds(self) -> list[Rows]:
        """The kinds of rows, in their order."""
        return [self.guesses] if self.true is None else [self.true, self.guesses]

    @property
    def tokens(self) -> list[int]:
        """The tokens of all rows."""
        return [token for rows in self.kinds for token in rows.tokens]

    @property
    def positions(self) -> list[int]:
        """The RoPE positions of all rows."""
        return [position for rows in self.kinds for position in rows.positions]

    @property
    def asked(self) -> list[Node]:
        """The nodes of the last rows of each kind, whose children are asked for."""
        return [node for rows in self.kinds for node in rows.asked]

    @property
    def known(self) -> list[Proposal]:
        """The proposals that need no row."""
        return [proposal for rows in self.kinds for proposal in rows.known]


class IncrementalDrafter(ABC):
    """A draft model; its sessions hold the state of each request."""

    name: str
    device: torch.device
    aux_hidden_state_layers: tuple[int, ...] = ()
    first_token = 0  # index of the true token of row 0
    max_positions = UNLIMITED  # rows beyond are not computed and get no children
    target_ids: Tensor | None = None  # [Vd] on the CPU, if the vocabulary is not the target's

    @abstractmethod
    def new_cache(self, capacity: int) -> TreeKVCache:
        """Return an empty cache for one request."""

    @abstractmethod
    def open(self, opening: Opening) -> "IncrementalSession":
        """Begin a session for one request."""

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata | JointAttentionMetadata,
        shares: Sequence[JobRows],
    ) -> Tensor:
        """Run the rows of all `shares`, one behind the other, n in all; returns states [n, H]."""

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """Return logits [n, Vd] of the tokens that follow states [n, H]."""

    def begin(self, jobs: Sequence[DraftJob]) -> "CachedForward":
        """Begin a forward with all jobs; a session has at most one job."""
        assert len({id(job.session) for job in jobs}) == len(jobs), "two jobs of one session"
        return CachedForward(self, jobs)

    def run(self, shares: Sequence[JobRows]) -> list[tuple[Tensor, Tensor]]:
        """Return states [m, H] and logits [m, Vd] of each share's `asked` rows."""
        busy = [share for share in shares if share.metadata is not None]
        outputs = iter(self._run_busy(busy) if busy else [])
        nothing = torch.empty(0)
        return [(nothing, nothing) if share.metadata is None else next(outputs) for share in shares]

    def _run_busy(self, shares: Sequence[JobRows]) -> list[tuple[Tensor, Tensor]]:
        sizes = [len(share.tokens) for share in shares]
        tokens = torch.tensor([t for share in shares for t in share.tokens], device=self.device)
        where = torch.tensor([p for share in shares for p in share.positions], device=self.device)
        parts = [share.metadata for share in shares if share.metadata is not None]
        metadata = parts[0] if len(parts) == 1 else JointAttentionMetadata(parts)
        states = self.forward(tokens, where, metadata, shares).split(sizes)
        # The vocabulary is large, so logits are computed only for asked rows.
        asked = [
            own[len(own) - len(share.asked) :] for own, share in zip(states, shares, strict=True)
        ]
        counts = [len(own) for own in asked]
        if not sum(counts):
            return [(own, own) for own in asked]
        return list(zip(asked, self.logits(torch.cat(asked)).split(counts), strict=True))


Outputs: TypeAlias = tuple[Tensor, Tensor]  # states [m, H] and logits [m, Vd], see `run`


@dataclass(slots=True)
class _Part:
    """One job's share of a forward, and its result."""

    session: "IncrementalSession"
    job: DraftJob
    share: JobRows
    outputs: Outputs | Exception | None = None


class CachedForward:
    """A draft model's forward over the rows of several sessions."""

    looked_up = False

    @torch.inference_mode()
    def __init__(self, drafter: IncrementalDrafter, jobs: Sequence[DraftJob]) -> None:
        self._drafter = drafter
        self._parts = [attempt(partial(_begin, job)) for job in jobs]

    @torch.inference_mode()
    def run(self) -> None:
        """Run all shares together; if that fails, run each share by itself.

        Rows may run twice, since each is written to its place in the cache.
        """
        parts = [part for part in self._parts if isinstance(part, _Part)]
        together = attempt(partial(self._drafter.run, [part.share for part in parts]))
        if isinstance(together, Exception):
            for part in parts:
                alone = attempt(partial(self._drafter.run, [part.share]))
                part.outputs = alone if isinstance(alone, Exception) else alone[0]
            return
        for part, outputs in zip(parts, together, strict=True):
            part.outputs = outputs

    @torch.inference_mode()
    def finish(self) -> list[Proposed]:
        """Return the proposals of each job, or the exception that ended it."""
        return [
            part if isinstance(part, Exception) else attempt(partial(_finish, part))
            for part in self._parts
        ]


def _begin(job: DraftJob) -> _Part:
    assert isinstance(job.session, IncrementalSession)
    return _Part(job.session, job, job.session.begin(job))


def _finish(part: _Part) -> list[Proposal]:
    assert part.outputs is not None, "it has not run"
    if isinstance(part.outputs, Exception):
        raise part.outputs
    return part.session.finish(part.job, part.share, *part.outputs)


class IncrementalSession:
    """One request's rows, for drafters that need tokens alone.

    Subclasses add what else a row needs (`_hidden_states_of...`) and what is kept of it
    (`_record`).
    """

    num_rows_ready: int
    num_reusable: int
    cache: TreeKVCache

    def __init__(self, drafter: IncrementalDrafter, opening: Opening) -> None:
        request, reuse, num_cached_tokens = (
            opening.request,
            opening.reuse,
            opening.num_cached_tokens,
        )
        self.drafter = drafter
        self.sampling = request.sampling
        self.draft_topk, self.coupled = opening.draft_topk, opening.coupled
        rows = min(len(request.prompt_tokens) + request.max_new_tokens, drafter.max_positions)
        self.tokens: list[int] = []  # all true tokens, the root last
        self.num_prefilled = 0  # true rows that are done: in the prefix, or beyond max_positions
        if num_cached_tokens:
            assert isinstance(reuse, IncrementalSession)
            assert num_cached_tokens <= reuse.num_reusable, "more than is reusable"
            count = num_cached_tokens + 1
            same = tuple(reuse.tokens[:count]) == opening.known_tokens[:count]
            assert same, f"the first {count} tokens must be the same"
            self.num_prefilled = min(num_cached_tokens, reuse.cache.prefix_length)
            self.cache = reuse.cache.resized(rows + SPARE_ROWS, prefix_length=self.num_prefilled)
        else:
            self.cache = drafter.new_cache(rows + SPARE_ROWS)
        self.num_rows_ready = 0
        self.num_reusable = 0
        self._rows: dict[NodeId, int] = {}  # guessed nodes in the cache's tree
        self._owners: list[NodeId] = []  # node of each tree row
        self._positions: list[int] = []  # RoPE position of each tree row

    def accept(self, tokens: Sequence[int]) -> None:
        """Append true tokens to those known before."""
        self.tokens.extend(tokens)
        self._count_ready()

    def accept_hidden_states(self, layer: int, hidden_states: Mapping[int, Tensor]) -> None:
        """Fail: a drafter without hidden-state layers asks for none."""
        del hidden_states
        raise AssertionError(f"hidden-state layer {layer} was not asked for")

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """Return the number of rows to expand `nodes`, or (None) to prefill."""
        if nodes is not None:
            return sum(self._known_children(node) is None for node in nodes)
        if self._is_full():
            return 0
        return min(self.num_rows_ready - len(self._known_path(tree)), MAX_PREFILL_ROWS)

    def prefill(self, tree: DraftTree) -> Proposal | None:
        """Run one forward over true tokens; return the root's children if it reaches the root."""
        (proposals,) = draft(self.drafter, [DraftJob(self, tree, prefills=True)])
        return proposals[0] if proposals else None

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """Run one forward over alive nodes whose parents are expanded."""
        (proposals,) = draft(self.drafter, [DraftJob(self, tree, nodes)])
        return proposals

    def begin(self, job: DraftJob) -> JobRows:
        """Return the rows of a job; `finish` takes their results."""
        room = self.cache.capacity - self.cache.prefix_length - self.cache.num_tree_rows
        if room < len(job.nodes) + 2 * MAX_PREFILL_ROWS:
            self._keep_rows(job.tree, path=())
        true = self._true_rows(job.tree) if job.prefills else None
        share = JobRows(true=true, guesses=self._guessed_rows(job.nodes), metadata=None)
        parents = [parent for rows in share.kinds for parent in rows.parents]
        return replace(share, metadata=self.cache.append_tree(parents)) if parents else share

    def _true_rows(self, tree: DraftTree) -> Rows:
        assert self.num_rows_ready > 0, "nothing was ready to prefill"
        ready = self.num_prefilled + self.num_rows_ready
        if self._is_full():
            return Rows(known=self._known_root(tree, ready), num_prefilled=ready)
        path = self._known_path(tree)
        start = self.num_prefilled + len(path)
        n = min(ready - start, MAX_PREFILL_ROWS)
        if n == 0:
            return Rows(known=self._known_root(tree, ready), path=path, num_prefilled=ready)
        first = self.cache.num_tree_rows
        tokens = self.tokens[start + self.drafter.first_token :]
        return Rows(
            tokens=tokens[:n],
            positions=range(start, start + n),
            parents=[path[-1] if path else COMMITTED, *range(first, first + n - 1)],
            hidden_states=self._hidden_states_of_true(start, n),
            asked=[tree.root] if self._is_root(tree, start + n) else [],
            path=[*path, *range(first, first + n)],
            num_prefilled=start + n,
        )

    def _guessed_rows(self, nodes: Sequence[Node]) -> Rows:
        known = {node.id: self._known_children(node) for node in nodes}
        asked = [node for node in nodes if known[node.id] is None]
        return Rows(
            tokens=[node.token for node in asked],
            positions=[node.position - self.drafter.first_token for node in asked],
            parents=[self._rows.get(node.parent, COMMITTED) for node in asked],
            hidden_states=self._hidden_states_of_guesses(asked) if asked else None,
            asked=asked,
            known=[Proposal(node, own) for node, own in known.items() if own is not None],
        )

    def finish(
        self, job: DraftJob, share: JobRows, states: Tensor, logits: Tensor
    ) -> list[Proposal]:
        """Return the job's proposals from states [m, H] and logits [m, Vd] of its `asked` rows."""
        asked = share.asked
        proposals = self._propose(asked, logits) if asked else []
        self._enter(share)
        if share.true is not None:
            self.num_prefilled = share.true.num_prefilled
            self._count_ready()
            self._keep_rows(job.tree, path=share.true.path)
        self._record(asked, states, proposals)
        found = {proposal.node: proposal for proposal in [*proposals, *share.known]}
        below = [found.pop(node.id) for node in job.nodes]
        return [*found.values(), *below]  # the root's first

    def _is_full(self) -> bool:
        """Return whether the text is longer than the draft model can see."""
        return len(self.tokens) - self.drafter.first_token > self.drafter.max_positions

    def _is_root(self, tree: DraftTree, num_prefilled: int) -> bool:
        """Return whether the newest of `num_prefilled` true rows is that of the tree's root."""
        return num_prefilled + self.drafter.first_token == len(self.tokens) and len(tree) > 0

    def _known_root(self, tree: DraftTree, num_prefilled: int) -> list[Proposal]:
        """Return the proposal of a root whose row is not computed now."""
        if not self._is_root(tree, num_prefilled):
            return []
        children = self._known_children(tree.root)
        assert children is not None
        return [Proposal(tree.root.id, children)]

    def _enter(self, share: JobRows) -> None:
        """Note that the rows are in the cache."""
        true = share.true.positions if share.true is not None else ()
        self._owners += [NO_NODE] * len(true)  # true rows go to the prefix
        self._positions += true
        pairs = zip(share.guesses.asked, share.guesses.positions, strict=True)
        for row, (node, position) in enumerate(pairs, start=len(self._owners)):
            if node.id in self._rows:  # drafted again: the newer guess counts
                self._owners[self._rows[node.id]] = NO_NODE
            self._rows[node.id] = row
            self._owners.append(node.id)
            self._positions.append(position)

    def _keep_rows(self, tree: DraftTree, *, path: Sequence[int]) -> None:
        """Commit `path`; keep the rows of living nodes and of their ancestors.

        Prefilled rows are in the prefix now, so the guessed rows of the same tokens are dropped.
        """
        living = [row for row, node in enumerate(self._owners) if node in tree]
        rows = self.cache.with_ancestors(living)
        keep = [row for row in rows if self._positions[row] >= self.num_prefilled]
        self.cache.reroot(path, keep)
        self._owners = [self._owners[row] for row in keep]
        self._positions = [self._positions[row] for row in keep]
        self._rows = {node: row for row, node in enumerate(self._owners) if node != NO_NODE}

    def _propose(self, nodes: Sequence[Node], logits: Tensor) -> list[Proposal]:
        positions = [node.position + 1 for node in nodes]
        ids = self.drafter.target_ids
        scores = draft_scores(
            logits, positions, self.sampling, coupled=self.coupled, target_ids=ids
        )
        best = scores.topk(min(self.draft_topk, scores.shape[-1]), dim=-1)
        tokens = best.indices.cpu() if ids is None else ids[best.indices.cpu()]
        return [
            Proposal(
                node.id,
                tuple((t, v) for t, v in zip(ts, vs, strict=True) if v > float("-inf")),
            )
            for node, ts, vs in zip(nodes, tokens.tolist(), best.values.tolist(), strict=True)
        ]

    def _count_ready(self) -> None:
        ready = max(self._num_complete(), self.num_prefilled)
        self.num_rows_ready = ready - self.num_prefilled
        self.num_reusable = min(ready, max(len(self.tokens) - 1, 0))

    # What differs between drafters --------------------------------------------------------------

    def _num_complete(self) -> int:
        """Return the number of leading true rows that can be computed, done ones included."""
        return len(self.tokens) - self.drafter.first_token

    def _known_path(self, tree: DraftTree) -> list[int]:
        """Return the tree rows that are exact rows of the true tokens after the prefix."""
        return []

    def _known_children(self, node: Node) -> tuple[tuple[int, float], ...] | None:
        """Return the children of a node that are known without a row of its own."""
        beyond = node.position - self.drafter.first_token >= self.drafter.max_positions
        return () if beyond else None

    def _hidden_states_of_true(self, start: int, n: int) -> Tensor | None:
        """Return the hidden states beside the tokens of true rows start .. start + n."""
        return None

    def _hidden_states_of_guesses(self, nodes: Sequence[Node]) -> Tensor | None:
        """Return the hidden states beside the tokens of guesses."""
        return None

    def _record(self, nodes: Sequence[Node], states: Tensor, proposals: Sequence[Proposal]) -> None:
        """Keep the computed states [m, H] and proposals of `nodes`."""
