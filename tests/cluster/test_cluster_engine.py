"""A cluster's engine: what clients ask of it while devices come, fail and go."""

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from flowspec.cluster.controller.status import _device
from flowspec.cluster.membership.membership import Phase
from flowspec.cluster.membership.roster import Device, FailRequests, Halt
from flowspec.engine.cluster import RequestBlamed, StageLost
from flowspec.engine.stream import Notice
from flowspec.protocol.control import DeviceReport
from flowspec.protocol.messages import Failed, FinishRequest, Ping
from flowspec.request import (
    ClusterError,
    Decoding,
    Failure,
    FailureKind,
    FinishReason,
    Request,
    TokensOut,
)
from flowspec.speculation.strategies import STRATEGIES
from tests.support.asked import KILLED, Asking, Live, status
from tests.support.in_process import TinyModel, tiny_model

REQUEST = Request(prompt=(5,), max_new_tokens=8)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """Served with a strategy that is not the default."""
    made = tiny_model(tmp_path_factory.mktemp("asked"))
    return made.with_config(strategy="flowspec", decode={"draft_topk": 7})


@pytest.fixture
def waiting(model: TinyModel) -> Asking:
    """Without devices."""
    return Asking(model)


@pytest.fixture
def head(model: TinyModel) -> Live:
    """With two."""
    return Live(model)


def failure_of(stream: Any) -> Failure:
    """Why it has ended."""
    assert stream.output is not None
    assert stream.output.error is not None
    return stream.output.error  # type: ignore[no-any-return]


# Decoding ---------------------------------------------------------------------------------------


def test_two_clients_have_their_own_strategies_at_once(head):
    """And who names none has the cluster's."""
    own = Decoding(strategy="streaming", parameters={"draft_topk": 3})
    for decoding in (own, Decoding(strategy="ar"), None):
        head.ask(decoding=decoding)
    for _ in range(4):
        head.turn()
    resolved = [state.decoding for state in head.engine.head.scheduler.running.values()]
    assert [one.strategy for one in resolved] == ["streaming", "ar", "flowspec"]
    assert resolved[0].config.draft_topk == 3
    assert resolved[2].config == STRATEGIES["flowspec"].defaults.model_copy(
        update={"draft_topk": 7}
    )
    assert head.engine.status().strategy == "flowspec"


def test_a_strategy_that_runs_on_emulated_clusters_alone_is_refused(waiting):
    """Real stages cannot do without what it takes away."""
    with pytest.raises(ValueError, match="needs a pipeline that was made for it"):
        waiting.ask(decoding=Decoding(strategy="streaming-unpruned"))


def test_without_a_drafter_nothing_drafts(model):
    """Plain decoding still does."""
    parts = replace(model.parts, drafters={})
    head = Asking(replace(model, parts=parts))
    with pytest.raises(ValueError, match="needs a drafter and none is loaded"):
        head.ask(decoding=Decoding(strategy="streaming"))
    assert head.ask(decoding=Decoding(strategy="ar")).output is None


def test_what_no_stage_can_hold_is_refused_as_such(waiting):
    """Prompt, answer and tree, against what the tightest stage holds."""
    waiting.engine.head.scheduler.max_kv_tokens = 300
    fits = Decoding(strategy="streaming", parameters={"num_draft_tokens": 40})
    assert waiting.ask(decoding=fits).output is None
    large = Decoding(strategy="streaming", parameters={"num_draft_tokens": 400})
    stream = waiting.ask(decoding=large)
    failure = failure_of(stream)
    assert (failure.kind, failure.rank) == (FailureKind.TOO_LARGE, None)
    assert "tokens of KV cache on every stage, the tightest stage holds 300" in failure.cause
    assert 0 < stream.output.num_prompt_tokens < 300


def test_what_a_chat_template_refuses_is_refused_as_such(waiting, monkeypatch):
    """In the template's words; the engine goes on."""
    with monkeypatch.context() as patch:
        refusal = "{{ raise_exception('not so') }}"
        patch.setattr(waiting.parts.tokenizer, "chat_template", refusal)
        with pytest.raises(ValueError, match="chat template refuses this conversation: not so"):
            waiting.ask()
    assert waiting.ask().output is None


