"""ReferenceEngine: the target model alone, in this process, which every strategy must equal."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from flowspec.engine.engine import EngineStatus
from flowspec.engine.stream import Stream
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
    cause_of,
    check_token_ids,
)
from flowspec.speculation.acceptance import choose
from flowspec.speculation.drafters import find_drafter
from flowspec.speculation.processors import begin_path
from flowspec.speculation.strategies import strategy_config
from flowspec.system import signals
from flowspec.tokenizer import TextStream

log = logging.getLogger(__name__)
CLOSED = "the engine was closed"


@dataclass(slots=True)
class LocalTarget:
    """A whole model: `chunked_prefill_size` prompt tokens a forward, then one token a forward."""

    model: StageModel
    max_context: int
    chunked_prefill_size: int = 64
    batch_invariant: bool = False

    def stream(self, request: Request) -> Iterator[tuple[int, Tensor]]:
        """Yield each next token with the logits [V] that chose it, without end.

        The caller applies the stop rules. The logits are those that processors with a state have
        left; filters come after them. Raises ValueError if the prompt has a token that the model
        does not have.
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
        """Return tokens, finish reason and text under the same stop rules as the head's.

        Raises ValueError if the prompt fills the context.
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


@dataclass(slots=True, kw_only=True)
class _OpenRequest:
    """An open request and its results so far."""

    request: Request
    stream: Stream
    chosen: Iterator[tuple[int, Tensor]]  # the tokens to come
    text: TextStream
    limit: int  # of new tokens
    stats: DecodeStats
    tokens: list[int] = field(default_factory=list)


class ReferenceEngine:
    """The target alone as an engine: a token is computed when its request's stream is read.

    Decoding does not change the text, so every known strategy is accepted and ignored.
    """

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
        self._open: dict[int, _OpenRequest] = {}
        self._num_finished = self._num_failed = 0
        self._closed = ""

    def submit(self, request: Request) -> Stream:
        """Begin a request. Raises ValueError and ClusterError as `Engine.submit` does."""
        if (decoding := request.decoding) is not None:
            strategy_config(decoding.strategy, decoding.parameters, where="decoding")
            if decoding.drafter:
                find_drafter(decoding.drafter)
        with self._lock:
            if self._closed:
                raise ClusterError("reference", f"it takes no more requests: {self._closed}")
            request = self._render(request)
            number, self._next_id = self._next_id, self._next_id + 1
            request = replace(request, id=number)
            stream = Stream(number, abort=self._abort, advance=lambda: self._advance(number))
            room = self.target.max_context - len(request.prompt_tokens)
            self._open[number] = _OpenRequest(
                request=request,
                stream=stream,
                chosen=self.target.stream(request),
                text=self._new_text(request),
                limit=min(request.max_new_tokens, room),
                stats=DecodeStats(submitted_at=time.monotonic()),
            )
        return stream

    def _advance(self, number: int) -> bool:
        """Compute the next token of one request; return False if it is over."""
        with self._lock:
            state = self._open.get(number)
            if state is None:
                return False
            try:
                reason = self._next_token(state)
            except ValueError as error:
                failure = Failure(cause=str(error), kind=FailureKind.REFUSED)
                self._end(state, FinishReason.ERROR, failure)
            except Exception as error:
                log.exception("request %d has failed", number)
                self._end(state, FinishReason.ERROR, Failure(cause=cause_of(error), rank=0))
            else:
                if reason is not None:
                    self._end(state, reason)
            return True

    def _next_token(self, state: _OpenRequest) -> FinishReason | None:
        """Compute a token and give it to the reader; return the finish reason, if any."""
        if state.limit < 1:
            raise ValueError(f"the prompt fills the context of {self.target.max_context} tokens")
        token, _ = next(state.chosen)
        state.tokens.append(token)
        state.stats.count_tokens(1, time.monotonic())
        text, _ = state.text.push([token])
        reason = None
        if state.text.stopped or token in (state.request.eos_token_ids or ()):
            reason = FinishReason.STOP
        elif len(state.tokens) == state.limit:
            reason = FinishReason.LENGTH
        if reason is not None:
            text += state.text.flush()
        state.stream.put(TokensOut(request=state.request.id, tokens=(token,), text=text))
        return reason

    def _abort(self, number: int) -> None:
        with self._lock:
            if (state := self._open.get(number)) is not None:
                self._end(state, FinishReason.CANCELLED)

    def _end(self, state: _OpenRequest, reason: FinishReason, error: Failure | None = None) -> None:
        del self._open[state.request.id]
        self._num_finished += error is None
        self._num_failed += error is not None
        state.stats.finished_at = time.monotonic()
        state.stream.put(
            RequestOutput(
                request=state.request.id,
                tokens=tuple(state.tokens),
                text=state.text.text,
                reason=reason,
                stats=state.stats,
                error=error,
                num_prompt_tokens=len(state.request.prompt_tokens),
            )
        )
        state.stream.put_counts({})

    def status(self) -> EngineStatus:
        """Return the present status; it has no stages."""
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
        with self._lock:
            self._closed = self._closed or "it is draining"
        while (numbers := list(self._open)) and time.monotonic() < end:
            self._advance(numbers[0])
        return not self._open

    def forget(self) -> None:
        """Do nothing, since nothing is learnt. Raises as `Engine.forget` does."""
        with self._lock:
            if self._open:
                raise ValueError(f"{len(self._open)} requests are open")
            if self._closed == CLOSED:
                raise ClusterError("reference", CLOSED)

    def close(self) -> None:
        """End open requests with an error; they keep their tokens."""
        with self._lock:
            self._closed = CLOSED
            for state in list(self._open.values()):
                self._end(state, FinishReason.ERROR, Failure(cause=CLOSED, rank=0))
