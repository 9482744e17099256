"""An exception in one request's work, wherever it is raised: that request ends, and no other."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import flowspec.stage.sampler
from flowspec.engine.engine import generate_all
from flowspec.engine.simulated import SimulatedEngine
from flowspec.head.losses import MAX_RECENT, MIN_ALONE
from flowspec.head.request_state import RequestState
from flowspec.model.stage_model import StageModel
from flowspec.protocol.messages import Resume, Submit, Suspend
from flowspec.request import (
    Failure,
    FailureKind,
    FinishReason,
    Request,
    RequestOutput,
    TokensOut,
)
from flowspec.runtime.failures import Failures, attempt, is_fatal
from flowspec.simulator.simulator import instant_link
from flowspec.speculation.drafters.base import DraftJob
from flowspec.speculation.drafters.cached import IncrementalSession
from flowspec.speculation.drafters.draft_model import DraftModelDrafter
from flowspec.speculation.drafters.merge import MergedSession
from flowspec.speculation.strategies.streaming import Streaming
from flowspec.stage.stage import Stage
from flowspec.stage.stage_request_state import StageRequestState
from flowspec.tokenizer import TextStream
from tests.support.clusters import LetterTokenizer, check_empty, make_cluster
from tests.support.scripted import ScriptedDrafter, ScriptedSession, drafter_named, mixed
from tests.support.tiny import PROMPT, T0, T1, VOCAB, expected, request, stage_models

BAD = 2  # the request that fails
SEED = 77  # by which it is known where its id is not
PROMPT_OF_BAD = PROMPT[2:]
Patch = pytest.MonkeyPatch


class Broken(Exception):
    """An exception that no code expects."""


def asked() -> list[Request]:
    """Three at once; the second is the one that fails."""
    return [
        request(1, max_new_tokens=9),
        request(BAD, prompt=PROMPT_OF_BAD, sampling=replace(T1, seed=SEED), max_new_tokens=9),
        request(3, prompt=PROMPT[4:], sampling=T1, max_new_tokens=9),
    ]


def broken(owner: Any, name: str, is_bad: Callable[..., bool]) -> Callable[[Patch], None]:
    """`owner.name` raises where `is_bad` says so of its arguments."""
    before = getattr(owner, name)

    def raising(*args: Any, **fields: Any) -> Any:
        if is_bad(*args):
            raise Broken("it broke")
        return before(*args, **fields)

    return lambda patch: patch.setattr(owner, name, raising)


def of_bad(session: Any) -> bool:
    """Whether a drafter's session is that of the failing request."""
    return tuple(session.tokens[:4]) == PROMPT_OF_BAD[:4]


def second(count: int = 2) -> Callable[..., bool]:
    """The failing request's call number `count` of a method on its session (the head's)."""
    seen: list[int] = []

    def is_bad(_: Any, session: Any, *rest: Any) -> bool:
        del rest
        if session.request.id == BAD:
            seen.append(BAD)
        return len(seen) >= count and bool(session.request.id == BAD)

    return is_bad


HEAD_POINTS = {
    "strategy, what to send": broken(Streaming, "next_segment", second()),
    "strategy, what to draft": broken(Streaming, "next_draft", second()),
    "strategy, a verdict": broken(Streaming, "on_verdict", second()),
    "drafter, open": broken(ScriptedDrafter, "open", lambda d, opening: opening.request.id == BAD),
    "drafter, accept": broken(ScriptedSession, "accept", lambda s, tokens: of_bad(s)),
    "drafter, hidden states": broken(
        ScriptedSession, "accept_hidden_states", lambda s, *rest: of_bad(s)
    ),
    "drafter, rows": broken(ScriptedSession, "num_rows", lambda s, *rest: of_bad(s)),
    "drafter, prefill": broken(ScriptedSession, "prefill", lambda s, tree: of_bad(s)),
    "drafter, expand": broken(ScriptedSession, "expand", lambda s, *rest: of_bad(s)),
    "branches": broken(MergedSession, "merge_branches", lambda s, *rest: of_bad(s.base)),
    "merged branches": broken(MergedSession, "merged", lambda s, *rest: of_bad(s.base)),
    "calibration": broken(RequestState, "learn", lambda session, *rest: session.request.id == BAD),
}


def stage_of(state: StageRequestState) -> bool:
    """Whether a stage's request is the failing one."""
    return bool(state.opened.request == BAD)


