"""Tiny simulated clusters, and the invariants that must always hold in them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from flowspec.engine.engine import generate_all
from flowspec.engine.simulated import SimulatedEngine
from flowspec.engine.stream import Event
from flowspec.head.head import Head
from flowspec.head.pipeline import Pipeline
from flowspec.head.scheduler import Scheduler
from flowspec.model.architecture import ModelConfig
from flowspec.model.attention_metadata import run_rows
from flowspec.model.backend import StageBackend
from flowspec.protocol.messages import Batch, FinishRequest, Message, Segment
from flowspec.request import Decoding, Request, RequestOutput
from flowspec.runtime.core import Core, Send, Step
from flowspec.simulator.ablated import DecidingHead, UnprunedStage
from flowspec.simulator.simulator import ChargeLink, ChargeWork, instant_link, unit_work
from flowspec.speculation.drafters.base import Drafter
from flowspec.speculation.strategies import STRATEGIES, find_strategy
from flowspec.stage.stage import Stage
from flowspec.stage.stage_request_state import StageRequestState
from flowspec.tokenizer import TextStream
from tests.support.scripted import ScriptedDrafter, ScriptedSession, mixed
from tests.support.tiny import CONFIG, MAX_CONTEXT, stage_models, truth, whole_model

MAX_EVENTS = 100_000


@dataclass(slots=True)
class Watch:
    """A core whose invariants are checked before and after everything it does."""

    core: Any
    max_queued: int = 0
    truths: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # by request
    seen: list[Message] = field(default_factory=list)
    sent: list[Send] = field(default_factory=list)

    @property
    def rank(self) -> int:
        """The rank of the watched core."""
        return int(self.core.rank)

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Pass the message on and check what follows."""
        self.seen.append(message)
        sends = self.core.handle(message, now)
        self.sent.extend(sends)
        self._check()
        return sends

    def poll(self, now: float) -> Step | None:
        """Ask the core, and check before and after."""
        self._check()
        step: Step | None = self.core.poll(now)
        self._check()
        if step is None:
            return None
        self.sent.extend(step.sends)
        if step.work is None:
            return step
        finish = step.work.finish

        def watched(now: float, elapsed: float) -> Sequence[Send]:
            sends = finish(now, elapsed)
            self.sent.extend(sends)
            self._check()
            return sends

        return replace(step, work=replace(step.work, finish=watched))

    def _check(self) -> None:
        stage = self.core.end if isinstance(self.core, DecidingHead) else self.core
        if not isinstance(stage, Stage):
            return
        segments = sum(isinstance(message, Segment | Batch) for message in stage.queue)
        self.max_queued = max(self.max_queued, segments)
        for number, state in stage.requests.items():
            check_request(state, pruned=not isinstance(stage, UnprunedStage))
            closing = stage.queue and stage.queue[0]
            if (
                isinstance(closing, FinishRequest)
                and closing.request == number
                and number in self.truths
            ):
                check_keys(stage, state, self.truths[number])


def check_request(state: StageRequestState, *, pruned: bool = True) -> None:
    """Check what must hold for a request on a stage while nothing of it is computed."""
    count = len(state.nodes)
    lists = (
        state.parents,
        state.tokens,
        state.positions,
        state.rows,
        *state.hidden_states.values(),
    )
    assert all(len(column) == count for column in lists), "the row lists are not parallel"
    assert state.cache.num_tree_rows == count, "cache and row lists disagree"
    assert state.cache.prefix_length == state.tip_position + 1, "the path was not committed"
    if state.sampler is not None:
        assert len(state.sampler.tokens) == state.tip_position + 1, "committed tokens are missing"
        assert state.sampler.num_states in (0, count), "a state without a row, or the reverse"
    for row, (node, parent) in enumerate(zip(state.nodes, state.parents, strict=True)):
        assert state.rows[node] == row
        if not pruned:
            continue  # a dead row may stay until the next verdict
        if parent == state.tip:
            assert state.positions[row] == state.tip_position + 1
            living = state.next_token in (None, state.tokens[row])
            assert living, f"row of node {node} is dead: its token is not the verdict's"
        else:
            assert state.rows.get(parent, row) < row, f"row of node {node} has no living parent"
            assert state.positions[row] == state.positions[state.rows[parent]] + 1


def check_keys(stage: Stage, state: StageRequestState, true: tuple[int, ...]) -> None:
    """Check that the committed rows are those that the target alone would have."""
    count = state.cache.prefix_length
    keys, values, _ = whole_run(true, ())
    layers = slice(stage.model.first_layer, stage.model.last_layer)
    for have, want in ((state.cache.keys, keys), (state.cache.values, values)):
        close = torch.allclose(have[:, :, :count], want[layers, :, :count], atol=1e-3)
        assert close, f"stage {stage.rank}: committed keys or values are not the target's"


def check_hidden_states(session: ScriptedSession) -> None:
    """Check that the drafter was given the target's own hidden states of accepted positions."""
    _, _, own = whole_run(session.truth, tuple(session.hidden_states))
    for layer, hidden_states in session.hidden_states.items():
        assert all(position < len(session.tokens) - 1 for position in hidden_states), "not accepted"
        for position, hidden in hidden_states.items():
            close = torch.allclose(hidden, own[layer][position], atol=1e-3)
            assert close, f"layer {layer}, position {position}: not the target's own"


