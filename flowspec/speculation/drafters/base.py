"""The seam of a drafter, which proposes children of tree nodes, one forward at a time."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeAlias

from torch import Tensor

from flowspec.request import NodeId, Request
from flowspec.runtime.failures import attempt, settled
from flowspec.speculation.tree import DraftTree, Node


@dataclass(frozen=True, slots=True)
class Proposal:
    """Children proposed for one node: (token, log-probability of being the target's choice)."""

    node: NodeId
    children: tuple[tuple[int, float], ...]
    sources: tuple[str, ...] = ()  # of each child; empty: the drafter itself
    # The children's distribution, as (token, probability); empty: they were not drawn.
    drawn_from: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Subtree:
    """Several levels proposed at once below one node, parents before children.

    Entry i is (parent, token, log-probability). `parent` is the index of an earlier entry, or -1
    for the node itself. The log-probability of the token holds given that its parent is true.
    """

    node: NodeId
    entries: tuple[tuple[int, int, float], ...]

    def __post_init__(self) -> None:
        for place, (parent, _, _) in enumerate(self.entries):
            assert -1 <= parent < place, f"entry {place} comes before its parent {parent}"

    def levels(self) -> Iterator[tuple[int, list[tuple[int, int, float]]]]:
        """Yield (parent, its children as (index, token, log-probability)), parents first."""
        below: dict[int, list[tuple[int, int, float]]] = {}
        for place, (parent, token, logprob) in enumerate(self.entries):
            below.setdefault(parent, []).append((place, token, logprob))
        yield from below.items()


# The result of one drafter forward for one job, or the exception that ended it.
Proposed: TypeAlias = Sequence[Proposal | Subtree] | Exception


class DraftSession(Protocol):
    """The drafter's side of one request. `prefill` and `expand` compute.

    While a forward that has begun is not finished, the text may grow and hidden states may come. A
    model's `num_reusable` is below the number of its tokens: the last row needs hidden states (or a
    successor) that only the next request brings.
    """

    @property
    def num_rows_ready(self) -> int:
        """Number of true tokens that `prefill` can compute (0: nothing to do)."""

    @property
    def num_reusable(self) -> int:
        """Number of leading positions whose work is complete, for `Opening.num_cached_tokens`."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Append true tokens to those known before (first the prompt)."""

    def accept_hidden_states(self, layer: int, hidden_states: Mapping[int, Tensor]) -> None:
        """Take true hidden states [H] by absolute position, each position once, in any order."""

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """Return the number of rows to expand `nodes`, or (None) to prefill."""

    def prefill(self, tree: DraftTree) -> Proposal | None:
        """Run one forward over true tokens; return the root's children if it reaches the root."""

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """Run one forward over alive nodes whose parents are expanded."""


@dataclass(frozen=True, slots=True)
class DraftJob:
    """One request's share of a drafter forward: true rows to prefill, nodes to expand, or both."""

    session: DraftSession
    tree: DraftTree
    nodes: Sequence[Node] = ()  # not the root, whose children come from its true row
    prefills: bool = False

    def __post_init__(self) -> None:
        assert self.prefills or self.nodes, "a job of nothing"

    @property
    def num_rows(self) -> int:
        """Number of rows that it would compute now."""
        prefilled = self.session.num_rows(self.tree) if self.prefills else 0
        return prefilled + (self.session.num_rows(self.tree, self.nodes) if self.nodes else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """The beginning of a session: `draft_topk` children per node, by shared noise if coupled.

    `prefix` is the tokens known when it begins: the prompt, and what was generated before a stage
    was lost.

    `reuse`, a finished session of the same drafter, gives its work on the first `num_cached_tokens`
    positions (at most its `num_reusable`). The new prompt must have the same first
    `num_cached_tokens + 1` tokens, since a head's row at position i holds hidden state i beside
    token i + 1. Then only hidden states of positions from `num_cached_tokens` on are needed;
    `accept` brings every token in any case.
    """

    request: Request
    prefix: tuple[int, ...] = ()  # (): the prompt alone
    draft_topk: int
    coupled: bool
    reuse: DraftSession | None = None
    num_cached_tokens: int = 0

    @property
    def known_tokens(self) -> tuple[int, ...]:
        """The tokens that are known when the session begins."""
        return self.prefix or self.request.prompt_tokens


class Draft(Protocol):
    """A drafter forward that has begun. Until it is finished no other one may begin."""

    looked_up: bool  # `run` computes nothing and needs no thread

    def run(self) -> None:
        """Compute, perhaps in a thread of its own; it uses only the draft model's tensors."""

    def finish(self) -> list[Proposed]:
        """Return the proposals of each job: the root's, if it was reached, then its nodes'.

        Nodes that have died since are included. A job whose share of the forward failed gives the
        exception instead, and its session is not used again; the others are not affected.
        """


class Drafter(Protocol):
    """A loaded draft model or another method of drafting."""

    name: str
    aux_hidden_state_layers: tuple[int, ...]  # layers whose hidden states it needs from the target
    # A drafter may also have `pushes = True`; it is never asked, see NoDrafter.

    def open(self, opening: Opening) -> DraftSession:
        """Begin a session for one request."""

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Begin all jobs, in one forward if the method has one.

        A session has at most one job.
        """


def draft(drafter: Drafter, jobs: Sequence[DraftJob]) -> list[list[Proposal]]:
    """Run a whole forward and return the proposals of each job."""
    begun = drafter.begin(jobs)
    begun.run()
    found = (settled(one) for one in begun.finish())
    return [[one for one in own if isinstance(one, Proposal)] for own in found]


class Lookup:
    """A Draft without a forward: it looks up one job after the other when it begins."""

    looked_up = True

    def __init__(self, jobs: Sequence[DraftJob]) -> None:
        self._proposals = look_up(jobs)

    def run(self) -> None:
        """Do nothing; everything was looked up at the beginning."""

    def finish(self) -> list[Proposed]:
        """Return the proposals of each job."""
        return self._proposals


def look_up(jobs: Sequence[DraftJob]) -> list[Proposed]:
    """Return the proposals of each job, from its session alone."""
    return [attempt(partial(_look_up_one, job)) for job in jobs]


def _look_up_one(job: DraftJob) -> list[Proposal]:
    root = job.session.prefill(job.tree) if job.prefills else None
    below = job.session.expand(job.nodes, job.tree) if job.nodes else []
    return [*([] if root is None else [root]), *below]


class NoDrafter:
    """Drafts nothing when asked.

    It serves `ar`. Under another name it stands for a drafter that pushes: a core of its own, which
    learns the accepted tokens by DraftContext and sends a DraftSubtree whenever it has one.
    """

    def __init__(self, name: str = "none", *, pushes: bool = False) -> None:
        self.name, self.pushes = name, pushes

    aux_hidden_state_layers: tuple[int, ...] = ()

    def open(self, opening: Opening) -> "NoDraftSession":
        """Return a session that proposes nothing."""
        del opening
        return NoDraftSession()

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Return a Draft that gives no proposals."""
        return Lookup(jobs)


class NoDraftSession:
    """A session that proposes nothing."""

    num_rows_ready = 0
    num_reusable = 2**31  # there is nothing to compute again

    def accept(self, tokens: Sequence[int]) -> None:
        """Ignore the tokens: nothing depends on the text."""

    def accept_hidden_states(self, layer: int, hidden_states: Mapping[int, Tensor]) -> None:
        """Ignore the hidden states: none were asked for."""

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """Return 0: nothing is ever computed."""
        del tree, nodes
        return 0

    def prefill(self, tree: DraftTree) -> Proposal | None:
        """Fail: it is never called, since num_rows_ready stays 0."""
        raise AssertionError("nothing was ready to prefill")

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """Return no children."""
        return [Proposal(node.id, ()) for node in nodes]
