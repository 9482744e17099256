"""HeadEngine: runs a head's core in its own thread, with the streams of its requests."""

import contextlib
import logging
import queue
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import TypeAlias

import torch

from flowspec.engine.build import HeadParts
from flowspec.engine.engine import EngineStatus, StageStatus
from flowspec.engine.status import progress_of, stage_status
from flowspec.engine.stream import Notice, Stream
from flowspec.head.head import Head
from flowspec.head.request_state import RequestState
from flowspec.protocol.codec import WireError
from flowspec.protocol.messages import AbandonRequests, AbortRequest, ForgetCosts, Message, Submit
from flowspec.request import (
    ClusterError,
    Failure,
    FinishReason,
    Request,
    RequestOutput,
    TokensOut,
    cause_of,
)
from flowspec.runtime.event_loop import EventLoop

log = logging.getLogger(__name__)
TURN_S = 0.2  # longest wait for a message while requests are open
IDLE_S = 0.5  # and while none is open
JOIN_S = 5.0
FORGET_S = 5.0
POLL_S = 0.2
COUNTS_S = 2.0  # for the stages to report their work for a finished request

Command: TypeAlias = Callable[[], None]


class HeadEngine(ABC):
    """Runs `loop` in a thread; subclasses watch the stages and replace lost ones.

    Clients may call from any thread. The engine's own thread executes their commands in order.
    """

    def __init__(self, head: Head, parts: HeadParts, loop: EventLoop, *, name: str) -> None:
        self.head, self.parts, self.loop = head, parts, loop
        self.failure: Exception | None = None  # of the thread; nothing is served any more
        self._lock = threading.Lock()  # for `_streams`, `_closed` and the next id
        self._streams: dict[int, Stream] = {}
        self._next_id = 1
        self._counts_due: dict[int, tuple[Stream, float]] = {}  # and their deadlines
        self._num_finished = self._num_failed = 0
        self._closed = ""  # the reason why no more requests are taken
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._num_threads = torch.get_num_threads()  # torch keeps it per thread
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # Any thread ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Begin a request while others run.

        Raises ValueError for errors in the request that are known at once, and ClusterError if the
        engine is closed or has failed.
        """
        self._check_open()
        self.head.resolve(request.decoding)
        request = self.parts.render(request)
        with self._lock:
            self._check_open()  # closing the engine ends the requests registered before
            stream = Stream(self._new_id(), abort=self.abort)
            self._streams[stream.request] = stream
            # inside the lock, so that the core gets the ids in order
            self.post(lambda: self._submit(replace(request, id=stream.request)))
        return stream

    def _check_open(self) -> None:
        self.check()
        if self._closed:
            raise ClusterError("head", f"it takes no more requests: {self._closed}", rank=0)

    def _new_id(self) -> int:
        """Return the next request's number; the caller holds the lock."""
        number, self._next_id = self._next_id, self._next_id + 1
        return number

    def abort(self, request: int) -> None:
        """End a request now; a finished one stays as it is."""
        self.post(lambda: self.inject(AbortRequest(request=request)))

    def check(self) -> None:
        """Raise ClusterError if the engine's thread has failed."""
        if self.failure is not None:
            raise ClusterError("head", f"{cause_of(self.failure)}; see its log", rank=0)

    def status(self) -> EngineStatus:
        """Return the engine's present status."""
        outage = self.head.outage
        why = self._closed or ("" if self.failure is None else cause_of(self.failure))
        if not why and outage is not None:
            why = str(self.named(outage))
        return EngineStatus(
            healthy=not why,
            why=why,
            model=self.parts.manifest.model_id,
            num_stages=self.num_stages_now,
            max_context=self.parts.max_context,
            strategy=self.head.decoding.strategy,
            drafters=tuple(self.parts.drafters),
            num_running=(num_running := self.num_running),
            num_waiting=max(0, len(self._streams) - num_running),
            num_finished=self._num_finished,
            num_failed=self._num_failed,
            progress=progress_of(self.head.scheduler.running.values()),
            stages=self.stages_status(),
        )

    @property
    def num_stages_now(self) -> int:
        """Return the number of serving stages; 0 while some are missing."""
        return self.head.pipe.num_stages if self.head.outage is None else 0

    @property
    def num_running(self) -> int:
        """Return the number of clients' requests on the stages."""
        return len(self.head.scheduler.running)

    def stages_status(self) -> dict[int, StageStatus]:
        """Return the newest totals of each stage, by rank."""
        return {rank: stage_status(one) for rank, one in dict(self.head.statuses).items()}

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for the open ones; return whether all have ended."""
        with self._lock:
            self._closed = self._closed or "it is draining"
        end = time.monotonic() + timeout_s
        while self._streams and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        return not self._streams

    def forget(self) -> None:
        """Forget learnt costs and acceptance.

        Raises ValueError if requests are open, and ClusterError if the engine is closed, has failed
        or does not answer.
        """
        done = threading.Event()
        num_open: list[int] = []

        def forget() -> None:
            num_open.append(len(self._streams))
            if not num_open[0]:
                self.forget_now()
            done.set()

        self._check_forget(len(self._streams))
        self.post(forget)
        end = time.monotonic() + FORGET_S
        while not done.wait(POLL_S):
            self._check_forget(0)
            if time.monotonic() > end:
                raise ClusterError("head", f"no answer within {FORGET_S:.0f} s", rank=0)
        self._check_forget(num_open[0])

    def _check_forget(self, num_open: int) -> None:
        self.check()
        if self.is_stopping:
            raise ClusterError("head", self._closed, rank=0)
        if num_open:
            raise ValueError(f"{num_open} requests are open; what they have learnt is in use")

    def close(self) -> None:
        """End the thread; open requests end with an error. It is safe to call twice."""
        self.stop_thread("the engine was closed")

    def post(self, command: Command) -> None:
        """Queue a command for the engine's thread; commands run in order."""
        self._commands.put(command)
        self.loop.transport.wake()

    # The engine's thread -------------------------------------------------------------------------

    def start_thread(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop_thread(self, why: str) -> None:
        """Stop the thread, if it runs, and end the open requests."""
        with self._lock:
            self._closed = why if not self._stopping.is_set() else self._closed
        self._stopping.set()
        self.post(lambda: None)
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=JOIN_S)
        self._end_all(Failure(cause=why, rank=0))  # those of a thread that never ran or hangs

    @property
    def is_stopping(self) -> bool:
        """Return whether the thread is asked to stop; long waits in it end then."""
        return self._stopping.is_set()

    @property
    def is_busy(self) -> bool:
        """Return whether a request is open in the core."""
        return bool(self.head.scheduler.running or self.head.scheduler.waiting)

    @abstractmethod
    def turn(self, timeout_s: float) -> None:
        """Run one turn of the loop and check the stages. Raises ClusterError if one is lost."""

    @abstractmethod
    def lose(self, error: ClusterError | WireError) -> None:
        """Handle a lost stage, or a frame that is no message, in a turn or a command."""

    def named(self, failure: Failure) -> Failure:
        """Return the failure with the name of the stage's device, if it has one."""
        return failure

    def forget_now(self) -> None:
        """Forget learnt costs, in the engine's thread, while no client's request is open."""
        self.inject(ForgetCosts())

    def inject(self, message: Message) -> None:
        """Give the core a message of its own process."""
        self.loop.inject(message)

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            while not self._stopping.is_set():
                try:
                    self.do_commands()
                    self.turn(TURN_S if self.is_busy else IDLE_S)
                except (ClusterError, WireError) as error:
                    self.lose(error)
                self.deliver()
            if self.is_busy:
                with contextlib.suppress(ClusterError):  # of a lost stage
                    self.abandon(Failure(cause=self._closed, rank=0))
        except Exception as error:
            log.exception("the head has failed")
            with self._lock:
                self.failure = error
            self._end_all(Failure(cause=f"{cause_of(error)}; see its log", rank=0))

    def do_commands(self, timeout_s: float = 0.0) -> None:
        """Do what clients want; wait at most `timeout_s` seconds for the first command."""
        while True:
            try:
                command = self._commands.get(block=timeout_s > 0.0, timeout=timeout_s)
            except queue.Empty:
                return
            timeout_s = 0.0
            command()

    def _submit(self, request: Request) -> None:
        if not self.is_busy:
            self.loop.last_progress = time.monotonic()
        self.inject(Submit(request=request))
        self.register(request)

    def _why_it_waits(self, request: Request) -> str:
        """Return for the user why a request waits although there is room; "" if it does not."""
        scheduler = self.head.scheduler
        if not any(one.id == request.id for one in scheduler.waiting):
            return ""  # the core has refused it, so it is over
        states = [*scheduler.running.values(), *scheduler.waiting]
        others = [one.request for one in states if one.id != request.id]
        if others and request.exclusive:
            return f"it runs alone, so it waits for the ends of {len(others)} other requests"
        if any(other.exclusive for other in others):
            return "it waits for the end of a request that runs alone"
        return ""

    def register(self, request: Request) -> None:
        """Tell a new request's reader if it waits for others."""
        stream = self._streams.get(request.id)
        if stream is not None and (why := self._why_it_waits(request)):
            stream.put(Notice(text=why))

    def deliver(self) -> None:
        """Give the streams the core's events for its clients."""
        events = self.loop.to_client
        while events:
            event = events.popleft()
            assert isinstance(event, TokensOut | RequestOutput), "the head speaks to clients so"
            self.take_event(event)
        for request, (stream, until) in list(self._counts_due.items()):
            counts = self.head.finished.get(request)
            is_whole = counts is not None and len(counts) == self.head.pipe.num_stages
            if counts is None or is_whole or time.monotonic() >= until:
                del self._counts_due[request]
                stream.put_counts(dict(counts) if counts is not None and is_whole else None)

    def take_event(self, event: TokensOut | RequestOutput) -> None:
        """Pass on one event of a request; those of requests without a stream are ignored."""
        stream = self._streams.get(event.request)
        if stream is None:
            return
        if isinstance(event, TokensOut):
            stream.put(event)
            return
        self._counts_due[event.request] = stream, time.monotonic() + COUNTS_S
        self._end(event)

    def _end(self, output: RequestOutput) -> None:
        with self._lock:
            stream = self._streams.pop(output.request, None)
        if stream is not None:
            self._num_finished += output.error is None
            self._num_failed += output.error is not None
            if output.error is not None:
                output = replace(output, error=self.named(output.error))
            stream.put(output)

    def abandon(self, failure: Failure) -> None:
        """End every open request with this failure; the core keeps their tokens."""
        try:
            self.inject(AbandonRequests(failure=failure))
        finally:  # clients are told even if a stage is not
            self.deliver()

    def _end_all(self, failure: Failure) -> None:
        for stream, _ in list(self._counts_due.values()):
            stream.put_counts(None)
        for number, stream in list(self._streams.items()):
            reason = FinishReason.ERROR
            state = self._state_of(number)
            if state is not None:
                output = RequestOutput(
                    request=number,
                    tokens=tuple(state.tokens),
                    text=state.text.text,
                    reason=reason,
                    stats=state.stats,
                    error=failure,
                    num_prompt_tokens=len(state.request.prompt_tokens),
                )
            else:
                output = RequestOutput(request=number, reason=reason, error=failure)
            self._end(output)
            stream.put_counts(None)

    def _state_of(self, number: int) -> RequestState | None:
        scheduler = self.head.scheduler
        states = (*scheduler.running.values(), *scheduler.waiting)
        return next((one for one in states if one.id == number), None)


def failure_of_loss(error: ClusterError | WireError) -> Failure:
    """Return the failure of requests that a lost stage, or a frame that is no message, ends."""
    if isinstance(error, ClusterError):
        return Failure(cause=error.cause, rank=error.rank)
    return Failure(cause=str(error), rank=0)
