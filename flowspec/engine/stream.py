"""Stream: the events of one request, read by iteration, asyncio, a callback or as a whole."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import TypeAlias

from flowspec.request import RequestOutput, StageCounts, TokensOut
from flowspec.system import signals

log = logging.getLogger(__name__)
POLL_S = 0.2  # between two looks at the signals while an event is awaited
STAGE_COUNTS_S = 3.0  # limit for the answer to `stage_stats`; engines know after 2 s


@dataclass(frozen=True, slots=True, kw_only=True)
class Notice:
    """Why an answer waits, for the user: a device is lost, or layers are on their way."""

    text: str


Event: TypeAlias = TokensOut | Notice | RequestOutput


class Stream:
    """The events of one request of an engine. The last event is its RequestOutput.

    A slow reader gets the tokens that came meanwhile as one event, so the memory that waits for it
    is bounded by the answer's own. An engine with its own clock gives `advance`, which is called
    instead of waiting; it returns False when no event is left.
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
        self.output: RequestOutput | None = None  # once the request is over
        self._abort, self._ask_counts, self._advance = abort, ask_counts, advance
        lock = threading.RLock()
        self._changed = threading.Condition(lock)  # there is something to read
        self._over = threading.Condition(lock)  # the output or the stages' counts have come
        self._tokens: list[int] = []  # not read yet
        self._texts: list[str] = []  # the text of these tokens
        self._notices: list[Notice] = []  # not read yet
        self._is_read = False  # the output was read
        self._counts: Mapping[int, StageCounts] | None = None
        self._is_counted = False  # the counts have come, or never will
        self._listeners: list[Callable[[], None]] = []

    # The engine's side ---------------------------------------------------------------------------

    def put(self, event: Event) -> None:
        """Add an event. Nothing may follow the output."""
        with self._changed:
            if self.output is not None:
                return
            match event:
                case TokensOut():
                    self._tokens.extend(event.tokens)
                    if event.text:
                        self._texts.append(event.text)
                case Notice():
                    self._notices = [*self._notices[-7:], event]
                case RequestOutput():
                    self.output = event
            self._wake(is_over=self.output is not None)

    def put_counts(self, counts: Mapping[int, StageCounts] | None) -> None:
        """Add the stages' work for the finished request; None: it will not come."""
        with self._changed:
            if not self._is_counted:
                self._counts, self._is_counted = counts, True
                self._wake(is_over=True)

    def _wake(self, *, is_over: bool) -> None:
        self._changed.notify_all()
        if is_over:
            self._over.notify_all()
        for listener in list(self._listeners):
            try:
                listener()
            except Exception:  # such as an asyncio loop that has ended; the engine goes on
                log.exception(
                    "a listener to request %d fails; it is not called again", self.request
                )
                self._listeners.remove(listener)

    # The reader's side ---------------------------------------------------------------------------

    def abort(self) -> None:
        """End the request now. Its output says `cancelled`; a finished one stays as it is."""
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
        """Abort the request if the reader leaves before the end."""
        self.abort()

    def __iter__(self) -> Iterator[Event]:
        while (event := self._next()) is not None:
            yield event

    def poll(self) -> Event | None:
        """Return the next event, or None if there is none now."""
        with self._changed:
            return self._take()

    def listen(self, listener: Callable[[], None]) -> None:
        """Call `listener`, from the engine's thread, whenever `poll` may have something."""
        with self._changed:
            self._listeners.append(listener)
            if self._has_event():
                listener()

    def result(self, timeout_s: float | None = None) -> RequestOutput:
        """Return the whole answer. Raises TimeoutError if it is not over after `timeout_s`."""
        end = None if timeout_s is None else time.monotonic() + timeout_s
        while self.output is None:
            if end is not None and time.monotonic() >= end:
                raise TimeoutError(f"request {self.request} is not over after {timeout_s:g} s")
            left_s = POLL_S if end is None else min(POLL_S, end - time.monotonic())
            is_there = self._wait(self._over, lambda: self.output is not None, left_s)
            if not is_there and self.output is None:
                raise self._stands_still()
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
        """Wait until there may be something to read."""
        if self._advance is not None:
            if not self._advance() and not self._has_event() and not self._is_read:
                raise self._stands_still()
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
                if listener in self._listeners:
                    self._listeners.remove(listener)

    @property
    def is_counted(self) -> bool:
        """Whether `stage_stats` has its answer and does not wait."""
        return self._is_counted

    def stage_stats(self, timeout_s: float = STAGE_COUNTS_S) -> Mapping[int, StageCounts] | None:
        """Return each stage's work for the finished request, by rank.

        Returns None if the stages have not reported it within `timeout_s`; a lost stage never does.
        """
        self.result()
        if not self._is_counted:
            self._ask_counts(self.request)
        end = time.monotonic() + timeout_s
        while not self._is_counted and (left_s := end - time.monotonic()) > 0:
            if not self._wait(self._over, lambda: self._is_counted, min(POLL_S, left_s)):
                break
        return self._counts

    def _next(self) -> Event | None:
        """Wait for the next event and return it; None after the last one."""
        while True:
            event = self.poll()
            if event is not None or self._is_read:
                return event
            is_there = self._wait(self._changed, self._has_event)
            if not is_there and not self._has_event() and not self._is_read:
                raise self._stands_still()

    def _stands_still(self) -> RuntimeError:
        what = "is not over, and nothing is left to happen"
        return RuntimeError(f"request {self.request} {what}")

    def _has_event(self) -> bool:
        is_unread = self.output is not None and not self._is_read
        return bool(self._tokens or self._texts or self._notices) or is_unread

    def _take(self) -> Event | None:
        if self._notices:
            return self._notices.pop(0)
        if self._tokens or self._texts:
            tokens, text = tuple(self._tokens), "".join(self._texts)
            self._tokens, self._texts = [], []
            return TokensOut(request=self.request, tokens=tokens, text=text)
        if self.output is not None and not self._is_read:
            self._is_read = True
            return self.output
        return None

    def _wait(
        self, news: threading.Condition, is_there: Callable[[], bool], timeout_s: float = POLL_S
    ) -> bool:
        """Wait a little for `news`; return False if no event is left."""
        signals.check()
        if self._advance is not None:
            return self._advance()
        with news:
            if not is_there():
                news.wait(timeout_s)
        return True
