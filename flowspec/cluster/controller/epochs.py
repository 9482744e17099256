"""The head's core in a thread of its own: one data plane per epoch, requests that outlive epochs.

Commands come in by `post`, what happens goes out by `tell`, both from any thread to any thread.
"""

import logging
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import TypeAlias

from flowspec.cluster.controller.requests import (
    AskedDecoding,
    check_fits,
    check_measurable,
    request_of,
)
from flowspec.cluster.controller.stage_statistics import StageWatch
from flowspec.cluster.device.stage_thread import AddressBook, listen
from flowspec.cluster.membership.roster import Engage, GiveUp, Halt, Member, Resume
from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts, build_head
from flowspec.head.admission import TooLargeError
from flowspec.head.head import Head
from flowspec.model.architecture import read_config
from flowspec.protocol import messages as wire
from flowspec.protocol.codec import WireError
from flowspec.protocol.control import Addresses, Ask, Decoding, Done, figures_of
from flowspec.protocol.messages import (
    AbortRequest,
    Finished,
    Message,
    Ping,
    Status,
    Submit,
    Tokens,
    WireMessage,
)
from flowspec.request import (
    ClusterError,
    Completion,
    FinishReason,
    Request,
    cause_of,
    error_of,
    rank_name,
)
from flowspec.runtime.event_loop import EventLoop
from flowspec.runtime.failures import Failures, attempt, is_fatal
from flowspec.system.address import ALL_INTERFACES
from flowspec.tokenizer import PromptError
from flowspec.transport.base import Transport
from flowspec.transport.secure.keys import Keys
from flowspec.transport.zmq import ZmqTransport
from flowspec.weights.manifest import HEAD_FOLDER


@dataclass(frozen=True, slots=True)
class NewRequest:
    """Answer `ask`; all that is told about it carries `ticket`."""

    ticket: int
    ask: Ask


@dataclass(frozen=True, slots=True)
class CancelTicket:
    """End it now."""

    ticket: int


@dataclass(frozen=True, slots=True)
class HeadBound:
    """The head's data sockets for this epoch."""

    epoch: int
    addresses: Addresses


@dataclass(frozen=True, slots=True)
class StageLost:
    """A stage takes or answers nothing."""

    epoch: int
    rank: int
    cause: str


@dataclass(frozen=True, slots=True)
class Crossed:
    """A token has come through every stage of this epoch; told once for each."""

    epoch: int


@dataclass(frozen=True, slots=True)
class Blamed:
    """A request has ended, for in each of these epochs a device was lost by its doing."""

    epochs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MoreText:
    """Newly accepted tokens of a request."""

    ticket: int
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Ended:
    """A request is over; `done.id` is left to whoever knows the client."""

    ticket: int
    done: Done


Command: TypeAlias = Engage | ResumeEpoch | Halt | FailRequests | NewRequest | CancelTicket
Event: TypeAlias = HeadBound | StageLost | Crossed | Blamed | MoreText | Ended


