"""HeadServer: serves devices and clients in one thread, beside the engine's thread."""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeAlias

from pydantic import ValidationError

import flowspec
from flowspec.cluster.controller.status import HeadFacts, cluster_status
from flowspec.cluster.membership.membership import Membership, Phase
from flowspec.cluster.membership.roster import (
    Effect,
    Engage,
    FailRequests,
    Halt,
    LogEvent,
    ResumeEpoch,
    SendToDevice,
)
from flowspec.engine.cluster import (
    ClusterEngine,
    EngineEvent,
    HeadBound,
    RequestBlamed,
    StageLost,
    TokenCrossed,
)
from flowspec.engine.stream import Notice, Stream
from flowspec.protocol.control import (
    PROTOCOL_VERSION,
    Ask,
    AskCounts,
    AskStatus,
    Beat,
    Bye,
    Control,
    ControlError,
    Counts,
    Done,
    Drop,
    Echo,
    Forget,
    Forgotten,
    FromDevice,
    Hello,
    ModelSizes,
    Note,
    Piece,
    Progress,
    Refuse,
    StageFigures,
    StageReady,
    Trouble,
    figures_of,
    pack,
    report_of,
    unpack,
)
from flowspec.request import (
    ClusterError,
    Failure,
    FailureKind,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    StageCounts,
    TokensOut,
    cause_of,
)
from flowspec.tokenizer import PromptError
from flowspec.transport.control_sockets import ControlServer, UnreachableError
from flowspec.transport.secure.tally import Tally

log = logging.getLogger(__name__)
TICK_S = 0.1
MAX_OPEN_PER_CLIENT = 64
DRAIN_POLL_S = 0.05
MIN_CHARACTERS, CHARACTERS_PER_TOKEN = 262_144, 32  # limit of a prompt, by the context
MAX_REMEMBERED = 256  # finished requests whose stage counts may be asked for
MAX_WORDS = 4000  # characters of a sentence in a message
MAX_PIECE, MAX_PIECE_TEXT = 4096, 200_000  # tokens and characters in a message


@dataclass(slots=True, eq=False)
class _Call:
    """A client's request: its connection, the client's number, and the stream once it runs."""

    peer: bytes
    id: int
    stream: Stream | None = None
    is_dropped: bool = False  # the client does not want it any more


@dataclass(frozen=True, slots=True)
class _Submitted:
    """The engine has accepted or refused a request."""

    call: _Call
    outcome: Stream | Failure | None  # None: its client has withdrawn it before


@dataclass(frozen=True, slots=True)
class _Readable:
    """The stream of this call has something to read."""

    call: _Call


@dataclass(frozen=True, slots=True)
class _Answered:
    """A message for a client that another thread has prepared."""

    peer: bytes
    message: Control


_Event: TypeAlias = EngineEvent | _Submitted | _Readable | _Answered


