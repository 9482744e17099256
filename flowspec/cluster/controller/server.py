"""The head as a server: devices and clients in one thread, the core in another."""

import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import flowspec
from flowspec.cluster.controller.epochs import (
    Blamed,
    CancelTicket,
    Crossed,
    Ended,
    Event,
    HeadBound,
    HeadEngine,
    MoreText,
    NewRequest,
    StageLost,
    failed,
)
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
from flowspec.protocol.control import (
    PROTOCOL_VERSION,
    Ask,
    AskStatus,
    Beat,
    Bye,
    Control,
    ControlError,
    Done,
    Drop,
    Echo,
    FromDevice,
    Hello,
    ModelSizes,
    Note,
    Piece,
    Progress,
    Refuse,
    StageReady,
    Trouble,
    pack,
    unpack,
)
from flowspec.request import ClusterError
from flowspec.transport.control_sockets import ControlServer, UnreachableError
from flowspec.transport.secure.tally import Tally

log = logging.getLogger(__name__)
TICK_S = 0.1
MAX_OPEN_PER_CLIENT = 64
DRAIN_POLL_S = 0.05


@dataclass(frozen=True, slots=True)
class _Caller:
    """Whose request a ticket is: the client's connection and its own number for it."""

    peer: bytes
    id: int


class HeadServer:
    """Start with `start`; `close` drains and ends it.

    `on_say` and `on_progress` are called from the control thread, for whoever watches.
    """

    def __init__(
        self,
        control: ControlServer,
        membership: Membership,
        new_engine: Callable[[Callable[[Event], None]], HeadEngine],
        *,
        sizes: ModelSizes,
        on_say: Callable[[LogEvent], None] = lambda say: None,
        on_progress: Callable[[str, Progress], None] = lambda name, progress: None,
    ) -> None:
        self.control, self.membership = control, membership
        self.failure: Exception | None = None  # of one of its threads: nothing is served any more
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.engine = new_engine(self._hear)
        self._sizes = sizes
        self._on_say, self._on_progress = on_say, on_progress
        self._callers: dict[int, _Caller] = {}
        self._next_ticket = 1
        self._num_done = self._num_failed = 0
        self._started_at = time.monotonic()
        self._bad = Tally(log, "dropped control messages")
        self._draining = ""
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Take devices and clients."""
        self.engine.start()
        self._thread.start()

    def check(self) -> None:
        """Raises ClusterError where one of its threads has failed."""
        if failure := self.failure or self.engine.failure:
            raise ClusterError("head", f"{type(failure).__name__}: {failure}; see its log")

    @property
    def is_serving(self) -> bool:
        """Whether all layers are covered now."""
        return self.membership.phase is Phase.SERVING

    def drain(
        self, why: str, timeout_s: float, in_a_hurry: Callable[[], bool] = lambda: False
    ) -> bool:
        """Take no new requests and wait for the open ones; whether all have ended."""
        self._draining = why
        end = time.monotonic() + timeout_s
        while self._callers and self._thread.is_alive() and time.monotonic() < end:
            if in_a_hurry():
                break
            time.sleep(DRAIN_POLL_S)
        return not self._callers

    def close(self) -> None:
        """Tell everybody and end. Devices keep their layers and wait for a head."""
        self._draining = self._draining or "it was stopped"
        self._closing.set()
        self.control.wake()
        self._thread.join(timeout=5.0)
        self.engine.close()
        self.control.close()

    def _hear(self, event: Event) -> None:
        self._events.put(event)
        self.control.wake()

    def _run(self) -> None:
        try:
            while not self._closing.is_set():
                for peer, frame in self.control.receive(TICK_S):
                    self._take(peer, frame)
                while not self._events.empty():
                    self._from_engine(self._events.get())
                self._apply(self.membership.tick(time.monotonic(), idle=not self._callers))
            for ticket in list(self._callers):
                self._end(
                    ticket, Done(id=0, reason="error", error=f"the head ends: {self._draining}")
                )
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

    def _serve_client(self, peer: bytes, message: Control) -> None:
        """What fails here is about this client alone, who is told."""
        try:
            self._take_from_client(peer, message)
        except Exception as error:
            log.exception("a client's message was not served")
            if isinstance(message, Ask):
                for ticket, caller in list(self._callers.items()):
                    if caller == _Caller(peer, message.id):
                        del self._callers[ticket]
                self._send(peer, failed(error).model_copy(update={"id": message.id}))
            else:
                self._send(peer, Refuse(why=failed(error).error))

    def _take_from_client(self, peer: bytes, message: Control) -> None:
        match message:
            case Ask():
                self._ask(peer, message)
            case Drop():
                for ticket, caller in list(self._callers.items()):
                    if caller == _Caller(peer, message.id):
                        self.engine.post(CancelTicket(ticket))
            case AskStatus():
                self._status(peer, message)
            case Echo():
                self._send(peer, Echo(payload="x" * message.reply_bytes))
            case _:
                self._bad.add("not for a head", message.kind)

    def _from_device(self, peer: bytes, message: FromDevice, now: float) -> None:
        if isinstance(message, StageReady):
            message = self._seen_here(peer, message)
        self._apply(self.membership.handle(peer, message, now))
        if isinstance(message, Progress):
            self._on_progress(self._name(peer), message)

    def _seen_here(self, peer: bytes, ready: StageReady) -> StageReady:
        """Where a stage listens, as this machine must write it."""
        if not (host := self.control.host_of(peer)):
            return ready
        return ready.model_copy(update={"addresses": ready.addresses.seen_here(host)})

    def _ask(self, peer: bytes, ask: Ask) -> None:
        if why := version_refusal(ask.protocol, ask.version):
            self._send(peer, Refuse(why=why))
            # for a client of a version that waits for this alone
            self._send(peer, Done(id=ask.id, reason="error", error=why))
            return
        refusal = ""
        open_here = sum(caller.peer == peer for caller in self._callers.values())
        if self._draining:
            refusal = f"the head takes no more requests: {self._draining}"
        elif self.membership.gave_up:
            refusal = f"not ready: {self.membership.missing()}"
        elif open_here >= MAX_OPEN_PER_CLIENT:
            refusal = f"{open_here} requests of this client are open already"
        if refusal:
            self._send(peer, Done(id=ask.id, reason="error", error=refusal))
            return
        ticket, self._next_ticket = self._next_ticket, self._next_ticket + 1
        self._callers[ticket] = _Caller(peer, ask.id)
        if not self.is_serving:
            text = f"not ready: {self.membership.missing()}"[:3900]
            self._send(peer, Note(id=ask.id, text=f"{text}; the answer comes once it is"))
        self.engine.post(NewRequest(ticket, ask))

    def _status(self, peer: bytes, message: AskStatus) -> None:
        if refusal := version_refusal(message.protocol, message.version):
            self._send(peer, Refuse(why=refusal))
            return
        now = time.monotonic()
        facts = HeadFacts(
            strategy=self.engine.strategy,
            max_context=self.engine.parts.max_context,
            drafter=self.engine.parts.drafter.name,
            draft_hash=self.engine.parts.draft_hash,
            code_hash=self.engine.parts.code_hash,
            sizes=self._sizes,
            uptime_s=now - self._started_at,
            epoch_at=self.engine.epoch_at,
            crossed_at=self.engine.crossed_at,
            statuses=dict(self.engine.statuses),
            num_active=len(self.engine.head.active),
            num_waiting=len(self.engine.head.admission.waiting),
            num_done=self._num_done,
            num_failed=self._num_failed,
        )
        self._send(peer, cluster_status(self.membership, facts, now))

    def _apply(self, effects: list[Effect]) -> None:
        for effect in effects:
            match effect:
                case SendToDevice():
                    self._send(effect.peer, effect.message)
                case LogEvent():
                    self._on_say(effect)
                case Halt():
                    self.engine.post(effect)
                    for caller in list(self._callers.values()):  # who has left goes meanwhile
                        left = f"{self.membership.config.give_up_s:g} s"
                        text = (
                            f"{effect.error}; the answer goes on when its layers are held again, "
                            f"and ends if nobody holds them within {left}"
                        )
                        self._send(caller.peer, Note(id=caller.id, text=text[:4000]))
                case Engage() | ResumeEpoch() | FailRequests():
                    self.engine.post(effect)

    def _from_engine(self, event: Event) -> None:
        match event:
            case HeadBound():
                self._apply(self.membership.head_bound(event.epoch, event.addresses))
            case StageLost():
                now = time.monotonic()
                effects = self.membership.stage_lost(event.epoch, event.rank, event.cause, now)
                self._apply(effects)
            case Crossed():
                self.membership.crossed(event.epoch)
            case Blamed():
                self.membership.forgive(event.epochs, time.monotonic())
            case MoreText() | Ended():
                self._pass_on(event)

    def _pass_on(self, event: MoreText | Ended) -> None:
        """An answer that cannot be told ends, and no other."""
        try:
            if isinstance(event, Ended):
                self._end(event.ticket, event.done)
            elif caller := self._callers.get(event.ticket):
                piece = Piece(id=caller.id, tokens=event.tokens, text=event.text)
                self._send(caller.peer, piece)
        except Exception as error:
            log.exception("an answer could not be told")
            self._end(event.ticket, failed(error))
            self.engine.post(CancelTicket(event.ticket))

    def _end(self, ticket: int, done: Done) -> None:
        caller = self._callers.get(ticket)
        if caller is None:
            return
        self._send(caller.peer, done.model_copy(update={"id": caller.id}))
        self._num_done += not done.error
        self._num_failed += bool(done.error)
        self._callers.pop(ticket, None)

    def _send(self, peer: bytes, message: Control) -> None:
        try:
            self.control.send(peer, pack(message))
        except UnreachableError:
            self._apply(self.membership.unreachable(peer, time.monotonic()))
            for ticket, caller in list(self._callers.items()):
                if caller.peer == peer:
                    del self._callers[ticket]
                    self.engine.post(CancelTicket(ticket))

    def _name(self, peer: bytes) -> str:
        return next((d.name for d in self.membership.devices.values() if d.peer == peer), "?")


def version_refusal(protocol: int, version: str) -> str:
    """Why this head does not serve a client of that protocol and version; empty where it does."""
    own = flowspec.__version__
    if protocol != PROTOCOL_VERSION:
        return f"the head speaks control protocol {PROTOCOL_VERSION}, this client {protocol}"
    if version != own:
        return f"the head runs FlowSpec {own}, this client {version}; install the same on both"
    return ""
