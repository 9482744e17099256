"""The head's core in a thread of its own: one data plane per epoch, requests that outlive epochs.

Commands come in by `post`, what happens goes out by `tell`, both from any thread to any thread.
"""

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import TypeAlias

from flowspec import wire
from flowspec.cluster.messages import Addresses, Ask, Done
from flowspec.cluster.roster import Engage, GiveUp, Halt, Member, Resume
from flowspec.cluster.stage_job import AddressBook, listen
from flowspec.codec import WireError
from flowspec.config import RunConfig
from flowspec.driver import Driver
from flowspec.engine import HeadParts, build_head
from flowspec.head import Head
from flowspec.model.config import read_config
from flowspec.model.manifest import HEAD_FOLDER
from flowspec.request import ClusterError, Completion, Request, SamplingParams, rank_name
from flowspec.text import render_chat
from flowspec.transport.base import Transport
from flowspec.transport.keys import Keys
from flowspec.transport.zmq_sockets import ZmqTransport
from flowspec.wire import Cancel, Finished, Message, Ping, Status, Submit, Tokens, WireMessage

log = logging.getLogger(__name__)
TURN_S = 0.02  # how long a command may wait while messages are waited for
IDLE_S = 0.5
PROBE_EVERY_S = 10.0


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


Command: TypeAlias = Engage | Resume | Halt | GiveUp | NewRequest | CancelTicket
Event: TypeAlias = HeadBound | StageLost | MoreText | Ended


@dataclass(slots=True)
class _Open:
    """A client's request being served."""

    ticket: int
    request: Request
    tokens: list[int] = field(default_factory=list)
    text: str = ""
    num_resumed: int = 0


class _Nowhere:
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


