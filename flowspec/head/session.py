"""Session: what a strategy may see of one request: its tree, what is in flight, what it costs.

Strategies decide through it; only the head changes it.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from operator import itemgetter

from flowspec.config import DecodeConfig
from flowspec.head.calibration import Forecasts, Word
from flowspec.head.pipeline import Pipeline
from flowspec.protocol.messages import Candidates, Reroot, Segment
from flowspec.request import DecodeStats, NodeId, Request
from flowspec.speculation.acceptance.candidates import candidates_of
from flowspec.speculation.drafters.base import DraftSession, Proposal
from flowspec.speculation.drafters.merge import MergedSession
from flowspec.speculation.tree import DraftTree, Node

_LOGPROB = itemgetter(1)


@dataclass(slots=True)
class Session:
    """One request in the head. `seq_no`s count this request's segments."""

    request: Request
    config: DecodeConfig
    pipe: Pipeline
    drafter: DraftSession
    source: str = ""  # the drafter's name
    tree: DraftTree = field(default_factory=DraftTree)
    stats: DecodeStats = field(default_factory=DecodeStats)
    flights: set[int] = field(default_factory=set)  # seq_nos sent and not back
    tokens: list[int] = field(default_factory=list)  # generated so far
    verdict: Reroot | None = None  # the newest
    context: int = 0  # positions that exist: prompt and every token that may be generated
    num_segments: int = 0  # sent, the prompt's included
    num_prompt_sent: int = 0
    last_was_hit: bool = False  # the newest verdict's token was in the tree
    last_was_unsent: bool = False  # and not in flight
    root_proposal: Proposal | None = None  # the drafter's newest word on a root's children
    num_aux_hidden_state_layers: int = 0  # of which true features come
    positions: dict[NodeId, int] = field(default_factory=dict)  # of accepted nodes, see `locate`
    layers_come: dict[NodeId, int] = field(
        default_factory=dict
    )  # of nodes some layers of which have
    vocab_size: int = 0  # of the target, 0: not known
    forecasts: Forecasts | None = None  # corrects the drafter's scores
    over: bool = False  # answered: what was being drafted comes too late

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

    def commit(self, nodes: Iterable[tuple[NodeId, int]]) -> None:
        """Nodes (with their positions) are accepted: their features come, or have come before."""
        for node, position in nodes:
            if self.layers_come.get(node, 0) < self.num_aux_hidden_state_layers:
                self.positions[node] = position
            else:
                self.layers_come.pop(node, None)

    def locate(self, node: NodeId) -> int:
        """Absolute position of a node whose features of one more layer have come.

        It may be alive still, where they overtook its verdict. What has come in full is forgotten,
        so that a long text does not fill the memory.
        """
        alive = node in self.tree
        assert alive or node in self.positions, f"features of node {node}, which was never accepted"
        position = self.tree[node].position if alive else self.positions[node]
        self.layers_come[node] = self.layers_come.get(node, 0) + 1
        if not alive and self.layers_come[node] == self.num_aux_hidden_state_layers:
            del self.positions[node], self.layers_come[node]
        return position

    def begin(self, num_cached_tokens: int) -> None:
        """Number the prompt's nodes (token i is node i) and tell the drafter its tokens."""
        prompt = self.request.prompt
        ids = [(self.tree.new_id(), index) for index in range(len(prompt))]
        self.commit(ids[num_cached_tokens:])
        self.drafter.accept(prompt)

    def take_proposals(self, proposals: list[Proposal], *, expanded: Container[NodeId]) -> None:
        """The drafter's forward is done: a new word on the root, children of expanded nodes."""
        below = [proposal for proposal in proposals if proposal.node in expanded]
        for proposal in proposals:
            if proposal.node not in expanded:
                self.root_proposal = proposal
                if self.config.refresh or not self.tree.root.expanded:
                    below.insert(0, proposal)
        if below:
            self.grow(below, floor_count=self.config.tree_size)
            self.graft()

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

        `grafted`: not the drafter's word on the node, which it may still expand. Tokens outside
        the target's vocabulary are left out: it never chooses them, and has no embedding for them.
        """
        floor = float("-inf")
        if len(self.tree) > floor_count:
            floor = self.tree.ranked()[floor_count].score
        grown = []
        for proposal in proposals:
            if proposal.node not in self.tree:
                continue
            node = self.tree[proposal.node]
            node.expanded = node.expanded or not grafted
            if not grafted:
                node.drawn_from = proposal.drawn_from
            for child in node.children.values():
                self.tree[child].expandable = node.expanded
            if node.position + 1 < self.context - 1:  # what follows the last token is not asked for
                grown.append((node, within(proposal, self.vocab_size)))
        added: list[Node] = []
        for (node, _), children in zip(grown, self._calibrated(grown), strict=True):
            added += self.tree.extend(node, children, floor=floor, expandable=node.expanded)
        return added

    def graft(self) -> None:
        """Add the branches that the drafter has at hand, without a forward, for the tree now."""
        room = self.config.tree_size + 1 - len(self.tree)
        if not isinstance(self.drafter, MergedSession) or not self.decoding or room <= 0:
            return

        def grow(proposal: Proposal) -> list[Node]:
            return self.grow([proposal], floor_count=self.config.tree_size, grafted=True)

        self.drafter.graft(self.tree, grow, most=room, min_score=self.config.min_score)

    def learn(self, path: Sequence[Node], token: int) -> None:
        """The verdict: `path`, from the old root down, is true, and `token` comes after it."""
        if self.forecasts is not None:
            tokens = [*(node.token for node in path[1:]), token]
            self.forecasts.settle([node.id for node in path], tokens, self.tree.nodes)

    def _calibrated(
        self, grown: Sequence[tuple[Node, Proposal]]
    ) -> Iterable[Sequence[tuple[int, float]]]:
        """Each node's proposed children, with corrected scores where these are learnt."""
        if self.forecasts is None:
            return [proposal.children for _, proposal in grown]
        above = self.tree.root.position - 1
        scores = self.forecasts.enter(
            [
                Word(node.id, node.position - above, proposal.children, proposal.sources)
                for node, proposal in grown
            ]
        )
        found = []
        for (node, proposal), logprobs in zip(grown, scores, strict=True):
            tokens = [token for token, _ in proposal.children]
            children = list(zip(tokens, logprobs, strict=True))
            if self.forecasts.calibration.paths is not None:
                self.forecasts.log_paths(self.tree.path(node.id), children)
            children.sort(key=_LOGPROB, reverse=True)  # stable, also in reverse
            found.append(children)
        return found


