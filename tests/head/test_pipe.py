"""Tests of the messages between head and stages: hidden states, failures, bounds, counts."""

from collections.abc import Sequence
from typing import Any

import pytest

import flowspec.head.request_state
from flowspec.engine.engine import generate
from flowspec.protocol.messages import (
    Exit,
    Failed,
    FinishRequest,
    FreeRequest,
    HiddenStates,
    Message,
    Segment,
    Status,
    Submit,
)
from flowspec.request import Failure, FinishReason, RequestOutput
from flowspec.runtime.core import Core, Send, Step
from flowspec.speculation.strategies import STRATEGIES
from flowspec.stage.stage import Stage
from tests.support.clusters import (
    Watch,
    check_empty,
    check_hidden_states,
    make_cluster,
    run_watched,
)
from tests.support.scripted import SCRIPTS, ScriptedDrafter, perfect
from tests.support.tiny import PROMPT, T0, request, truth


def own_tokens(count: int, sampling: Any = T0) -> list[int]:
    """The target's first `count` tokens after PROMPT."""
    return list(truth(PROMPT, sampling)[len(PROMPT) :][:count])


@pytest.mark.parametrize("drafter", ["perfect", "hostile"])
def test_streaming_keeps_at_most_one_segment_before_the_first_stage(drafter):
    """Segments that wait are chosen too early: rows are picked when the stage can take them."""
    setup = {"num_stages": 4, "strategy": "streaming", "chunked_prefill_size": 64}
    asked = request(max_new_tokens=14)
    _, watches = run_watched({**setup, "drafter": ScriptedDrafter(SCRIPTS[drafter])}, asked)
    first = next(watch for watch in watches if watch.rank == 1)
    assert first.max_queued == 1


def test_hidden_states_are_the_targets_own_of_accepted_nodes_from_the_owning_stage():
    """EAGLE-3 needs layers of several stages; a wrong or doubled hidden state spoils drafts."""
    layers = (1, 5, -1)
    drafter = ScriptedDrafter(perfect, aux_hidden_state_layers=layers)
    asked = request(max_new_tokens=10)
    _, watches = run_watched({"num_stages": 4, "drafter": drafter}, asked)
    session = drafter.sessions[1]
    check_hidden_states(session)
    for layer in layers:  # in order on this clock: all accepted before the last verdict
        assert sorted(session.hidden_states[layer]) == list(
            range(len(session.hidden_states[layer]))
        )
        assert len(session.hidden_states[layer]) > len(PROMPT)
    senders = {
        (send.message.layer, watch.rank)
        for watch in watches
        for send in watch.sent
        if isinstance(send.message, HiddenStates)
    }
    assert senders == {(1, 1), (5, 3), (-1, 4)}


class SmallStage:
    """A stage that makes less room than it was asked for."""

    def __init__(self, core: Stage, capacity: int) -> None:
        self.core, self.capacity, self.rank = core, capacity, core.rank

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Handle a message of the core."""
        return self.core.handle(message, now)

    def poll(self, now: float) -> Step | None:
        """Return the next step of the core."""
        if 1 in self.core.requests:
            self.core.requests[1].cache.capacity = self.capacity
        return self.core.poll(now)


@pytest.mark.parametrize("capacity", [3, len(PROMPT) + 1])
def test_a_full_cache_ends_the_request_with_the_stages_name(capacity):
    """A failure in prompt or answer is reported with its place, and the cluster serves on."""

    def wrap(core: Core) -> Core:
        return SmallStage(core, capacity) if isinstance(core, Stage) and core.rank == 2 else core

    cluster = make_cluster(3, "streaming", wrap=wrap)
    completion = generate(cluster, request(1))
    assert completion.reason is FinishReason.ERROR
    assert completion.error.rank == 2
    assert "KV cache" in completion.error.cause
    check_empty(cluster)
    assert list(generate(cluster, request(2, max_new_tokens=4)).tokens) == own_tokens(4)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_caches_never_hold_more_than_the_head_asked_room_for(strategy, monkeypatch):
    """`AddRequest.capacity` has room for the largest tree at any moment."""
    monkeypatch.setattr(flowspec.head.request_state, "MIN_TREE_TOKENS", 8)
    setup = {"num_stages": 3, "strategy": strategy, "num_draft_tokens": 8, "segment_size": 3}
    completion, _ = run_watched({**setup, "num_draft_steps": 5, "draft_topk": 6}, request())
    assert completion.reason is FinishReason.LENGTH


def test_failures_of_other_requests_do_not_end_this_one():
    """A stage's complaint names a request; 0 means the stage itself."""
    cluster = make_cluster(1)
    head = cluster.head
    head.handle(Submit(request=request(5)), 0.0)
    head.poll(0.0)
    assert not head.handle(Failed(stage=1, request=4, text="late"), 0.0)
    close, free, end = head.handle(Failed(stage=1, request=0, text="broken"), 0.0)
    assert close.message == FinishRequest(request=5)
    assert free.message == FreeRequest(request=5)
    assert isinstance(end.message, RequestOutput)
    assert end.message.error == Failure(cause="broken", rank=1)


def test_statuses_of_the_stages_are_kept_also_between_requests():
    """They are the only way to see what a stage does."""
    cluster = make_cluster(2)
    watch = Watch(cluster.head)
    watch.handle(Status(stage=2, busy_s=1.0, num_segments=1, num_rows_run=2, num_rows_pruned=3,
                        num_requests=0), 0.0)  # fmt: skip
    assert cluster.status().stages[2].num_rows_pruned == 3
    generate(cluster, request(max_new_tokens=3))
    held = {rank: status.num_requests for rank, status in cluster.status().stages.items()}
    assert held == {1: 0, 2: 0}


def test_segment_numbers_count_every_segment_once():
    """One in, one out: each seq_no leaves the pipe exactly once."""
    _, watches = run_watched({"num_stages": 3, "strategy": "flowspec"}, request())
    went_in = [m.seq_no for m in watches[1].seen if isinstance(m, Segment)]
    came_out = sorted(m.seq_no for m in watches[0].seen if isinstance(m, Exit))
    assert went_in == came_out == list(range(len(went_in)))
