"""Requests that are decoded in different ways share one pipeline: each text is as alone."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec.engine.simulated import SimulatedEngine
from flowspec.head.head import Head
from flowspec.head.pipeline import Pipeline
from flowspec.head.scheduler import Scheduler
from flowspec.protocol.messages import Batch
from flowspec.request import Decoding, Failure, FinishReason, Request, RequestOutput, SamplingParams
from flowspec.runtime.core import Core
from flowspec.simulator.simulator import adversarial, instant_link, unit_work
from flowspec.speculation.drafters.base import Draft, Drafter, DraftJob, Proposed
from flowspec.speculation.strategies import STRATEGIES
from flowspec.stage.stage import Stage
from tests.support.clusters import MAX_EVENTS, Watch, check_empty, serve, small
from tests.support.scripted import SCRIPTS, ScriptedDrafter, drafter_named, mixed, perfect
from tests.support.tiny import (
    MAX_CONTEXT,
    PROMPT,
    SAMPLINGS,
    T0,
    T1,
    expected,
    request,
    stage_models,
    truth,
)

PROMPTS = (PROMPT, PROMPT[2:], PROMPT[::-1], (*PROMPT, *PROMPT[:5]), PROMPT[:4])


def make_engine(
    drafters: Mapping[str, Drafter],
    *,
    num_stages: int = 2,
    seed: int | None = None,
    asked: Sequence[Request] = (),
    **limits: int,
) -> tuple[SimulatedEngine, list[Watch]]:
    """An engine with these drafters, and its cores, whose invariants are checked on the way.

    With a seed its computations and messages take adversarial times.
    """
    watches: list[Watch] = []
    truths = {one.id: truth(one.prompt_tokens, one.sampling) for one in asked}

    def wrap(core: Core) -> Core:
        watches.append(Watch(core, truths=truths))
        return watches[-1]

    scheduler = Scheduler(
        pipe=Pipeline(num_stages), max_context=MAX_CONTEXT, chunked_prefill_size=5, **limits
    )
    head = Head(scheduler, Decoding(parameters=small("streaming")), drafters)
    models = stage_models(num_stages)
    stages = [Stage(rank, num_stages, model) for rank, model in enumerate(models, start=1)]
    work_time, link_time = (unit_work, instant_link) if seed is None else adversarial(seed)
    engine = SimulatedEngine(head, stages, work_time=work_time, link_time=link_time, wrap=wrap)
    engine.simulator._max_events = MAX_EVENTS
    return engine, watches


def asking(
    number: int,
    strategy: str = "streaming",
    drafter: str = "",
    *,
    sampling: SamplingParams = T0,
    new: int = 10,
    **parameters: Any,
) -> Request:
    """A request that names its decoding; prompts differ by number."""
    decoding = Decoding(
        strategy=strategy, parameters=small(strategy, **parameters), drafter=drafter
    )
    prompt = PROMPTS[number % len(PROMPTS)]
    one = request(number, prompt=prompt, sampling=sampling, max_new_tokens=new)
    return replace(one, decoding=decoding)


def answers(engine: SimulatedEngine, asked: Sequence[Request]) -> dict[int, RequestOutput]:
    """The whole answers to requests that run at once, by id; several of them ran together once."""
    done, most = {}, 0
    for event in serve(engine, asked):
        most = max(most, len(engine.head.scheduler.running))
        if isinstance(event, RequestOutput):
            done[event.request] = event
    assert most >= min(len(asked), 3), "they did not run at once"
    return done


def check_texts(asked: Sequence[Request], done: Mapping[int, RequestOutput]) -> None:
    """Each answer is what the target alone says."""
    for one in asked:
        output = done[one.id]
        assert (output.error, list(output.tokens)) == (None, expected(one)), one.decoding


@pytest.mark.parametrize("seed", [None, 3, 4])
@pytest.mark.parametrize(
    ("first", "second"),
    [("mixed", "perfect"), ("eagle", "ngram"), ("eagle3", "draft_model"), ("hostile", "eagle")],
)
def test_all_strategies_and_two_drafters_share_a_pipeline(first, second, seed):
    """Every strategy once, drafters in turn, at every kind of sampling, merged and calibrated."""
    asked = [
        asking(
            number,
            strategy,
            (first, second)[number % 2] if STRATEGIES[strategy].drafts else "",
            sampling=SAMPLINGS[number % len(SAMPLINGS)],
            merge=number % 3 == 0,
            calibrate=number % 3 != 1,
            draft_topk=12,
        )
        for number, strategy in enumerate(STRATEGIES, start=1)
    ]
    drafters = {first: drafter_named(first), second: drafter_named(second, seed=1)}
    engine, watches = make_engine(drafters, num_stages=3, seed=seed, asked=asked)
    check_texts(asked, answers(engine, asked))
    check_empty(engine)
    shared = [m for m in watches[1].seen if isinstance(m, Batch)]
    assert any(len({s.request for s in batch.segments}) > 1 for batch in shared), "nothing shared"


class Counting(ScriptedDrafter):
    """Counts the jobs of each of its forwards, by request."""

    def __init__(self, name: str, *, seed: int = 0) -> None:
        super().__init__(mixed, seed=seed)
        self.name = name
        self.forwards: list[set[int]] = []

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Begin a forward of these jobs."""
        ids = {id(session): number for number, session in self.sessions.items()}
        self.forwards.append({ids[id(unwrapped(job.session))] for job in jobs})
        return super().begin(jobs)


