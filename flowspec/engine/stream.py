"""Stream: the events of one request, read by iteration, asyncio, a callback or as a whole."""

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from flowspec.request import RequestOutput, StageCounts, TokensOut
from flowspec.system import signals

POLL_S = 0.2  # between two looks at the signals while an event is awaited
STAGE_COUNTS_S = 2.0  # that stages may take to say what they did for a request


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Why an answer waits, for a person: a device is lost, layers are on their way."""

    text: str


Event: TypeAlias = TokensOut | Notice | RequestOutput


class Stream:
    """One request of an engine. The last event is its RequestOutput.

    A reader that is slow gets tokens that came meanwhile as one event, so the memory that waits
    for it is bounded by the answer's own. `advance`, where an engine has a clock of its own, is
    called instead of waiting; it returns False when nothing is left to happen.
    """

    def __init__(
        self,
        request: int,
        *,
        abort: Callable[[int], None],
        ask_counts: Callable[[int], None] = lambda request: None,
        advance: Callable[[], bool] | None = None,
    ) -> None:
        self.request = request
        self.output: RequestOutput | None = None  # once it is over
        self._abort, self._ask_counts, self._advance = abort, ask_counts, advance
        self._changed = threading.Condition()
        self._tokens: TokensOut | None = None  # not read yet
        self._notices: list[Notice] = []  # not read yet
        self._is_read = False  # the output has been given out
        self._counts: Mapping[int, StageCounts] | None = None
        self._listeners: list[Callable[[], None]] = []

    # The engine's side ---------------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Something has happened. Called from one thread of the engine."""
        with self._changed:
            match event:
                case TokensOut() if self._tokens is not None:
                    self._tokens = TokensOut(
                        request=self.request,
                        tokens=self._tokens.tokens + event.tokens,
                        text=self._tokens.text + event.text,
                    )
                case TokensOut():
                    self._tokens = event
                case Notice():
                    self._notices = [*self._notices[-7:], event]
                case RequestOutput():
                    self.output = event
            self._wake()

    def put_counts(self, counts: Mapping[int, StageCounts]) -> None:
        """What each stage did for the request, once it is over and all of them have said so."""
        with self._changed:
            self._counts = counts
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        for listener in self._listeners:
            listener()

    # The reader's side ---------------------------------------------------------------------------

    def abort(self) -> None:
        """End the request now. Its output says `cancelled`; one that is over stays as it is."""
        if self.output is None:
            self._abort(self.request)

    def __enter__(self) -> "Stream":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Whoever leaves before the end takes the request back."""
        self.abort()

    def __iter__(self) -> Iterator[Event]:
        while (event := self._next()) is not None:
            yield event

    def poll(self) -> Event | None:
        """The next event, if there is one now."""
        with self._changed:
            return self._take()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener`, from the engine's thread, whenever `poll` may have something."""
        with self._changed:
            self._listeners.append(listener)
            if self._has_event():
                listener()

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """The whole answer. Raises TimeoutError where it is not over after `timeout_s`."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while self.output is None:
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"request {self.request} is not over after {timeout_s:g} s")
            self._await(lambda: self.output is not None)
        return self.output

    async def __aiter__(self) -> AsyncIterator[Event]:
        while True:
            event = self.poll()
            if event is None:
                if self._is_read:
                    return
                await self._arrival()
                continue
            yield event

    async def _arrival(self) -> None:
        """Until there may be something to read."""
        if self._advance is not None:
            self._await(self._has_event)
            await asyncio.sleep(0)
            return
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def listener() -> None:
            with suppress(RuntimeError):  # the reader's loop has ended
                loop.call_soon_threadsafe(arrived.set)

        self.listen(listener)
        try:
            await arrived.wait()
        finally:
            with self._changed:
                self._listeners.remove(listener)

    def stage_stats(self, timeout_s: float = STAGE_COUNTS_S) -> Mapping[int, StageCounts] | None:
        """What each stage did for the request, by rank, once it is over.

        None where the stages have not said so within `timeout_s`: a lost stage never does.
        """
        self.result()
        self._ask_counts(self.request)
        end = time.monotonic() + timeout_s
        while self._counts is None and time.monotonic() < end:
            if not self._wait(lambda: self._counts is not None):
                break
        return self._counts

    def _next(self) -> Event | None:
        """Waits for the next event; None after the last one."""
        while True:
            event = self.poll()
            if event is not None or self._is_read:
                return event
            self._await(self._has_event)

    def _has_event(self) -> bool:
        is_unread = self.output is not None and not self._is_read
        return self._tokens is not None or bool(self._notices) or is_unread

    def _take(self) -> Event | None:
        if self._notices:
            return self._notices.pop(0)
        if self._tokens is not None:
            event, self._tokens = self._tokens, None
            return event
        if self.output is not None and not self._is_read:
            self._is_read = True
            return self.output
        return None

    def _await(self, is_there: Callable[[], bool]) -> None:
        """Wait a little. Raises RuntimeError where nothing can ever come."""
        if not self._wait(is_there) and not is_there():
            raise RuntimeError(
                f"nothing is left to happen and request {self.request} is not over; this is a bug "
                "of its engine"
            )

    def _wait(self, is_there: Callable[[], bool]) -> bool:
        """Wait a little; False where nothing is left to happen."""
        signals.check()
        if self._advance is not None:
            return self._advance()
        with self._changed:
            if not is_there():
                self._changed.wait(POLL_S)
        return True
