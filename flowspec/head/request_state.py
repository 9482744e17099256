"""RequestState: the state of one request from its submission to its end.

It owns the request's tokens, text, statistics, draft tree and drafter session. Strategies read it;
only the head and its scheduler change it. The prefix cache may keep it once it is finished.
"""

from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from operator import itemgetter
from os.path import commonprefix

from flowspec.head.calibration import Calibration, Forecasts, NodeForecast
from flowspec.head.losses import Losses
from flowspec.head.pipeline import Pipeline
from flowspec.protocol.messages import AddRequest, Candidates, Reroot, Segment
from flowspec.request import (
    DecodeStats,
    Failure,
    FinishReason,
    NodeId,
    Request,
    RequestOutput,
)
from flowspec.speculation.acceptance.candidates import candidates_of
from flowspec.speculation.drafters.base import (
    Drafter,
    DraftSession,
    NoDraftSession,
    Opening,
    Proposal,
    Subtree,
)
from flowspec.speculation.drafters.merge import MergedSession
from flowspec.speculation.strategy import (
    DraftingConfig,
    ResolvedDecoding,
    Strategy,
    StrategyConfig,
)
from flowspec.speculation.tree import DraftTree, Node
from flowspec.tokenizer import TextStream

MIN_TREE_TOKENS = 256
# A request is cleared of earlier losses of stages after so many verdicts, or so much service.
CLEARED_AFTER = 2
FORGOTTEN_AFTER_S = 60.0
_LOGPROB = itemgetter(1)