def within(proposal: Proposal, vocab_size: int) -> Proposal:
    """The proposal without tokens that the vocabulary does not have (size 0: not known)."""
    tokens = [token for token, _ in proposal.children]
    if not vocab_size or not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return proposal
    keep = [place for place, token in enumerate(tokens) if 0 <= token < vocab_size]
    children = tuple(proposal.children[place] for place in keep)
    return Proposal(
        proposal.node, children, tuple(proposal.sources[p] for p in keep if proposal.sources)
    )


def tree_segment(session: Session, nodes: Sequence[Node], verify: bool) -> Segment:
    """Nodes of the tree as the request's next segment; they count as sent."""
    session.tree.send(nodes)
    return new_segment(
        session,
        nodes=tuple(node.id for node in nodes),
        parents=tuple(node.parent for node in nodes),
        tokens=tuple(node.token for node in nodes),
        prefix=False,
        verify=verify,
        candidates=candidates_of(session.request.sampling, nodes),
    )


def new_segment(
    session: Session,
    *,
    nodes: tuple[NodeId, ...],
    parents: tuple[NodeId, ...],
    tokens: tuple[int, ...],
    prefix: bool,
    verify: bool,
    candidates: tuple[Candidates, ...] = (),
) -> Segment:
    """The request's next segment, entered in its flights."""
    seq_no = session.num_segments
    session.num_segments += 1
    if not prefix:
        session.stats.num_segments += 1
        session.stats.num_rows_sent += len(nodes)
    session.flights.add(seq_no)
    return Segment(
        epoch=session.pipe.epoch,
        request=session.request.id,
        seq_no=seq_no,
        nodes=nodes,
        parents=parents,
        tokens=tokens,
        prefix=prefix,
        verify=verify,
        verdict=session.verdict,
        candidates=candidates,
    )
