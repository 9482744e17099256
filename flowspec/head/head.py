"""Head (rank 0): it takes requests and verdicts in, and sends segments and tokens out.

It is a sans-IO core (runtime/core.py). Between messages it takes one decision at a time: start a
waiting request, send the next batch (head/scheduler.py), or run one drafter forward
(head/drafting.py). Prefill, stop rules and statistics are here, once for every strategy.

Work for a request runs inside `self.failures.of(request)`. An exception there ends that request at
the end of the turn (runtime/failures.py).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from flowspec.head.calibration import Calibration
from flowspec.head.drafting import draft_work, next_shares, of_one_drafter
from flowspec.head.pipeline import Pipeline, SegmentCost
from flowspec.head.request_state import RequestState
from flowspec.head.scheduler import Scheduler, TooLargeError
from flowspec.protocol.codec import MAX_BATCH
from flowspec.protocol.messages import (
    CLIENT,
    DRAFTER,
    EVERY_STAGE,
    AbandonRequests,
    AbortRequest,
    DraftContext,
    DraftSubtree,
    Exit,
    Failed,
    FinishRequest,
    ForgetCosts,
    FreeRequest,
    HiddenStates,
    Message,
    Reroot,
    Reset,
    Resume,
    Started,
    Status,
    Submit,
    Suspend,
    epoch_of,
    together,
)
from flowspec.request import (
    NO_NODE,
    DecodeStats,
    Decoding,
    Failure,
    FailureKind,
    FinishReason,
    Request,
    RequestOutput,
    StageCounts,
    TokensOut,
    cause_of,
)
from flowspec.runtime.core import Send, Step
from flowspec.runtime.failures import Failures, attempt
from flowspec.speculation.acceptance import rule_of
from flowspec.speculation.drafters.base import Drafter, NoDrafter, Subtree
from flowspec.speculation.drafters.merge import MergedDrafter
from flowspec.speculation.strategies import find_strategy, resolve_decoding
from flowspec.speculation.strategy import ResolvedDecoding
from flowspec.tokenizer import TextStream

FIRST_STAGE = 1
MAX_FINISHED = 256  # finished requests whose stage counts are kept


class Head:
    """Serves as many requests at once as its scheduler allows; others wait in its queue.

    `decoding` is the default for requests that name none. `drafters` are the loaded ones by name;
    the first one is the default.
    """

    rank = 0

    def __init__(
        self,
        scheduler: Scheduler,
        decoding: Decoding,
        drafters: Mapping[str, Drafter],
        *,
        new_text: Callable[[Request], TextStream] = lambda request: TextStream(None),
    ) -> None:
        assert 1 <= scheduler.max_num_seqs <= MAX_BATCH, "more requests than a batch holds"
        self.scheduler = scheduler
        self.pipe: Pipeline = scheduler.pipe
        self.failures: Failures = scheduler.failures
        self.decoding = decoding
        self.drafters = {"none": NoDrafter(), **drafters}
        self.merged = {name: MergedDrafter(drafter) for name, drafter in drafters.items()}
        self.new_text = new_text
        self.calibrations: dict[ResolvedDecoding, Calibration] = {}
        self.newest_id = 0
        # Stage counts of the newest finished requests.
        self.finished: dict[int, dict[int, StageCounts]] = {}
        self.statuses: dict[int, Status] = {}
        self.heard_at: dict[int, float] = {}  # arrival time of each stage's status
        self.outage: Failure | None = None  # the failure of a lost stage; nothing is sent meanwhile
        self.resumes = False  # whether a failed stage is replaced; otherwise requests end
        # Requests that ran when the newest stage was lost, with the number of losses that ended
        # them.
        self.blamed: dict[int, int] = {}

    def resolve(self, decoding: Decoding | None) -> ResolvedDecoding:
        """Return a request's decoding with the defaults set. Raises ValueError if it cannot run."""
        decoding, own = decoding or self.decoding, self.decoding.strategy
        if find_strategy(decoding.strategy).without is not find_strategy(own).without:
            raise ValueError(
                f"strategy {decoding.strategy} needs a pipeline that was made for it; this one was "
                f"made for {own}"
            )
        return resolve_decoding(decoding, self.drafters)

    def drafter_of(self, decoding: ResolvedDecoding) -> Drafter:
        """Return the drafter for a decoding, with or without n-gram branches."""
        drafters = self.merged if decoding.merges else self.drafters
        return drafters[decoding.drafter]

    def calibration_of(self, decoding: ResolvedDecoding) -> Calibration | None:
        """Return the calibration that requests of this decoding share; None if it is off."""
        if decoding.drafter == "none" or not decoding.drafting.calibrate:
            return None
        return self.calibrations.setdefault(decoding, Calibration())

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Process one message. Messages of another epoch are ignored."""
        self.pipe.now = now
        if epoch_of(message) not in (None, self.pipe.epoch):
            return ()
        sends = self._take_in(message, now)
        return [*sends, *self._end_failed(now)] if self.failures else sends

    def _take_in(self, message: Message, now: float) -> Sequence[Send]:
        match message:
            case Submit() | AbortRequest() | ForgetCosts() | Suspend() | Resume():
                return self._obey(message, now)
            case AbandonRequests():
                return self._abandon(message.failure, now)
            case Status():
                self._status(message, now)
            case Failed():
                return self._failed(message, now)
            case Started():
                self.pipe.start((message.request, message.seq_no))
            case Exit():
                self._exit(message)
            case HiddenStates():
                with self.failures.of(message.request):
                    self._hidden_states(message)
            case DraftSubtree():
                with self.failures.of(message.request):
                    self._subtree(message)
            case Reroot():
                request = self.scheduler.running.get(message.request)
                return self._reroot(request, message, now) if request is not None else ()
        return ()

    def _obey(
        self, message: Submit | AbortRequest | ForgetCosts | Suspend | Resume, now: float
    ) -> Sequence[Send]:
        """Process a message of the client or of the head's own process."""
        match message:
            case Submit():
                return self._submit(message.request, now)
            case AbortRequest():
                return self._abort(message.request, now)
            case ForgetCosts():
                self._forget_costs()
            case Suspend():
                return self._suspend(message.failure, now, blames=message.blames)
            case Resume():
                return self._resume(message, now)
        return ()

    def poll(self, now: float) -> Step | None:
        """Return the next decision: a batch first, so that the pipe never waits for the drafter."""
        self.pipe.now = now
        if self.outage is not None:
            return None
        step = self._next_step(now)
        if not self.failures:
            return step
        step = step or Step()
        return Step(sends=[*step.sends, *self._end_failed(now)], work=step.work)

    def _next_step(self, now: float) -> Step | None:
        if (waiting := self.scheduler.next_to_start()) is not None:
            return Step(sends=self._start(waiting, now))
        running = self.scheduler.running
        if not running:
            return None
        batch = self.scheduler.next_batch()
        if not batch:
            if self.pipe.draft_began_at is not None:
                return None
            asked = [one for one in running.values() if not self.drafter_pushes(one)]
            if shares := next_shares(asked, self.failures):
                own = of_one_drafter(shares, self.pipe.drafting)
                drafter = self.drafter_of(own[0].request.decoding)
                work = draft_work(drafter, self.pipe, own, self.failures, self._end_failed)
                return Step(work=work)
            # A strategy may have waited to learn that there is nothing more to draft.
            batch = self.scheduler.next_batch()
        return Step(sends=[Send(FIRST_STAGE, together(batch))]) if batch else None

    # Beginnings ----------------------------------------------------------------------------------

    def _submit(self, request: Request, now: float) -> Sequence[Send]:
        """Queue a request, or end it at once if it cannot run."""
        if not self.newest_id < request.id < 2**63:
            cause = f"request id {request.id} must be above the last, {self.newest_id}"
            return [_refusal(request, Failure(cause=cause, kind=FailureKind.REFUSED))]
        self.newest_id = request.id
        state = attempt(lambda: self._new_state(request, now))
        if isinstance(state, Exception):
            return [_refusal(request, failure_of(state))]
        self.scheduler.add(state)
        return ()

    def _new_state(self, request: Request, now: float) -> RequestState:
        """Return the state of a new request. Raises ValueError if it can never run."""
        decoding = self.resolve(request.decoding)
        rule_of(request.sampling)
        return RequestState(
            request=request,
            decoding=decoding,
            text=self.new_text(request),
            pipe=self.pipe,
            max_new_tokens=self.scheduler.check(request, decoding.config),
            vocab_size=self.scheduler.vocab_size,
            stats=DecodeStats(submitted_at=now),
        )

    def _start(self, request: RequestState, now: float) -> Sequence[Send]:
        """Start the oldest waiting request, reusing the common prefix of a cached one."""
        evicted, succeeded, started = [], [], []
        with self.failures.of(request.id):
            start = self.scheduler.start(request)
            evicted, succeeded = start.evicted, start.succeeded
            message = request.run(
                find_strategy(request.decoding.strategy).make(request.decoding.config),
                self.drafter_of(request.decoding),
                self.calibration_of(request.decoding),
                reuse=start.reuse,
                num_cached_tokens=start.num_cached_tokens,
            )
            started = [Send(FIRST_STAGE, message), *self._tell_drafter(request, 0, request.prefix)]
        sends = [*self._close(evicted), *started, *self._close(succeeded)]
        if (error := self.failures.pop(request.id)) is not None:
            self.scheduler.withdraw(request.id)
            self.scheduler.running.pop(request.id, None)
            sends.append(self._end(request, FinishReason.ERROR, now, own_failure(error)))
        return sends

    def _close(self, requests: Sequence[int]) -> list[Send]:
        """Free cached requests on the stages."""
        epoch = self.pipe.epoch
        self.pipe.num_closes += len(requests)
        return [Send(FIRST_STAGE, FinishRequest(epoch=epoch, request=old)) for old in requests]

    # What stages say -----------------------------------------------------------------------------

    def _status(self, message: Status, now: float) -> None:
        self.statuses[message.stage] = message
        self.heard_at[message.stage] = now
        if (counts := self.finished.get(message.finished_request)) is not None:
            counts[message.stage] = StageCounts(
                num_rows_run=message.finished_rows_run,
                num_rows_pruned=message.finished_rows_pruned,
                busy_s=message.finished_busy_s,
            )

    def _exit(self, message: Exit) -> None:
        segments = self.pipe.arrive((message.request, message.seq_no))
        for request, seq_no in segments:
            if request in self.scheduler.running:
                self.scheduler.running[request].flights.discard(seq_no)
        if segments and message.rows:
            self.pipe.cost.record(message.slowest_rows, message.slowest_ms)

    def _hidden_states(self, message: HiddenStates) -> None:
        """Take hidden states of true tokens; the next turn of a cached request needs them too."""
        request = self.scheduler.running.get(message.request)
        request = request or self.scheduler.cache.requests.get(message.request)
        if request is None:
            return
        by_position = {}
        for node, hidden in zip(message.nodes, message.hidden, strict=True):
            by_position[request.locate(node)] = hidden
        request.drafter.accept_hidden_states(message.layer, by_position)

    def _subtree(self, message: DraftSubtree) -> None:
        """Take guesses that a drafter has pushed; those of finished requests are ignored."""
        request = self.scheduler.running.get(message.request)
        if request is not None and self.drafter_pushes(request):
            entries = tuple(zip(message.parents, message.tokens, message.logprobs, strict=True))
            subtree = Subtree(NO_NODE, entries)
            request.take_subtree(message.position, message.path, subtree)

    def drafter_pushes(self, request: RequestState) -> bool:
        """Whether the request's drafter is a core of its own, which pushes and is never asked."""
        return bool(getattr(self.drafters[request.decoding.drafter], "pushes", False))

    def _tell_drafter(
        self, request: RequestState, position: int, tokens: Sequence[int], *, is_over: bool = False
    ) -> list[Send]:
        """Tell a pushing drafter which tokens are true; sessions tell the others."""
        if not self.drafter_pushes(request):
            return []
        context = DraftContext(
            epoch=self.pipe.epoch,
            request=request.id,
            position=position,
            tokens=tuple(tokens),
            is_over=is_over,
        )
        return [Send(DRAFTER, context)]

    def _reroot(self, request: RequestState, verdict: Reroot, now: float) -> Sequence[Send]:
        if request.verdict is not None and verdict.position <= request.verdict.position:
            return ()  # a stale verdict
        request.verdict = verdict
        request.count_verdict(now)
        sends: list[Send] = []
        reason: FinishReason | None = None
        with self.failures.of(request.id):
            new, num_drafted = self._accept(request, verdict, now)
            tokens, reason = self._take_tokens(request, new, num_drafted, now)
            sends.append(Send(CLIENT, tokens))
            end = len(request.all_tokens)
            sends += self._tell_drafter(request, end - len(tokens.tokens), tokens.tokens)
            if reason is None:
                assert request.strategy is not None, "a running request has a strategy"
                request.strategy.on_verdict(request)
                request.merge_branches()
        return [*sends, *self._finish(request, reason, now)] if reason is not None else sends

    def _accept(
        self, request: RequestState, verdict: Reroot, now: float
    ) -> tuple[list[int], int | None]:
        """Return a verdict's new tokens and how many of them were drafted (None: the prompt's)."""
        tree = request.tree
        if not request.is_decoding:
            tree.plant(verdict.parent, verdict.token, verdict.position)
            request.stats.num_prefills += 1
            request.end_outage(now)
            return [verdict.token], None
        request.stats.num_nodes_alive += len(tree)
        child = tree.child(verdict.parent, verdict.token)
        request.last_was_unsent = child is not None and not child.sent
        path, request.last_was_hit = tree.reroot(verdict.parent, verdict.token)
        request.learn(path, verdict.token)
        new = [*(node.token for node in path[1:]), verdict.token]
        request.commit((node.id, node.position) for node in path)
        return new, len(new) - (not request.last_was_hit)

    def _take_tokens(
        self, request: RequestState, new: list[int], num_drafted: int | None, now: float
    ) -> tuple[TokensOut, FinishReason | None]:
        """Apply the stop rules in order of position; nothing after the end is counted.

        The first `num_drafted` of the new tokens were in the tree; None means the prompt's verdict.
        Returns the event for the client and the finish reason, if the request ends.
        """
        end_ids = request.request.eos_token_ids or ()
        new = new[: request.max_new_tokens - len(request.tokens)]
        ends = [index for index, token in enumerate(new) if token in end_ids]
        if ends:
            new = new[: ends[0] + 1]
        text, used = request.text.push(new)
        new = new[:used]
        request.tokens.extend(new)
        request.stats.count_tokens(len(new), now)
        request.drafter.accept(new)
        if num_drafted is not None:
            found = min(num_drafted, len(new))
            unsent = request.last_was_unsent and found == num_drafted
            request.stats.count_verdict(found, missed=len(new) > found, unsent=unsent)
        reason = None
        if request.text.stopped or (new and new[-1] in end_ids):
            reason = FinishReason.STOP
        elif len(request.tokens) >= request.max_new_tokens:
            reason = FinishReason.LENGTH
        if reason is not None:
            text += request.text.flush()
        return TokensOut(request=request.id, tokens=tuple(new), text=text), reason

    # Ends ----------------------------------------------------------------------------------------

    def _finish(
        self,
        request: RequestState,
        reason: FinishReason,
        now: float,
        error: Failure | None = None,
    ) -> list[Send]:
        """End a running request: free its memory at once, or keep it for a next turn."""
        epoch, cache = self.pipe.epoch, self.scheduler.cache
        del self.scheduler.running[request.id]
        end = self._end(request, reason, now, error)
        keep = reason in (FinishReason.STOP, FinishReason.LENGTH) and cache.max_size > 0
        close = FinishRequest(epoch=epoch, request=request.id, keep=keep, verdict=request.verdict)
        sends = [Send(FIRST_STAGE, close)]
        self.pipe.num_closes += 1
        if keep:
            sends += self._close(cache.add(request))
        else:
            sends.append(Send(EVERY_STAGE, FreeRequest(epoch=epoch, request=request.id)))
        sends += self._tell_drafter(request, len(request.all_tokens), (), is_over=True)
        return [*sends, end]

    def _end(
        self,
        request: RequestState,
        reason: FinishReason,
        now: float,
        error: Failure | None = None,
    ) -> Send:
        """Return the request's output. It is on no stage any more, or has just been freed there."""
        output = request.finish(reason, now, error)
        self.finished[request.id] = {}
        if len(self.finished) > MAX_FINISHED:
            del self.finished[next(iter(self.finished))]
        return Send(CLIENT, output)

    def _end_failed(self, now: float) -> list[Send]:
        """End requests whose own work has failed; evict failed ones from the prefix cache."""
        sends: list[Send] = []
        for number, error in self.failures.take().items():
            failure = own_failure(error)
            if (running := self.scheduler.running.get(number)) is not None:
                sends += self._finish(running, FinishReason.ERROR, now, failure)
            elif self.scheduler.cache.remove(number) is not None:
                sends += self._close([number])
            elif (waiting := self.scheduler.withdraw(number)) is not None:
                sends.append(self._end(waiting, FinishReason.ERROR, now, failure))
        return sends

    def _abort(self, number: int, now: float) -> Sequence[Send]:
        if (running := self.scheduler.running.get(number)) is not None:
            return self._finish(running, FinishReason.CANCELLED, now)
        if (waiting := self.scheduler.withdraw(number)) is not None:
            return [self._end(waiting, FinishReason.CANCELLED, now)]
        return ()

    def _forget_costs(self) -> None:
        """Forget learnt costs and calibration; does nothing while requests are open."""
        if not self.scheduler.running and not self.scheduler.waiting:
            self.pipe.forget()
            self.calibrations.clear()

    def _suspend(self, failure: Failure, now: float, *, blames: bool = False) -> list[Send]:
        """Stop sending after the loss of a stage: the rows of every request are lost with it.

        The accepted tokens are here. With `blames` a request may have been the cause. It cannot be
        told from the others that ran, so all are suspects: they start again one at a time, those
        with most losses first. A request that its losses condemn (head/losses.py) ends here.
        """
        self.outage = failure
        self.pipe.begin_epoch()
        running = list(self.scheduler.running.values())
        condemned = []
        for request in running:
            if blames:
                request.count_loss(alone=len(running) == 1)
                self.blamed[request.id] = request.losses.condemns
            if request.losses.condemns:
                condemned.append(request)
        self.scheduler.preempt_all(now, condemned)
        sends = []
        for request in condemned:
            request.lost_at = now if request.lost_at is None else request.lost_at
            error = after_losses(failure, request.losses.condemns)
            sends.append(self._end(request, FinishReason.ERROR, now, error))
        if condemned:
            self.scheduler.forgive()
        self.statuses.clear()
        return sends

    def _resume(self, message: Resume, now: float) -> Sequence[Send]:
        """Go on with a complete pipeline: requests start anew as memory allows, prefixes first."""
        if self.outage is None:
            self._suspend(Failure(cause=""), now)  # nobody is to blame, so no request ends
        self.outage = None
        self.blamed.clear()
        if message.num_stages != self.pipe.num_stages:
            self.pipe.num_stages, self.pipe.cost = message.num_stages, SegmentCost()
        self.scheduler.max_kv_tokens = message.num_kv_tokens
        sends = [Send(EVERY_STAGE, Reset(epoch=self.pipe.epoch))]
        for request in self.scheduler.take_too_large():
            cause = (
                f"the request needs {request.num_kv_tokens} tokens of KV cache on every stage, the "
                f"tightest of those that are left holds {message.num_kv_tokens}"
            )
            error = Failure(cause=cause, kind=FailureKind.TOO_LARGE)
            sends.append(self._end(request, FinishReason.ERROR, now, error))
        return sends

    def _abandon(self, failure: Failure, now: float) -> Sequence[Send]:
        """End every request; the client keeps what was generated."""
        sends: list[Send] = []
        for request in list(self.scheduler.running.values()):
            sends += self._finish(request, FinishReason.ERROR, now, failure)
        while self.scheduler.waiting:
            request = self.scheduler.waiting.popleft()
            sends.append(self._end(request, FinishReason.ERROR, now, failure))
        return sends

    def _failed(self, message: Failed, now: float) -> Sequence[Send]:
        """Handle a stage that cannot serve one request, or (request 0) any request."""
        failure = Failure(cause=message.text, rank=message.stage)
        if self.resumes and not message.request:
            return self._suspend(failure, now, blames=not message.num_lost)
        sends: list[Send] = []
        for number, request in list(self.scheduler.running.items()):
            if message.request in (0, number):
                sends += self._finish(request, FinishReason.ERROR, now, failure)
        if self.scheduler.cache.remove(message.request) is not None:
            sends += self._close([message.request])  # no next turn can use it again
        return sends


def failure_of(error: Exception) -> Failure:
    """Return the failure of a request: a ValueError is its own fault, anything else the head's."""
    if isinstance(error, TooLargeError):
        return Failure(cause=str(error), kind=FailureKind.TOO_LARGE)
    if isinstance(error, ValueError):
        return Failure(cause=str(error), kind=FailureKind.REFUSED)
    return own_failure(error)


def own_failure(error: Exception) -> Failure:
    """Return what a client is told of an exception in the head's work for its request."""
    return Failure(cause=cause_of(error), rank=0)


def after_losses(failure: Failure, count: int) -> Failure:
    """Return the failure of a request that may have caused the loss of a device."""
    first, newline, log = failure.cause.partition("\n")
    cause = (
        f"{first}; a device was lost {count} times while it served this request, which is not "
        f"tried again{newline}{log}"
    )
    return replace(failure, cause=cause)


def _refusal(request: Request, failure: Failure) -> Send:
    """Return the end of a request that was never queued."""
    output = RequestOutput(
        request=request.id,
        reason=FinishReason.ERROR,
        error=failure,
        num_prompt_tokens=len(request.prompt_tokens),
    )
    return Send(CLIENT, output)