STAGE_POINTS = {
    "cache": broken(Stage, "_new_cache", lambda stage, message, _: message.request == BAD),
    "admit": broken(StageRequestState, "admit", lambda state, segment: stage_of(state)),
    "enter": broken(StageRequestState, "enter", lambda state, segment: stage_of(state)),
    "reroot": broken(StageRequestState, "reroot", lambda state, verdict: stage_of(state)),
    "hidden states": broken(
        Stage, "_keep_hidden_states", lambda stage, share: stage_of(share.state)
    ),
    "sampling": broken(
        flowspec.stage.sampler, "choose", lambda logits, positions, sampling: sampling.seed == SEED
    ),
    "verdict": broken(Stage, "_verdict", lambda stage, state, segment: stage_of(state)),
}
TEXT_POINTS = ("new_text", "push", "flush")


class Text(TextStream):
    """Letters, and an exception at one point."""

    point = ""

    def push(self, tokens: Sequence[int]) -> tuple[str, int]:
        """Raise, for one request."""
        if self.point == "push":
            raise Broken("it broke")
        return super().push(tokens)

    def flush(self) -> str:
        """Raise, for one request."""
        if self.point == "flush":
            raise Broken("it broke")
        return super().flush()


def check_only_the_bad_one_ends(cluster: SimulatedEngine, *, ranks: Sequence[int]) -> None:
    """The others' text is the target's own, nothing is left behind, and the next one is served."""
    several = asked()
    completions = generate_all(cluster, several)
    check_ends(several, completions, ranks)
    check_empty(cluster)
    (after,) = generate_all(cluster, [request(9)])
    assert list(after.tokens) == expected(request(9))


def check_ends(
    several: list[Request], completions: list[RequestOutput], ranks: Sequence[int]
) -> None:
    """The bad one ends with its reason, and the error names one of `ranks` as its place."""
    for one, completion in zip(several, completions, strict=True):
        if one.id != BAD:
            assert (completion.error, list(completion.tokens)) == (None, expected(one))
            continue
        assert completion.reason is FinishReason.ERROR
        assert completion.error is not None
        assert completion.error.rank in ranks, completion.error
        assert completion.error.cause == "Broken: it broke"
        assert list(completion.tokens) == expected(one)[: len(completion.tokens)]


@pytest.mark.parametrize("point", HEAD_POINTS)
def test_what_fails_in_the_head_ends_one_request(point: str, monkeypatch: Patch) -> None:
    """Drafter, strategy, merged branches, calibration: whatever is done for a request alone."""
    HEAD_POINTS[point](monkeypatch)
    drafter = ScriptedDrafter(mixed, aux_hidden_state_layers=(1,))
    cluster = make_cluster(2, drafter=drafter, merge="branches" in point, calibrate=True)
    check_only_the_bad_one_ends(cluster, ranks=(0,))


@pytest.mark.parametrize("point", TEXT_POINTS)
def test_a_detokenizer_that_fails_ends_one_request(point: str) -> None:
    """Made, fed, or asked for its rest."""

    def new_text(asked_for: Request) -> TextStream:
        if asked_for.id == BAD and point == "new_text":
            raise Broken("it broke")
        text = Text(LetterTokenizer(), asked_for.stop)
        text.point = point if asked_for.id == BAD else ""
        return text

    check_only_the_bad_one_ends(make_cluster(2, new_text=new_text), ranks=(0,))


@pytest.mark.parametrize("point", STAGE_POINTS)
def test_what_fails_on_a_stage_ends_one_request(point: str, monkeypatch: Patch) -> None:
    """A stage's error names the stage, even if its rows run together with those of others."""
    STAGE_POINTS[point](monkeypatch)
    cluster = make_cluster(2, drafter=ScriptedDrafter(mixed, aux_hidden_state_layers=(1,)))
    check_only_the_bad_one_ends(cluster, ranks=(1, 2))


@pytest.mark.parametrize("num_stages", [1, 2])
def test_a_forward_that_fails_finds_who_is_the_cause(num_stages: int, monkeypatch: Patch) -> None:
    """The rows of several requests are one tensor: the others' run again without it."""
    joint = []
    forward = StageModel.forward

    def raising(self: Any, x: Any, positions: Any, metadata: Any, **fields: Any) -> Any:
        caches = [one.cache for one in getattr(metadata, "parts", [metadata])]
        if any(getattr(cache, "is_bad", False) for cache in caches):
            joint.append(len(caches))
            raise IndexError("index out of range in self")
        return forward(self, x, positions, metadata, **fields)

    new_cache = Stage._new_cache

    def marked(self: Stage, message: Any, before: Any) -> Any:
        cache = new_cache(self, message, before)
        cache.is_bad = message.request == BAD and self.rank == self.num_stages
        return cache

    monkeypatch.setattr(StageModel, "forward", raising)
    monkeypatch.setattr(Stage, "_new_cache", marked)
    cluster = make_cluster(num_stages, chunked_prefill_size=64)
    several = asked()
    done = {c.request: c for c in generate_all(cluster, several)}
    assert max(joint) > 1, "it ran with no other"
    cause = "IndexError: index out of range in self"
    assert done[BAD].error == Failure(cause=cause, rank=num_stages)
    for one in several:
        if one.id != BAD:
            assert list(done[one.id].tokens) == expected(one)
    check_empty(cluster)


