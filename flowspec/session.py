"""Session: what a strategy may see of one request: its tree, what is in flight, what it costs.

Strategies decide through it; only the head changes it.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flowspec.calibration import Child, Forecasts
from flowspec.config import DecodeConfig
from flowspec.drafters.base import Drafter, DraftSession, Proposal
from flowspec.drafters.grafted import GraftedSession
from flowspec.request import DecodeStats, NodeId, Request
from flowspec.tree import DraftTree, Node
from flowspec.wire import Reroot, Segment


@dataclass(slots=True)
class Flight:
    """One segment on its way."""

    nodes: tuple[NodeId, ...]
    started_at: float | None = None  # when the first stage took it, as the head learnt


class SegmentCost:
    """t(n): what a segment of n rows costs the slowest stage, learnt from segments that came back.

    Exponential averages at powers of two; between them linear, and never falling with n. Sizes not
    seen yet cost what the largest smaller one does, so they get tried.
    """

    _SIZES = tuple(2**k for k in range(11))

    def __init__(self, decay: float = 0.1) -> None:
        self._decay = decay
        self._mean_ms: dict[int, float] = {}
        self._counts: dict[int, int] = {}

    def record(self, rows: int, elapsed_ms: float) -> None:
        """A stage took `elapsed_ms` for `rows` rows."""
        size = min((s for s in self._SIZES if s >= rows), default=self._SIZES[-1])
        before = self._mean_ms.get(size, elapsed_ms)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        # The first forward of a size may pay for allocations: early on every one counts alike.
        share = max(self._decay, 1 / count)
        self._mean_ms[size] = before + share * (min(elapsed_ms, 4 * before) - before)

    def milliseconds(self, rows: int) -> float:
        """Expected time of a segment of `rows` rows; 1.0 while nothing is known."""
        known = [(size, ms) for size, ms in sorted(self._mean_ms.items())]
        if not known:
            return 1.0
        below = max((ms for size, ms in known if size <= rows), default=known[0][1])
        size_below = max((size for size, _ in known if size <= rows), default=known[0][0])
        above = next(((size, ms) for size, ms in known if size > rows), None)
        if above is None or rows <= size_below:
            return below
        share = (rows - size_below) / (above[0] - size_below)
        return below + share * max(0.0, above[1] - below)


@dataclass(slots=True)
class Session:
    """One request in the head. `seq_no`s count this request's segments."""

    request: Request
    config: DecodeConfig
    num_stages: int
    draft_model: Drafter
    drafter: DraftSession
    cost: SegmentCost
    tree: DraftTree = field(default_factory=DraftTree)
    stats: DecodeStats = field(default_factory=DecodeStats)
    flights: dict[int, Flight] = field(default_factory=dict)
    tokens: list[int] = field(default_factory=list)  # generated so far
    verdict: Reroot | None = None  # the newest
    now: float = 0.0  # the driver's clock at the last event, seconds
    draft_s: float = 0.0  # what a drafter forward takes, a running mean
    context: int = 0  # positions that exist: prompt and every token that may be generated
    num_segments: int = 0  # sent, the prompt's included
    num_prompt_sent: int = 0
    last_was_hit: bool = False  # the newest verdict's token was in the tree
    root_proposal: Proposal | None = None  # the drafter's newest word on a root's children
    positions: dict[NodeId, int] = field(default_factory=dict)  # of accepted nodes
    forecasts: Forecasts | None = None  # corrects the drafter's scores

    @property
    def decoding(self) -> bool:
        """Whether the prompt is through and the tree has a root."""
        return len(self.tree) > 0

    @property
    def num_in_flight(self) -> int:
        """Segments sent and not back."""
        return len(self.flights)

    @property
    def num_waiting(self) -> int:
        """Segments sent that the first stage has not taken yet."""
        return sum(flight.started_at is None for flight in self.flights.values())

    @property
    def first_stage_busy_s(self) -> float:
        """How much longer the first stage is expected to compute, in seconds."""
        running = [f for f in self.flights.values() if f.started_at is not None]
        if not running:
            return 0.0
        newest = running[-1]
        assert newest.started_at is not None
        until = newest.started_at + self.cost.milliseconds(len(newest.nodes)) / 1e3
        return max(0.0, until - self.now)

    @property
    def drained(self) -> bool:
        """Nothing is in flight."""
        return not self.flights

    @property
    def round_over(self) -> bool:
        """The pipe is empty and the root is a token the target has not seen: draft anew."""
        return self.drained and not self.tree.root.sent

    def position_of(self, node: NodeId) -> int | None:
        """Absolute position of a living or lately accepted node."""
        if node in self.tree:
            return self.tree[node].position
        return self.positions.get(node)

    def count_draft(self, elapsed: float) -> None:
        """A drafter forward took `elapsed` seconds."""
        self.stats.num_draft_forwards += 1
        self.draft_s += (elapsed - self.draft_s) * (0.1 if self.draft_s else 1.0)

    def drop_tree(self) -> None:
        """Forget all guesses but the root's children as last proposed: a new round begins."""
        self.tree.drop_descendants()
        proposal = self.root_proposal
        if proposal is not None and proposal.node == self.tree.root.id:
            self.grow([proposal], floor_count=self.config.tree_size)

    def grow(
        self, proposals: list[Proposal], *, floor_count: int, grafted: bool = False
    ) -> list[Node]:
        """Add proposed children that are among the `floor_count` best; returns those added.

        `grafted`: not the drafter's word on the node, which it may still expand.
        """
        floor = float("-inf")
        if len(self.tree) > floor_count:
            floor = sorted((n.score for n in self.tree.nodes.values()), reverse=True)[floor_count]
        added = []
        for proposal in proposals:
            if proposal.node not in self.tree:
                continue
            node = self.tree[proposal.node]
            node.expanded = node.expanded or not grafted
            for child in node.children.values():
                self.tree[child].expandable = node.expanded
            if node.position + 1 >= self.context - 1:
                continue  # what follows the last token is never asked for
            for token, logprob in self._calibrated(node, proposal):
                if node.score + logprob < floor and token not in node.children:
                    continue
                added.append(self.tree.add(node.id, token, logprob))
                added[-1].expandable = node.expanded
        return added

    def graft(self) -> None:
        """Add the branches that the drafter has at hand, without a forward, for the tree now."""
        room = self.config.tree_size + 1 - len(self.tree)
        if not isinstance(self.drafter, GraftedSession) or not self.decoding or room <= 0:
            return

        def grow(proposal: Proposal) -> list[Node]:
            return self.grow([proposal], floor_count=self.config.tree_size, grafted=True)

        self.drafter.graft(self.tree, grow, most=room, min_score=self.config.min_score)

    def learn(self, path: Sequence[Node], token: int) -> None:
        """The verdict: `path`, from the old root down, is true, and `token` comes after it."""
        if self.forecasts is not None:
            tokens = [*(node.token for node in path[1:]), token]
            self.forecasts.settle([node.id for node in path], tokens, self.tree.nodes)

    def _calibrated(self, node: Node, proposal: Proposal) -> Iterable[tuple[int, float]]:
        """The proposed children of `node`, with corrected scores where these are learnt."""
        if self.forecasts is None:
            return proposal.children
        depth = node.position + 1 - self.tree.root.position
        sources = proposal.sources or (self.draft_model.name,) * len(proposal.children)
        children = [
            (token, self.forecasts.enter(node.id, token, Child(source, depth, rank, logprob)))
            for rank, ((token, logprob), source) in enumerate(
                zip(proposal.children, sources, strict=True)
            )
        ]
        if self.forecasts.calibration.paths is not None:
            self.forecasts.log_paths(self.tree.path(node.id), children)
        return sorted(children, key=lambda child: -child[1])


def tree_segment(session: Session, nodes: Sequence[Node], verify: bool) -> Segment:
    """Nodes of the tree as the request's next segment; they count as sent."""
    for node in nodes:
        node.sent = True
    return new_segment(
        session,
        nodes=tuple(node.id for node in nodes),
        parents=tuple(node.parent for node in nodes),
        tokens=tuple(node.token for node in nodes),
        prefix=False,
        verify=verify,
    )


def new_segment(
    session: Session,
    *,
    nodes: tuple[NodeId, ...],
    parents: tuple[NodeId, ...],
    tokens: tuple[int, ...],
    prefix: bool,
    verify: bool,
) -> Segment:
    """The request's next segment, entered in its flights."""
    seq_no = session.num_segments
    session.num_segments += 1
    if not prefix:
        session.stats.num_segments += 1
        session.stats.num_rows_sent += len(nodes)
    session.flights[seq_no] = Flight(nodes)
    return Segment(
        request=session.request.id,
        seq_no=seq_no,
        nodes=nodes,
        parents=parents,
        tokens=tokens,
        prefix=prefix,
        verify=verify,
        verdict=session.verdict,
    )
