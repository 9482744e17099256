"""What a drafter is to the head: it proposes children of tree nodes, one forward at a time."""

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
    sources: tuple[str, ...] = ()  # who says so, child by child; empty: the drafter itself
    # what the children were drawn from, as (token, probability); empty: they were not drawn
    drawn_from: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Subtree:
    """Several levels proposed at once below one node, parents before children.

    Entry i is (parent, token, log-probability): `parent` is the index of an earlier entry, or -1
    for the node itself; the log-probability is that of the token, given that its parent is true.
    """

    node: NodeId
    entries: tuple[tuple[int, int, float], ...]

    def __post_init__(self) -> None:
        for place, (parent, _, _) in enumerate(self.entries):
            assert -1 <= parent < place, f"entry {place} comes before its parent {parent}"

    def levels(self) -> Iterator[tuple[int, list[tuple[int, int, float]]]]:
        """(parent, its children as (index, token, log-probability)), parents first."""
        below: dict[int, list[tuple[int, int, float]]] = {}
        for place, (parent, token, logprob) in enumerate(self.entries):
            below.setdefault(parent, []).append((place, token, logprob))
        yield from below.items()


# What one drafter forward gives for one job, or the exception that ended it.
Proposed: TypeAlias = Sequence[Proposal | Subtree] | Exception


class DraftSession(Protocol):
    """The drafter's side of one request. Methods that compute are `absorb` and `expand`.

    While a forward begun for it has not finished, the text may grow and features may come.

    A model's `num_reusable` is below the number of its tokens: the last row needs features (or a
    successor) that only the next request brings.
    """

    @property
    def num_rows_ready(self) -> int:
        """True tokens waiting to be absorbed (0: nothing to do)."""

    @property
    def num_reusable(self) -> int:
        """Leading positions whose work is complete, see Opening."""

    def accept(self, tokens: Sequence[int]) -> None:
        """Tokens now known to be true, behind those known before (first the prompt)."""

    def accept_features(self, layer: int, features: Mapping[int, Tensor]) -> None:
        """True features [H] by absolute position, each position once, any order."""

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """Rows to compute now to expand `nodes`, or (None) to absorb."""

    def absorb(self, tree: DraftTree) -> Proposal | None:
        """One forward over true tokens; the root's children if it got as far as the root."""

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """One forward over alive nodes whose parents are expanded."""


@dataclass(frozen=True, slots=True)
class DraftJob:
    """One request's share of a drafter forward: true rows to absorb, nodes to expand, or both."""

    session: DraftSession
    tree: DraftTree
    nodes: Sequence[Node] = ()  # not the root: its children come of absorbing its row
    absorbs: bool = False

    def __post_init__(self) -> None:
        assert self.absorbs or self.nodes, "a job of nothing"

    @property
    def num_rows(self) -> int:
        """That it would compute now."""
        absorbed = self.session.num_rows(self.tree) if self.absorbs else 0
        return absorbed + (self.session.num_rows(self.tree, self.nodes) if self.nodes else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opening:
    """What a session begins with: `draft_topk` children per node, by the shared noise if coupled.

    `prefix` is the tokens known when it begins: the prompt, and what was generated before a stage
    was lost.

    `reuse`, a session of the same drafter that is over, gives its work on the first
    `num_cached_tokens` positions (at most its `num_reusable`). The new prompt must have the same
    first `num_cached_tokens + 1` tokens: a head's row at position i holds feature i beside token i
    + 1. Then features of positions from `num_cached_tokens` on are all that is still needed;
    `accept` brings every token anyway.
    """

    request: Request
    prefix: tuple[int, ...] = ()  # (): the prompt alone
    draft_topk: int
    coupled: bool
    reuse: DraftSession | None = None
    num_cached_tokens: int = 0

    @property
    def known_tokens(self) -> tuple[int, ...]:
        """What is known when the session begins."""
        return self.prefix or self.request.prompt_tokens


class Draft(Protocol):
    """A drafter forward that has begun. Between `begin` and `finish` no other may."""

    looked_up: bool  # `run` has nothing to compute: not worth a thread of its own

    def run(self) -> None:
        """Compute. In a thread of its own, perhaps: it touches the draft model's tensors alone."""

    def finish(self) -> list[Proposed]:
        """The proposals of each job: the root's, if it has absorbed that, then its nodes'.

        Also for nodes that have died since. A job whose share of the forward failed gives the
        exception instead, and its session is of no more use; the others are not touched by it.
        """


class Drafter(Protocol):
    """A loaded draft model (or method)."""

    name: str
    aux_hidden_state_layers: tuple[int, ...]  # which of the target's hidden states it needs
    # A drafter may also have `pushes = True`: it is never asked, see NoDrafter.

    def open(self, opening: Opening) -> DraftSession:
        """Begin with a request."""

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Begin with all jobs, in one forward where the method has one.

        At most one job per session.
        """


def draft(drafter: Drafter, jobs: Sequence[DraftJob]) -> list[list[Proposal]]:
    """The proposals of each job, from begin to finish."""
    begun = drafter.begin(jobs)
    begun.run()
    found = (settled(one) for one in begun.finish())
    return [[one for one in own if isinstance(one, Proposal)] for own in found]


class Lookup:
    """A Draft that is done as soon as it has begun, one job after the other: nothing to compute."""

    looked_up = True

    def __init__(self, jobs: Sequence[DraftJob]) -> None:
        self._proposals = look_up(jobs)

    def run(self) -> None:
        """Nothing."""

    def finish(self) -> list[Proposed]:
        """See Draft."""
        return self._proposals


def look_up(jobs: Sequence[DraftJob]) -> list[Proposed]:
    """The proposals of one job after the other, each by its session alone."""
    return [attempt(partial(_look_up_one, job)) for job in jobs]


def _look_up_one(job: DraftJob) -> list[Proposal]:
    root = job.session.absorb(job.tree) if job.absorbs else None
    below = job.session.expand(job.nodes, job.tree) if job.nodes else []
    return [*([] if root is None else [root]), *below]


class NoDrafter:
    """Drafts nothing when asked.

    It serves `ar`; under another name it stands for a drafter that pushes: a core of its own, which
    hears of the accepted tokens by DraftContext and sends DraftSubtree whenever it has one.
    """

    def __init__(self, name: str = "none", *, pushes: bool = False) -> None:
        self.name, self.pushes = name, pushes

    aux_hidden_state_layers: tuple[int, ...] = ()

    def open(self, opening: Opening) -> "NoDraftSession":
        """A session that never has anything to say."""
        del opening
        return NoDraftSession()

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """See Drafter.begin."""
        return Lookup(jobs)


class NoDraftSession:
    """See NoDrafter."""

    num_rows_ready = 0
    num_reusable = 2**31  # there is nothing to do again

    def accept(self, tokens: Sequence[int]) -> None:
        """Nothing depends on the text."""

    def accept_features(self, layer: int, features: Mapping[int, Tensor]) -> None:
        """No features were asked for."""

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """Nothing is ever computed."""
        del tree, nodes
        return 0

    def absorb(self, tree: DraftTree) -> Proposal | None:
        """Never called: num_rows_ready stays 0."""
        raise AssertionError("nothing was ready to absorb")

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """No children."""
        return [Proposal(node.id, ()) for node in nodes]