class HeadServer:
    """Serves devices and clients: `start` starts it, `close` drains and ends it.

    `on_say` and `on_progress` are called from the control thread, for observers.
    """

    def __init__(
        self,
        control: ControlServer,
        membership: Membership,
        new_engine: Callable[[Callable[[EngineEvent], None]], ClusterEngine],
        *,
        sizes: ModelSizes,
        on_say: Callable[[LogEvent], None] = lambda say: None,
        on_progress: Callable[[str, Progress], None] = lambda name, progress: None,
    ) -> None:
        self.control, self.membership = control, membership
        self.failure: Exception | None = None  # of its thread; nothing is served any more
        self._events: queue.SimpleQueue[_Event] = queue.SimpleQueue()
        self.engine = new_engine(self._hear)
        self._sizes = sizes
        self._on_say, self._on_progress = on_say, on_progress
        self._calls: list[_Call] = []  # the open ones
        self._over: deque[_Call] = deque(maxlen=MAX_REMEMBERED)
        self._counts_due: dict[tuple[bytes, int], Stream] = {}  # by who asks, and the number there
        # Prompts are rendered and slow questions answered here, so that heartbeats do not wait.
        self._workers = ThreadPoolExecutor(2, thread_name_prefix="clients")
        self._num_done = self._num_failed = 0
        self._started_at = time.monotonic()
        self._bad = Tally(log, "dropped control messages")
        self._draining = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Begin to serve devices and clients."""
        self.engine.start()
        self._thread.start()

    def check(self) -> None:
        """Raise ClusterError if one of its threads has failed."""
        if failure := self.failure or self.engine.failure:
            raise ClusterError.of_rank(0, f"{cause_of(failure)}; see its log")

    @property
    def is_serving(self) -> bool:
        """Whether all layers are covered now."""
        return self.membership.phase is Phase.SERVING

    def drain(
        self, why: str, timeout_s: float, in_a_hurry: Callable[[], bool] = lambda: False
    ) -> bool:
        """Take no new requests and wait for the open ones; return whether all have ended."""
        self._draining = why
        end = time.monotonic() + timeout_s
        while self._calls and self._thread.is_alive() and time.monotonic() < end:
            if in_a_hurry():
                break
            time.sleep(DRAIN_POLL_S)
        return not self._calls

    def close(self) -> None:
        """Tell all peers and end. Devices keep their layers and wait for a head."""
        self._draining = self._draining or "it was stopped"
        self._closing.set()
        self.control.wake()
        self._thread.join(timeout=5.0)
        self.engine.close()
        self._workers.shutdown(wait=False, cancel_futures=True)
        self.control.close()

    def _hear(self, event: _Event) -> None:
        self._events.put(event)
        self.control.wake()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                for peer, frame in self.control.receive(TICK_S):
                    self._take(peer, frame)
                while not self._events.empty():
                    self._take_event(self._events.get())
                self._tell_counts()
                self._apply(self.membership.tick(time.monotonic(), idle=not self._calls))
            for call in list(self._calls):
                failure = Failure(cause=f"the head ends: {self._draining}", rank=0)
                self._end(call, _failed_output(failure))
            self._apply(self.membership.close(self._draining))
        except Exception as error:
            log.exception("the control thread failed")
            self.failure = error

    def _take(self, peer: bytes, frame: bytes) -> None:
        try:
            message = unpack(frame)
        except ControlError as error:
            self._bad.add("no message of this protocol", str(error))
            return
        now = time.monotonic()
        match message:
            case Hello() | Progress() | StageReady() | Trouble() | Beat() | Bye():
                self._from_device(peer, message, now)
            case _:
                self._serve_client(peer, message)

    # Devices -------------------------------------------------------------------------------------

    def _from_device(self, peer: bytes, message: FromDevice, now: float) -> None:
        if isinstance(message, StageReady):
            message = self._seen_here(peer, message)
        self._apply(self.membership.handle(peer, message, now))
        if isinstance(message, Progress):
            self._on_progress(self._name(peer), message)

    def _seen_here(self, peer: bytes, ready: StageReady) -> StageReady:
        """Return the addresses of a stage in the form that this machine needs."""
        if not (host := self.control.host_of(peer)):
            return ready
        return ready.model_copy(update={"addresses": ready.addresses.seen_here(host)})

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendToDevice():
                    self._send(effect.peer, effect.message)
                case LogEvent():
                    self._on_say(effect)
                case Halt():
                    self.engine.obey(effect)
                    left = f"{self.membership.config.give_up_s:g} s"
                    text = (
                        f"{effect.failure}; the answer goes on when its layers are held again, "
                        f"and ends if nobody holds them within {left}"
                    )
                    for call in list(self._calls):  # some may leave meanwhile
                        self._send(call.peer, Note(id=call.id, text=text[:MAX_WORDS]))
                case Engage() | ResumeEpoch() | FailRequests():
                    self.engine.obey(effect)

    def _name(self, peer: bytes) -> str:
        return next((d.name for d in self.membership.devices.values() if d.peer == peer), "?")

    # Clients -------------------------------------------------------------------------------------

    def _serve_client(self, peer: bytes, message: Control) -> None:
        """Process one message; an error concerns this client alone, which is told."""
        try:
            self._take_from_client(peer, message)
        except Exception as error:
            log.exception("a client's message was not served")
            failure = Failure(cause=cause_of(error), rank=0)
            if isinstance(message, Ask):
                self._calls = [c for c in self._calls if (c.peer, c.id) != (peer, message.id)]
                self._send(peer, _done(message.id, _failed_output(failure)))
            else:
                self._send(peer, Refuse(why=str(failure)[:MAX_WORDS]))

    def _take_from_client(self, peer: bytes, message: Control) -> None:
        match message:
            case Ask():
                self._ask(peer, message)
            case Drop():
                for call in list(self._calls):
                    if (call.peer, call.id) == (peer, message.id):
                        self._drop(call)
            case AskCounts():
                self._ask_counts(peer, message.id)
            case Forget():
                self._workers.submit(self._forget, peer, message.id)
            case AskStatus():
                self._status(peer, message)
            case Echo():
                self._send(peer, Echo(payload="x" * message.reply_bytes))
            case _:
                self._bad.add("not for a head", message.kind)

    def _ask(self, peer: bytes, ask: Ask) -> None:
        if why := version_refusal(ask.protocol, ask.version):
            self._send(peer, Refuse(why=why))
            return
        refusal = ""
        open_here = sum(call.peer == peer for call in self._calls)
        if self._draining:
            refusal = f"the head takes no more requests: {self._draining}"
        elif self.membership.gave_up:
            refusal = f"not ready: {self.membership.missing()}"
        elif open_here >= MAX_OPEN_PER_CLIENT:
            refusal = f"{open_here} requests of this client are open already"
        if refusal:
            self._send(peer, _done(ask.id, _failed_output(Failure(cause=refusal, rank=0))))
            return
        call = _Call(peer, ask.id)
        self._calls.append(call)
        if not self.is_serving:
            text = f"not ready: {self.membership.missing()}"[:3900]
            self._send(peer, Note(id=ask.id, text=f"{text}; the answer comes once it is"))
        self._workers.submit(self._submit, call, ask)

    def _submit(self, call: _Call, ask: Ask) -> None:
        """Render the prompt and give the request to the engine, in a worker's thread."""
        outcome: Stream | Failure
        if call.is_dropped:
            self._hear(_Submitted(call, None))
            return
        try:
            outcome = self.engine.submit(request_of(ask, self.engine.parts.max_context))
        except Exception as error:
            outcome = refusal_of(error)
            if outcome.kind is FailureKind.FAILED:
                log.warning("a request cannot begin: %s", cause_of(error), exc_info=error)
        self._hear(_Submitted(call, outcome))

    def _drop(self, call: _Call) -> None:
        """End a call: its client has left or cannot be told."""
        call.is_dropped = True
        if call.stream is not None:
            call.stream.abort()

    def _ask_counts(self, peer: bytes, number: int) -> None:
        """Report the stages' work for a finished request once it is known."""
        found = next((c for c in self._over if (c.peer, c.id) == (peer, number)), None)
        if found is None or found.stream is None:
            self._send(peer, Counts(id=number, stages=None))
        else:
            self._counts_due[peer, number] = found.stream

    def _tell_counts(self) -> None:
        """Answer clients whose counts have come, or never will."""
        for (peer, number), stream in list(self._counts_due.items()):
            if stream.is_counted:
                del self._counts_due[peer, number]
                counts = stream.stage_stats()
                stages = None if counts is None else stage_figures(counts)
                self._send(peer, Counts(id=number, stages=stages))

    def _forget(self, peer: bytes, number: int) -> None:
        """Forget learnt costs while no request is open, in a worker's thread."""
        why = ""
        try:
            self.engine.forget()
        except (ValueError, ClusterError) as error:
            why = str(error)[:MAX_WORDS]
        self._hear(_Answered(peer, Forgotten(id=number, why=why)))

    def _status(self, peer: bytes, message: AskStatus) -> None:
        if refusal := version_refusal(message.protocol, message.version):
            self._send(peer, Refuse(why=refusal))
            return
        now, parts, engine = time.monotonic(), self.engine.parts, self.engine.status()
        facts = HeadFacts(
            strategy=engine.strategy,
            max_context=parts.max_context,
            drafter=next(iter(parts.drafters), "none"),
            draft_hash=parts.draft_hash,
            code_hash=parts.code_hash,
            sizes=self._sizes,
            uptime_s=now - self._started_at,
            epoch_at=self.engine.epoch_at,
            crossed_at=self.engine.crossed_at,
            statuses=dict(self.engine.head.statuses),
            num_active=engine.num_running,
            # prompts that are not rendered yet count too
            num_waiting=max(engine.num_waiting, len(self._calls) - engine.num_running),
            num_done=self._num_done,
            num_failed=self._num_failed,
        )
        self._send(peer, cluster_status(self.membership, facts, now))

    # What other threads say ----------------------------------------------------------------------

    def _take_event(self, event: _Event) -> None:
        match event:
            case HeadBound():
                self._apply(self.membership.head_bound(event.epoch, event.addresses))
            case StageLost():
                now = time.monotonic()
                effects = self.membership.stage_lost(event.epoch, event.rank, event.cause, now)
                self._apply(effects)
            case TokenCrossed():
                self.membership.crossed(event.epoch)
            case RequestBlamed():
                self.membership.forgive(event.epochs, time.monotonic())
            case _Submitted():
                self._submitted(event)
            case _Readable():
                self._pass_on(event.call)
            case _Answered():
                self._send(event.peer, event.message)

    def _submitted(self, event: _Submitted) -> None:
        call = event.call
        if isinstance(event.outcome, Failure):
            self._end(call, _failed_output(event.outcome))
            return
        if event.outcome is None:
            self._end(call, RequestOutput(request=0, reason=FinishReason.CANCELLED))
            return
        call.stream = event.outcome
        if call.is_dropped:
            call.stream.abort()
        call.stream.listen(lambda: self._hear(_Readable(call)))

    def _pass_on(self, call: _Call) -> None:
        """Send a client its stream's events; an answer that cannot be sent ends alone."""
        assert call.stream is not None, "it is readable"
        try:
            while call in self._calls and (event := call.stream.poll()) is not None:
                match event:
                    case TokensOut():
                        self._send_tokens(call, event)
                    case Notice():
                        self._send(call.peer, Note(id=call.id, text=event.text[:MAX_WORDS]))
                    case RequestOutput():
                        self._end(call, event)
        except Exception as error:
            log.exception("an answer could not be told")
            self._drop(call)
            self._end(call, _failed_output(Failure(cause=cause_of(error), rank=0)))

    def _send_tokens(self, call: _Call, event: TokensOut) -> None:
        """Send tokens in pieces that a message can hold."""
        tokens, text = event.tokens, event.text
        while tokens or text:
            piece = Piece(id=call.id, tokens=tokens[:MAX_PIECE], text=text[:MAX_PIECE_TEXT])
            self._send(call.peer, piece)
            tokens, text = tokens[MAX_PIECE:], text[MAX_PIECE_TEXT:]

    def _end(self, call: _Call, output: RequestOutput) -> None:
        if call not in self._calls:
            return
        self._calls.remove(call)
        self._over.append(call)
        self._num_done += output.error is None
        self._num_failed += output.error is not None
        first_epoch = self.engine.first_epoch(output.request)
        done = _done(call.id, output, epoch=self.engine.epoch, first_epoch=first_epoch)
        self._send(call.peer, done)

    def _send(self, peer: bytes, message: Control) -> None:
        try:
            self.control.send(peer, pack(message))
        except UnreachableError:
            self._apply(self.membership.unreachable(peer, time.monotonic()))
            for call in [one for one in self._calls if one.peer == peer]:
                self._calls.remove(call)
                self._drop(call)