@lru_cache(maxsize=64)
def whole_run(
    tokens: tuple[int, ...], layers: tuple[int, ...]
) -> tuple[Tensor, Tensor, Mapping[int, Tensor]]:
    """Return the target's keys, values [L, g, n, d] over tokens [n]; hidden states [n, H] each."""
    model = whole_model()
    cache = model.new_cache(len(tokens))
    rows = torch.tensor(tokens)
    _, own = run_rows(
        model, cache, rows, range(len(tokens)), parents=None, aux_hidden_state_layers=layers
    )
    return cache.keys, cache.values, own


def make_cluster(
    num_stages: int,
    strategy: str = "streaming",
    *,
    drafter: Drafter | None = None,
    charges: tuple[ChargeWork, ChargeLink] = (unit_work, instant_link),
    wrap: Callable[[Core], Core] = lambda core: core,
    max_context: int = MAX_CONTEXT,
    new_text: Callable[[Request], TextStream] = lambda request: TextStream(None),
    bf16: bool = False,
    limits: Mapping[str, int] = {},
    model: ModelConfig = CONFIG,
    beside: Sequence[Core] = (),
    backends: Sequence[StageBackend[Any]] = (),
    **decode: Any,
) -> SimulatedEngine:
    """A simulated cluster over the tiny model; `decode` overrides the strategy's defaults.

    With `bf16` the stages run in bfloat16 and batch-invariant. `backends` compute the layers in
    place of the tiny model's own.
    """
    chunk = decode.pop("chunked_prefill_size", 5)
    head = Head(
        Scheduler(
            pipe=Pipeline(num_stages),
            max_context=max_context,
            chunked_prefill_size=chunk,
            **limits,
        ),
        Decoding(strategy=strategy, parameters=small(strategy, **decode)),
        {"scripted": drafter or ScriptedDrafter(mixed)},
        new_text=new_text,
    )
    parts = backends or stage_models(num_stages, bf16=bf16, config=model)
    stages = [
        Stage(rank, num_stages, part, batch_invariant=bf16)
        for rank, part in enumerate(parts, start=1)
    ]
    work_time, link_time = charges
    cluster = SimulatedEngine(
        head, stages, work_time=work_time, link_time=link_time, wrap=wrap, beside=beside
    )
    cluster.simulator._max_events = MAX_EVENTS
    return cluster


def small(strategy: str, **decode: Any) -> dict[str, Any]:
    """A strategy's parameters at the size of these tests; those that it does not take are left out.

    Parameters in `decode` that no strategy takes are kept, for whoever must refuse them.
    """
    spec = find_strategy(strategy)
    sizes = {"segment_size": 8, "num_draft_tokens": 24, "num_draft_steps": 4, "draft_topk": 4}
    known = {name for one in STRATEGIES.values() for name in one.parameters}
    found = {
        name: min(getattr(spec.defaults, name), most)
        for name, most in sizes.items()
        if name in spec.parameters
    }
    taken = {k: v for k, v in decode.items() if k in spec.parameters or k not in known}
    return {**found, **taken}


def run_watched(
    cluster_args: Mapping[str, Any], asked: Request
) -> tuple[RequestOutput, list[Watch]]:
    """One request with every invariant checked on the way and nothing left behind."""
    (completion,), watches = run_all_watched(cluster_args, [asked])
    return completion, watches


def run_all_watched(
    cluster_args: Mapping[str, Any], asked: Sequence[Request]
) -> tuple[list[RequestOutput], list[Watch]]:
    """The same for several at once."""
    watches: list[Watch] = []
    truths = {one.id: truth(one.prompt_tokens, one.sampling) for one in asked}

    def wrap(core: Core) -> Core:
        watches.append(Watch(core, truths=truths))
        return watches[-1]

    cluster = make_cluster(**cluster_args, wrap=wrap)
    completions = generate_all(cluster, asked)
    check_empty(cluster)
    return completions, watches


def serve(cluster: SimulatedEngine, asked: Sequence[Request]) -> Iterator[Event]:
    """The events of requests that run at once, as they come. Who stops reading aborts the rest."""
    streams = [cluster.submit(one) for one in asked]
    try:
        while any(stream.output is None for stream in streams):
            cluster.step()
            for stream in streams:
                while (event := stream.poll()) is not None:
                    yield event
    finally:
        for stream in streams:
            stream.abort()


def check_empty(cluster: SimulatedEngine) -> None:
    """No trace of a request after its end."""
    assert not cluster.head.pipe.batches
    assert not cluster.head.scheduler.running
    assert not cluster.head.scheduler.waiting
    for stage in cluster.stages:
        assert not stage.requests, f"stage {stage.rank} still holds {list(stage.requests)}"
        assert not stage.queue, f"stage {stage.rank} still has {len(stage.queue)} messages waiting"


# Text -------------------------------------------------------------------------------------------


class LetterTokenizer:
    """A tokenizer of letters and a few longer pieces, so that stop strings cross tokens."""

    PIECES = ("ab", "bc", "ca", "abc")

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        """The pieces of the tokens, one after the other."""
        del skip_special_tokens
        return "".join(self.piece(token) for token in token_ids)

    def piece(self, token: int) -> str:
        """Return the text of one token."""
        return self.PIECES[token] if token < len(self.PIECES) else chr(ord("a") + token % 26)


def grid(*columns: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    """Yield rows with every value of the longest column once; shorter columns repeat."""
    longest = max(len(column) for column in columns)
    for index in range(longest):
        yield tuple(column[index % len(column)] for column in columns)