@pytest.mark.parametrize("phase", ["begin", "forward", "finish"])
def test_a_draft_models_joint_forward_fails_for_one_alone(phase: str, monkeypatch: Patch) -> None:
    """Its rows are left out; those of the others give the proposals that they would have given."""
    if phase == "forward":
        forward = DraftModelDrafter.forward

        def raising(self: Any, tokens: Any, positions: Any, metadata: Any, shares: Any) -> Any:
            if any(own is BAD_CACHE.get("own") for own in caches_of(metadata)):
                raise IndexError("index out of range in self")
            return forward(self, tokens, positions, metadata, shares)

        opening = DraftModelDrafter.open

        def noting(self: Any, opened: Any) -> Any:
            session = opening(self, opened)
            if opened.request.id == BAD:
                BAD_CACHE["own"] = session.cache
            return session

        monkeypatch.setattr(DraftModelDrafter, "open", noting)
        monkeypatch.setattr(DraftModelDrafter, "forward", raising)
    else:
        broken(IncrementalSession, phase, lambda session, job, *rest: of_bad(session))(monkeypatch)
    cluster = make_cluster(2, drafter=drafter_named("draft_model"))
    several = asked()
    done = {c.request: c for c in generate_all(cluster, several)}
    assert done[BAD].reason is FinishReason.ERROR
    for one in several:
        if one.id != BAD:
            assert list(done[one.id].tokens) == expected(one)
            assert done[one.id].stats.num_draft_forwards > 5, "it had no drafter any more"
    check_empty(cluster)


BAD_CACHE: dict[str, Any] = {}


def caches_of(metadata: Any) -> list[Any]:
    """The caches that a forward looks into."""
    return [one.cache for one in getattr(metadata, "parts", [metadata])]


def test_a_drafter_that_does_not_say_whose_fault_it_is_ends_those_it_drafted_for() -> None:
    """The loop survives, and the next request is served."""

    class Unhelpful(ScriptedDrafter):
        fails = True

        def begin(self, jobs: Sequence[DraftJob]) -> Any:
            """Begin, and raise for one job."""
            if self.fails:
                raise Broken("it broke")
            return super().begin(jobs)

    drafter = Unhelpful(mixed)
    cluster = make_cluster(2, drafter=drafter)
    done = generate_all(cluster, asked())
    assert {one.error for one in done} == {Failure(cause="Broken: it broke", rank=0)}
    check_empty(cluster)
    drafter.fails = False
    (after,) = generate_all(cluster, [request(9)])
    assert list(after.tokens) == expected(request(9))


def test_a_kept_request_that_fails_is_given_up_and_nobody_ends() -> None:
    """A next turn is served even if the last turn left nothing that it can use."""

    class Forgetful(ScriptedSession):
        @property
        def num_reusable(self) -> int:
            """Raise, for one request."""
            raise Broken("it broke")

    class Keeping(ScriptedDrafter):
        def open(self, opening: Any) -> ScriptedSession:
            """Open a session that raises."""
            return Forgetful(self, opening.request, opening.draft_topk)

    cluster = make_cluster(2, drafter=Keeping(mixed), limits={"max_cached": 2})
    (first,) = generate_all(cluster, [request(1)])
    next_prompt = (*PROMPT, *first.tokens)
    (second_turn,) = generate_all(cluster, [request(2, prompt=next_prompt)])
    assert second_turn.error is None
    assert list(second_turn.tokens) == expected(request(2, prompt=next_prompt))
    assert 1 not in cluster.head.scheduler.cache
    assert all(1 not in stage.requests for stage in cluster.stages)


def test_a_kept_request_that_a_stage_has_lost_is_given_up() -> None:
    """Its next turn begins from nothing instead of failing on that stage."""
    cluster = make_cluster(2, limits={"max_cached": 2})
    (first,) = generate_all(cluster, [request(1)])
    cluster.stages[1].failures.add(Broken("it broke"), 1)
    for send in cluster.stages[1]._tell_failed():
        cluster.simulator.deliver(send.to, send.message)
    next_turn = request(2, prompt=(*PROMPT, *first.tokens))
    (done,) = generate_all(cluster, [next_turn])
    assert (done.error, list(done.tokens)) == (None, expected(next_turn))
    assert done.stats.num_prompt_reused == 0