def unwrapped(session: Any) -> Any:
    """The drafter's own session, below merged branches."""
    return getattr(session, "base", session)


def test_a_drafter_drafts_for_those_who_named_it():
    """A forward serves requests of one drafter and one kind of tree; both drafters have turns."""
    drafters = {"first": Counting("first"), "second": Counting("second", seed=5)}
    asked = [
        asking(1, "streaming", "first", new=16),
        asking(2, "streaming", "second", new=16),
        asking(3, "flowspec", "first", new=16, sampling=T1),
        asking(4, "serial_pp", "second", new=16, sampling=T1),
        asking(5, "streaming", "first", new=16, merge=True),
        asking(6, "streaming", "", new=16),  # the first one
    ]
    engine, _ = make_engine(drafters, asked=asked)
    done = answers(engine, asked)
    check_texts(asked, done)
    forwards = {name: drafter.forwards for name, drafter in drafters.items()}
    assert set().union(*forwards["first"]) == {1, 3, 5, 6}
    assert set().union(*forwards["second"]) == {2, 4}
    assert any(len(ids) > 1 for ids in forwards["first"]), "no forward was shared"
    assert all(ids == {5} for ids in forwards["first"] if 5 in ids), "merged trees are apart"
    assert set(engine.head.pipe.draft_s) == {"first", "second"}
    assert all(done[one.id].stats.num_draft_forwards > 3 for one in asked)


def test_requests_learn_with_their_equals_alone():
    """Calibration is shared by equal decodings, and by no other strategy, parameter or drafter."""
    drafters = {"first": drafter_named("mixed"), "second": drafter_named("perfect")}
    asked = [
        asking(1, "streaming", "first", calibrate=True),
        asking(2, "streaming", "", calibrate=True),  # equal to the first
        asking(3, "streaming", "second", calibrate=True),
        asking(4, "streaming", "first", calibrate=True, num_draft_tokens=9),
        asking(5, "streaming", "first", calibrate=False),
        asking(6, "ar"),
    ]
    engine, _ = make_engine(drafters, asked=asked)
    check_texts(asked, answers(engine, asked))
    learnt = engine.head.calibrations
    assert sorted(one.drafter for one in learnt) == ["first", "first", "second"]
    assert all(calibration.num_bins for calibration in learnt.values())
    engine.forget()
    assert not engine.head.calibrations


CASES = st.tuples(
    st.sampled_from(list(STRATEGIES)),
    st.sampled_from(["first", "second", ""]),
    st.sampled_from(SAMPLINGS),
    st.booleans(),
    st.booleans(),
    st.sampled_from([6, 24]),
)


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    cases=st.lists(CASES, min_size=2, max_size=5),
    scripts=st.tuples(st.sampled_from(list(SCRIPTS)), st.sampled_from([*SCRIPTS, "ngram"])),
    num_stages=st.integers(1, 4),
    most=st.integers(2, 5),
)
@settings(max_examples=30, deadline=None)
def test_no_timing_mixes_them_up(seed, cases, scripts, num_stages, most):
    """Whatever is open at once and however late anything comes, each text is as alone."""
    asked = [
        asking(
            number,
            strategy,
            drafter,
            sampling=sampling,
            new=6,
            merge=merge,
            calibrate=calibrate,
            num_draft_tokens=size,
        )
        for number, (strategy, drafter, sampling, merge, calibrate, size) in enumerate(cases, 1)
    ]
    first, second = scripts
    drafters = {
        "first": drafter_named(first, seed=seed % 1000),
        "second": drafter_named(second, seed=7),
    }
    engine, _ = make_engine(
        drafters, num_stages=num_stages, seed=seed, asked=asked, max_num_seqs=most
    )
    done = {}
    for event in serve(engine, asked):
        if isinstance(event, RequestOutput):
            done[event.request] = event
    check_texts(asked, done)
    check_empty(engine)


class Broken(Exception):
    """An exception that no code expects."""


