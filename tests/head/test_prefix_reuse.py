"""The next turn of a conversation begins where the last one's caches end."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec.engine.engine import generate, generate_all
from flowspec.engine.simulated import SimulatedEngine
from flowspec.protocol.messages import AddRequest, FinishRequest, Reroot, Segment
from flowspec.request import Decoding
from flowspec.simulator.simulator import adversarial
from flowspec.speculation.strategies import STRATEGIES
from tests.support.clusters import Watch, check_hidden_states, make_cluster, truth
from tests.support.scripted import SCRIPTS, ScriptedDrafter, perfect
from tests.support.tiny import PROMPT, T0, T1, expected, request
from tests.support.tiny_drafters import MODEL_DRAFTERS, model_drafter

LAYERS = (1, 5, -1)


def conversation(cluster: SimulatedEngine, turns: int, *, sampling=T0, new: int = 9) -> list[int]:
    """Each turn's prompt is all that was said and something new; the reused tokens per turn."""
    said: tuple[int, ...] = PROMPT
    reused = []
    for turn in range(turns):
        asked = request(cluster.head.newest_id + 1, prompt=said, sampling=sampling)
        asked = replace(asked, max_new_tokens=new)
        completion = generate(cluster, asked)
        assert list(completion.tokens) == expected(asked)
        reused.append(completion.stats.num_prompt_reused)
        said = (*said, *completion.tokens, turn, 7, 3)
    return reused


def kept(num_stages: int, strategy: str, **setup) -> SimulatedEngine:
    """A cluster that keeps two requests."""
    return make_cluster(num_stages, strategy, limits={"max_cached": 2}, **setup)