# The vocabulary ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "of"),
    [
        ({"prompt": (*PROMPT, VOCAB)}, "the prompt has the token '[PAD]' (id 48)"),
        ({"prompt": (-1, *PROMPT)}, "the prompt has the token '[PAD]' (id -1)"),
        ({"eos": (3, VOCAB + 5)}, "the end has the token '[PAD]' (id 53)"),
    ],
)
def test_tokens_that_the_model_has_not_are_refused_by_name(fields: dict[str, Any], of: str) -> None:
    """The request is refused before anything is computed, with text, id and vocabulary size."""
    limits: dict[str, Any] = {"vocab_size": VOCAB, "text_of": lambda token: "[PAD]"}
    cluster = make_cluster(2, limits=limits)
    (done,) = generate_all(cluster, [request(**fields)])
    assert done.reason is FinishReason.ERROR
    assert done.error is not None
    assert done.error.kind is FailureKind.REFUSED
    assert of in done.error.cause
    assert "vocabulary has 48 tokens" in done.error.cause
    assert not cluster.stages[0].num_segments


@pytest.mark.parametrize("merge", [False, True])
def test_proposals_outside_the_vocabulary_never_enter_the_tree(merge: bool) -> None:
    """A draft model with more tokens: the text is the target's own, with the others' help."""

    def beyond(random: Any, true: int | None, draft_topk: int) -> list[tuple[int, float]]:
        return [(VOCAB, -0.01), (-1, -0.02), (VOCAB + 9, -0.5), *mixed(random, true, draft_topk)]

    limits: dict[str, Any] = {"vocab_size": VOCAB}
    cluster = make_cluster(2, drafter=ScriptedDrafter(beyond), limits=limits, merge=merge)
    (done,) = generate_all(cluster, [request()])
    assert (done.error, list(done.tokens)) == (None, expected(request()))
    assert done.stats.mean_accepted_length > 1.0


def test_a_stage_fails_a_row_without_an_embedding_before_it_runs() -> None:
    """On a GPU the lookup itself would end the process, so ids are checked first."""
    cluster = make_cluster(2, "ar")  # a head that does not know the vocabulary
    several = [request(1), request(BAD, prompt=(*PROMPT, VOCAB)), request(3, prompt=PROMPT[3:])]
    done = {c.request: c for c in generate_all(cluster, several)}
    assert str(done[BAD].error).startswith(f"stage 1: a row has the token id {VOCAB}, the model's")
    assert [list(done[n].tokens) for n in (1, 3)] == [expected(several[0]), expected(several[2])]
    check_empty(cluster)


# A request that kills stages --------------------------------------------------------------------


def lose_stage(cluster: SimulatedEngine, *, blames: bool = True) -> None:
    """Stage 2 dies; a fresh one takes its place."""
    simulator = cluster.simulator
    failure = Failure(cause="connection lost", rank=2, device="ada")
    simulator.deliver(0, Suspend(failure=failure, blames=blames))
    stage = Stage(2, 2, stage_models(2)[1], epoch=cluster.head.pipe.epoch)
    simulator.replace(stage)
    cluster.stages = [cluster.stages[0], stage]
    simulator.deliver(0, Resume(num_stages=2))


def serve_with_poison(
    cluster: SimulatedEngine, several: Sequence[Request], poison: int, *, blames: bool = True
) -> tuple[dict[int, RequestOutput], int]:
    """Each time rows of `poison` reach stage 2, that dies; the ends, and how often it died."""
    done, deaths = dict[int, RequestOutput](), 0
    for one in several:
        cluster.simulator.submit(Submit(request=one))
    while cluster.simulator.step():
        state = cluster.stages[1].requests.get(poison)
        if state is not None and state.tip_position >= 0 and deaths < 20:
            deaths += 1
            lose_stage(cluster, blames=blames)
        while cluster.simulator.to_client:
            event = cluster.simulator.to_client.popleft()
            if isinstance(event, RequestOutput):
                done[event.request] = event
    return done, deaths