class RequestStatus(Enum):
    """The stages in the life of a request."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"  # its stages were lost; it waits to go on from its tokens
    FINISHED = "finished"


def max_tree_tokens(config: StrategyConfig) -> int:
    """Return the most tree tokens of one request that a stage's cache must hold at once."""
    size = config.num_draft_tokens if isinstance(config, DraftingConfig) else 0
    return max(MIN_TREE_TOKENS, size + 1)


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """One request in the head. Times are in seconds of the event loop's clock."""

    request: Request
    decoding: ResolvedDecoding
    text: TextStream
    pipe: Pipeline
    max_new_tokens: int  # at most what the context has room for
    vocab_size: int = 0  # of the target; 0: not known
    stats: DecodeStats = field(default_factory=DecodeStats)
    status: RequestStatus = RequestStatus.WAITING
    tokens: list[int] = field(default_factory=list)  # generated so far
    losses: Losses = field(default_factory=Losses)  # of stages, while it ran
    lost_at: float | None = None  # when its stages were lost, until its next token

    # Fields of the present run; they begin anew after a preemption.
    strategy: "Strategy[RequestState] | None" = None
    drafter: DraftSession = field(default_factory=NoDraftSession)
    forecasts: Forecasts | None = None  # corrects the drafter's scores
    prefix: tuple[int, ...] = ()  # tokens known when the run began
    tree: DraftTree = field(default_factory=DraftTree)
    verdict: Reroot | None = None  # the newest one
    flights: set[int] = field(default_factory=set)  # sequence numbers in flight
    num_segments: int = 0  # sent, those of the prefix included
    num_prefix_sent: int = 0
    num_verdicts: int = 0
    first_verdict_at: float = 0.0
    last_was_hit: bool = False  # the newest verdict's token was in the tree
    last_was_unsent: bool = False  # and was not in flight
    root_proposal: Proposal | Subtree | None = None  # the newest proposal for the root's children
    num_aux_hidden_state_layers: int = 0  # number of layers whose hidden states the drafter needs
    positions: dict[NodeId, int] = field(default_factory=dict)  # of accepted nodes, see `locate`
    num_layers_come: dict[NodeId, int] = field(default_factory=dict)  # while some are missing

    @property
    def id(self) -> int:
        """The request's number."""
        return self.request.id

    @property
    def context(self) -> int:
        """Number of positions: the prompt and every token that may be generated."""
        return len(self.request.prompt_tokens) + self.max_new_tokens

    @property
    def num_kv_tokens(self) -> int:
        """Capacity of its cache on every stage: the context and the tree."""
        return self.context + max_tree_tokens(self.decoding.config)

    @property
    def num_tree_tokens_free(self) -> int:
        """Number of tree tokens that the stages' caches can still hold."""
        return max_tree_tokens(self.decoding.config) - self.tree.num_sent

    @property
    def is_running(self) -> bool:
        """Whether it is on the stages."""
        return self.status is RequestStatus.RUNNING

    @property
    def is_decoding(self) -> bool:
        """Whether the prefix is through and the tree has a root."""
        return len(self.tree) > 0

    @property
    def num_stages(self) -> int:
        """Number of stages of the pipeline."""
        return self.pipe.num_stages

    @property
    def num_in_flight(self) -> int:
        """Number of this request's segments in flight."""
        return len(self.flights)

    @property
    def drained(self) -> bool:
        """Whether nothing is in flight."""
        return not self.flights

    @property
    def round_over(self) -> bool:
        """Whether the pipe is empty and the target has not seen the root: draft anew."""
        return self.drained and not self.tree.root.sent

    @property
    def draft_left_s(self) -> float:
        """Expected rest of the running drafter forward, or the time of a new one."""
        return self.pipe.draft_left_s(self.decoding.drafter)

    @property
    def all_tokens(self) -> tuple[int, ...]:
        """Prompt and generated tokens."""
        return (*self.request.prompt_tokens, *self.tokens)

    @property
    def num_committed(self) -> int:
        """Number of tokens whose rows every stage commits once it knows the newest verdict."""
        return 0 if self.verdict is None else self.verdict.position

    def num_reusable(self, prompt: Sequence[int]) -> int:
        """Return how many leading positions of another request's `prompt` can be reused.

        It is one less than the tokens in common, as an Opening needs it, and at most what the
        stages have committed and the drafter has complete.
        """
        in_common = len(commonprefix([tuple(prompt), self.all_tokens]))
        return max(0, min(in_common - 1, self.num_committed, self.drafter.num_reusable))

    # Its life ------------------------------------------------------------------------------------

    def run(
        self,
        strategy: "Strategy[RequestState]",
        drafter: Drafter,
        calibration: Calibration | None,
        *,
        reuse: "RequestState | None" = None,
        num_cached_tokens: int = 0,
    ) -> AddRequest:
        """Begin to run, or begin again; the first `num_cached_tokens` are those of `reuse`.

        Returns the message that makes room for it on the stages. Sampling noise is keyed by
        absolute position, so the text does not depend on where a run begins.
        """
        if self.status is RequestStatus.PREEMPTED:
            self.stats.num_resumes += 1
        else:
            self.stats.num_prompt_reused = num_cached_tokens
        self._clear_run()
        self.prefix = self.all_tokens
        self.strategy = strategy
        self.drafter = drafter.open(self._opening(reuse, num_cached_tokens))
        self.num_aux_hidden_state_layers = len(drafter.aux_hidden_state_layers)
        self.num_prefix_sent = num_cached_tokens
        if calibration is not None:
            sampled = self.request.sampling.temperature > 0.0
            self.forecasts = Forecasts(calibration, drafter.name, sampled=sampled)
        ids = [(self.tree.new_id(), index) for index in range(len(self.prefix))]
        self.commit(ids[num_cached_tokens:])
        self.drafter.accept(self.prefix)
        self.status = RequestStatus.RUNNING
        return AddRequest(
            epoch=self.pipe.epoch,
            request=self.id,
            capacity=self.num_kv_tokens,
            context=self.context,
            sampling=self.request.sampling,
            aux_hidden_state_layers=drafter.aux_hidden_state_layers,
            reuse=reuse.id if reuse is not None else 0,
            num_cached_tokens=num_cached_tokens,
            num_prompt_tokens=len(self.request.prompt_tokens),
        )

    def _opening(self, reuse: "RequestState | None", num_cached_tokens: int) -> Opening:
        config = self.decoding.config
        return Opening(
            request=self.request,
            prefix=self.prefix,
            draft_topk=config.draft_topk if isinstance(config, DraftingConfig) else 1,
            coupled=isinstance(config, DraftingConfig) and config.coupled_drafting,
            reuse=reuse.drafter if reuse is not None else None,
            num_cached_tokens=num_cached_tokens,
        )

    def _clear_run(self) -> None:
        self.strategy, self.drafter, self.forecasts = None, NoDraftSession(), None
        self.tree, self.verdict, self.root_proposal = DraftTree(), None, None
        self.flights, self.positions, self.num_layers_come = set(), {}, {}
        self.num_segments = self.num_prefix_sent = self.num_verdicts = 0
        self.first_verdict_at = 0.0
        self.last_was_hit = self.last_was_unsent = False

    def preempt(self, now: float) -> None:
        """Leave the lost stages; tokens, text and statistics stay."""
        self.status = RequestStatus.PREEMPTED
        self.lost_at = now if self.lost_at is None else self.lost_at
        self._clear_run()

    def finish(
        self, reason: FinishReason, now: float, error: Failure | None = None
    ) -> RequestOutput:
        """Finish the request and return its output."""
        self.end_outage(now)
        self.status = RequestStatus.FINISHED
        self.stats.finished_at = now
        return RequestOutput(
            request=self.id,
            tokens=tuple(self.tokens),
            text=self.text.text,
            reason=reason,
            stats=self.stats,
            error=error,
            num_prompt_tokens=len(self.request.prompt_tokens),
        )

    def count_verdict(self, now: float) -> None:
        """Count a verdict: with the second one the stages have also computed rows of its tree."""
        self.num_verdicts += 1
        if self.num_verdicts == 1:
            self.first_verdict_at = now
        if self.num_verdicts == CLEARED_AFTER:
            self.losses.clear()
        if now - self.first_verdict_at >= FORGOTTEN_AFTER_S:
            self.losses.forget()

    def count_loss(self, *, alone: bool) -> None:
        """Count a lost stage that the request may have caused."""
        self.losses.add(alone=alone, early=self.num_verdicts < CLEARED_AFTER)

    def end_outage(self, now: float) -> None:
        """End an outage: a token has come, or the request is over.

        An outage before the first token is part of the time to it and is counted nowhere else.
        """
        if self.lost_at is not None and self.stats.num_tokens:
            self.stats.resume_s += now - self.lost_at
        self.lost_at = None

    # Hidden states -------------------------------------------------------------------------------

    def commit(self, nodes: Iterable[tuple[NodeId, int]]) -> None:
        """Mark nodes (with their positions) as accepted; their hidden states may have come."""
        for node, position in nodes:
            if self.num_layers_come.get(node, 0) < self.num_aux_hidden_state_layers:
                self.positions[node] = position
            else:
                self.num_layers_come.pop(node, None)

    def locate(self, node: NodeId) -> int:
        """Return the absolute position of a node whose hidden states of one more layer have come.

        The node may still be alive if they overtook its verdict. Complete entries are forgotten, so
        that a long text does not fill the memory.
        """
        alive = node in self.tree
        assert alive or node in self.positions, (
            f"hidden states of node {node}, which was never accepted"
        )
        position = self.tree[node].position if alive else self.positions[node]
        self.num_layers_come[node] = self.num_layers_come.get(node, 0) + 1
        if not alive and self.num_layers_come[node] == self.num_aux_hidden_state_layers:
            del self.positions[node], self.num_layers_come[node]
        return position

    # The draft tree ------------------------------------------------------------------------------

    def take_proposals(
        self, proposals: Sequence[Proposal | Subtree], *, expanded: Container[NodeId]
    ) -> None:
        """Add the results of a drafter forward: children of expanded nodes, perhaps the root's."""
        config = self.decoding.drafting
        below = [proposal for proposal in proposals if proposal.node in expanded]
        for proposal in proposals:
            if proposal.node not in expanded:
                self.root_proposal = proposal
                if config.refresh or not self.tree.root.expanded:
                    below.insert(0, proposal)
        if below:
            self._grow_all(below, floor_count=config.num_draft_tokens)
            self.merge_branches()

    def _grow_all(self, proposals: Sequence[Proposal | Subtree], *, floor_count: int) -> None:
        self.grow([p for p in proposals if isinstance(p, Proposal)], floor_count=floor_count)
        for proposal in proposals:
            if isinstance(proposal, Subtree):
                self.grow_subtree(proposal, floor_count=floor_count)

    def grow_subtree(self, subtree: Subtree, *, floor_count: int) -> None:
        """Add several levels below a node, as far as their scores are among the best."""
        nodes = {-1: subtree.node}
        for parent, children in subtree.levels():
            node = nodes.get(parent)
            if node is None or node not in self.tree:
                continue  # it was not among the best
            named = tuple((token, logprob) for _, token, logprob in children)
            self.grow([Proposal(node, named)], floor_count=floor_count)
            known = self.tree[node].children
            nodes.update({place: known[token] for place, token, _ in children if token in known})

    def take_subtree(self, position: int, path: Sequence[int], subtree: Subtree) -> None:
        """Add guesses that a drafter has pushed, below the text up to `position` and then `path`.

        The drafter does not know `subtree.node`, which is found here. The text has gone on since;
        guesses below a path that has turned out wrong are dropped.
        """
        if not self.is_decoding or position > self.tree.root.position:
            return  # the prompt has no verdict yet, or the drafter is ahead of the head
        known = self.all_tokens[position + 1 : self.tree.root.position + 1]
        if tuple(path[: len(known)]) != known[: len(path)] or len(path) < len(known):
            return
        node = self.tree.root
        for token in path[len(known) :]:
            child = self.tree.child(node.id, token)
            if child is None:
                return
            node = child
        found = Subtree(node.id, subtree.entries)
        self.grow_subtree(found, floor_count=self.decoding.drafting.num_draft_tokens)

    def drop_tree(self) -> None:
        """Forget all guesses but the root's children as last proposed, for a new round."""
        self.tree.drop_descendants()
        proposal = self.root_proposal
        if proposal is not None and proposal.node == self.tree.root.id:
            self._grow_all([proposal], floor_count=self.decoding.drafting.num_draft_tokens)

    def grow(
        self, proposals: list[Proposal], *, floor_count: int, merged: bool = False
    ) -> list[Node]:
        """Add proposed children that are among the `floor_count` best; return those added.

        `merged` children are not the drafter's, which may still expand the node. Tokens outside the
        target's vocabulary are left out: the target never chooses them and has no embedding for
        them.
        """
        floor = float("-inf")
        if len(self.tree) > floor_count:
            floor = self.tree.ranked()[floor_count].score
        grown = []
        for proposal in proposals:
            if proposal.node not in self.tree:
                continue
            node = self.tree[proposal.node]
            node.expanded = node.expanded or not merged
            if not merged:
                node.drawn_from = proposal.drawn_from
            for child in node.children.values():
                self.tree[child].expandable = node.expanded
            if node.position + 1 < self.context - 1:  # nothing follows the last token
                grown.append((node, within(proposal, self.vocab_size)))
        added: list[Node] = []
        for (node, _), children in zip(grown, self._calibrated(grown), strict=True):
            added += self.tree.extend(node, children, floor=floor, expandable=node.expanded)
        return added

    def merge_branches(self) -> None:
        """Add n-gram branches, which need no drafter forward, to the tree as it is now."""
        if not isinstance(self.drafter, MergedSession) or not self.is_decoding:
            return
        config = self.decoding.drafting
        room = config.num_draft_tokens + 1 - len(self.tree)

        def grow(proposal: Proposal) -> list[Node]:
            return self.grow([proposal], floor_count=config.num_draft_tokens, merged=True)

        if room > 0:
            self.drafter.merge_branches(self.tree, grow, most=room, min_score=config.min_score)

    def learn(self, path: Sequence[Node], token: int) -> None:
        """Calibrate by a verdict: `path`, from the old root down, is true; `token` follows."""
        if self.forecasts is not None:
            tokens = [*(node.token for node in path[1:]), token]
            self.forecasts.settle([node.id for node in path], tokens, self.tree.nodes)

    def _calibrated(
        self, grown: Sequence[tuple[Node, Proposal]]
    ) -> Iterable[Sequence[tuple[int, float]]]:
        """Return each node's proposed children, with calibrated scores if calibration is on."""
        if self.forecasts is None:
            return [proposal.children for _, proposal in grown]
        above = self.tree.root.position - 1
        scores = self.forecasts.enter(
            [
                NodeForecast(node.id, node.position - above, proposal.children, proposal.sources)
                for node, proposal in grown
            ]
        )
        found = []
        for (node, proposal), logprobs in zip(grown, scores, strict=True):
            tokens = [token for token, _ in proposal.children]
            children = list(zip(tokens, logprobs, strict=True))
            if self.forecasts.calibration.paths is not None:
                self.forecasts.log_paths(self.tree.path(node.id), children)
            children.sort(key=_LOGPROB, reverse=True)  # The sort is stable, also in reverse.
            found.append(children)
        return found

    # Segments ------------------------------------------------------------------------------------

    def tree_segment(self, nodes: Sequence[Node], *, verify: bool) -> Segment:
        """Return nodes of the tree as the next segment, and count them as sent."""
        self.tree.send(nodes)
        return self._segment(
            tuple(node.id for node in nodes),
            tuple(node.parent for node in nodes),
            tuple(node.token for node in nodes),
            prefix=False,
            verify=verify,
            candidates=candidates_of(self.request.sampling, nodes),
        )

    def prefix_segment(self, most: int) -> Segment | None:
        """Return up to `most` tokens of the prefix as the next segment; None if all of it is sent.

        Stages work on different pieces at the same time.
        """
        start = self.num_prefix_sent
        end = min(start + most, len(self.prefix))
        if start == end:
            return None
        self.num_prefix_sent = end
        return self._segment(
            tuple(NodeId(i) for i in range(start, end)),
            tuple(NodeId(i - 1) for i in range(start, end)),
            self.prefix[start:end],
            prefix=True,
            verify=end == len(self.prefix),
        )

    def _segment(
        self,
        nodes: tuple[NodeId, ...],
        parents: tuple[NodeId, ...],
        tokens: tuple[int, ...],
        *,
        prefix: bool,
        verify: bool,
        candidates: tuple[Candidates, ...] = (),
    ) -> Segment:
        seq_no = self.num_segments
        self.num_segments += 1
        if not prefix:
            self.stats.num_segments += 1
            self.stats.num_rows_sent += len(nodes)
        self.flights.add(seq_no)
        return Segment(
            epoch=self.pipe.epoch,
            request=self.id,
            seq_no=seq_no,
            nodes=nodes,
            parents=parents,
            tokens=tokens,
            prefix=prefix,
            verify=verify,
            verdict=self.verdict,
            candidates=candidates,
        )


def within(proposal: Proposal, vocab_size: int) -> Proposal:
    """Return the proposal without tokens outside the vocabulary (size 0: not known)."""
    tokens = [token for token, _ in proposal.children]
    if not vocab_size or not tokens or (min(tokens) >= 0 and max(tokens) < vocab_size):
        return proposal
    keep = [place for place, token in enumerate(tokens) if 0 <= token < vocab_size]
    children = tuple(proposal.children[place] for place in keep)
    return Proposal(
        proposal.node, children, tuple(proposal.sources[p] for p in keep if proposal.sources)
    )
