"""ClusterEngine: a head whose stages are joined devices; requests survive the loss of a device.

The membership core decides which device holds which layers, epoch by epoch. Its effects come in by
`obey`. Each epoch has its own data channel.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

from flowspec.cluster.device.stage_thread import AddressBook, listen
from flowspec.cluster.membership.roster import Engage, FailRequests, Halt, Member, ResumeEpoch
from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts, build_head
from flowspec.engine.head_engine import HeadEngine, failure_of_loss
from flowspec.model.architecture import read_config
from flowspec.protocol.codec import WireError
from flowspec.protocol.control import Addresses
from flowspec.protocol.messages import (
    AbortRequest,
    Ping,
    Resume,
    Submit,
    Suspend,
    WireMessage,
)
from flowspec.request import (
    ClusterError,
    Failure,
    Request,
    RequestOutput,
    TokensOut,
)
from flowspec.runtime.event_loop import EventLoop
from flowspec.system.address import ALL_INTERFACES
from flowspec.transport.base import Transport
from flowspec.transport.secure.keys import Keys
from flowspec.transport.zmq import ZmqTransport
from flowspec.weights.manifest import HEAD_FOLDER


@dataclass(frozen=True, slots=True)
class HeadBound:
    """The head's data sockets for this epoch are open."""

    epoch: int
    addresses: Addresses


@dataclass(frozen=True, slots=True)
class StageLost:
    """A stage takes or answers nothing."""

    epoch: int
    rank: int
    cause: str


@dataclass(frozen=True, slots=True)
class TokenCrossed:
    """A token has come through every stage of this epoch; sent for each token."""

    epoch: int


@dataclass(frozen=True, slots=True)
class RequestBlamed:
    """A request was ended because a device was lost in each of these epochs while it ran."""

    epochs: tuple[int, ...]


Order: TypeAlias = Engage | ResumeEpoch | Halt | FailRequests
EngineEvent: TypeAlias = HeadBound | StageLost | TokenCrossed | RequestBlamed


class NoTransport:
    """The transport between two epochs: nothing is sent and nothing comes."""

    def __init__(self) -> None:
        self._woken = threading.Event()

    def send(self, to: int, message: object) -> None:
        """Drop a message for stages that are gone."""

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """Wait until `wake` is called."""
        self._woken.wait(timeout_s)
        self._woken.clear()
        return ()

    def wake(self) -> None:
        """End the wait of `receive`."""
        self._woken.set()

    def close(self) -> None:
        """Do nothing: nothing is open."""


log = logging.getLogger(__name__)
PROBE_EVERY_S = 10.0
PROBE_AGAIN_S = 1.0  # after a failed one
CAUSE_S = 0.3  # wait for a lost device's message, which may come after its connection has broken