# An exclusive request ---------------------------------------------------------------------------


def notices(stream: Any) -> list[str]:
    """What its reader has been told so far."""
    found = []
    while isinstance(event := stream.poll(), Notice):
        found.append(event.text)
    return found


def test_an_exclusive_request_runs_alone_and_who_waits_is_told(head):
    """It waits for those before it, and those behind wait for it."""
    first = head.ask()
    head.turn()
    alone, behind = head.ask(exclusive=True), head.ask()
    for _ in range(3):
        head.turn()
    assert head.running == [first.request]
    assert notices(alone) == ["it runs alone, so it waits for the ends of 1 other requests"]
    assert notices(behind) == ["it waits for the end of a request that runs alone"]
    assert not notices(first)
    assert (head.engine.status().num_running, head.engine.status().num_waiting) == (1, 2)
    head.abort(first)
    for _ in range(3):
        head.turn()
    assert head.running == [alone.request]
    head.abort(alone)
    head.turn()
    assert head.running == [behind.request]


# The probe --------------------------------------------------------------------------------------


def test_the_head_s_own_probe_is_nobody_s_request(head):
    """It is not counted, gives way to a client's, and is not in the way of `forget`."""
    head.engine._submit_probe()
    head.turn()
    assert head.running == [head.engine._probe]
    assert head.engine.status().num_running == 0
    head.engine.forget_now()
    assert not head.running
    assert not head.engine.head.calibrations
    head.engine.deliver()
    assert head.engine._probe is None
    head.engine._submit_probe()
    stream = head.ask(exclusive=True)
    assert not notices(stream)
    assert head.engine._probe is None
    head.turn()
    assert head.running == [stream.request]


def test_a_probe_comes_behind_a_request_that_is_on_its_way(head):
    """Its number would be above that of the request, which the core would then refuse."""
    stream = head.engine.submit(replace(REQUEST, prompt=(5, 6)))
    head.engine._submit_probe()
    assert head.engine._probe is None
    head.turn()
    assert stream.output is None
    assert head.running == [stream.request]


def test_a_probe_goes_with_its_stages(head):
    """The next ones get one of their own, whatever became of it."""
    head.engine._submit_probe()
    first = head.engine._probe
    head.turn()
    head.engine._do(Halt(0, KILLED))
    assert head.engine._probe is None
    assert not head.engine.head.scheduler.waiting
    head.begin()
    head.turn()
    assert head.engine._probe not in (None, first)


def test_a_probe_that_fails_is_not_sent_again_at_once(head):
    """A model that computes nothing would keep the head busy with probes."""
    head.engine._submit_probe()
    head.turn()
    failed = Failed(epoch=head.epoch, stage=1, request=head.engine._probe, text="ValueError")
    head.say(failed)
    assert head.engine._probe is None
    head.engine._submit_probe()
    assert head.engine._probe is None


# Losses -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["drop", "failed", "given up"])
def test_a_request_may_end_before_its_first_token(head, how):
    """It has no speed; the engine goes on."""
    stream = head.ask()
    head.turn()
    assert head.running == [stream.request]
    if how == "drop":
        head.abort(stream)
    elif how == "failed":
        head.say(Failed(epoch=head.epoch, stage=1, request=stream.request, text="no room"))
        assert str(failure_of(stream)) == "stage 1 on ada: no room"
    else:
        head.engine._do(Halt(0, KILLED))
        head.engine._do(FailRequests(KILLED))
    output = stream.output
    assert (output.stats.num_tokens, output.stats.tokens_per_s) == (0, 0.0)
    assert output.reason == (FinishReason.CANCELLED if how == "drop" else FinishReason.ERROR)
    assert head.ask().output is None


def test_what_is_over_is_told_though_a_stage_takes_nothing(head):
    """The client hears of its end, and membership of the loss."""
    stream = head.ask()
    head.turn()
    head.broken = FinishRequest
    assert head.abort(stream).reason is FinishReason.CANCELLED
    assert StageLost(0, 2, "took no FinishRequest for 5 s") in head.told
    assert not head.running


