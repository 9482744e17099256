"""The target model alone, in this process: the reference every strategy must equal."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flowspec.engine.engine import EngineStatus
from flowspec.engine.stream import Event, Stream
from flowspec.model.attention_metadata import run_rows
from flowspec.model.kv_cache import COMMITTED
from flowspec.model.stage_model import StageModel
from flowspec.request import (
    ClusterError,
    DecodeStats,
    Failure,
    FailureKind,
    FinishReason,
    Request,
    RequestOutput,
    TokensOut,
    check_token_ids,
)
from flowspec.speculation.acceptance import choose
from flowspec.speculation.processors import begin_path
from flowspec.system import signals
from flowspec.tokenizer import TextStream


@dataclass(slots=True)
class LocalTarget:
    """A whole model: `chunked_prefill_size` prompt tokens a forward, then one token a forward."""

    model: StageModel
    max_context: int
    chunked_prefill_size: int = 64
    batch_invariant: bool = False

    def stream(self, request: Request) -> Iterator[tuple[int, Tensor]]:
        """Each next token with the logits [V] that chose it, without end: stop rules are above.

        The logits are those that the processors with a state have left; filters come after them.

        Raises ValueError where the prompt has a token that the model has not.
        """
        prompt = request.prompt_tokens
        check_token_ids(prompt, self.model.config.vocab_size)
        context = min(len(prompt) + request.max_new_tokens, self.max_context)
        stable_context = context if self.batch_invariant else None
        cache = self.model.new_cache(context + 1, stable_context=stable_context)
        for start in range(0, len(prompt), self.chunked_prefill_size):
            signals.check()
            ids = torch.tensor(prompt[start : start + self.chunked_prefill_size])
            where = range(start, start + len(ids))
            hidden, _ = run_rows(self.model, cache, ids, where, parents=None)
        position = len(prompt)
        state = begin_path(request.sampling, prompt)
        while True:
            signals.check()
            logits = self.model.logits(hidden[-1:], batch_invariant=self.batch_invariant)
            if state is not None:
                logits = state.apply(logits[0])[None]
            token = choose(logits, [position], request.sampling)[0]
            yield token, logits[0]
            hidden, _ = run_rows(
                self.model, cache, torch.tensor([token]), [position], parents=[COMMITTED]
            )
            cache.reroot([0], [])
            state = None if state is None else state.fork(token)
            position += 1

    def generate(
        self,
        request: Request,
        new_text: Callable[[Request], TextStream] = lambda request: TextStream(None),
    ) -> tuple[list[int], FinishReason, str]:
        """Tokens, reason and text under the same stop rules as the head's.

        Raises ValueError where the prompt fills the context.
        """
        limit = min(request.max_new_tokens, self.max_context - len(request.prompt_tokens))
        if limit < 1:
            raise ValueError(f"the prompt fills the context of {self.max_context} tokens")
        text = new_text(request)
        tokens: list[int] = []
        reason = FinishReason.LENGTH
        for token, _ in self.stream(request):
            tokens.append(token)
            text.push([token])
            if text.stopped or token in (request.eos_token_ids or ()):
                reason = FinishReason.STOP
                break
            if len(tokens) == limit:
                break
        text.flush()
        return tokens, reason, text.text


class ReferenceEngine:
    """The target alone as an engine: one request after the other, in the thread that reads."""

    def __init__(
        self,
        target: LocalTarget,
        *,
        render: Callable[[Request], Request] = lambda request: request,
        new_text: Callable[[Request], TextStream] = lambda request: TextStream(None),
    ) -> None:
        self.target = target
        self._render, self._new_text = render, new_text
        self._lock = threading.RLock()
        self._next_id = 1
        self._open: dict[int, tuple[Stream, Iterator[Event]]] = {}
        self._num_finished = self._num_failed = 0
        self._closed = ""

    def submit(self, request: Request) -> Stream:
        """Begin with a request; it is computed while its stream is read."""
        with self._lock:
            if self._closed:
                raise ClusterError("reference", f"it takes no more requests: {self._closed}")
            request = self._render(request)
            number, self._next_id = self._next_id, self._next_id + 1
            stream = Stream(number, abort=self._abort, advance=lambda: self._advance(number))
            self._open[number] = stream, self._events(replace(request, id=number))
        return stream

    def _events(self, request: Request) -> Iterator[Event]:
        """The request's events, each computed when it is asked for."""
        began = time.monotonic()
        text, tokens = self._new_text(request), list[int]()
        stats = DecodeStats(submitted_at=began)
        room = self.target.max_context - len(request.prompt_tokens)
        limit = min(request.max_new_tokens, room)

        def output(reason: FinishReason, error: Failure | None = None) -> RequestOutput:
            stats.finished_at = time.monotonic()
            return RequestOutput(
                request=request.id,
                tokens=tuple(tokens),
                text=text.text,
                reason=reason,
                stats=stats,
                error=error,
                num_prompt_tokens=len(request.prompt_tokens),
            )

        try:
            if limit < 1:
                raise ValueError(f"the prompt fills the context of {self.target.max_context}")
            for token, _ in self.target.stream(request):
                tokens.append(token)
                stats.count_tokens(1, time.monotonic())
                said, _ = text.push([token])
                is_end = text.stopped or token in (request.eos_token_ids or ())
                is_over = is_end or len(tokens) == limit
                said += text.flush() if is_over else ""
                yield TokensOut(request=request.id, tokens=(token,), text=said)
                if is_over:
                    yield output(FinishReason.STOP if is_end else FinishReason.LENGTH)
                    return
        except ValueError as error:
            failure = Failure(cause=str(error), kind=FailureKind.REFUSED)
            yield output(FinishReason.ERROR, failure)

    def _advance(self, number: int) -> bool:
        """The next event of one request; False where there is none."""
        with self._lock:
            if number not in self._open:
                return False
            stream, events = self._open[number]
            event = next(events)
            if isinstance(event, RequestOutput):
                self._end(number, event)
            else:
                stream.put(event)
            return True

    def _abort(self, number: int) -> None:
        with self._lock:
            if number in self._open:
                reason = FinishReason.CANCELLED
                self._end(number, RequestOutput(request=number, reason=reason))

    def _end(self, number: int, output: RequestOutput) -> None:
        stream, events = self._open.pop(number)
        events.close()  # type: ignore[attr-defined]
        self._num_finished += output.error is None
        self._num_failed += output.error is not None
        stream.put(output)
        stream.put_counts({})

    def status(self) -> EngineStatus:
        """The engine now; it has no stages."""
        with self._lock:
            return EngineStatus(
                healthy=not self._closed,
                why=self._closed,
                max_context=self.target.max_context,
                strategy="ar",
                num_running=len(self._open),
                num_finished=self._num_finished,
                num_failed=self._num_failed,
            )

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and compute the open ones."""
        end = time.monotonic() + timeout_s
        self._closed = self._closed or "it is draining"
        while self._open and time.monotonic() < end:
            self._advance(next(iter(self._open)))
        return not self._open

    def forget(self) -> None:
        """Nothing is learnt here. Raises ValueError where requests are open."""
        if self._open:
            raise ValueError(f"{len(self._open)} requests are open")

    def close(self) -> None:
        """End open requests."""
        with self._lock:
            self._closed = "it was closed"
            failure = Failure(cause="the engine was closed", rank=0)
            for number in list(self._open):
                output = RequestOutput(request=number, reason=FinishReason.ERROR, error=failure)
                self._end(number, output)