class ClusterEngine(HeadEngine):
    """Runs a head over joined devices: `start` starts it and `close` ends it.

    Its thread calls `tell` with the events that the membership core must know.
    """

    def __init__(
        self,
        config: EngineConfig,
        parts: HeadParts,
        keys: Keys,
        tell: Callable[[EngineEvent], None],
        *,
        host: str = ALL_INTERFACES,
        port: int = 0,
    ) -> None:
        self.config, self.keys = config, keys
        head = build_head(config, parts)
        head.resumes = True  # membership replaces a stage that fails
        super().__init__(head, parts, EventLoop(head, NoTransport(), 0), name="head")
        self.crossed_at: float | None = None  # when a token last came through every stage
        self.epoch_at: float | None = None  # when the epoch began
        self.epoch = 0
        self._host, self._port, self._tell = host, port, tell
        self._orders: queue.SimpleQueue[Order] = queue.SimpleQueue()
        self._taken: deque[Order] = deque()  # orders that are read but not yet executed
        hidden_size = read_config(parts.folder / HEAD_FOLDER).hidden_size
        self._row_bytes = hidden_size * (4 if config.numerics.dtype == "float32" else 2)
        self._lost_epochs: dict[int, list[int]] = {}  # epochs in which open requests lost a device
        self._first_epochs: dict[int, int] = {}  # in which they came; 0: between two
        self._probe: int | None = None
        self._probe_failed_at = 0.0
        self._crossed_epoch = 0  # the newest epoch that a token has crossed
        self._num_stages = 0
        self._members: Sequence[Member] = ()
        self._book: AddressBook = {}
        self._transport: ZmqTransport | None = None
        self._is_live = False
        self._pinged_at = 0.0

    def start(self) -> None:
        """Begin to take orders and requests."""
        self._suspend(Failure(cause="the layers are not covered yet"))
        self.start_thread()

    def obey(self, order: Order) -> None:
        """Queue an effect of the membership core; they are executed in order."""
        self._orders.put(order)
        self.post(lambda: None)

    def close(self) -> None:
        """End the thread and the data channel; open requests end with an error."""
        super().close()
        self._drop_transport()

    def first_epoch(self, request: int) -> int:
        """Return the epoch in which a request came; 0: between two, or not known any more."""
        return self._first_epochs.get(request, 0)

    @property
    def num_running(self) -> int:
        """Return the number of clients' requests on the stages, without the probe."""
        return sum(number != self._probe for number in tuple(self.head.scheduler.running))

    def named(self, failure: Failure) -> Failure:
        """Return the failure with the name of the device that holds the stage."""
        names = {member.rank: member.place.name for member in self._members}
        if failure.rank and failure.rank in names and not failure.device:
            return replace(failure, device=names[failure.rank])
        return failure

    # The engine's thread -------------------------------------------------------------------------

    def turn(self, timeout_s: float) -> None:
        """Execute orders, run one turn of the core, and check for progress."""
        while (order := self._next_order()) is not None:
            self._do(order)
            timeout_s = 0.0  # a client may have woken the previous transport
        if not self._is_live:
            self.loop.transport.receive(timeout_s)
            return
        self.loop.turn(timeout_s)
        if (outage := self.head.outage) is not None:
            raise ClusterError(outage.place or "head", outage.cause, rank=outage.rank)
        self._check_progress()
        self._submit_probe()

    def lose(self, error: ClusterError | WireError) -> None:
        """End this epoch: a stage takes nothing or has failed."""
        if isinstance(error, WireError):
            log.warning("dropped: %s", error)
            return
        if (halt := self._waiting_halt()) is not None:
            self._halt(halt)
            return
        failure = failure_of_loss(error)
        rank = failure.rank or 1
        self._tell(StageLost(self.epoch, rank, failure.cause))
        self._suspend(self.named(replace(failure, rank=rank)), blames=True)

    def _next_order(self) -> Order | None:
        if self._taken:
            return self._taken.popleft()
        try:
            return self._orders.get_nowait()
        except queue.Empty:
            return None

    def _do(self, order: Order) -> None:
        match order:
            case Engage():
                self._engage(order)
            case ResumeEpoch():
                self._resume(order)
            case Halt():
                self._halt(order)
            case FailRequests():
                self.abandon(order.failure)

    def _engage(self, order: Engage) -> None:
        """Listen for an epoch that is about to begin."""
        self._drop_transport()
        self._members = order.members
        self._book = {}
        self._transport = listen(0, self._host, self._port, self._book, self.keys)
        ends = self._transport.bound
        self._tell(HeadBound(order.epoch, Addresses(control=ends["control"], data=ends["data"])))

    def _resume(self, order: ResumeEpoch) -> None:
        """Go on from the accepted tokens: all stages are ready."""
        if self._transport is None:
            return
        for rank, there in enumerate(order.addresses):
            self._book[rank] = {"control": there.control, "data": there.data}
        self.epoch, self._num_stages = order.epoch, len(self._members)
        self._use(self._transport)
        known = [member.num_kv_tokens for member in self._members if member.num_kv_tokens]
        self.inject(Resume(num_stages=self._num_stages, num_kv_tokens=min(known, default=0)))
        rates = [member.link_bytes_per_s for member in self._members if member.link_bytes_per_s]
        self.head.pipe.link_row_ms = self._row_bytes / min(rates) * 1e3 if rates else 0.0
        self._is_live, self._pinged_at, self.epoch_at = True, 0.0, time.monotonic()
        self._probe_failed_at = 0.0
        self.loop.last_progress = self.epoch_at  # earlier silence is not the fault of these stages
        self._submit_probe()

    def _halt(self, order: Halt) -> None:
        log.warning("epoch %d is over: %s", order.epoch, order.failure)
        self._suspend(order.failure, blames=not order.in_order)

    def _suspend(self, failure: Failure, *, blames: bool = False) -> None:
        """Suspend the head: the stages are lost, accepted tokens go on with the next ones."""
        self._drop_transport()
        self.inject(Suspend(failure=failure, blames=blames))
        self._tell_blamed()
        self._abort_probe()  # the next stages get one of their own
        self._probe = None
        self.deliver()

    def _tell_blamed(self) -> None:
        """Note which requests ran when the stages were lost; report those that ended for it."""
        blamed, self.head.blamed = self.head.blamed, {}
        for number, num_losses in blamed.items():
            epochs = self._lost_epochs.setdefault(number, [])
            epochs.append(self.epoch)
            if num_losses:
                self._tell(RequestBlamed(tuple(epochs[-num_losses:])))

    def _drop_transport(self) -> None:
        self._is_live = False
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        self._use(NoTransport())

    def _use(self, transport: Transport) -> None:
        """Switch to another transport; events that clients have not read stay."""
        num_stages = 0 if isinstance(transport, NoTransport) else self._num_stages
        self.loop.go_on(transport, num_stages)

    def _waiting_halt(self) -> Halt | None:
        """Return the loss that the control connections report, if it comes soon enough.

        A device reports there what has happened to it; here its connections only break.
        """
        until = time.monotonic() + CAUSE_S
        while True:
            for order in self._taken:
                if isinstance(order, Halt) and order.epoch == self.epoch:
                    self._taken.remove(order)
                    return order
            left = until - time.monotonic()
            if left <= 0 or self.is_stopping:
                return None
            try:
                self._taken.append(self._orders.get(timeout=left))
            except queue.Empty:
                return None

    def _check_progress(self) -> None:
        """Ask all stages after half the timeout without progress; a silent one hangs."""
        now = time.monotonic()
        if not self.head.scheduler.running:
            self.loop.last_progress = now
        silence, limit = now - self.loop.last_progress, self.config.timeout_s
        if silence < limit / 2:
            self._pinged_at = 0.0
            return
        ranks = range(1, self._num_stages + 1)
        if not self._pinged_at:
            self._pinged_at = now
            for rank in ranks:
                self.loop.transport.send(rank, Ping(rank=0))
        if silence < limit:
            return
        silent = [r for r in ranks if self.head.heard_at.get(r, 0.0) < self._pinged_at]
        cause = f"no answer for {limit / 2:.1f} s: it hangs" if silent else "its messages are lost"
        raise ClusterError.of_rank(silent[0] if silent else 1, cause)

    def _submit_probe(self) -> None:
        """Send a token through all stages from time to time while no request is open."""
        now = time.monotonic()
        recent = self.crossed_at is not None and now - self.crossed_at < PROBE_EVERY_S
        if self._probe is not None or self.is_busy or (recent and self.head.statuses):
            return
        if now - self._probe_failed_at < PROBE_AGAIN_S:
            return
        with self._lock:
            if self._streams:
                return  # a client's request is on its way to the core
            self._probe = self._new_id()
        # The probe is aborted at its first token, so that it is not cached.
        eos = self.parts.eos_token_ids
        prompt = (eos[0] if eos else 0,)
        self.inject(Submit(request=Request(id=self._probe, prompt=prompt, max_new_tokens=2)))

    def register(self, request: Request) -> None:
        """Note the epoch in which a request has come; a probe gives way to it."""
        self._first_epochs[request.id] = self.epoch if self._is_live else 0
        while len(self._first_epochs) > MAX_REMEMBERED:
            del self._first_epochs[next(iter(self._first_epochs))]
        self._abort_probe()
        super().register(request)

    def forget_now(self) -> None:
        """Forget learnt costs, after aborting the probe; runs in the engine's thread."""
        self._abort_probe()
        super().forget_now()

    def _abort_probe(self) -> None:
        if self._probe is not None:
            self.inject(AbortRequest(request=self._probe))

    def take_event(self, event: TokensOut | RequestOutput) -> None:
        """Pass an event on; those of the probe are used here."""
        if isinstance(event, TokensOut) and event.tokens:
            self._note_crossing()
        if event.request != self._probe:
            if isinstance(event, RequestOutput):
                self._lost_epochs.pop(event.request, None)
            super().take_event(event)
        elif isinstance(event, TokensOut):
            self.inject(AbortRequest(request=event.request))
        else:
            self._probe = None
            if event.error is not None:
                self._probe_failed_at = time.monotonic()

    def _note_crossing(self) -> None:
        self.crossed_at = time.monotonic()
        if self._crossed_epoch != self.epoch:
            self._crossed_epoch = self.epoch
            self._tell(TokenCrossed(self.epoch))


MAX_REMEMBERED = 256  # requests whose first epoch is known