def test_a_stage_that_takes_no_ping_is_lost_and_no_more(head):
    """What the core has said before still reaches its client."""
    stream = head.ask()
    head.turn()
    head.broken = Ping
    head.engine.loop.last_progress -= 40.0
    head.engine.loop.to_client.append(TokensOut(request=stream.request, tokens=(5,), text="a"))
    head.turn()
    assert StageLost(0, 2, "took no Ping for 5 s") in head.told
    assert next(iter(stream)) == TokensOut(request=stream.request, tokens=(5,), text="a")
    assert stream.output is None


def test_who_asks_as_a_stage_is_lost_waits_for_the_next_ones(head):
    """Also where the probe that gives way finds the loss; another probe is sent later."""
    head.engine._submit_probe()
    head.turn()
    head.broken = FinishRequest
    stream = head.ask()
    assert any(isinstance(event, StageLost) for event in head.told)
    assert (stream.output, head.engine._probe) == (None, None)
    head.broken = None
    head.begin()
    head.turn()
    assert head.running == [stream.request]
    head.abort(stream)
    head.engine._submit_probe()
    assert head.engine._probe is not None


def test_the_status_is_true_during_an_outage(head):
    """It names the device and why, and no stages; afterwards all is well."""
    assert head.engine.status().num_stages == 2
    assert set(head.engine.status().stages) == {1, 2}
    stream = head.ask()
    head.turn()
    head.engine._do(Halt(0, replace(KILLED, device="ada")))
    now = head.engine.status()
    assert (now.healthy, now.why) == (False, "stage 1 on ada: killed")
    assert (now.num_stages, now.stages) == (0, {})
    assert (now.num_running, now.num_waiting) == (0, 1)
    head.begin()
    head.turn()
    assert head.engine.status().healthy
    assert head.running == [stream.request]


def test_without_devices_the_status_says_so(waiting):
    """Who asks waits."""
    stream = waiting.ask()
    now = waiting.engine.status()
    assert (now.healthy, now.why, now.num_stages) == (False, "no device has joined", 0)
    assert (now.num_running, now.num_waiting) == (0, 1)
    assert waiting.abort(stream).reason is FinishReason.CANCELLED


@pytest.mark.parametrize("when", ["never", "before it came", "as it waited", "as it was served"])
def test_an_outage_before_the_first_token_is_counted(head, when):
    """Its time is a part of that to the first token, so whoever measures that has to know."""
    killed = Halt(0, KILLED)
    if when == "before it came":
        head.engine._do(killed)
    stream = head.ask()
    if when == "as it was served":
        head.turn()
    if when.startswith("as"):
        head.engine._do(killed)
    if when != "never":
        head.begin(epoch=3)
    head.turn()
    output = head.abort(stream)
    assert output.stats.num_resumes == int(when == "as it was served")
    assert output.stats.resume_s == 0.0
    # whoever compares the two knows of the outage
    assert head.engine.first_epoch(stream.request) == 0
    assert head.engine.epoch == (0 if when == "never" else 3)


def test_a_request_s_first_epoch_is_the_one_it_came_in(head):
    """0 where no devices were there to answer; it is remembered of the newest ones alone."""
    head.begin(epoch=3)
    there = head.ask()
    head.engine._do(Halt(3, KILLED))
    between = head.ask()
    assert head.engine.first_epoch(there.request) == 3
    assert head.engine.first_epoch(between.request) == 0
    for _ in range(300):
        head.abort(head.ask())
    assert head.engine.first_epoch(there.request) == 0
    assert len(head.engine._first_epochs) <= 256


@pytest.mark.parametrize("in_order", [False, True])
def test_a_request_during_which_a_device_is_lost_twice_ends_and_others_are_served(head, in_order):
    """Named with the device and the cause; a device that leaves in order is no request's doing."""
    stream = head.ask()
    for _ in range(2):
        head.begin()
        head.turn()
        assert head.running == [stream.request]
        if in_order:
            left = Failure(cause="left: stopped", rank=2, device="bob")
            head.engine._do(Halt(0, left, in_order=True))
        else:
            head.engine.loop.transport.receive = lost
            for _ in range(3):  # one reads: what there is to send goes first
                if head.engine._is_live:
                    head.turn()
    if in_order:
        assert stream.output is None
        return
    failure = failure_of(stream)
    assert str(failure).startswith(
        "stage 2 on bob: connection lost; a device was lost 2 times while it served this request"
    )
    assert (failure.kind, failure.rank, failure.device) == (FailureKind.FAILED, 2, "bob")
    assert RequestBlamed((0, 0)) in head.told
    head.begin()
    other = head.ask()
    head.turn()
    assert head.running == [other.request]