@pytest.mark.parametrize("poison", [1, 2, 3])
def test_a_request_that_kills_a_stage_is_found_after_two_losses(poison: int) -> None:
    """One of several requests fails, wherever it stands among them; the others lose nothing."""
    cluster = make_cluster(2)
    several = asked()
    done, deaths = serve_with_poison(cluster, several, poison)
    assert deaths == 2
    assert done[poison].reason is FinishReason.ERROR
    error = done[poison].error
    assert error is not None
    assert (error.rank, error.device) == (2, "ada")
    assert str(error).startswith("stage 2 on ada: connection lost; a device was lost 2 ")
    for one in several:
        if one.id != poison:
            assert (done[one.id].error, list(done[one.id].tokens)) == (None, expected(one))
    check_empty(cluster)


def test_losses_that_no_request_can_have_caused_end_none() -> None:
    """A device that leaves in order, layers that move: the answer goes on each time."""
    cluster = make_cluster(2)
    done, deaths = serve_with_poison(cluster, asked()[:1], 1, blames=False)
    assert deaths == 20
    assert list(done[1].tokens) == expected(asked()[0])


def serve_with_late_losses(
    several: Sequence[Request], poison: int, *, seconds_per_work: float, every: int = 3
) -> tuple[dict[int, RequestOutput], int]:
    """Stage 2 dies with each `every`-th token of `poison`; the ends, and how often it died."""
    cluster = make_cluster(2, "ar", charges=(lambda rank, work: seconds_per_work, instant_link))
    done = dict[int, RequestOutput]()
    for one in several:
        cluster.simulator.submit(Submit(request=one))
    count, losses = 0, 0
    while cluster.simulator.step():
        while cluster.simulator.to_client:
            event = cluster.simulator.to_client.popleft()
            if isinstance(event, RequestOutput):
                done[event.request] = event
            elif isinstance(event, TokensOut) and event.request == poison:
                count += 1
                if count % every == 0:
                    losses += 1
                    lose_stage(cluster)
    check_empty(cluster)
    return done, losses


def test_a_long_answer_survives_many_losses_far_apart() -> None:
    """After a minute of service the earlier losses are forgotten."""
    long = request(max_new_tokens=40)
    done, losses = serve_with_late_losses([long], long.id, seconds_per_work=20.0)
    assert losses > 10
    assert (done[1].error, list(done[1].tokens)) == (None, expected(long))


def test_a_request_that_kills_a_stage_some_tokens_later_ends() -> None:
    """Verdicts between the losses do not clear it; its tokens until then are the client's."""
    long = request(max_new_tokens=40)
    done, losses = serve_with_late_losses([long], long.id, seconds_per_work=0.01)
    assert losses == MAX_RECENT
    assert done[1].reason is FinishReason.ERROR
    assert f"a device was lost {MAX_RECENT} times" in str(done[1].error)
    assert list(done[1].tokens) == expected(long)[: len(done[1].tokens)]
    assert len(done[1].tokens) >= 3 * MAX_RECENT


@pytest.mark.parametrize("poison", [1, 2, 3])
def test_who_kills_a_stage_later_each_time_is_found_among_others(poison: int) -> None:
    """Those that are served beside it lose nothing, wherever it stands among them."""
    several = [
        request(1, max_new_tokens=40),
        request(2, prompt=PROMPT[2:], sampling=T1, max_new_tokens=40),
        request(3, prompt=PROMPT[4:], max_new_tokens=40),
    ]
    done, losses = serve_with_late_losses(several, poison, seconds_per_work=0.01)
    assert losses <= MAX_RECENT + MIN_ALONE
    for one in several:
        if one.id == poison:
            assert done[one.id].reason is FinishReason.ERROR
        else:
            assert (done[one.id].error, list(done[one.id].tokens)) == (None, expected(one))


# What is no request's fault ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "fatal"),
    [
        (ValueError("no"), False),
        (AssertionError("a bug"), False),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
        (torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (MemoryError(), False),
        (RuntimeError("CUDA error: device-side assert triggered"), True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), True),
        (KeyboardInterrupt(), True),
    ],
)
def test_what_leaves_no_sound_process_is_no_requests_end(error: BaseException, fatal: bool) -> None:
    """It goes on up: the device is restarted or rejoins, and the loss is counted there."""
    assert is_fatal(error) == fatal
    failures = Failures()

    def fail() -> None:
        raise error

    if fatal:
        with pytest.raises(type(error)), failures.of(1):
            fail()
        return
    with failures.of(1):
        fail()
    assert failures.take() == {1: error}
    assert attempt(fail) is error


def test_a_broken_accelerator_ends_the_stage(monkeypatch: Patch) -> None:
    """No request is blamed for it here."""

    def raising(*args: Any, **fields: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(StageModel, "forward", raising)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        generate_all(make_cluster(2), [request(sampling=T0)])