class Failing(ScriptedDrafter):
    """Begins forwards that break: all of them, after the first few."""

    def __init__(self, phase: str) -> None:
        super().__init__(perfect)
        self.phase = phase
        self.num_forwards = 0

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Begin a forward that breaks in the chosen phase."""
        self.num_forwards += 1
        if self.num_forwards <= 2:
            return super().begin(jobs)
        if self.phase == "begin":
            raise Broken("it broke")
        return BrokenDraft(super().begin(jobs), self.phase)


class BrokenDraft:
    """A forward that breaks while it runs, or when its proposals are asked for."""

    looked_up = False

    def __init__(self, draft: Draft, phase: str) -> None:
        self.draft, self.phase = draft, phase

    def run(self) -> None:
        """Compute, or break."""
        if self.phase == "run":
            raise Broken("it broke")
        self.draft.run()

    def finish(self) -> Sequence[Proposed]:
        """Break."""
        raise Broken("it broke")


@pytest.mark.parametrize("seed", [None, 8])
@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("phase", ["begin", "run", "finish"])
def test_a_failing_forward_ends_the_requests_of_its_drafter_alone(phase, merge, seed):
    """Those of the other drafter, and those without one, are answered to the end."""
    drafters = {"bad": Failing(phase), "good": drafter_named("mixed")}
    asked = [
        asking(1, "streaming", "bad", new=24, merge=merge),
        asking(2, "streaming", "good", new=24, merge=merge),
        asking(3, "flowspec", "bad", new=24, sampling=T1),
        asking(4, "serial_pp", "good", new=24, sampling=T1),
        asking(5, "ar", new=24),
    ]
    engine, _ = make_engine(drafters, seed=seed, asked=asked)
    done = answers(engine, asked)
    check_texts([asked[1], asked[3], asked[4]], done)
    for one in (asked[0], asked[2]):
        assert done[one.id].error == Failure(cause="Broken: it broke", rank=0)
        tokens = list(done[one.id].tokens)
        assert tokens == expected(one)[: len(tokens)]
    check_empty(engine)
    after = asking(6, "streaming", "good", new=12)
    check_texts([after], answers(engine, [after]))


@pytest.mark.parametrize("seed", [None, 21, 22, 23])
@pytest.mark.parametrize("aborted", [1, 2, 3, 4])
def test_aborting_one_leaves_the_others_exact(aborted, seed):
    """Its rows, drafts and caches go; nothing of the others does, whichever drafter they share."""
    drafters = {"first": drafter_named("eagle"), "second": drafter_named("mixed")}
    asked = [
        asking(1, "streaming", "first", new=20, draft_topk=12),
        asking(2, "flowspec", "second", new=20, sampling=T1),
        asking(3, "streaming", "second", new=20, merge=True, calibrate=True),
        asking(4, "pipedec", "first", new=20, sampling=T1),
    ]
    engine, _ = make_engine(drafters, seed=seed, asked=asked)
    streams = {one.id: engine.submit(one) for one in asked}
    next(iter(streams[aborted]))
    streams[aborted].abort()
    done = {number: stream.result() for number, stream in streams.items()}
    cut = done.pop(aborted)
    assert cut.reason is FinishReason.CANCELLED
    assert list(cut.tokens) == expected(asked[aborted - 1])[: len(cut.tokens)]
    assert 1 <= len(cut.tokens) < 20
    check_texts([one for one in asked if one.id != aborted], done)
    check_empty(engine)


VARIANTS: Sequence[tuple[str, str, dict[str, Any]]] = (
    ("streaming", "first", {}),
    ("streaming", "second", {}),
    ("streaming", "first", {"merge": True}),
    ("streaming", "first", {"num_draft_tokens": 10}),
    ("serial_pp", "first", {}),
    ("ar", "", {}),
)


@pytest.mark.parametrize(("before", "after"), list(product(range(6), range(6))))
def test_prefixes_are_used_again_between_equal_decodings_alone(before, after):
    """A next turn of another decoding computes its prompt itself, and says the same."""
    drafters = {"first": drafter_named("eagle"), "second": drafter_named("mixed")}
    engine, _ = make_engine(drafters, max_cached=2)

    def turn(number: int, variant: int, prompt: tuple[int, ...]) -> RequestOutput:
        strategy, drafter, parameters = VARIANTS[variant]
        asked = replace(asking(number, strategy, drafter, **parameters), prompt=prompt)
        output = engine.submit(asked).result()
        check_texts([asked], {number: output})
        return output

    first = turn(1, before, PROMPT)
    second = turn(2, after, (*PROMPT, *first.tokens, 5))
    assert bool(second.stats.num_prompt_reused) == (before == after)
