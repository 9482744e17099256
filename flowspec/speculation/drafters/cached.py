"""What model drafters share: one persistent tree cache per request, one forward for many requests.

Row i of the cache's prefix belongs to true token i + `first_token` (1 for heads that set a token
beside its parent's feature, 0 for plain language models) and has RoPE position i. Guessed nodes are
tree rows behind it. `absorb` makes true rows of what is newly known, and of the guesses keeps those
that live; `expand` adds rows of guesses. Both go through `IncrementalDrafter.begin`: the rows of
all its jobs run together, so that the weights are read once. Shapes: n rows, H hidden size, V
vocabulary, Vd the draft model's.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from flowspec.model.kv_cache import COMMITTED, JointAttentionMetadata, TreeKVCache, Window
from flowspec.request import NO_NODE, NodeId
from flowspec.runtime.failures import attempt
from flowspec.speculation.acceptance.gumbel_coupled import draft_scores
from flowspec.speculation.drafters.base import DraftJob, Opening, Proposal, Proposed, draft
from flowspec.speculation.tree import DraftTree, Node

MAX_ABSORBED_ROWS = 128  # per request and forward, so that the head's inbox is served in between
SPARE_ROWS = 2304  # tree rows, over twice the largest tree; dead ones go when these run out
UNLIMITED = 2**31


@dataclass(frozen=True, slots=True, kw_only=True)
class Rows:
    """n rows of one kind in a forward: true ones, or guesses."""

    tokens: Sequence[int] = ()
    positions: Sequence[int] = ()  # of RoPE
    parents: Sequence[int] = ()  # tree rows, see TreeKVCache.append_tree
    features: Tensor | None = None  # [n, ...], of drafters that need them
    asked: Sequence[Node] = ()  # the last rows are theirs, and give their children
    known: Sequence[Proposal] = ()  # what needs no row
    path: Sequence[int] = ()  # of true ones: the tree rows that become true
    num_absorbed: int = 0  # of true ones: how many there are once it has run


@dataclass(frozen=True, slots=True, kw_only=True)
class JobRows:
    """One job's rows in a forward, entered in its session's cache: the true ones, then guesses.

    Guesses see the guessed rows of their path, also where its true rows are computed beside them.
    """

    true: Rows | None  # None: nothing is absorbed
    guesses: Rows
    window: Window | None  # None where there are no rows

    @property
    def kinds(self) -> list[Rows]:
        """In the order of the rows."""
        return [self.guesses] if self.true is None else [self.true, self.guesses]

    @property
    def tokens(self) -> list[int]:
        """Of all rows."""
        return [token for rows in self.kinds for token in rows.tokens]

    @property
    def positions(self) -> list[int]:
        """Of all rows."""
        return [position for rows in self.kinds for position in rows.positions]

    @property
    def asked(self) -> list[Node]:
        """The last rows are theirs."""
        return [node for rows in self.kinds for node in rows.asked]

    @property
    def known(self) -> list[Proposal]:
        """What needs no row."""
        return [proposal for rows in self.kinds for proposal in rows.known]


class IncrementalDrafter(ABC):
    """A draft model; its sessions hold what belongs to one request."""

    name: str
    device: torch.device
    aux_hidden_state_layers: tuple[int, ...] = ()
    first_token = 0  # the true token of row 0
    max_positions = UNLIMITED  # rows beyond are not computed, and get no children
    target_ids: Tensor | None = None  # [Vd] on the CPU, where the vocabulary is not the target's

    @abstractmethod
    def new_cache(self, capacity: int) -> TreeKVCache:
        """An empty cache for one request."""

    @abstractmethod
    def open(self, opening: Opening) -> "IncrementalSession":
        """See Drafter.open."""

    @abstractmethod
    def forward(
        self,
        tokens: Tensor,
        positions: Tensor,
        window: Window | JointAttentionMetadata,
        shares: Sequence[JobRows],
    ) -> Tensor:
        """The rows of all `shares` one behind the other, n in all: states [n, H]."""

    @abstractmethod
    def logits(self, states: Tensor) -> Tensor:
        """States [n, H] -> logits [n, Vd] of the tokens after them."""

    def begin(self, jobs: Sequence[DraftJob]) -> "CachedForward":
        """See Drafter.begin; a session has one job at most."""
        assert len({id(job.session) for job in jobs}) == len(jobs), "two jobs of one session"
        return CachedForward(self, jobs)

    def run(self, shares: Sequence[JobRows]) -> list[tuple[Tensor, Tensor]]:
        """States [m, H] and logits [m, Vd] of each share's `asked` rows."""
        busy = [share for share in shares if share.window is not None]
        outputs = iter(self._run_busy(busy) if busy else [])
        nothing = torch.empty(0)
        return [(nothing, nothing) if share.window is None else next(outputs) for share in shares]

    def _run_busy(self, shares: Sequence[JobRows]) -> list[tuple[Tensor, Tensor]]:
        sizes = [len(share.tokens) for share in shares]
        tokens = torch.tensor([t for share in shares for t in share.tokens], device=self.device)
        where = torch.tensor([p for share in shares for p in share.positions], device=self.device)
        windows = [share.window for share in shares if share.window is not None]
        window = windows[0] if len(windows) == 1 else JointAttentionMetadata(windows)
        states = self.forward(tokens, where, window, shares).split(sizes)
        # the vocabulary is large: logits only where children are asked for
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
    """One job's share of a forward, and what has become of it."""

    session: "IncrementalSession"
    job: DraftJob
    share: JobRows
    outputs: Outputs | Exception | None = None


