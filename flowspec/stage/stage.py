"""Stage: runs rows through its layers and drops those that a `Reroot` has made dead.

It is a sans-IO core (runtime/core.py). It does not know the head's tree or strategy. Rows of
several requests may come as one batch and then run in one forward. Rows with dead or unknown
parents are dropped just before it. An empty segment still travels on, so that the head's counts
stay right. The last stage also holds the verifiers and makes the verdicts.

An exception in the work for one request ends that request here, and the head is told
(runtime/failures.py).
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowspec.model.backend import StageBackend, StageCache
from flowspec.protocol.messages import (
    EVERY_STAGE,
    HEAD,
    AddRequest,
    Batch,
    Exit,
    Failed,
    FinishRequest,
    FreeRequest,
    HiddenStates,
    Message,
    Ping,
    Reroot,
    Segment,
    Started,
    Status,
    epoch_of,
    segments_of,
    together,
)
from flowspec.request import LONGEST_CONTEXT, NodeId, cause_of
from flowspec.runtime.core import Send, Step, Work
from flowspec.runtime.failures import Failures
from flowspec.speculation.acceptance import rule_of
from flowspec.stage.executor import Forward, Part, Share
from flowspec.stage.sampler import Sampler
from flowspec.stage.stage_request_state import StageRequestState
from flowspec.stage.verifier import Verifier

MAX_QUEUED = 256  # segments; the head keeps far fewer in flight, so more means a broken peer
MAX_TREE_ROWS = 4096  # of one request, beside its context
STATUS_INTERVAL_S = 0.25


@dataclass(slots=True)
class RequestCounts:
    """The work of this stage for one request; `busy_s` counts its rows of the draft tree."""

    num_rows_run: int = 0
    num_rows_pruned: int = 0
    busy_s: float = 0.0

    def add(self, share: Share, elapsed: float) -> None:
        """Count rows of the request that were run; `elapsed` is their share of the forward."""
        self.num_rows_run += len(share.rows.positions)
        if not share.segment.prefix:
            self.busy_s += elapsed


class Stage:
    """Rank 1..num_stages of the pipeline; the backend `model` computes its layers.

    `num_kv_tokens` limits the rows of all requests' caches together; 0 means no limit. A stage that
    replaces a lost one begins with the head's `epoch`.
    """

    def __init__(
        self,
        rank: int,
        num_stages: int,
        model: StageBackend[Any],
        *,
        batch_invariant: bool = False,
        epoch: int = 0,
    ) -> None:
        self.rank = rank
        self.num_stages = num_stages
        self.model = model
        self.batch_invariant = batch_invariant
        self.epoch = epoch  # older messages concern a pipeline that is gone
        self.num_kv_tokens = 0
        self.requests: dict[int, StageRequestState] = {}  # cached ones included
        self.failures = Failures(on_failure=self._forget)
        self.queue: deque[AddRequest | Segment | Batch | FinishRequest] = deque()
        self.busy_s = 0.0
        self.num_segments = 0
        self.num_rows_run = 0
        self.num_rows_pruned = 0
        self.num_closes = 0  # in this epoch
        self.counts: dict[int, RequestCounts] = {}  # of requests that have not ended
        self.peak_memory_bytes: Callable[[], int] = lambda: 0  # of the process
        self._status_due = 0.0

    @property
    def is_last(self) -> bool:
        """Whether this stage makes the verdicts."""
        return self.rank == self.num_stages

    @property
    def next_rank(self) -> int:
        """Rank of the next stage; there is none after the last."""
        return self.rank + 1

    @property
    def num_kv_tokens_used(self) -> int:
        """Rows of all caches held now."""
        return sum(state.opened.capacity for state in self.requests.values())

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Process one message: verdicts act at once, data messages wait for their turn."""
        if not self._is_current(message):
            return ()
        sends = self._take_in(message, now)
        return [*sends, *self._tell_failed()] if self.failures else sends

    def _take_in(self, message: Message, now: float) -> Sequence[Send]:
        match message:
            case Reroot():
                return self._reroot(message)
            case FreeRequest():
                self._forget(message.request)
            case Ping():
                return [self._status(now)]
            case AddRequest() | Segment() | Batch() | FinishRequest():
                if len(self.queue) >= MAX_QUEUED:
                    return self._fail(0, f"{MAX_QUEUED} segments are waiting already")
                self.queue.append(message)
        return ()

    def _is_current(self, message: Message) -> bool:
        """Return whether a message is of this epoch; one of a newer epoch ends old requests."""
        epoch = epoch_of(message)
        if epoch is not None and epoch > self.epoch:
            self.epoch, self.num_closes = epoch, 0
            for request in list(self.requests):
                self._forget(request)
            self.counts.clear()
            self.queue.clear()
        return epoch in (None, self.epoch)

    def poll(self, now: float) -> Step | None:
        """Return the work for the next message of the data channel."""
        if not self.queue:
            return None
        step = self._next_step(self.queue.popleft(), now)
        if not self.failures:
            return step
        return replace(step, sends=[*step.sends, *self._tell_failed()])

    def _next_step(self, message: AddRequest | Segment | Batch | FinishRequest, now: float) -> Step:
        match message:
            case AddRequest():
                return Step(sends=self._open(message))
            case FinishRequest():
                sends = self._close(message)
                return Step(sends=[*sends, self._status(now, finished=message.request)])
            case Segment() | Batch():
                return self._forward(segments_of(message))

    def _open(self, message: AddRequest) -> Sequence[Send]:
        with self.failures.of(message.request):
            return self._begin(message)
        return ()

    def _begin(self, message: AddRequest) -> Sequence[Send]:
        assert message.request not in self.requests, f"request {message.request} is already open"
        before = self.requests.get(message.reuse)  # its own FinishRequest frees it
        error = self._refusal(message, before)
        if error:
            return self._fail(message.request, error)
        layers = self.model.owned_hidden_states(message.aux_hidden_state_layers)
        state = StageRequestState(
            opened=message,
            cache=self._new_cache(message, before),
            aux_hidden_state_layers=layers,
            hidden_states={layer: [] for layer in layers},
            verifier=Verifier() if self.is_last else None,
            sampler=self._new_sampler(message, before) if self.is_last else None,
        )
        if message.num_cached_tokens:
            state.tip, state.tip_position = (
                NodeId(message.num_cached_tokens - 1),
                message.num_cached_tokens - 1,
            )
        self.requests[message.request] = state
        self.counts[message.request] = RequestCounts()
        return self._pass_on(message)

    def _new_cache(self, message: AddRequest, before: StageRequestState | None) -> StageCache:
        context = message.context if self.batch_invariant else None
        if before is None:
            return self.model.new_cache(message.capacity, stable_context=context)
        return before.cache.resized(
            message.capacity, prefix_length=message.num_cached_tokens, stable_context=context
        )

    def _new_sampler(self, message: AddRequest, before: StageRequestState | None) -> Sampler:
        if before is None or before.sampler is None:
            return Sampler(message)
        return Sampler(message, before.sampler.tokens[: message.num_cached_tokens])

    def _forget(self, request: int) -> None:
        """Free the request if it is here."""
        state = self.requests.pop(request, None)
        if state is not None:
            state.cache.free()

    def _refusal(self, message: AddRequest, before: StageRequestState | None) -> str:
        """Return why a request cannot have its cache; nothing is allocated before this check."""
        # The head decides how long a request may be; memory is checked below.
        asked = f"a context of {message.context} was asked for"
        if message.context > LONGEST_CONTEXT:
            return f"{asked}, needed: at most {LONGEST_CONTEXT}"
        if message.capacity > message.context + MAX_TREE_ROWS:
            return (
                f"a cache of {message.capacity} rows was asked for, a context of "
                f"{message.context} needs at most {message.context + MAX_TREE_ROWS}"
            )
        if self.num_kv_tokens and self.num_kv_tokens_used + message.capacity > self.num_kv_tokens:
            return (
                f"a cache of {message.capacity} rows was asked for, "
                f"{self.num_kv_tokens - self.num_kv_tokens_used} of {self.num_kv_tokens} are free"
            )
        have = before.cache.prefix_length if before is not None else 0
        if message.num_cached_tokens > have:
            return (
                f"{message.num_cached_tokens} rows of request {message.reuse} were to be used "
                f"again, {have} are here"
            )
        try:
            rule_of(message.sampling)
        except ValueError as error:
            return str(error)
        return ""

    def _close(self, message: FinishRequest) -> list[Send]:
        """Free the request, or keep its committed rows for the prefix cache."""
        self.num_closes += 1
        sends: list[Send] = []
        if not message.keep:
            self._forget(message.request)
        elif message.verdict is not None:
            sends += self._reroot(message.verdict)
        return [*sends, *self._pass_on(message)]

    def _pass_on(self, message: AddRequest | FinishRequest) -> list[Send]:
        return [] if self.is_last else [Send(self.next_rank, message)]

    def _forward(self, segments: Sequence[Segment]) -> Step:
        """Drop the dead rows, run the others, and send them on."""
        sends: list[Send] = []
        if self.rank == 1:
            first = segments[0]
            started = Started(epoch=self.epoch, request=first.request, seq_no=first.seq_no)
            sends.append(Send(HEAD, started))
        parts = []
        for segment in segments:
            # Its control message may be late, and dead rows must not pile up.
            if segment.verdict is not None:
                sends += self._reroot(segment.verdict)
            parts.append(self._admit(segment))
        forward = Forward(
            self.model, parts, choose=self.is_last, batch_invariant=self.batch_invariant
        )
        if not forward.num_rows:
            return Step(sends=[*sends, *self._hand_on(parts)])
        work = Work(
            kind="verify" if self.is_last else "forward",
            rows=forward.num_rows,
            context=max(p.state.tip_position + 1 for p in parts if p.state and p.segment.nodes),
            run=forward.run,
            finish=lambda now, elapsed: self._finish(forward, now, elapsed),
            about={"segments": [part.segment for part in parts if part.segment.nodes]},
        )
        return Step(sends=sends, work=work)

    def _finish(self, forward: Forward, now: float, elapsed: float) -> Sequence[Send]:
        """Return the messages after a forward: rows, hidden states of prompts, and verdicts."""
        self.busy_s += elapsed
        self.num_segments += 1
        self.num_rows_run += sum(len(share.rows.positions) for share in forward.shares)
        for share in forward.shares:
            if (counts := self.counts.get(share.segment.request)) is not None:
                counts.add(share, elapsed * len(share.rows.positions) / forward.num_rows)
        sends: list[Send] = []
        for request, error in forward.errors.items():
            self.failures.add(error, request)
        for share in forward.shares:
            with self.failures.of(share.segment.request):
                sends += self._keep_hidden_states(share)
                forward.observe(share)
        sends += self._hand_on(forward.outgoing(elapsed * 1e3, self.failures))
        if now >= self._status_due:
            sends.append(self._status(now))
        return [*sends, *self._tell_failed()]

    def _keep_hidden_states(self, share: Share) -> list[Send]:
        """Return the hidden states of prompt rows, which are true; keep those of other rows."""
        segment, sends = share.segment, []
        for layer in share.state.aux_hidden_state_layers:
            own = share.hidden_states[layer]
            if segment.prefix:
                sends.append(self._hidden_states(segment.request, layer, segment.nodes, own))
            else:
                share.state.hidden_states[layer].extend(own)
        return sends

    def _admit(self, segment: Segment) -> Part:
        """Return the segment with the rows that are alive here."""
        alive: Sequence[int] = ()
        state = self.requests.get(segment.request)
        with self.failures.of(segment.request):
            if state is not None:
                alive = range(len(segment.nodes)) if segment.prefix else state.admit(segment)
        state = self.requests.get(segment.request)  # None if the request has failed
        num_pruned = len(segment.nodes) - len(alive)
        self.num_rows_pruned += num_pruned
        if (counts := self.counts.get(segment.request)) is not None:
            counts.num_rows_pruned += num_pruned
        segment = segment.select(alive)
        if not segment.nodes:
            segment = replace(segment, hidden=None)
        return Part(state, segment)

    def _hand_on(self, parts: Sequence[Part]) -> list[Send]:
        """Send the rows to the next stage, or out of the pipe with the verdicts that are due."""
        if not self.is_last:
            return [Send(self.next_rank, together([part.segment for part in parts]))]
        sends: list[Send] = []
        for part in parts:
            if part.state is not None:
                with self.failures.of(part.segment.request):
                    sends += self._verdict(part.state, part.segment)
        first = parts[0].segment
        left = Exit(
            epoch=self.epoch,
            request=first.request,
            seq_no=first.seq_no,
            rows=sum(len(part.segment.nodes) for part in parts),
            slowest_rows=first.slowest_rows,
            slowest_ms=first.slowest_ms,
        )
        return [*sends, Send(HEAD, left)]

    def _verdict(self, state: StageRequestState, segment: Segment) -> list[Send]:
        assert state.verifier is not None
        is_prompt_end = segment.prefix and segment.verify and segment.nodes
        if not segment.verify or not (state.verifier.walk() or is_prompt_end):
            return []
        position = state.tip_position + 1
        if not segment.prefix:
            position = state.positions[state.rows[state.verifier.tip]] + 1
        verdict = Reroot(
            epoch=self.epoch,
            request=segment.request,
            position=position,
            parent=state.verifier.tip,
            token=state.verifier.next_token,
        )
        to_head = Send(HEAD, verdict)
        return [to_head, *self._reroot(verdict), Send(EVERY_STAGE, verdict)]

    def _reroot(self, verdict: Reroot) -> list[Send]:
        """Apply a verdict, return hidden states of accepted rows; a stale one changes nothing."""
        state = self.requests.get(verdict.request)
        if state is None or verdict.position <= state.verdict_position:
            return []
        with self.failures.of(verdict.request):
            return self._commit(state, verdict)
        return []

    def _commit(self, state: StageRequestState, verdict: Reroot) -> list[Send]:
        hidden_states = state.hidden_states
        nodes_before, rows_before = state.nodes, state.rows
        path = state.reroot(verdict)
        path_nodes = [nodes_before[row] for row in path]
        sends = []
        for layer in state.aux_hidden_state_layers:
            rows = hidden_states[layer]
            if path:
                hidden = torch.stack([rows[row] for row in path])
                sends.append(self._hidden_states(verdict.request, layer, path_nodes, hidden))
            hidden_states[layer] = [rows[rows_before[node]] for node in state.nodes]
        return sends

    def _hidden_states(
        self, request: int, layer: int, nodes: Sequence[NodeId], hidden: Tensor
    ) -> Send:
        message = HiddenStates(
            epoch=self.epoch, request=request, layer=layer, nodes=tuple(nodes), hidden=hidden
        )
        return Send(HEAD, message)

    def _status(self, now: float, *, finished: int = 0) -> Send:
        """Return the totals, with the counts of a request that has just ended here."""
        self._status_due = now + STATUS_INTERVAL_S
        counts = self.counts.pop(finished, None)
        status = Status(
            stage=self.rank,
            busy_s=self.busy_s,
            num_segments=self.num_segments,
            num_rows_run=self.num_rows_run,
            num_rows_pruned=self.num_rows_pruned,
            num_requests=len(self.requests),
            num_kv_tokens_used=self.num_kv_tokens_used,
            peak_memory_bytes=self.peak_memory_bytes(),
            num_closes=self.num_closes,
            finished_request=finished if counts is not None else 0,
            finished_rows_run=counts.num_rows_run if counts is not None else 0,
            finished_rows_pruned=counts.num_rows_pruned if counts is not None else 0,
            finished_busy_s=counts.busy_s if counts is not None else 0.0,
        )
        return Send(HEAD, status)

    def _tell_failed(self) -> list[Send]:
        """Return messages about requests that have failed here; the head ends them."""
        return [
            send
            for request, error in self.failures.take().items()
            for send in self._fail(request, cause_of(error))
        ]

    def _fail(self, request: int, text: str) -> list[Send]:
        failed = Failed(epoch=self.epoch, stage=self.rank, request=request, text=text)
        return [Send(HEAD, failed)]
