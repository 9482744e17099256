"""Head (rank 0): prompts in, segments out, verdicts in, tokens out.

A sans-IO core (see runtime/core.py). One match over messages; between them one decision at a time:
begin a waiting request, fill the next slot (head/batching.py), or run one drafter forward. Prefill,
stop rules and statistics live here, once, for every strategy.

Work for a request is done inside `self.failures.of(request)`; what raises there ends that request
at the end of the turn (runtime/failures.py).
"""

from collections.abc import Callable, Sequence

from flowspec.config import DecodeConfig
from flowspec.head.active import (
    Active,
    count_outage,
    max_rows_alive,
    next_prompt_piece,
    open_message,
    open_session,
    room,
)
from flowspec.head.admission import Admission, Turn, Waiting
from flowspec.head.batching import Slots
from flowspec.head.calibration import Calibration
from flowspec.head.drafting import draft_work, next_drafts
from flowspec.head.pipeline import Pipeline, SegmentCost
from flowspec.protocol.codec import MAX_BATCH
from flowspec.protocol.messages import (
    CLIENT,
    EVERY_STAGE,
    AbortRequest,
    Exit,
    Failed,
    Features,
    Finished,
    FinishRequest,
    FreeRequest,
    GiveUp,
    Message,
    Reroot,
    Reset,
    Resume,
    Segment,
    Started,
    Status,
    Submit,
    Suspend,
    Tokens,
    epoch_of,
    together,
)
from flowspec.protocol.sequencing import is_gap
from flowspec.request import (
    Completion,
    DecodeStats,
    FinishReason,
    Request,
    cause_of,
    rank_name,
)
from flowspec.runtime.core import Send, Step
from flowspec.runtime.failures import Failures
from flowspec.speculation.drafters.base import Drafter, NoDrafter
from flowspec.speculation.drafters.merge import MergedDrafter
from flowspec.speculation.strategies import StrategySpec
from flowspec.tokenizer import TextStream