def version_refusal(protocol: int, version: str) -> str:
    """Return why this head refuses a client of that protocol and version; empty if it does not."""
    own = flowspec.__version__
    if protocol != PROTOCOL_VERSION:
        return f"the head speaks control protocol {PROTOCOL_VERSION}, this client {protocol}"
    if version != own:
        return f"the head runs FlowSpec {own}, this client {version}; install the same on both"
    return ""


def request_of(ask: Ask, max_context: int) -> Request:
    """Return the request of an Ask. Raises ValueError for invalid sampling parameters.

    A text that is far longer than the context is not made into tokens.
    """
    most = max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * max_context)
    if (length := sum(len(turn.content) for turn in ask.turns)) > most:
        raise ValueError(
            f"the conversation has {length:,} characters, at most {most:,} are taken for the "
            f"model's context of {max_context:,} tokens; shorten it"
        )
    return Request(
        prompt=ask.prompt or [turn.model_dump() for turn in ask.turns],
        sampling=SamplingParams(
            temperature=ask.temperature,
            top_k=ask.top_k,
            top_p=ask.top_p,
            min_p=ask.min_p,
            seed=ask.seed,
            acceptance=ask.acceptance,
        ),
        max_new_tokens=ask.max_new_tokens,
        stop=ask.stop,
        eos_token_ids=ask.end_ids,
        decoding=ask.decoding.decoding() if ask.decoding is not None else None,
        exclusive=ask.exclusive,
    )