class HeadEngine:
    """Start with `start`; `close` ends it."""

    def __init__(
        self,
        config: RunConfig,
        parts: HeadParts,
        keys: Keys,
        tell: Callable[[Event], None],
        *,
        host: str = "0.0.0.0",
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
        hidden_size = read_config(parts.folder / HEAD_FOLDER).hidden_size
        self._row_bytes = hidden_size * (4 if config.dtype == "float32" else 2)
        self._ids = count(1)
        self._open: dict[int, _Open] = {}
        self._probe: int | None = None
        self._epoch, self._num_stages = 0, 0
        self._members: Sequence[Member] = ()
        self._book: AddressBook = {}
        self._transport: ZmqTransport | None = None
        self._driver = Driver(self.head, _Nowhere(), 0)
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

    def _run(self) -> None:
        try:
            self._suspend("the layers are not covered yet")
            while self._serve_commands():
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
            while (command := self._commands.get(wait_s > 0, wait_s or None)) is not None:
                self._do(command)
                wait_s = 0.0
        except queue.Empty:
            return True
        return False

    def _do(self, command: Command) -> None:
        match command:
            case Engage():
                self._engage(command)
            case Resume():
                self._resume(command)
            case Halt():
                self._halt(command)
            case GiveUp():
                self._inject(wire.GiveUp(error=str(command.error)))
            case NewRequest():
                self._submit(command)
            case CancelTicket():
                for number, entry in list(self._open.items()):
                    if entry.ticket == command.ticket:
                        self._inject(Cancel(request=number))
        self._pass_on()

    def _engage(self, command: Engage) -> None:
        """Listen for an epoch that is about to begin."""
        self._drop_transport()
        self._members = command.members
        self._book = {}
        self._transport = listen(0, self._host, self._port, self._book, self.keys)
        ends = self._transport.bound
        self._tell(HeadBound(command.epoch, Addresses(control=ends["control"], data=ends["data"])))

    def _resume(self, command: Resume) -> None:
        """All stages are there: go on where the accepted tokens end."""
        if self._transport is None:
            return
        for rank, there in enumerate(command.addresses):
            self._book[rank] = {"control": there.control, "data": there.data}
        self._epoch, self._num_stages = command.epoch, len(self._members)
        self.statuses = {}
        self._use(self._transport)
        rows = [member.kv_rows for member in self._members if member.kv_rows]
        self._inject(wire.Resume(num_stages=self._num_stages, kv_rows=min(rows, default=0)))
        rates = [member.link_bytes_per_s for member in self._members if member.link_bytes_per_s]
        self.head.pipe.link_row_ms = self._row_bytes / min(rates) * 1e3 if rates else 0.0
        self._is_live, self._pinged_at, self.epoch_at = True, 0.0, time.monotonic()
        self._driver.last_progress = self.epoch_at  # the silence before is not of these stages
        self._submit_probe()

    def _halt(self, command: Halt) -> None:
        log.warning("epoch %d is over: %s", command.epoch, command.error)
        for entry in self._open.values():
            entry.num_resumed += bool(entry.tokens)
        self._suspend(str(command.error))

    def _suspend(self, cause: str) -> None:
        """The stages are lost; what is accepted is here, and goes on with the next ones."""
        self._drop_transport()
        self._inject(wire.Suspend(cause=cause))

    def _drop_transport(self) -> None:
        self._is_live = False
        if self._transport is not None:
            self._transport.close()
            self._transport = None
        self._use(_Nowhere())

    def _use(self, transport: Transport) -> None:
        """Go on over another network; what clients have not been told yet stays."""
        num_stages = 0 if isinstance(transport, _Nowhere) else self._num_stages
        self._driver.go_on(transport, num_stages)

    def _turn(self) -> None:
        """One turn of the core, and a look at whether anything moves."""
        try:
            self._driver.turn(TURN_S)
            if self.head.outage is not None:
                where, _, cause = self.head.outage.partition(": ")
                raise ClusterError(where, cause)
            self._check_progress()
            self._submit_probe()
        except WireError as error:
            log.warning("dropped: %s", error)
        except ClusterError as error:
            rank = next(
                (r for r in range(1, self._num_stages + 1) if rank_name(r) == error.where), 0
            )
            self._lost(rank or 1, error.cause)
        self._pass_on()

    def _lost(self, rank: int, cause: str) -> None:
        self._suspend(cause)
        self._tell(StageLost(self._epoch, rank, cause))

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
            for rank in ranks:
                self._driver.transport.send(rank, Ping(rank=0))
        if silence < limit:
            return
        silent = [r for r in ranks if self.head.heard_at.get(r, 0.0) < self._pinged_at]
        cause = f"no answer for {limit / 2:.1f} s: it hangs" if silent else "its messages are lost"
        self._lost(silent[0] if silent else 1, cause)

    def _inject(self, message: Message) -> None:
        self._driver.inject(message)

    def _submit(self, command: NewRequest) -> None:
        ask, number = command.ask, next(self._ids)
        try:
            request = Request(
                id=number,
                prompt=render_chat(self.parts.tokenizer, [t.model_dump() for t in ask.turns]),
                sampling=SamplingParams(
                    temperature=ask.temperature,
                    top_k=ask.top_k,
                    top_p=ask.top_p,
                    min_p=ask.min_p,
                    seed=ask.seed,
                ),
                max_new_tokens=ask.max_new_tokens,
                stop=ask.stop,
                eos_token_ids=self.parts.eos_token_ids,
            )
        except ValueError as error:
            done = Done(id=0, reason="error", error=str(error)[:4000])
            self._tell(Ended(command.ticket, done))
            return
        self._open[number] = _Open(command.ticket, request)
        self._inject(Submit(request=request))

    def _submit_probe(self) -> None:
        """While nobody asks anything, a token goes through all stages now and then."""
        now = time.monotonic()
        recent = self.crossed_at is not None and now - self.crossed_at < PROBE_EVERY_S
        if self._probe is not None or self._open or (recent and self.statuses):
            return
        self._probe = number = next(self._ids)
        # cancelled at its first token, so that it is not kept for a next turn
        eos = self.parts.eos_token_ids
        prompt = (eos[0] if eos else 0,)
        self._inject(Submit(request=Request(id=number, prompt=prompt, max_new_tokens=2)))

    def _pass_on(self) -> None:
        """What the core has for its clients."""
        self.statuses.update(self.head.statuses)
        queue_ = self._driver.to_client
        while queue_:
            message = queue_.popleft()
            if isinstance(message, Tokens):
                self._tokens(message)
            elif isinstance(message, Finished):
                self._finished(message)

    def _tokens(self, message: Tokens) -> None:
        if message.tokens:
            self.crossed_at = time.monotonic()
        if message.request == self._probe:
            self._inject(Cancel(request=message.request))
        entry = self._open.get(message.request)
        if entry is not None:
            entry.tokens.extend(message.tokens)
            entry.text += message.text
            self._tell(MoreText(entry.ticket, message.tokens, message.text))

    def _finished(self, message: Finished) -> None:
        if message.request == self._probe:
            self._probe = None
            self.head.finished.pop(message.request, None)
            return
        entry = self._open.pop(message.request, None)
        if entry is None:
            return
        completion = self.head.completion(entry.request, message, entry.tokens, entry.text)
        self._tell(Ended(entry.ticket, _done(completion, entry.num_resumed)))


def _done(completion: Completion, num_resumed: int) -> Done:
    stats = completion.stats
    return Done(
        id=0,
        reason=completion.reason.value,
        error=completion.error[:4000],
        num_tokens=len(completion.tokens),
        tokens_per_s=stats.tokens_per_s,
        time_to_first_token_s=stats.time_to_first_token_s,
        tau=stats.mean_accepted_length,
        resumed=num_resumed,
    )