def lost(timeout_s):
    """What a transport says of a peer whose connection is gone."""
    del timeout_s
    raise ClusterError.of_rank(2, "connection lost")


@pytest.mark.parametrize("in_order", [False, True])
def test_a_device_s_own_word_counts_before_its_broken_connection(head, in_order):
    """It may come a moment later; a device that has left in order blames nobody."""
    head.ask()
    head.turn()
    cause = "left: stopped" if in_order else "IndexError: boom"
    head.engine.loop.transport.receive = lost
    halt = Halt(0, Failure(cause=cause, rank=2, device="bob"), in_order)
    timer = threading.Timer(0.05, head.engine.obey, [halt])
    timer.start()
    for _ in range(3):  # one reads
        if head.engine._is_live:
            head.turn()
    timer.join()
    assert str(head.engine.head.outage) == f"stage 2 on bob: {cause}"
    (waiting,) = head.engine.head.scheduler.waiting
    assert waiting.losses.recent == (not in_order)
    assert not any(isinstance(event, StageLost) for event in head.told)


# What stages count ------------------------------------------------------------------------------


def finished(stage: int, request: int, rows: int) -> Any:
    """A stage's answer to a FinishRequest."""
    return status(stage, finished_request=request, finished_rows_run=rows, num_rows_run=100)


def test_the_counts_of_a_request_are_those_that_every_stage_has_said(head):
    """Not the totals, and none before the last word."""
    stream = head.ask()
    head.turn()
    head.abort(stream)
    head.say(finished(1, stream.request, 7))
    head.say(status(2), finished(2, 99, 5))
    assert not stream.is_counted
    head.say(finished(2, stream.request, 6))
    counts = stream.stage_stats()
    assert {rank: one.num_rows_run for rank, one in counts.items()} == {1: 7, 2: 6}


def test_a_lost_stage_never_says_what_it_did(head, monkeypatch):
    """Which is known after a while: nobody waits longer."""
    monkeypatch.setattr("flowspec.engine.head_engine.COUNTS_S", 0.0)
    stream = head.ask()
    head.turn()
    stream.abort()
    head.obey()
    assert stream.is_counted
    assert stream.stage_stats() is None
    assert not head.engine._counts_due


def test_a_refused_request_has_no_counts(head):
    """Nobody waits for them."""
    stream = head.ask((10**6,))
    assert failure_of(stream).kind is FailureKind.REFUSED
    assert stream.stage_stats() is None


def test_what_is_kept_of_requests_that_are_over_is_bounded(head):
    """A head lives for months."""
    for _ in range(300):
        stream = head.ask()
        head.turn()
        head.abort(stream)
        head.say(finished(1, stream.request, 1), finished(2, stream.request, 1))
    engine = head.engine
    assert not engine._streams
    assert not engine._counts_due
    assert not engine._lost_epochs
    assert len(engine.head.finished) <= 256
    assert all(set(counts) == {1, 2} for counts in engine.head.finished.values())


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (status(1, busy_s=2.0), 2.0),
        (status(1, busy_s=float("nan")), 0.0),
        (status(1, busy_s=-1.0), 0.0),
        (status(1, busy_s=2.0, num_kv_tokens_used=2**63), 0.0),
    ],
)
def test_what_cannot_be_is_not_shown(said, shown):
    """`flowspec status` is answered whatever a device says."""
    report = DeviceReport(hostname="a", kind="", memory_available_bytes=0, memory_total_bytes=0)
    hello: Any = SimpleNamespace(report=report)
    device = Device("a", b"", hello, 0.0, rank=1)
    facts: Any = SimpleNamespace(statuses={1: said})
    membership: Any = SimpleNamespace(phase=Phase.SERVING)
    assert _device(device, membership, facts, 1.0).busy_s == shown
