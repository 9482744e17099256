"""HeadEngine: a head's core in a thread of its own, and the streams of its requests."""

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
IDLE_S = 0.5  # and while none is
JOIN_S = 5.0
FORGET_S = 5.0
COUNTS_S = 2.0  # for the stages to say what they did for a request that is over

Command: TypeAlias = Callable[[], None]


class HeadEngine(ABC):
    """Runs `loop` in a thread; subclasses say how its stages are watched and replaced.

    Clients come from any thread. What they want is done by the engine's own thread, in order.
    """

    def __init__(self, head: Head, parts: HeadParts, loop: EventLoop, *, name: str) -> None:
        self.head, self.parts, self.loop = head, parts, loop
        self.failure: Exception | None = None  # of the thread: nothing is served any more
        self._lock = threading.Lock()  # of `_streams`, `_closed` and the next id
        self._streams: dict[int, Stream] = {}
        self._next_id = 1
        self._counts_due: dict[int, tuple[Stream, float]] = {}  # and until when
        self._num_finished = self._num_failed = 0
        self._closed = ""  # why no more requests are taken
        self._commands: queue.SimpleQueue[Command] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._num_threads = torch.get_num_threads()  # torch keeps it per thread
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    # Any thread ----------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Begin with a request while others run.

        Raises ValueError for what is wrong with it and known at once, ClusterError where the
        engine is closed or has failed.
        """
        self.check()
        request = self.parts.render(request)
        self.head.resolve(request.decoding)
        with self._lock:
            if self._closed:
                raise ClusterError("head", f"it takes no more requests: {self._closed}", rank=0)
            number, self._next_id = self._next_id, self._next_id + 1
            stream = Stream(number, abort=self.abort)
            self._streams[number] = stream
        self.post(lambda: self._submit(replace(request, id=number)))
        return stream

    def abort(self, request: int) -> None:
        """End a request now; one that is over stays as it is."""
        self.post(lambda: self.inject(AbortRequest(request=request)))

    def check(self) -> None:
        """Raises ClusterError where the engine's thread has failed."""
        if self.failure is not None:
            raise ClusterError("head", f"{cause_of(self.failure)}; see its log", rank=0)

    def status(self) -> EngineStatus:
        """The engine now."""
        scheduler, outage = self.head.scheduler, self.head.outage
        why = self._closed or ("" if self.failure is None else cause_of(self.failure))
        if not why and outage is not None:
            why = str(self.named(outage))
        return EngineStatus(
            healthy=not why,
            why=why,
            model=self.parts.manifest.model_id,
            num_stages=self.head.pipe.num_stages,
            max_context=self.parts.max_context,
            strategy=self.head.decoding.strategy,
            drafters=tuple(self.parts.drafters),
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_finished=self._num_finished,
            num_failed=self._num_failed,
            progress=progress_of(scheduler.running.values()),
            stages=self.stages_status(),
        )

    def stages_status(self) -> dict[int, StageStatus]:
        """The newest totals of each stage, by rank."""
        return {rank: stage_status(one) for rank, one in dict(self.head.statuses).items()}

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for the open ones; whether all of them have ended."""
        with self._lock:
            self._closed = self._closed or "it is draining"
        end = time.monotonic() + timeout_s
        while self._streams and self._thread.is_alive() and time.monotonic() < end:
            time.sleep(0.02)
        return not self._streams

    def forget(self) -> None:
        """Forget what was learnt of costs and acceptance.

        Raises ValueError where requests are open, ClusterError where the engine does not answer.
        """
        done = threading.Event()
        busy: list[int] = []

        def forget() -> None:
            busy.append(len(self._streams))
            if not busy[0]:
                self.inject(ForgetCosts())
            done.set()

        self.check()
        self.post(forget)
        if not done.wait(FORGET_S):
            raise ClusterError("head", f"no answer within {FORGET_S:.0f} s", rank=0)
        if busy[0]:
            raise ValueError(f"{busy[0]} requests are open; what they have learnt is in use")

    def close(self) -> None:
        """End the thread; open requests end with an error. Safe to call twice."""
        self.stop_thread("the engine was closed")

    def post(self, command: Command) -> None:
        """Have the engine's thread do something, in order."""
        self._commands.put(command)
        self.loop.transport.wake()

    # The engine's thread -------------------------------------------------------------------------

    def start_thread(self) -> None:
        """Begin to serve."""
        self._thread.start()

    def stop_thread(self, why: str) -> None:
        """End the thread, if it runs, and then what is open."""
        with self._lock:
            self._closed = self._closed or why
        self._stopping.set()
        self.loop.transport.wake()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=JOIN_S)
        self._end_all(Failure(cause=why, rank=0))

    @property
    def is_stopping(self) -> bool:
        """Whether the thread is asked to end: long waits in it end then."""
        return self._stopping.is_set()

    @property
    def is_busy(self) -> bool:
        """Whether a request is open in the core."""
        return bool(self.head.scheduler.running or self.head.scheduler.waiting)

    @abstractmethod
    def turn(self, timeout_s: float) -> None:
        """One turn of the loop, and a look at the stages. Raises ClusterError where one is lost."""

    @abstractmethod
    def lose(self, error: ClusterError | WireError) -> None:
        """A turn or a command has met a lost stage, or a frame that is no message."""

    def named(self, failure: Failure) -> Failure:
        """The failure with the name of the device that holds the stage, where it has one."""
        return failure

    def inject(self, message: Message) -> None:
        """Give the core a message of its own process."""
        self.loop.inject(message)

    def notify_all(self, text: str) -> None:
        """Tell the readers of all open requests why their answers wait."""
        for stream in list(self._streams.values()):
            stream.put(Notice(text=text))

    def _run(self) -> None:
        torch.set_num_threads(self._num_threads)
        try:
            while not self._stopping.is_set():
                try:
                    self._obey()
                    self.turn(TURN_S if self.is_busy else IDLE_S)
                except (ClusterError, WireError) as error:
                    self.lose(error)
                self.deliver()
        except Exception as error:
            log.exception("the head has failed")
            self.failure = error
            self._end_all(Failure(cause=f"{cause_of(error)}; see its log", rank=0))

    def _obey(self) -> None:
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            command()

    def _submit(self, request: Request) -> None:
        if not self.is_busy:
            self.loop.last_progress = time.monotonic()
        self.inject(Submit(request=request))
        self.register(request)

    def register(self, request: Request) -> None:  # noqa: B027 - a hook, for one subclass
        """A request has come to the core."""

    def deliver(self) -> None:
        """Give the streams what the core has for its clients."""
        events = self.loop.to_client
        while events:
            event = events.popleft()
            assert isinstance(event, TokensOut | RequestOutput), "the head speaks to clients so"
            self.take_event(event)
        for request, (stream, until) in list(self._counts_due.items()):
            state = self.head.finished.get(request)
            if state is not None and len(state.stage_counts) == self.head.pipe.num_stages:
                stream.put_counts(dict(state.stage_counts))
            elif state is not None and time.monotonic() < until:
                continue
            del self._counts_due[request]

    def take_event(self, event: TokensOut | RequestOutput) -> None:
        """One event of a request; those of requests without a stream are ignored."""
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
        """End every open request with this failure; the core has what was generated."""
        self.inject(AbandonRequests(failure=failure))
        self.deliver()

    def _end_all(self, failure: Failure) -> None:
        for number in list(self._streams):
            reason = FinishReason.ERROR
            state = self.head.scheduler.running.get(number)
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


def failure_of_loss(error: ClusterError | WireError) -> Failure:
    """What a lost stage, or a frame that is no message, is to the requests that it ends."""
    if isinstance(error, ClusterError):
        return Failure(cause=error.cause, rank=error.rank)
    return Failure(cause=str(error), rank=0)