class CachedForward:
    """A draft model's forward over the rows of several sessions; see Draft."""

    looked_up = False

    @torch.inference_mode()
    def __init__(self, drafter: IncrementalDrafter, jobs: Sequence[DraftJob]) -> None:
        self._drafter = drafter
        self._parts = [attempt(partial(_begin, job)) for job in jobs]

    @torch.inference_mode()
    def run(self) -> None:
        """See Draft. Where the joint forward fails, each share runs by itself: rows may run twice,
        for they go to the places they have in the cache.
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
        """See Draft."""
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
    """One request's rows. As it stands, for drafters that need tokens alone.

    Subclasses add what else a row needs (`_features_of...`) and what is kept of it (`_record`).
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
        self.tokens: list[int] = []  # all that is known to be true, the root last
        self.num_absorbed = 0  # true rows done with: in the prefix, or beyond max_positions
        if num_cached_tokens:
            assert isinstance(reuse, IncrementalSession)
            assert num_cached_tokens <= reuse.num_reusable, "more than is reusable"
            count = num_cached_tokens + 1
            same = tuple(reuse.tokens[:count]) == opening.known_tokens[:count]
            assert same, f"the first {count} tokens must be the same"
            self.num_absorbed = min(num_cached_tokens, reuse.cache.prefix_length)
            self.cache = reuse.cache.resized(rows + SPARE_ROWS, prefix_length=self.num_absorbed)
        else:
            self.cache = drafter.new_cache(rows + SPARE_ROWS)
        self.num_rows_ready = 0
        self.num_reusable = 0
        self._rows: dict[NodeId, int] = {}  # guessed nodes in the cache's tree
        self._owners: list[NodeId] = []  # node of each tree row
        self._positions: list[int] = []  # RoPE position of each tree row

    def accept(self, tokens: Sequence[int]) -> None:
        """See DraftSession.accept."""
        self.tokens.extend(tokens)
        self._count_ready()

    def accept_features(self, layer: int, features: Mapping[int, Tensor]) -> None:
        """See DraftSession.accept_features."""
        del features
        raise AssertionError(f"feature layer {layer} was not asked for")

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """See DraftSession.num_rows."""
        if nodes is not None:
            return sum(self._known_children(node) is None for node in nodes)
        if self._is_full():
            return 0
        return min(self.num_rows_ready - len(self._known_path(tree)), MAX_ABSORBED_ROWS)

    def absorb(self, tree: DraftTree) -> Proposal | None:
        """See DraftSession.absorb."""
        (proposals,) = draft(self.drafter, [DraftJob(self, tree, absorbs=True)])
        return proposals[0] if proposals else None

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """See DraftSession.expand."""
        (proposals,) = draft(self.drafter, [DraftJob(self, tree, nodes)])
        return proposals

    def begin(self, job: DraftJob) -> JobRows:
        """The rows of a job; `finish` takes what becomes of them."""
        room = self.cache.capacity - self.cache.prefix_length - self.cache.num_tree_rows
        if room < len(job.nodes) + 2 * MAX_ABSORBED_ROWS:
            self._keep_rows(job.tree, path=())
        true = self._true_rows(job.tree) if job.absorbs else None
        share = JobRows(true=true, guesses=self._guessed_rows(job.nodes), window=None)
        parents = [parent for rows in share.kinds for parent in rows.parents]
        return replace(share, window=self.cache.append_tree(parents)) if parents else share

    def _true_rows(self, tree: DraftTree) -> Rows:
        assert self.num_rows_ready > 0, "nothing was ready to absorb"
        ready = self.num_absorbed + self.num_rows_ready
        if self._is_full():
            return Rows(known=self._known_root(tree, ready), num_absorbed=ready)
        path = self._known_path(tree)
        start = self.num_absorbed + len(path)
        n = min(ready - start, MAX_ABSORBED_ROWS)
        if n == 0:
            return Rows(known=self._known_root(tree, ready), path=path, num_absorbed=ready)
        first = self.cache.num_tree_rows
        tokens = self.tokens[start + self.drafter.first_token :]
        return Rows(
            tokens=tokens[:n],
            positions=range(start, start + n),
            parents=[path[-1] if path else COMMITTED, *range(first, first + n - 1)],
            features=self._features_of_true(start, n),
            asked=[tree.root] if self._is_root(tree, start + n) else [],
            path=[*path, *range(first, first + n)],
            num_absorbed=start + n,
        )

    def _guessed_rows(self, nodes: Sequence[Node]) -> Rows:
        known = {node.id: self._known_children(node) for node in nodes}
        asked = [node for node in nodes if known[node.id] is None]
        return Rows(
            tokens=[node.token for node in asked],
            positions=[node.position - self.drafter.first_token for node in asked],
            parents=[self._rows.get(node.parent, COMMITTED) for node in asked],
            features=self._features_of_guesses(asked) if asked else None,
            asked=asked,
            known=[Proposal(node, own) for node, own in known.items() if own is not None],
        )

    def finish(
        self, job: DraftJob, share: JobRows, states: Tensor, logits: Tensor
    ) -> list[Proposal]:
        """The job's proposals, from states [m, H] and logits [m, Vd] of its `asked` rows."""
        asked = share.asked
        proposals = self._propose(asked, logits) if asked else []
        self._enter(share)
        if share.true is not None:
            self.num_absorbed = share.true.num_absorbed
            self._count_ready()
            self._keep_rows(job.tree, path=share.true.path)
        self._record(asked, states, proposals)
        found = {proposal.node: proposal for proposal in [*proposals, *share.known]}
        below = [found.pop(node.id) for node in job.nodes]
        return [*found.values(), *below]  # the root's first

    def _is_full(self) -> bool:
        """Whether the text is beyond what the draft model can see."""
        return len(self.tokens) - self.drafter.first_token > self.drafter.max_positions

    def _is_root(self, tree: DraftTree, num_absorbed: int) -> bool:
        """Whether the newest of `num_absorbed` true rows is that of the tree's root."""
        return num_absorbed + self.drafter.first_token == len(self.tokens) and len(tree) > 0

    def _known_root(self, tree: DraftTree, num_absorbed: int) -> list[Proposal]:
        """The proposal of a root whose row is not computed now."""
        if not self._is_root(tree, num_absorbed):
            return []
        children = self._known_children(tree.root)
        assert children is not None
        return [Proposal(tree.root.id, children)]

    def _enter(self, share: JobRows) -> None:
        """The rows are in the cache now."""
        true = share.true.positions if share.true is not None else ()
        self._owners += [NO_NODE] * len(true)  # they go to the prefix
        self._positions += true
        pairs = zip(share.guesses.asked, share.guesses.positions, strict=True)
        for row, (node, position) in enumerate(pairs, start=len(self._owners)):
            if node.id in self._rows:  # drafted again: the newer guess stands
                self._owners[self._rows[node.id]] = NO_NODE
            self._rows[node.id] = row
            self._owners.append(node.id)
            self._positions.append(position)

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
        ready = max(self._num_complete(), self.num_absorbed)
        self.num_rows_ready = ready - self.num_absorbed
        self.num_reusable = min(ready, max(len(self.tokens) - 1, 0))

    # What differs between drafters --------------------------------------------------------------

    def _num_complete(self) -> int:
        """Leading true rows that can be computed, those that have been included."""
        return len(self.tokens) - self.drafter.first_token

    def _known_path(self, tree: DraftTree) -> list[int]:
        """Tree rows that are exact rows of the true tokens after the prefix."""
        return []

    def _known_children(self, node: Node) -> tuple[tuple[int, float], ...] | None:
        """What is known of a node's children without a row of its own."""
        beyond = node.position - self.drafter.first_token >= self.drafter.max_positions
        return () if beyond else None

    def _features_of_true(self, start: int, n: int) -> Tensor | None:
        """Beside the tokens of true rows start .. start + n."""
        return None

    def _features_of_guesses(self, nodes: Sequence[Node]) -> Tensor | None:
        """Beside the tokens of guesses."""
        return None

    def _record(self, nodes: Sequence[Node], states: Tensor, proposals: Sequence[Proposal]) -> None:
        """Of `nodes`, states [m, H] and proposals have been computed."""