FIRST_STAGE = 1
MAX_FINISHED = 256  # requests whose statistics are kept until somebody asks for them


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
        self.pipe = Pipeline(num_stages)
        self.admission = admission
        self.failures = admission.failures = Failures()
        self.slots = Slots(self.pipe, next_prompt_piece, self.failures)
        self.active: dict[int, Active] = {}  # oldest first
        self.calibration = Calibration()
        self.newest_id = 0
        self.finished: dict[int, DecodeStats] = {}
        self.statuses: dict[int, Status] = {}
        self.heard_at: dict[int, float] = {}  # when each stage's status came
        self.outage: str | None = None  # why nothing is sent: a stage is lost
        self.resumes = False  # whether somebody replaces a stage that fails; else requests end
        # Requests that were served as the newest stage was lost, and by how many losses they ended
        self.blamed: dict[int, int] = {}

    def configure(self, spec: StrategySpec, config: DecodeConfig) -> None:
        """Use another strategy for the requests to come."""
        assert not self.active, "a request is being served"
        assert not self.admission.waiting, "a request waits that was sized for another strategy"
        self.spec, self.config = spec, config
        self.pipe.cost, self.pipe.draft_s = SegmentCost(), 0.0
        self.calibration = Calibration()

    @property
    def drafter_in_use(self) -> Drafter:
        """The drafter as the strategy wants it: none, or with the text's own branches."""
        if not self.spec.drafts:
            return NoDrafter()
        return MergedDrafter(self.drafter) if self.config.merge else self.drafter

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
        if epoch_of(message) not in (None, self.pipe.epoch):
            return ()  # of a pipeline that is no more
        sends = self._take_in(message, now)
        return [*sends, *self._end_failed(now)] if self.failures else sends

    def _take_in(self, message: Message, now: float) -> Sequence[Send]:
        match message:
            case Submit() | AbortRequest() | Suspend() | Resume() | GiveUp():
                return self._obey(message, now)
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
                with self.failures.of(message.request):
                    self._features(message)
            case Reroot():
                active = self.active.get(message.request)
                return self._reroot(active, message, now) if active is not None else ()
        return ()

    def _obey(
        self, message: Submit | AbortRequest | Suspend | Resume | GiveUp, now: float
    ) -> Sequence[Send]:
        """What this side of the pipeline wants."""
        match message:
            case Submit():
                return self._submit(message.request, now)
            case AbortRequest():
                return self._cancel(message.request, now)
            case Suspend():
                return self._suspend(message.cause, now, blames=message.blames)
            case Resume():
                return self._resume(message, now)
            case GiveUp():
                return self._give_up(message.error, now)

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
        if self.outage is not None:
            return None
        step = self._next_step(now)
        if not self.failures:
            return step
        step = step or Step()
        return Step(sends=[*step.sends, *self._end_failed(now)], work=step.work)

    def _next_step(self, now: float) -> Step | None:
        on_trial = any(active.losses.needs_trial for active in self.active.values())
        if not on_trial and (begin := self.admission.next_to_begin()) is not None:
            return Step(sends=self._open(begin, now))
        if not self.active:
            return None
        slot = self._next_slot()
        if not slot:
            if self.pipe.draft_began_at is not None:
                return None
            if shares := next_drafts(self.active.values(), self.failures):
                drafter, after = self.drafter_in_use, self._end_failed
                return Step(work=draft_work(drafter, self.pipe, shares, self.failures, after))
            # "nothing more to draft" may be what a strategy was waiting for
            slot = self._next_slot()
        return Step(sends=[Send(FIRST_STAGE, together(slot))]) if slot else None

    def _next_slot(self) -> list[Segment]:
        slot = self.slots.next_slot(list(self.active.values()), room)
        if slot:
            num_rows = sum(len(segment.nodes) for segment in slot)
            self.pipe.depart(
                num_rows,
                tuple((s.request, s.seq_no) for s in slot),
                prompt=all(s.prefix for s in slot),
            )
        return slot

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

    def _open(self, begin: Waiting, now: float) -> Sequence[Send]:
        """The oldest waiting request begins, with what a kept one has in common with it."""
        drafter, gone, gone_after, opened = self.drafter_in_use, [], [], []
        with self.failures.of(begin.request.id):
            turn = self.admission.begin(begin, self.config, drafter.name)
            gone, gone_after = turn.gone, turn.gone_after
            active = self._begin(turn, drafter)
            message = open_message(turn, active.session, drafter.aux_hidden_state_layers)
            self.active[begin.request.id] = active
            opened = [Send(FIRST_STAGE, message)]
        sends = [*self._close(gone), *opened, *self._close(gone_after)]
        if (error := self.failures.pop(begin.request.id)) is not None:
            self.admission.drop(begin.request.id)
            sends.append(self._drop(begin, FinishReason.ERROR, now, own_failure(error)))
        return sends

    def _begin(self, turn: Turn, drafter: Drafter) -> Active:
        request, before = turn.waiting.request, turn.waiting.before
        session = open_session(
            turn,
            self.config,
            self.pipe,
            drafter,
            self.calibration,
            vocab_size=self.admission.vocab_size,
        )
        strategy = self.spec.make()
        if before is None:
            return Active(session, strategy, self.new_text(request))
        return Active(session, strategy, before.text, before.lost_at, before.losses)

    def _close(self, requests: Sequence[int]) -> list[Send]:
        epoch = self.pipe.epoch
        self.pipe.num_closes += len(requests)
        return [Send(FIRST_STAGE, FinishRequest(epoch=epoch, request=old)) for old in requests]

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
        session = active.session
        if session.verdict is not None and verdict.position <= session.verdict.position:
            return ()  # an older truth, overtaken
        session.verdict = verdict
        active.count_verdict(now)
        sends: list[Send] = []
        reason: FinishReason | None = None
        with self.failures.of(session.request.id):
            new, num_drafted = self._accept(active, verdict, now)
            tokens, reason = self._take_tokens(active, new, num_drafted, now)
            sends.append(Send(CLIENT, tokens))
            if reason is None:
                active.strategy.on_verdict(session)
                session.merge_branches()
        return [*sends, *self._finish(active, reason, now)] if reason is not None else sends

    def _accept(self, active: Active, verdict: Reroot, now: float) -> tuple[list[int], int | None]:
        """The verdict's new tokens, and how many of them the tree held; None: the prompt's."""
        session, tree = active.session, active.session.tree
        if not session.decoding:
            tree.plant(verdict.parent, verdict.token, verdict.position)
            session.stats.num_prefills += 1
            active.end_outage(now)
            return [verdict.token], None
        session.stats.num_nodes_alive += len(tree)
        child = tree.child(verdict.parent, verdict.token)
        session.last_was_unsent = child is not None and not child.sent
        path, session.last_was_hit = tree.reroot(verdict.parent, verdict.token)
        session.learn(path, verdict.token)
        new = [*(node.token for node in path[1:]), verdict.token]
        session.commit((node.id, node.position) for node in path)
        return new, len(new) - (not session.last_was_hit)

    def _take_tokens(
        self, active: Active, new: list[int], num_drafted: int | None, now: float
    ) -> tuple[Tokens, FinishReason | None]:
        """Apply the stop rules in order of position; nothing after the end is counted.

        Of the new tokens the first `num_drafted` were in the tree; None: the prompt's verdict.
        Returns what the client is told, and why the request ends, where it does.
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
        if reason is not None:
            text += active.text.flush()
        return Tokens(request=request.id, tokens=tuple(new), text=text), reason

    def _finish(
        self, active: Active, reason: FinishReason, now: float, error: str = ""
    ) -> Sequence[Send]:
        """The request is over: its memory is free at once, or kept for a next turn."""
        session, epoch = active.session, self.pipe.epoch
        active.end_outage(now)
        request, session.over = session.request.id, True
        del self.active[request]
        self._close_books(request, session.stats, now)
        self.statuses.clear()  # those to come tell whether the caches are free
        keep = reason in (FinishReason.STOP, FinishReason.LENGTH) and self.admission.max_kept > 0
        close = FinishRequest(epoch=epoch, request=request, keep=keep, verdict=session.verdict)
        sends = [Send(FIRST_STAGE, close)]
        self.pipe.num_closes += 1
        if keep:
            sends += self._close(self.admission.keep(session))
        else:
            del self.admission.rows[request]
            sends.append(Send(EVERY_STAGE, FreeRequest(epoch=epoch, request=request)))
        return [
            *sends,
            Send(CLIENT, Finished(request=request, reason=reason, error=error)),
        ]

    def _end_failed(self, now: float) -> list[Send]:
        """End the requests whose own work has failed; a kept one is given up."""
        sends: list[Send] = []
        for request, error in self.failures.take().items():
            if request in self.active:
                active = self.active[request]
                sends += self._finish(active, FinishReason.ERROR, now, own_failure(error))
            elif request in self.admission.kept:
                del self.admission.kept[request]
                sends += self._close([request])
            elif (waiting := self.admission.withdraw(request)) is not None:
                sends.append(self._drop(waiting, FinishReason.ERROR, now, own_failure(error)))
        return sends

    def _cancel(self, request: int, now: float) -> Sequence[Send]:
        if request in self.active:
            return self._finish(self.active[request], FinishReason.CANCELLED, now)
        if (waiting := self.admission.withdraw(request)) is not None:
            return [self._drop(waiting, FinishReason.CANCELLED, now)]
        return ()

    def _drop(self, waiting: Waiting, reason: FinishReason, now: float, error: str = "") -> Send:
        """A request ends that is not on the stages."""
        request, before = waiting.request.id, waiting.before
        if before is not None:
            count_outage(before.stats, now - before.lost_at)
            self._close_books(request, before.stats, now)
        return Send(CLIENT, Finished(request=request, reason=reason, error=error))

    def _close_books(self, request: int, stats: DecodeStats, now: float) -> None:
        stats.finished_at = now
        self.finished[request] = stats
        if len(self.finished) > MAX_FINISHED:
            del self.finished[next(iter(self.finished))]

    def _suspend(self, cause: str, now: float, *, blames: bool = False) -> list[Send]:
        """A stage is lost, and every request's rows with it; the accepted tokens are here.

        With `blames` a request may have been the cause. One alone cannot be told from the others
        that were served, so all are suspects: they begin again one at a time, those with most
        losses first, and one that the losses condemn (see Losses) ends here.
        """
        self.outage = cause
        self.pipe.begin_epoch()
        sends: list[Send] = []
        again = []
        for number, active in self.active.items():
            if blames:
                active.count_loss(alone=len(self.active) == 1)
                self.blamed[number] = active.losses.condemns
            if count := active.losses.condemns:
                active.session.over = True
                waiting = self.admission.waiting_again(active.session, active.put_aside(now))
                error = after_losses(cause, count)
                sends.append(self._drop(waiting, FinishReason.ERROR, now, error))
            else:
                again.append((active.session, active.put_aside(now)))
        again.sort(key=lambda one: -one[1].losses.recent)
        self.admission.begin_again(again)
        if sends:  # the cause is found: it was no other's doing
            self.admission.forget_losses()
        self.active.clear()
        self.statuses.clear()
        return sends

    def _resume(self, message: Resume, now: float) -> Sequence[Send]:
        """The layers are covered again: requests begin anew as memory allows, prefixes first."""
        if self.outage is None:
            self._suspend("", now)  # nobody is to blame, so nobody ends
        self.outage = None
        self.blamed.clear()
        if message.num_stages != self.pipe.num_stages:
            self.pipe.num_stages, self.pipe.cost = message.num_stages, SegmentCost()
        self.admission.max_rows = message.num_kv_tokens
        sends = [Send(EVERY_STAGE, Reset(epoch=self.pipe.epoch))]
        for waiting in self.admission.take_too_large():
            error = (
                f"the request needs {waiting.num_rows} rows of KV cache on every stage, the "
                f"tightest of those that are left holds {message.num_kv_tokens}"
            )
            sends.append(self._drop(waiting, FinishReason.ERROR, now, error))
        return sends

    def _give_up(self, error: str, now: float) -> Sequence[Send]:
        """Every request ends here; the client has what was generated."""
        sends: list[Send] = []
        for active in list(self.active.values()):
            sends += self._finish(active, FinishReason.ERROR, now, error)
        while self.admission.waiting:
            waiting = self.admission.waiting.popleft()
            sends.append(self._drop(waiting, FinishReason.ERROR, now, error))
        return sends

    def _failed(self, message: Failed, now: float) -> Sequence[Send]:
        """A stage cannot serve one request, or (request 0) none."""
        error = f"{rank_name(message.stage)}: {message.text}"
        if self.resumes and not message.request:
            return self._suspend(error, now, blames=not is_gap(message))
        sends: list[Send] = []
        for request, active in list(self.active.items()):
            if message.request in (0, request):
                sends += self._finish(active, FinishReason.ERROR, now, error)
        if self.admission.kept.pop(message.request, None) is not None:
            sends += self._close([message.request])  # no next turn can use it again
        return sends


def own_failure(error: Exception) -> str:
    """What a client is told of an exception in the work for its request."""
    return f"{rank_name(0)}: {cause_of(error)}"


def after_losses(cause: str, count: int) -> str:
    """Why a request ends that may be the cause of a device's loss; a log follows in its place."""
    first, newline, log = cause.partition("\n")
    return (
        f"{first}; a device was lost {count} times while it served this request, which is not "
        f"tried again{newline}{log}"
    )
