"""Head (rank 0): prompts in, segments out, verdicts in, tokens out.

A sans-IO core (see effects.py). One match over messages; between them one decision at a time: begin
a waiting request, fill the next slot (batching.py), or run one drafter forward. Prefill, stop rules
and statistics live here, once, for every strategy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from flowspec.admission import Admission, Waiting
from flowspec.batching import Slots
from flowspec.calibration import Calibration, Forecasts
from flowspec.codec import MAX_BATCH
from flowspec.config import DecodeConfig
from flowspec.drafters.base import Drafter, NoDrafter, Opening
from flowspec.drafters.grafted import GraftedDrafter
from flowspec.drafting import draft_work, next_drafts
from flowspec.effects import CLIENT, EVERY_STAGE, Send, Step
from flowspec.pipe import Pipe, SegmentCost
from flowspec.request import (
    Completion,
    DecodeStats,
    FinishReason,
    NodeId,
    Request,
    rank_name,
)
from flowspec.session import Session, new_segment
from flowspec.strategies import StrategySpec
from flowspec.strategies.base import Strategy
from flowspec.text import TextStream
from flowspec.wire import (
    Abandon,
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
    together,
)

FIRST_STAGE = 1
MIN_ROWS_ALIVE = 256
MAX_FINISHED = 256  # requests whose statistics are kept until somebody asks for them


@dataclass(slots=True)
class Active:
    """A request being served."""

    session: Session
    strategy: Strategy
    text: TextStream


class Head:
    """Serves as many requests at once as `admission` lets begin; others wait in its queue."""

    rank = 0

    def __init__(
        self,
        num_stages: int,
        spec: StrategySpec,
        config: DecodeConfig,
        drafter: Drafter,
        *,
        admission: Admission,
        new_text: Callable[[Request], TextStream] = lambda request: TextStream(None),
    ) -> None:
        assert 1 <= admission.max_active <= MAX_BATCH, "more requests than a batch holds"
        self.spec = spec
        self.config = config
        self.drafter = drafter
        self.new_text = new_text
        self.pipe = Pipe(num_stages)
        self.slots = Slots(self.pipe, self._next_prompt_piece)
        self.admission = admission
        self.active: dict[int, Active] = {}  # oldest first
        self.calibration = Calibration()
        self.newest_id = 0
        self.finished: dict[int, DecodeStats] = {}
        self.statuses: dict[int, Status] = {}
        self.heard_at: dict[int, float] = {}  # when each stage's status came

    def configure(self, spec: StrategySpec, config: DecodeConfig) -> None:
        """Use another strategy for the requests to come."""
        assert not self.active, "a request is being served"
        assert not self.admission.waiting, "a request waits that was sized for another strategy"
        self.spec, self.config = spec, config
        self.pipe.cost, self.calibration = SegmentCost(), Calibration()

    @property
    def drafter_in_use(self) -> Drafter:
        """The drafter as the strategy wants it: none, or with the text's own branches."""
        if not self.spec.drafts:
            return NoDrafter()
        return GraftedDrafter(self.drafter) if self.config.graft else self.drafter

    def served_stats(self) -> list[DecodeStats]:
        """Of the requests being served now."""
        return [active.session.stats for active in self.active.values()]

    def completion(
        self, request: Request, end: Finished, tokens: Sequence[int], text: str
    ) -> Completion:
        """The answer to a request that has just ended, for the client's side of the head."""
        return Completion(
            request=request.id,
            tokens=tuple(tokens),
            text=text,
            reason=end.reason,
            stats=self.finished.pop(request.id, DecodeStats()),
            error=end.error,
        )

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Take one message in."""
        self.pipe.now = now
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
            case Started():
                self.pipe.start((message.request, message.seq_no))
            case Exit():
                self._exit(message)
            case Features():
                self._features(message)
            case Reroot():
                active = self.active.get(message.request)
                return self._reroot(active, message, now) if active is not None else ()
        return ()

    def _exit(self, message: Exit) -> None:
        segments = self.pipe.arrive((message.request, message.seq_no))
        for request, seq_no in segments:
            if request in self.active:
                self.active[request].session.flights.discard(seq_no)
        if segments and message.rows:
            self.pipe.cost.record(message.slowest_rows, message.slowest_ms)

    def poll(self, now: float) -> Step | None:
        """The next decision: a slot first, so that the pipe never waits for the drafter."""
        self.pipe.now = now
        if (begin := self.admission.next_to_begin()) is not None:
            return Step(sends=self._open(begin))
        if not self.active:
            return None
        slot = self._next_slot()
        if not slot:
            if shares := next_drafts(self.active.values()):
                return Step(work=draft_work(self.drafter_in_use, self.pipe, shares))
            # "nothing more to draft" may be what a strategy was waiting for
            slot = self._next_slot()
        return Step(sends=[Send(FIRST_STAGE, together(slot))]) if slot else None

    def _next_slot(self) -> list[Segment]:
        slot = self.slots.next_slot(list(self.active.values()), self._room)
        if slot:
            num_rows = sum(len(segment.nodes) for segment in slot)
            self.pipe.depart(num_rows, tuple((s.request, s.seq_no) for s in slot))
        return slot

    def _room(self, session: Session) -> int:
        """How many more tree rows of the request the stages' caches can hold."""
        alive = sum(node.sent for node in session.tree.nodes.values())
        return max_rows_alive(session.config) - alive

    def _submit(self, request: Request, now: float) -> Sequence[Send]:
        if not self.newest_id < request.id < 2**63:
            return self._refuse(
                request.id, f"request id {request.id} must be above the last, {self.newest_id}"
            )
        self.newest_id = request.id
        try:
            self.admission.submit(request, now, num_tree_rows=max_rows_alive(self.config))
        except ValueError as error:
            return self._refuse(request.id, str(error))
        return ()

    def _refuse(self, request: int, error: str) -> Sequence[Send]:
        return [Send(CLIENT, Finished(request=request, reason=FinishReason.ERROR, error=error))]

    def _open(self, begin: Waiting) -> Sequence[Send]:
        """The oldest waiting request begins, with what a kept one has in common with it."""
        admission, config, request = self.admission, self.config, begin.request
        drafter = self.drafter_in_use
        admission.waiting.popleft()
        kept, num_shared = admission.find_shared(request.prompt, config, drafter.name)
        gone = admission.make_room(begin.num_rows, kept)
        gone_after: list[int] = []
        if kept is None or kept.session.request.id in gone:
            kept, num_shared = None, 0
        elif admission.is_succeeded(kept, num_shared):
            gone_after.append(kept.session.request.id)
            del admission.kept[kept.session.request.id]
        admission.rows[request.id] = begin.num_rows
        session = Session(
            request=request,
            config=config,
            pipe=self.pipe,
            drafter=drafter.open(
                Opening(
                    request=request,
                    topk=config.topk,
                    coupled=config.coupled_drafting,
                    reuse=kept.session.drafter if kept is not None else None,
                    num_shared=num_shared,
                )
            ),
            source=drafter.name,
            num_feature_layers=len(drafter.feature_layers),
            num_prompt_sent=num_shared,
            context=len(request.prompt) + request.max_new_tokens,
        )
        if config.calibrate:
            sampled = request.sampling.temperature > 0.0
            session.forecasts = Forecasts(self.calibration, sampled=sampled)
        session.begin(begin.submitted_at, num_shared)
        self.active[request.id] = Active(session, self.spec.make(), self.new_text(request))
        opened = Open(
            request=request.id,
            capacity=begin.num_rows,
            context=session.context,
            sampling=request.sampling,
            feature_layers=drafter.feature_layers,
            reuse=kept.session.request.id if kept is not None else 0,
            num_shared=num_shared,
        )
        before, after = (
            [Send(FIRST_STAGE, Close(request=old)) for old in ids] for ids in (gone, gone_after)
        )
        return [*before, Send(FIRST_STAGE, opened), *after]

    def _next_prompt_piece(self, session: Session, most: int) -> Segment | None:
        """Up to `most` tokens of the prompt; stages work on different pieces at the same time."""
        prompt, start = session.request.prompt, session.num_prompt_sent
        end = min(start + most, len(prompt))
        if start == end:
            return None
        session.num_prompt_sent = end
        return new_segment(
            session,
            nodes=tuple(NodeId(i) for i in range(start, end)),
            parents=tuple(NodeId(i - 1) for i in range(start, end)),
            tokens=prompt[start:end],
            prefix=True,
            verify=end == len(prompt),
        )

    def _features(self, message: Features) -> None:
        """True features; those of a kept request complete what its next turn can use again."""
        if message.request in self.active:
            session = self.active[message.request].session
        elif message.request in self.admission.kept:
            session = self.admission.kept[message.request].session
        else:
            return
        by_position = {}
        for node, hidden in zip(message.nodes, message.hidden, strict=True):
            by_position[session.locate(node)] = hidden
        session.drafter.accept_features(message.layer, by_position)

    def _reroot(self, active: Active, verdict: Reroot, now: float) -> Sequence[Send]:
        session, tree = active.session, active.session.tree
        if session.verdict is not None and verdict.position <= session.verdict.position:
            return ()  # an older truth, overtaken
        session.verdict = verdict
        if not session.decoding:
            tree.plant(verdict.parent, verdict.token, verdict.position)
            new, num_drafted = [verdict.token], None
        else:
            session.stats.num_nodes_alive += len(tree)
            child = tree.child(verdict.parent, verdict.token)
            session.last_was_unsent = child is not None and not child.sent
            path, session.last_was_hit = tree.reroot(verdict.parent, verdict.token)
            session.learn(path, verdict.token)
            new = [*(node.token for node in path[1:]), verdict.token]
            session.commit((node.id, node.position) for node in path)
            num_drafted = len(new) - (not session.last_was_hit)
        return self._take_tokens(active, new, num_drafted, now)

    def _take_tokens(
        self, active: Active, new: list[int], num_drafted: int | None, now: float
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
        session.stats.count_tokens(len(new), now)
        session.drafter.accept(new)
        if num_drafted is not None:
            found = min(num_drafted, len(new))
            unsent = session.last_was_unsent and found == num_drafted
            session.stats.count_verdict(found, missed=len(new) > found, unsent=unsent)
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
        return [Send(CLIENT, tokens), *self._finish(session, reason, now)]

    def _finish(
        self, session: Session, reason: FinishReason, now: float, error: str = ""
    ) -> Sequence[Send]:
        """The request is over: its memory is free at once, or kept for a next turn."""
        session.stats.finished_at = now
        request = session.request.id
        del self.active[request]
        self.finished[request] = session.stats
        if len(self.finished) > MAX_FINISHED:
            del self.finished[next(iter(self.finished))]
        self.statuses.clear()  # those to come tell whether the caches are free
        keep = reason in (FinishReason.STOP, FinishReason.LENGTH) and self.admission.max_kept > 0
        sends = [Send(FIRST_STAGE, Close(request=request, keep=keep, verdict=session.verdict))]
        if keep:
            gone = self.admission.keep(session)
            sends += [Send(FIRST_STAGE, Close(request=old)) for old in gone]
        else:
            del self.admission.rows[request]
            sends.append(Send(EVERY_STAGE, Abandon(request=request)))
        return [
            *sends,
            Send(CLIENT, Finished(request=request, reason=reason, error=error)),
        ]

    def _cancel(self, request: int, now: float) -> Sequence[Send]:
        if request in self.active:
            return self._finish(self.active[request].session, FinishReason.CANCELLED, now)
        if self.admission.withdraw(request):
            return [Send(CLIENT, Finished(request=request, reason=FinishReason.CANCELLED))]
        return ()

    def _failed(self, message: Failed, now: float) -> Sequence[Send]:
        """A stage cannot serve one request, or (request 0) none."""
        error = f"{rank_name(message.stage)}: {message.text}"
        sends: list[Send] = []
        for request, active in list(self.active.items()):
            if message.request in (0, request):
                sends += self._finish(active.session, FinishReason.ERROR, now, error)
        return sends


def max_rows_alive(config: DecodeConfig) -> int:
    """Most tree rows of one request that a stage's cache must hold at once."""
    return max(MIN_ROWS_ALIVE, config.tree_size + 1)
