"""Head (rank 0): prompts in, segments out, verdicts in, tokens out.

A sans-IO core (see effects.py). One match over messages; between them one decision at a time: send
a piece of prompt, send what the strategy wants sent, or run one drafter forward. Prefill, stop
rules and statistics live here, once, for every strategy.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from flowspec.calibration import Calibration, Forecasts
from flowspec.config import DecodeConfig
from flowspec.drafters.base import Drafter, DraftJob, NoDrafter, Proposal
from flowspec.drafters.grafted import GraftedDrafter
from flowspec.effects import CLIENT, Send, Step, Work
from flowspec.request import (
    Completion,
    DecodeStats,
    FinishReason,
    NodeId,
    Request,
    rank_name,
)
from flowspec.session import SegmentCost, Session, new_segment, tree_segment
from flowspec.strategies import StrategySpec
from flowspec.strategies.base import Strategy
from flowspec.text import TextStream
from flowspec.tree import Node
from flowspec.wire import (
    Cancel,
    Close,
    Exit,
    Failed,
    Features,
    Finished,
    Message,
    Open,
    Reroot,
    Segment,
    Started,
    Status,
    Submit,
    Tokens,
)

FIRST_STAGE = 1
MAX_QUEUED = 64  # requests waiting for their turn
MIN_ROWS_ALIVE = 256


@dataclass(slots=True)
class _Active:
    """The request being served."""

    session: Session
    strategy: Strategy
    text: TextStream


class Head:
    """Serves requests one after the other; further ones wait in a bounded queue."""

    rank = 0

    def __init__(
        self,
        num_stages: int,
        spec: StrategySpec,
        config: DecodeConfig,
        drafter: Drafter,
        *,
        max_context: int,
        new_text: Callable[[Request], TextStream] = lambda request: TextStream(None),
    ) -> None:
        self.num_stages = num_stages
        self.spec = spec
        self.config = config
        self.drafter = drafter
        self.max_context = max_context
        self.new_text = new_text
        self.cost = SegmentCost()
        self.calibration = Calibration()
        self.active: _Active | None = None
        self.waiting: deque[tuple[Request, float]] = deque()  # with the time of its coming
        self.newest_id = 0
        self.last: Session | None = None  # the session that finished last, for its statistics
        self.statuses: dict[int, Status] = {}
        self.heard_at: dict[int, float] = {}  # when each stage's status came

    @property
    def session(self) -> Session | None:
        """Of the request being served."""
        return self.active.session if self.active else None

    def configure(self, spec: StrategySpec, config: DecodeConfig) -> None:
        """Use another strategy for the requests to come."""
        assert self.active is None, "a request is being served"
        self.spec, self.config = spec, config
        self.cost, self.calibration = SegmentCost(), Calibration()

    def completion(
        self, request: Request, end: Finished, tokens: Sequence[int], text: str
    ) -> Completion:
        """The answer to a request that has just ended, for the client's side of the head."""
        served = self.last is not None and self.last.request.id == request.id
        return Completion(
            request=request.id,
            tokens=tuple(tokens),
            text=text,
            reason=end.reason,
            stats=self.last.stats if served and self.last else DecodeStats(),
            error=end.error,
        )

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Take one message in."""
        match message:
            case Submit():
                return self._submit(message.request, now)
            case Cancel():
                return self._cancel(message.request, now)
            case Status():
                self.statuses[message.stage] = message
                self.heard_at[message.stage] = now
            case Failed():
                return self._failed(message, now)
            case _:
                return self._handle_active(message, now)
        return ()

    def _handle_active(self, message: Message, now: float) -> Sequence[Send]:
        """Messages about the request being served; those about others come too late."""
        active = self.active
        if active is None or getattr(message, "request", None) != active.session.request.id:
            return ()
        match message:
            case Started():
                if message.seq_no in active.session.flights:
                    active.session.flights[message.seq_no].started_at = now
            case Exit():
                active.session.flights.pop(message.seq_no, None)
                if message.rows:
                    self.cost.record(message.slowest_rows, message.slowest_ms)
            case Features():
                self._features(active.session, message)
            case Reroot():
                return self._reroot(active, message, now)
        return ()

    def poll(self, now: float) -> Step | None:
        """The next decision: a segment first, so that the pipe never waits for the drafter."""
        if self.active is None:
            if not self.waiting:
                return None
            return Step(sends=self._open(*self.waiting.popleft()))
        session, strategy = self.active.session, self.active.strategy
        session.now = now
        segment = self._next_piece(session, strategy)
        if segment is None and session.drafter.num_rows_ready:
            return Step(work=self._draft(session, None))
        if segment is None and session.decoding:
            if nodes := strategy.next_draft(session):
                return Step(work=self._draft(session, nodes))
            # "nothing more to draft" may be what a strategy was waiting for
            segment = self._next_piece(session, strategy)
        return None if segment is None else Step(sends=[Send(FIRST_STAGE, segment)])

    def _submit(self, request: Request, now: float) -> Sequence[Send]:
        if not self.newest_id < request.id < 2**63:
            return self._refuse(
                request.id, f"request id {request.id} must be above the last, {self.newest_id}"
            )
        self.newest_id = request.id
        room = self.max_context - len(request.prompt)
        if room < 1:
            return self._refuse(
                request.id,
                f"the prompt has {len(request.prompt)} tokens, the model's context holds "
                f"{self.max_context}; shorten the prompt",
            )
        if len(self.waiting) >= MAX_QUEUED:
            return self._refuse(request.id, f"{MAX_QUEUED} requests are waiting already")
        # what does not fit the context is never asked for, and no memory is taken for it
        request = replace(request, max_new_tokens=min(request.max_new_tokens, room))
        self.waiting.append((request, now))
        return ()

    def _refuse(self, request: int, error: str) -> Sequence[Send]:
        return [Send(CLIENT, Finished(request=request, reason=FinishReason.ERROR, error=error))]

    def _open(self, request: Request, submitted_at: float) -> Sequence[Send]:
        spec, config = self.spec, self.config
        drafter: Drafter = self.drafter if spec.drafts else NoDrafter()
        if config.graft and spec.drafts:
            drafter = GraftedDrafter(drafter)
        session = Session(
            request=request,
            config=config,
            num_stages=self.num_stages,
            draft_model=drafter,
            drafter=drafter.open(request, topk=config.topk, coupled=config.coupled_drafting),
            cost=self.cost,
        )
        if config.calibrate:
            sampled = request.sampling.temperature > 0.0
            session.forecasts = Forecasts(self.calibration, sampled=sampled)
        for _ in request.prompt:
            session.tree.new_id()  # prompt token i is node i
        session.drafter.accept(request.prompt)
        session.stats.submitted_at = submitted_at
        self.active = _Active(session, spec.make(), self.new_text(request))
        session.context = len(request.prompt) + request.max_new_tokens
        opened = Open(
            request=request.id,
            capacity=session.context + max_rows_alive(config),
            context=session.context,
            sampling=request.sampling,
            feature_layers=drafter.feature_layers,
        )
        return [Send(FIRST_STAGE, opened)]

    def _next_piece(self, session: Session, strategy: Strategy) -> Segment | None:
        if session.decoding:
            return self._next_tree_piece(session, strategy)
        return self._next_prompt_piece(session)

    def _next_prompt_piece(self, session: Session) -> Segment | None:
        """The next chunk of the prompt; stages work on different chunks at the same time."""
        prompt, start = session.request.prompt, session.num_prompt_sent
        if start == len(prompt) or session.num_in_flight > 2 * session.num_stages:
            return None
        end = min(start + session.config.prefill_chunk, len(prompt))
        session.num_prompt_sent = end
        nodes = tuple(NodeId(i) for i in range(start, end))
        session.positions.update((node, int(node)) for node in nodes)
        return new_segment(
            session,
            nodes=nodes,
            parents=tuple(NodeId(i - 1) for i in range(start, end)),
            tokens=prompt[start:end],
            prefix=True,
            verify=end == len(prompt),
        )

    def _next_tree_piece(self, session: Session, strategy: Strategy) -> Segment | None:
        """What the strategy sends now, as far as the stages' caches have room for it."""
        if session.num_in_flight > 2 * session.num_stages:
            return None
        alive = sum(node.sent for node in session.tree.nodes.values())
        room = max_rows_alive(session.config) - alive
        if room <= 0:
            return None
        outgoing = strategy.next_segment(session)
        if outgoing is None:
            return None
        return tree_segment(session, outgoing.nodes[:room], outgoing.verify)

    def _draft(self, session: Session, nodes: Sequence[Node] | None) -> Work:
        """One drafter forward: expand `nodes`, or (None) absorb what is newly known to be true."""
        job = DraftJob(session.drafter, session.tree, nodes)
        proposals: list[Proposal] = []

        def run() -> None:
            for proposed in session.draft_model.draft([job]):
                proposals.extend(proposed)

        def finish(now: float, elapsed: float) -> Sequence[Send]:
            del now
            session.count_draft(elapsed)
            if nodes is not None:
                session.grow(proposals, floor_count=session.config.tree_size)
                session.graft()
                return ()
            for proposal in proposals:
                session.root_proposal = proposal
                if session.config.refresh or not session.tree.root.expanded:
                    session.grow([proposal], floor_count=session.config.tree_size)
                    session.graft()
            return ()

        rows = session.drafter.num_rows_ready if nodes is None else len(nodes)
        return Work("draft", rows, len(session.tokens), run, finish)

    def _features(self, session: Session, message: Features) -> None:
        by_position = {}
        for node, hidden in zip(message.nodes, message.hidden, strict=True):
            position = session.position_of(node)
            assert position is not None, f"features of node {node}, which was never accepted"
            by_position[position] = hidden
        session.drafter.accept_features(message.layer, by_position)

    def _reroot(self, active: _Active, verdict: Reroot, now: float) -> Sequence[Send]:
        session, tree = active.session, active.session.tree
        if session.verdict is not None and verdict.position <= session.verdict.position:
            return ()  # an older truth, overtaken
        session.verdict = verdict
        if not session.decoding:
            tree.plant(verdict.parent, verdict.token, verdict.position)
            new, num_drafted = [verdict.token], None
            session.stats.first_token_at = now
        else:
            path, session.last_was_hit = tree.reroot(verdict.parent, verdict.token)
            session.learn(path, verdict.token)
            new = [*(node.token for node in path[1:]), verdict.token]
            session.positions.update((node.id, node.position) for node in path)
            num_drafted = len(new) - (not session.last_was_hit)
        return self._take_tokens(active, new, num_drafted, now)

    def _take_tokens(
        self, active: _Active, new: list[int], num_drafted: int | None, now: float
    ) -> Sequence[Send]:
        """Apply the stop rules in order of position; nothing after the end is counted.

        Of the new tokens the first `num_drafted` were in the tree; None: the prompt's verdict.
        """
        session, request = active.session, active.session.request
        limit = session.context - len(request.prompt)
        new = new[: limit - len(session.tokens)]
        ends = [index for index, token in enumerate(new) if token in request.eos_token_ids]
        if ends:
            new = new[: ends[0] + 1]
        text, used = active.text.push(new)
        new = new[:used]
        session.tokens.extend(new)
        session.stats.num_tokens = len(session.tokens)
        session.drafter.accept(new)
        if num_drafted is not None:
            found = min(num_drafted, len(new))
            session.stats.count_verdict(found, missed=len(new) > found)
        reason = None
        if active.text.stopped or (new and new[-1] in request.eos_token_ids):
            reason = FinishReason.STOP
        elif len(session.tokens) >= limit:
            reason = FinishReason.LENGTH
        if reason is None:
            active.strategy.on_verdict(session)
            session.graft()
            return [Send(CLIENT, Tokens(request=request.id, tokens=tuple(new), text=text))]
        text += active.text.flush()
        tokens = Tokens(request=request.id, tokens=tuple(new), text=text)
        return [Send(CLIENT, tokens), *self._finish(reason, now)]

    def _finish(self, reason: FinishReason, now: float, error: str = "") -> Sequence[Send]:
        assert self.active is not None
        session = self.active.session
        session.stats.finished_at = now
        self.last, self.active = session, None
        self.statuses.clear()  # those to come tell whether the caches are free
        request = session.request.id
        return [
            Send(FIRST_STAGE, Close(request=request)),
            Send(CLIENT, Finished(request=request, reason=reason, error=error)),
        ]

    def _cancel(self, request: int, now: float) -> Sequence[Send]:
        if self.active is not None and self.active.session.request.id == request:
            return self._finish(FinishReason.CANCELLED, now)
        for queued in self.waiting:
            if queued[0].id == request:
                self.waiting.remove(queued)
                return [Send(CLIENT, Finished(request=request, reason=FinishReason.CANCELLED))]
        return ()

    def _failed(self, message: Failed, now: float) -> Sequence[Send]:
        active = self.active
        if active is None or message.request not in (0, active.session.request.id):
            return ()  # a late word about a request that is over
        error = f"{rank_name(message.stage)}: {message.text}"
        return self._finish(FinishReason.ERROR, now, error)


def max_rows_alive(config: DecodeConfig) -> int:
    """Most tree rows of one request that a stage's cache must hold at once."""
    return max(MIN_ROWS_ALIVE, config.tree_size + 1)