def refusal_of(error: Exception) -> Failure:
    """Return why a request could not begin; a ValueError's text names the reason."""
    if isinstance(error, PromptError):
        return Failure(cause=str(error), kind=FailureKind.BAD_PROMPT)
    if isinstance(error, ValueError):
        return Failure(cause=str(error), kind=FailureKind.REFUSED)
    if isinstance(error, ClusterError):
        return Failure(cause=error.cause, rank=error.rank)
    return Failure(cause=cause_of(error), rank=0)


def stage_figures(counts: Mapping[int, StageCounts]) -> tuple[StageFigures, ...] | None:
    """Return the stages' work for a request, as a control message.

    Returns None if a device reports values that a message cannot hold.
    """
    try:
        return tuple(
            StageFigures(
                rank=rank,
                rows_run=one.num_rows_run,
                rows_pruned=one.num_rows_pruned,
                busy_s=one.busy_s,
            )
            for rank, one in sorted(counts.items())
        )
    except ValidationError:
        return None


def _failed_output(failure: Failure) -> RequestOutput:
    """Return the end of a request that never reached the core."""
    return RequestOutput(request=0, reason=FinishReason.ERROR, error=failure)


def _done(number: int, output: RequestOutput, *, epoch: int = 0, first_epoch: int = 0) -> Done:
    """Return the end of a client's request `number` as a control message."""
    figures = None
    if output.request:
        figures = figures_of(output.stats, epoch=epoch, first_epoch=first_epoch)
    return Done(
        id=number,
        reason=output.reason,
        failure=report_of(output.error) if output.error is not None else None,
        prompt_tokens=output.num_prompt_tokens,
        figures=figures,
    )