class Nowhere:
    """Between epochs: nothing can be sent, nothing comes."""

    def send(self, to: int, message: object) -> None:
        """What was meant for stages that are gone."""

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """Nothing."""
        del timeout_s
        return ()

    def wake(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Nothing to close."""


MAX_ERROR = 4000  # characters that a client is told


@dataclass(slots=True)
class OpenRequest:
    """One that is being served."""

    ticket: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    num_resumed: int = 0
    first_epoch: int = 0  # in which it came; 0: between two
    lost_epochs: list[int] = field(default_factory=list)  # in which it was served as they were lost
    watch: StageWatch | None = None  # of one that is measured
    is_fresh: bool = False  # the first one under a strategy just put in force


@dataclass(frozen=True, slots=True)
class Measured:
    """A measured request that is over; its figures wait for the stages' last word, not for long."""

    entry: OpenRequest
    completion: Completion
    watch: StageWatch
    until: float

    def is_settled(self, now: float) -> bool:
        """Whether nothing more is waited for."""
        return self.watch.is_settled or now >= self.until

    def done(self, epoch: int, *, live: bool) -> Done:
        """Its end with figures; the stages' own only where they are there."""
        stats, watch = self.completion.stats, self.watch
        figures = figures_of(
            replace(stats, num_resumes=max(stats.num_resumes, int(watch.was_late))),
            epoch=epoch,
            first_epoch=self.entry.first_epoch,
            alone=watch.alone,
            fresh=self.entry.is_fresh,
            stages=watch.figures() if live else None,
        )
        return done_of(self.entry, self.completion).model_copy(update={"figures": figures})


def done_of(entry: OpenRequest, completion: Completion) -> Done:
    """The end of a request; `id` is left to whoever knows the client."""
    stats = completion.stats
    return Done(
        id=0,
        reason=completion.reason.value,
        error=plain(completion.error),
        refused=bool(completion.error) and not isinstance(error_of(completion.error), ClusterError),
        num_tokens=len(completion.tokens),
        tokens_per_s=stats.tokens_per_s,
        time_to_first_token_s=stats.time_to_first_token_s,
        tau=stats.mean_accepted_length,
        resumed=entry.num_resumed,
        prompt_tokens=len(entry.request.prompt),
    )


def refused(error: Exception, num_prompt: int) -> Done:
    """The end of a request that could not begin: a ValueError says what is wrong with it."""
    if not isinstance(error, ValueError):
        log.warning("a request cannot begin: %s", cause_of(error), exc_info=error)
        return failed(error, num_prompt)
    return Done(
        id=0,
        reason="error",
        error=plain(str(error)),
        prompt_tokens=num_prompt,
        too_large=isinstance(error, TooLargeError),
        refused=True,
        bad_prompt=isinstance(error, PromptError),
    )


def failed(error: Exception, num_prompt: int = 0) -> Done:
    """The end of a request at which the head itself has failed."""
    text = plain(f"{rank_name(0)}: {cause_of(error)}")
    return Done(id=0, reason="error", error=text, prompt_tokens=num_prompt)


def plain(text: str) -> str:
    """As a control message may hold it."""
    return text[:MAX_ERROR].encode(errors="replace").decode()


log = logging.getLogger(__name__)
TURN_S = 0.02  # how long a command may wait while messages are waited for
IDLE_S = 0.5
PROBE_EVERY_S = 10.0
PROBE_AGAIN_S = 1.0  # after one that failed
CAUSE_S = 0.3  # for a lost device's own word, which may come after its connection has broken
SETTLE_S = 2.0  # for the stages to say what they did for a request that is measured


class HeadEngine:
    """Start with `start`; `close` ends it."""

    def __init__(
        self,
        config: EngineConfig,
        parts: HeadParts,
        keys: Keys,
        tell: Callable[[Event], None],
        *,
        host: str = ALL_INTERFACES,
        port: int = 0,
    ) -> None:
        self.config, self.parts, self.keys = config, parts, keys
        self.head: Head = build_head(config, parts)
        self.head.resumes = True  # membership replaces a stage that fails
        self.failure: Exception | None = None  # of its thread: it does nothing any more
        self.crossed_at: float | None = None  # when a token last came through every stage
        self.epoch_at: float | None = None  # when the epoch began
        self.statuses: dict[int, Status] = {}
        self._host, self._port = host, port
        self._tell = tell
        self._commands: queue.SimpleQueue[Command | None] = queue.SimpleQueue()
        self._taken: deque[Command | None] = deque()  # commands that are looked at, not yet obeyed
        hidden_size = read_config(parts.folder / HEAD_FOLDER).hidden_size
        self._row_bytes = hidden_size * (4 if config.numerics.dtype == "float32" else 2)
        self._ids = count(1)
        self._open: dict[int, OpenRequest] = {}
        self._over: list[Measured] = []
        self._decoding = AskedDecoding(config, drafter=parts.drafter.name)
        self._probe: int | None = None
        self._probe_failed_at = 0.0
        self._failures = Failures()
        self._wants_statuses = False  # a measured request has had its first token
        self._crossed_epoch = 0  # the newest that a token has crossed
        self._epoch, self._num_stages = 0, 0
        self._members: Sequence[Member] = ()
        self._book: AddressBook = {}
        self._transport: ZmqTransport | None = None
        self._driver = EventLoop(self.head, Nowhere(), 0)
        self._is_live = False
        self._pinged_at = 0.0
        self._thread = threading.Thread(target=self._run, name="head", daemon=True)

    def start(self) -> None:
        """Begin to take commands."""
        self._thread.start()

    def post(self, command: Command) -> None:
        """Have `command` done, in order."""
        self._commands.put(command)

    def close(self) -> None:
        """End the thread; what is open stays unanswered."""
        self._commands.put(None)
        self._thread.join(timeout=10.0)

    @property
    def num_open(self) -> int:
        """Clients' requests that are not over."""
        return len(self._open)

    @property
    def strategy(self) -> str:
        """The one in force; a client's own goes some seconds after its last answer."""
        return self._decoding.strategy

    def _run(self) -> None:
        try:
            self._suspend("the layers are not covered yet")
            while self._serve_commands():
                self._put_back()
                if self._is_live:
                    self._turn()
        except Exception as error:
            log.exception("the head failed")
            self.failure = error
        finally:
            self._drop_transport()

    def _serve_commands(self) -> bool:
        """Do what was asked for; waits for it only while there is nothing else to do."""
        wait_s = 0.0 if self._is_live else IDLE_S
        try:
            while (command := self._next_command(wait_s)) is not None:
                self._do(command)
                wait_s = 0.0
        except queue.Empty:
            return True
        return False

    def _next_command(self, wait_s: float) -> Command | None:
        """None: end. Raises queue.Empty where there is none in time."""
        if self._taken:
            return self._taken.popleft()
        return self._commands.get(wait_s > 0, wait_s or None)

    def _do(self, command: Command) -> None:
        with self._noticing_losses():
            self._obey(command)

    def _obey(self, command: Command) -> None:
        match command:
            case Engage():
                self._engage(command)
            case ResumeEpoch():
                self._resume(command)
            case Halt():
                self._halt(command)
            case FailRequests():
                self._inject(wire.GiveUp(error=str(command.error)))
            case NewRequest():
                self._submit(command)
            case CancelTicket():
                for number, entry in list(self._open.items()):
                    if entry.ticket == command.ticket:
                        self._inject(AbortRequest(request=number))

    def _engage(self, command: Engage) -> None:
        """Listen for an epoch that is about to begin."""
        self._drop_transport()
        self._members = command.members
        self._book = {}
        self._transport = listen(0, self._host, self._port, self._book, self.keys)
        ends = self._transport.bound
        self._tell(HeadBound(command.epoch, Addresses(control=ends["control"], data=ends["data"])))

    def _resume(self, command: ResumeEpoch) -> None:
        """All stages are there: go on where the accepted tokens end."""
        if self._transport is None:
            return
        for rank, there in enumerate(command.addresses):
            self._book[rank] = {"control": there.control, "data": there.data}
        self._epoch, self._num_stages = command.epoch, len(self._members)
        self.statuses = {}
        self._use(self._transport)
        rows = [member.num_kv_tokens for member in self._members if member.num_kv_tokens]
        self._inject(wire.Resume(num_stages=self._num_stages, num_kv_tokens=min(rows, default=0)))
        rates = [member.link_bytes_per_s for member in self._members if member.link_bytes_per_s]
        self.head.pipe.link_row_ms = self._row_bytes / min(rates) * 1e3 if rates else 0.0
        self._is_live, self._pinged_at, self.epoch_at = True, 0.0, time.monotonic()
        self._probe_failed_at = 0.0
        self._driver.last_progress = self.epoch_at  # the silence before is not of these stages
        self._submit_probe()

    def _halt(self, command: Halt) -> None:
        log.warning("epoch %d is over: %s", command.epoch, command.error)
        for entry in self._open.values():
            entry.num_resumed += bool(entry.tokens)
        self._suspend(str(command.error), blames=not command.in_order)

    def _suspend(self, cause: str, *, blames: bool = False) -> None:
        """The stages are lost; what is accepted is here, and goes on with the next ones."""
        self._drop_transport()
        for watch in self._watches():
            watch.lose()
        self._inject(wire.Suspend(cause=cause, blames=blames))
        self._tell_blamed()
        if self._probe is not None:  # the next stages get one of their own
            self._inject(AbortRequest(request=self._probe))
            self._probe = None

    def _tell_blamed(self) -> None:
        """Note who was served as the stages were lost; tell of those that have ended with it."""
        blamed, self.head.blamed = self.head.blamed, {}
        for number, num_losses in blamed.items():
            if (entry := self._open.get(number)) is not None:
                entry.lost_epochs.append(self._epoch)
                if num_losses:
                    self._tell(Blamed(tuple(entry.lost_epochs[-num_losses:])))

    def _drop_transport(self) -> None:
        self._is_live = False
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        self._use(Nowhere())

    def _use(self, transport: Transport) -> None:
        """Go on over another network; what clients have not been told yet stays."""
        num_stages = 0 if isinstance(transport, Nowhere) else self._num_stages
        self._driver.go_on(transport, num_stages)

    def _turn(self) -> None:
        """One turn of the core, and a look at whether anything moves."""
        with self._noticing_losses():
            self._driver.turn(TURN_S)
            if self.head.outage is not None:
                where, _, cause = self.head.outage.partition(": ")
                raise ClusterError(where, cause)
            self._check_progress()
            self._submit_probe()

    @contextmanager
    def _noticing_losses(self) -> Iterator[None]:
        """A stage that takes nothing, or has failed, is the end of this epoch alone.

        What the core has for its clients is passed on, also what a loss has ended.
        """
        try:
            yield
            self._pass_on()
        except WireError as error:
            log.warning("dropped: %s", error)
        except ClusterError as error:
            if (halt := self._waiting_halt()) is not None:
                self._halt(halt)
            else:
                rank = self._rank_of(error.where)
                self._lost(rank or 1, error.cause)
            self._pass_on()  # nothing is sent any more, so nothing fails

    def _waiting_halt(self) -> Halt | None:
        """What the control connections say of a loss that is noticed here, if soon enough.

        A device tells there what has happened to it; here its connections only break.
        """
        until = time.monotonic() + CAUSE_S
        while True:
            for command in self._taken:
                if isinstance(command, Halt) and command.epoch == self._epoch:
                    self._taken.remove(command)
                    return command
            left = until - time.monotonic()
            if None in self._taken or left <= 0:
                return None
            try:
                self._taken.append(self._commands.get(timeout=left))
            except queue.Empty:
                return None

    def _rank_of(self, where: str) -> int:
        """The stage that an error's place is; 0: none."""
        return next((r for r in range(1, self._num_stages + 1) if rank_name(r) == where), 0)

    def _place_of(self, rank: int) -> str:
        """A stage, and on which device it is."""
        names = {member.rank: member.place.name for member in self._members}
        return f"{rank_name(rank)} on {names[rank]}" if rank in names else rank_name(rank)

    def _named(self, error: str) -> str:
        """A request's error, with the device's name where a stage's begins it."""
        where, colon, cause = error.partition(": ")
        rank = self._rank_of(where)
        return f"{self._place_of(rank)}{colon}{cause}" if rank else error

    def _lost(self, rank: int, cause: str) -> None:
        self._tell(StageLost(self._epoch, rank, cause))
        self._suspend(f"{self._place_of(rank)}: {cause}", blames=True)

    def _check_progress(self) -> None:
        """Nothing has moved for half the timeout: ask all stages; who stays silent hangs."""
        now = time.monotonic()
        if not self.head.active:
            self._driver.last_progress = now
        silence, limit = now - self._driver.last_progress, self.config.timeout_s
        if silence < limit / 2:
            self._pinged_at = 0.0
            return
        ranks = range(1, self._num_stages + 1)
        if not self._pinged_at:
            self._pinged_at = now
            self._ping_stages()
        if silence < limit:
            return
        silent = [r for r in ranks if self.head.heard_at.get(r, 0.0) < self._pinged_at]
        cause = f"no answer for {limit / 2:.1f} s: it hangs" if silent else "its messages are lost"
        self._lost(silent[0] if silent else 1, cause)

    def _ping_stages(self) -> None:
        for rank in range(1, self._num_stages + 1):
            self._driver.transport.send(rank, Ping(rank=0))

    def _watches(self) -> list[StageWatch]:
        return [entry.watch for entry in self._open.values() if entry.watch is not None]

    def _inject(self, message: Message) -> None:
        self._driver.inject(message)

    def _submit(self, command: NewRequest) -> None:
        """Build the request and have it served; whatever fails ends it, and it alone."""
        ask, num_prompt = command.ask, 0
        try:
            request = request_of(ask, next(self._ids), self.parts)
            num_prompt = len(request.prompt)
            if ask.decoding is not None:
                check_measurable(request, self.parts.max_context)
            self._use_decoding(ask.decoding)
            if ask.decoding is not None:
                check_fits(request, self.head)
            entry = self._enter(command, request)
        except Exception as error:
            if is_fatal(error):
                raise
            self._tell(Ended(command.ticket, refused(error, num_prompt)))
            return
        self._inject(Submit(request=entry.request))

    def _enter(self, command: NewRequest, request: Request) -> OpenRequest:
        for other in self._watches():
            other.alone = False
        for one in self._over:  # served alone, but what stages say from now on is of both
            one.watch.is_whole = False
        entry = OpenRequest(command.ticket, request)
        entry.first_epoch = self._epoch if self._is_live else 0
        if command.ask.decoding is not None:
            entry.watch = StageWatch(self.head, alone=not self._open)
            entry.is_fresh = self._decoding.use(time.monotonic())
        self._open[request.id] = entry
        return entry

    def _use_decoding(self, wanted: Decoding | None) -> None:
        """Have this strategy answer from now on. Raises ValueError where that cannot be.

        Who asks for none takes what is in force while others are served: the text is the same.
        """
        self._decoding.find(wanted)
        changes = wanted != self._decoding.in_force
        if wanted is None and (self._open or not changes):
            return
        if self._open and changes:
            raise ValueError(
                "the head serves another request now, so its strategy cannot be changed; ask again "
                "when it is over, `flowspec status` shows how many there are"
            )
        if self._probe is not None and not self._open:  # else it would be measured too
            with self._noticing_losses():  # who asks waits for the next stages then
                self._inject(AbortRequest(request=self._probe))
        if changes:
            self._decoding.put_in_force(wanted, self.head)

    def _put_back(self) -> None:
        """Nobody measures any more: serve's own strategy is in force again, for probes too."""
        if self._decoding.is_left(time.monotonic()) and not self._open and not self._over:
            self._use_decoding(None)

    def _submit_probe(self) -> None:
        """While nobody asks anything, a token goes through all stages now and then."""
        now = time.monotonic()
        recent = self.crossed_at is not None and now - self.crossed_at < PROBE_EVERY_S
        if self._probe is not None or self._open or self._over or (recent and self.statuses):
            return  # a measured one that is over counts what the stages do until they have said it
        if now - self._probe_failed_at < PROBE_AGAIN_S:
            return
        self._probe = next(self._ids)
        # cancelled at its first token, so that it is not kept for a next turn
        eos = self.parts.eos_token_ids
        prompt = (eos[0] if eos else 0,)
        self._inject(Submit(request=Request(id=self._probe, prompt=prompt, max_new_tokens=2)))

    def _pass_on(self) -> None:
        """What the core has for its clients."""
        self.statuses.update(self.head.statuses)
        queue_ = self._driver.to_client
        while queue_:
            message = queue_.popleft()
            if isinstance(message, Tokens):
                if message.tokens:
                    self._note_crossing()
                if message.request == self._probe:
                    self._inject(AbortRequest(request=message.request))
                with self._failures.of(message.request):
                    self._tokens(message)
            elif isinstance(message, Finished):
                with self._failures.of(message.request):
                    self._finished(message)
            self._end_unserved()  # before it is told of more
        for number, entry in list(self._open.items()):
            if entry.watch is not None:
                with self._failures.of(number):
                    entry.watch.look()
        self._end_settled()
        self._end_unserved()
        if self._wants_statuses:
            self._wants_statuses = False
            self._ping_stages()

    def _end_unserved(self) -> None:
        """Requests that the core serves well, but whose clients cannot be told so."""
        ended = []
        for number, error in self._failures.take().items():
            entry = self._open.pop(number, None)
            if entry is not None:
                self._tell(Ended(entry.ticket, failed(error, len(entry.request.prompt))))
                ended.append(number)
        for number in ended:  # a stage may be lost on the way: the clients know already
            self._inject(AbortRequest(request=number))

    def _note_crossing(self) -> None:
        self.crossed_at = time.monotonic()
        if self._crossed_epoch != self._epoch:
            self._crossed_epoch = self._epoch
            self._tell(Crossed(self._epoch))

    def _tokens(self, message: Tokens) -> None:
        entry = self._open.get(message.request)
        if entry is not None:
            entry.tokens.extend(message.tokens)
            entry.text += message.text
            self._tell(MoreText(entry.ticket, message.tokens, message.text))
            if entry.watch is not None and message.tokens and entry.watch.first_token():
                self._wants_statuses = True

    def _finished(self, message: Finished) -> None:
        entry = self._open.get(message.request)
        if entry is None:
            self.head.finished.pop(message.request, None)
            if message.request == self._probe:
                self._probe = None
                if message.reason is FinishReason.ERROR:
                    self._probe_failed_at = time.monotonic()
            return
        if entry.watch is not None:
            self._decoding.used_at = time.monotonic()
        completion = self.head.completion(
            entry.request,
            replace(message, error=self._named(message.error)),
            entry.tokens,
            entry.text,
        )
        if entry.watch is None or completion.error:
            self._tell(Ended(entry.ticket, done_of(entry, completion)))
        else:
            until = time.monotonic() + SETTLE_S
            self._over.append(Measured(entry, completion, entry.watch, until))
        del self._open[message.request]

    def _end_settled(self) -> None:
        """Measured requests of which there is no more to hear."""
        for one in list(self._over):
            if not self._is_live or one.is_settled(time.monotonic()):
                self._over.remove(one)
                done = attempt(partial(one.done, self._epoch, live=self._is_live))
                if isinstance(done, Exception):
                    log.warning("an answer's figures cannot be told", exc_info=done)
                    done = failed(done, len(one.entry.request.prompt))
                self._tell(Ended(one.entry.ticket, done))
