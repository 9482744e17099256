"""Session: what a strategy may see of one request: its tree, what is in flight, what it costs.

Strategies decide through it; only the head changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from flowspec.config import DecodeConfig
from flowspec.drafters.base import DraftSession, Proposal
from flowspec.pipe import Pipe
from flowspec.request import DecodeStats, NodeId, Request
from flowspec.tree import DraftTree, Node
from flowspec.wire import Reroot, Segment


@dataclass(slots=True)
class Session:
    """One request in the head. `seq_no`s count this request's segments."""

    request: Request
    config: DecodeConfig
    pipe: Pipe
    drafter: DraftSession
    tree: DraftTree = field(default_factory=DraftTree)
    stats: DecodeStats = field(default_factory=DecodeStats)
    flights: set[int] = field(default_factory=set)  # seq_nos sent and not back
    tokens: list[int] = field(default_factory=list)  # generated so far
    verdict: Reroot | None = None  # the newest
    context: int = 0  # positions that exist: prompt and every token that may be generated
    num_segments: int = 0  # sent, the prompt's included
    num_prompt_sent: int = 0
    last_was_hit: bool = False  # the newest verdict's token was in the tree
    root_proposal: Proposal | None = None  # the drafter's newest word on a root's children
    positions: dict[NodeId, int] = field(default_factory=dict)  # of accepted nodes

    @property
    def decoding(self) -> bool:
        """Whether the prompt is through and the tree has a root."""
        return len(self.tree) > 0

    @property
    def num_stages(self) -> int:
        """Of the pipeline."""
        return self.pipe.num_stages

    @property
    def num_in_flight(self) -> int:
        """This request's segments sent and not back."""
        return len(self.flights)

    @property
    def drained(self) -> bool:
        """Nothing is in flight."""
        return not self.flights

    @property
    def round_over(self) -> bool:
        """The pipe is empty and the root is a token the target has not seen: draft anew."""
        return self.drained and not self.tree.root.sent

    @property
    def all_tokens(self) -> tuple[int, ...]:
        """Prompt and what was generated."""
        return (*self.request.prompt, *self.tokens)

    @property
    def num_committed(self) -> int:
        """Tokens whose rows every stage has committed once it knows the newest verdict."""
        return 0 if self.verdict is None else self.verdict.position

    def position_of(self, node: NodeId) -> int | None:
        """Absolute position of a living or lately accepted node."""
        if node in self.tree:
            return self.tree[node].position
        return self.positions.get(node)

    def begin(self, submitted_at: float, num_shared: int) -> None:
        """Number the prompt's nodes (token i is node i) and tell the drafter its tokens."""
        prompt = self.request.prompt
        for index in range(len(prompt)):
            self.positions[self.tree.new_id()] = index
        self.drafter.accept(prompt)
        self.stats.submitted_at = submitted_at
        self.stats.num_prompt_reused = num_shared

    def take_proposals(self, proposals: list[Proposal], *, expanded: bool) -> None:
        """The drafter's forward is done: children of expanded nodes, or a new word on the root."""
        if expanded:
            self.grow(proposals, floor_count=self.config.tree_size)
            return
        for proposal in proposals:
            self.root_proposal = proposal
            if self.config.refresh or not self.tree.root.expanded:
                self.grow([proposal], floor_count=self.config.tree_size)

    def drop_tree(self) -> None:
        """Forget all guesses but the root's children as last proposed: a new round begins."""
        self.tree.drop_descendants()
        proposal = self.root_proposal
        if proposal is not None and proposal.node == self.tree.root.id:
            self.grow([proposal], floor_count=self.config.tree_size)

    def grow(self, proposals: list[Proposal], *, floor_count: int) -> list[Node]:
        """Add proposed children that are among the `floor_count` best; returns those added."""
        scores = sorted((node.score for node in self.tree.nodes.values()), reverse=True)
        floor = scores[floor_count] if len(scores) > floor_count else float("-inf")
        added = []
        for proposal in proposals:
            if proposal.node not in self.tree:
                continue
            node = self.tree[proposal.node]
            node.expanded = True
            if node.position + 1 >= self.context - 1:
                continue  # what follows the last token is never asked for
            for token, logprob in proposal.children:
                if node.score + logprob < floor and token not in node.children:
                    break  # children come best first
                added.append(self.tree.add(node.id, token, logprob))
        return added


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
    session.flights.add(seq_no)
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