@pytest.mark.parametrize("sampling", [T0, T1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_conversation_computes_each_token_once(strategy, sampling):
    """Rows of earlier turns are not sent again, and the text is the same."""
    drafter = ScriptedDrafter(perfect, aux_hidden_state_layers=LAYERS)
    watches = []

    def wrap(core):
        watches.append(Watch(core, truths={}))
        return watches[-1]

    cluster = kept(3, strategy, drafter=drafter, wrap=wrap)
    reused = conversation(cluster, 3, sampling=sampling)
    assert reused[0] == 0
    assert reused[1] >= len(PROMPT), reused
    assert reused[2] > reused[1]
    sent = [m for m in watches[1].seen if isinstance(m, Segment) and m.prefix]
    by_request = {
        number: sum(len(m.nodes) for m in sent if m.request == number) for number in (2, 3)
    }
    lengths = {number: len(PROMPT) + (number - 1) * 12 for number in by_request}
    assert by_request == {n: lengths[n] - reused[n - 1] for n in by_request}
    if strategy != "ar":
        for number, session in drafter.sessions.items():
            session.truth = truth(tuple(session.tokens), sampling)
            assert number in (1, 2, 3)
            check_hidden_states(session)


@pytest.mark.parametrize("name", MODEL_DRAFTERS)
def test_model_drafters_go_on_where_the_last_turn_ended(name):
    """Their own caches are used again, too."""
    cluster = kept(3, "streaming", drafter=model_drafter(name), draft_topk=12)
    reused = conversation(cluster, 3, sampling=T1)
    assert reused[0] == 0
    assert reused[1] >= len(PROMPT) - 1, reused
    assert reused[2] > reused[1]


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    strategy=st.sampled_from(list(STRATEGIES)),
    script=st.sampled_from(list(SCRIPTS)),
    stages=st.integers(1, 4),
)
@settings(max_examples=25, deadline=None)
def test_no_timing_spoils_what_is_kept(seed, strategy, script, stages):
    """Late verdicts, late hidden states: a stage keeps exactly what the head believes it has."""
    drafter = ScriptedDrafter(SCRIPTS[script], seed=seed, aux_hidden_state_layers=LAYERS)
    cluster = kept(stages, strategy, drafter=drafter, charges=adversarial(seed))
    conversation(cluster, 3, sampling=T1, new=5)


def test_only_the_common_beginning_is_used():
    """A prompt that parts from the kept one in the middle, and one that is the same."""
    cluster = kept(2, "streaming", drafter=ScriptedDrafter(perfect))
    generate(cluster, request(1))
    other = request(2, prompt=(*PROMPT[:6], 1, 2, 3))
    completion = generate(cluster, other)
    assert completion.stats.num_prompt_reused == 5
    assert list(completion.tokens) == expected(other)
    again = generate(cluster, request(3, prompt=other.prompt))
    assert again.stats.num_prompt_reused == len(other.prompt) - 1, "the last token is run again"
    assert again.tokens == completion.tokens


def test_two_conversations_do_not_mix():
    """Each next turn finds its own caches."""
    cluster = kept(2, "streaming", drafter=ScriptedDrafter(perfect))
    first, second = request(1), request(2, prompt=PROMPT[::-1], sampling=T1)
    answers = generate_all(cluster, [first, second])
    for number, (one, answer) in enumerate(
        zip((second, first), answers[::-1], strict=True), start=3
    ):
        turn = request(number, prompt=(*one.prompt, *answer.tokens, 5), sampling=one.sampling)
        completion = generate(cluster, turn)
        assert list(completion.tokens) == expected(turn)
        assert completion.stats.num_prompt_reused >= len(one.prompt)


def test_a_prompt_that_only_begins_alike_takes_nothing_away():
    """Prompts of one chat template share their first tokens; each conversation keeps its rows."""
    cluster = kept(2, "streaming", drafter=ScriptedDrafter(perfect))
    first, second = request(1), request(2, prompt=(*PROMPT[:4], 1, 2, 3))
    answers = [generate(cluster, first), generate(cluster, second)]
    assert answers[1].stats.num_prompt_reused == 3
    turn = request(3, prompt=(*PROMPT, *answers[0].tokens, 5))
    completion = generate(cluster, turn)
    assert completion.stats.num_prompt_reused >= len(PROMPT)
    assert list(completion.tokens) == expected(turn)
    assert [sorted(stage.requests) for stage in cluster.stages] == [[2, 3], [2, 3]]


def test_a_refused_turn_leaves_nothing_behind():
    """A stage in the middle refuses: those after it, which never hear of it, free too."""
    cluster = kept(3, "streaming", drafter=ScriptedDrafter(perfect))
    answer = generate(cluster, request(1))
    cluster.stages[1].num_kv_tokens = 1
    refused = generate(cluster, request(2, prompt=(*PROMPT, *answer.tokens)))
    assert refused.error.rank == 2
    assert "0 of 1 are free" in refused.error.cause
    assert [list(stage.requests) for stage in cluster.stages] == [[], [], []]


def test_the_oldest_is_given_up_first():
    """At most `max_cached` requests are cached; the stages free the evicted ones."""
    cluster = kept(2, "streaming", drafter=ScriptedDrafter(perfect))
    for number in range(1, 5):
        generate(cluster, request(number, prompt=(number, *PROMPT), max_new_tokens=4))
    assert list(cluster.head.scheduler.cache.requests) == [3, 4]
    assert [sorted(stage.requests) for stage in cluster.stages] == [[3, 4], [3, 4]]


def test_memory_for_a_new_request_goes_before_memory_kept():
    """Cached requests are evicted only when their memory is needed."""
    cluster = kept(2, "streaming", drafter=ScriptedDrafter(perfect))
    rows = len(PROMPT) + 14 + 256
    cluster.head.scheduler.limit_kv_tokens(2 * rows)
    for stage in cluster.stages:
        stage.num_kv_tokens = 2 * rows
    for number, prompt in enumerate([PROMPT, PROMPT[::-1], PROMPT[1:]], start=1):
        asked = request(number, prompt=prompt)
        assert list(generate(cluster, asked).tokens) == expected(asked)
    assert list(cluster.head.scheduler.cache.requests) == [2, 3]


@pytest.mark.parametrize(
    "other",
    [
        Decoding(strategy="ar"),
        Decoding(parameters={"num_draft_tokens": 20}),
        Decoding(parameters={"merge": True}),
        Decoding(drafter="second"),
    ],
    ids=["strategy", "parameter", "merge", "drafter"],
)
def test_another_decoding_does_not_use_what_was_kept(other):
    """Its drafter session would be of another kind; a request of equal decoding does use it."""
    cluster = kept(2, "streaming", drafter=ScriptedDrafter(perfect))
    cluster.head.drafters["second"] = ScriptedDrafter(perfect)
    first = generate(cluster, replace(request(1), decoding=Decoding()))
    said = (*PROMPT, *first.tokens)
    completion = generate(cluster, replace(request(2, prompt=said), decoding=other))
    assert completion.stats.num_prompt_reused == 0
    assert list(completion.tokens) == expected(request(2, prompt=said))
    again = generate(cluster, replace(request(3, prompt=(*said, 5)), decoding=Decoding()))
    assert again.stats.num_prompt_reused >= len(PROMPT)
    assert list(again.tokens) == expected(request(3, prompt=(*said, 5)))


def test_a_stage_that_lost_what_was_kept_says_so():
    """The request fails with the numbers instead of computing on nothing."""
    cluster = kept(1, "streaming", drafter=ScriptedDrafter(perfect))
    generate(cluster, request(1))
    cluster.stages[0].requests.clear()
    completion = generate(cluster, request(2))
    assert "rows of request 1 were to be used again, 0 are here" in completion.error.cause


def test_close_keeps_by_the_verdict_it_brings():
    """A stage that has not heard the newest verdict commits it before it keeps anything."""
    stage = make_cluster(2).stages[0]
    rows = Segment(request=1, seq_no=0, nodes=(0, 1), parents=(-1, 0), tokens=(3, 4), prefix=True)
    for message in (
        AddRequest(request=1, capacity=64, context=64),
        rows,
        replace(rows, seq_no=1, nodes=(2, 3), parents=(1, 1), tokens=(8, 9), prefix=False),
    ):
        stage.handle(message, 0.0)
    verdict = make_verdict()
    stage.handle(FinishRequest(request=1, keep=True, verdict=verdict), 0.0)
    while (step := stage.poll(0.0)) is not None:
        if step.work is not None:
            step.work.run()
            step.work.finish(1.0, 1.0)
    assert stage.requests[1].cache.prefix_length == verdict.position == 3


def make_verdict() -> Reroot:
    """Node 2 is true, and 6 follows it."""
    return Reroot(request=1, position=3, parent=2, token=6)
