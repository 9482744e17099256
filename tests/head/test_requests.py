"""Many requests in one pipeline: each text is as alone, none starves, memory is freed."""

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec.engine.engine import generate, generate_all
from flowspec.engine.reference import LocalTarget
from flowspec.head.pipeline import Pipeline, SegmentCost
from flowspec.head.scheduler import best_counts, pays
from flowspec.protocol.messages import HEAD, Batch, Submit
from flowspec.request import FinishReason, Request, RequestOutput, TokensOut
from flowspec.simulator.simulator import adversarial
from flowspec.speculation.drafters.draft_model import DraftModelDrafter
from flowspec.speculation.strategies import STRATEGIES
from tests.support.clusters import check_empty, make_cluster, run_all_watched
from tests.support.scripted import SCRIPTS, ScriptedDrafter, drafter_named, hostile, mixed, perfect
from tests.support.tiny import CONFIG, MAX_CONTEXT, PROMPT, T0, T1, expected, request, whole_model
from tests.support.tiny_drafters import MODEL_DRAFTERS, model_drafter
from tests.support.traces import record


def several(count: int, *, new: int = 10, first: int = 1) -> list[Request]:
    """Requests that differ in prompt, length of prompt and answer, parameters and seed."""
    return [
        request(
            first + i,
            prompt=(PROMPT * 2)[i : i + 3 + 4 * (i % 3)],
            sampling=replace(T1, seed=30 + i) if i % 2 else T0,
            max_new_tokens=new + 3 * (i % 4),
        )
        for i in range(count)
    ]


def check_answers(asked: list[Request], completions: list[RequestOutput]) -> None:
    """Each is what the target alone says."""
    assert [list(c.tokens) for c in completions] == [expected(one) for one in asked]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_text_is_as_alone(strategy, script):
    """Each text is as alone, whatever shares the segments, in every strategy."""
    asked = several(4)
    setup = {"num_stages": 3, "strategy": strategy, "drafter": ScriptedDrafter(SCRIPTS[script])}
    completions, watches = run_all_watched(setup, asked)
    check_answers(asked, completions)
    if strategy != "ar":
        assert any(isinstance(m, Batch) for m in watches[1].seen), "nothing was shared"


@pytest.mark.parametrize("name", MODEL_DRAFTERS)
@pytest.mark.parametrize("strategy", ["streaming", "serial_pp", "flowspec"])
def test_one_drafter_forward_serves_all(strategy, name):
    """Model drafters draft for several requests at once; each text is as alone."""
    asked = several(4, new=6)
    drafter = model_drafter(name)
    setup = {"num_stages": 2, "strategy": strategy, "drafter": drafter, "draft_topk": 12}
    completions, _ = run_all_watched(setup, asked)
    check_answers(asked, completions)


@pytest.mark.parametrize("name", MODEL_DRAFTERS)
def test_a_drafter_forward_is_one_that_ran(name, monkeypatch):
    """Known proposals need no forward: none is counted, and the mean time stays."""
    drafter, ran = model_drafter(name), []

    def forward(tokens, *args):
        ran.append(len(tokens))
        return type(drafter).forward(drafter, tokens, *args)

    monkeypatch.setattr(drafter, "forward", forward)
    counted = []
    monkeypatch.setattr(Pipeline, "count_draft", lambda pipe, elapsed: counted.append(elapsed))
    cluster = make_cluster(2, "streaming", drafter=drafter)
    recorder = record(cluster)[HEAD]
    completion = generate(cluster, request())
    rows = [entry[4] for entry in recorder.records if entry[0] == "work"]
    assert [number for number in rows if number] == ran, "other rows were charged than ran"
    assert completion.stats.num_draft_forwards == len(counted) == len(ran)


@pytest.mark.parametrize("sampling", [T0, T1], ids=["t0", "t1"])
@pytest.mark.parametrize("merge", [False, True], ids=["alone", "merged"])
@pytest.mark.parametrize("name", [*MODEL_DRAFTERS, "ngram"])
@pytest.mark.parametrize("strategy", ["streaming", "flowspec"])
def test_each_turn_is_as_alone_whatever_drafts(strategy, name, merge, sampling):
    """Three conversations at once, calibrated, their caches going on, branches merged or not."""
    setup = {"drafter": drafter_named(name), "merge": merge, "calibrate": True}
    cluster = make_cluster(2, strategy, limits={"max_cached": 3}, **setup)
    said = [(PROMPT * 2)[i : i + 4 + 3 * i] for i in range(3)]
    reused = 0
    for turn in range(2):
        asked = [
            request(3 * turn + i, prompt=prompt, sampling=sampling, max_new_tokens=6)
            for i, prompt in enumerate(said, start=1)
        ]
        completions = generate_all(cluster, asked)
        check_answers(asked, completions)
        reused += sum(completion.stats.num_prompt_reused for completion in completions)
        said = [(*one.prompt, *c.tokens, 7, 3) for one, c in zip(asked, completions, strict=True)]
    assert reused, "no turn went on with an earlier one's caches"


@pytest.mark.parametrize("name", ["mixed", "draft_model"])
def test_sliding_windows_hold_in_batches_and_in_kept_caches(name):
    """Three requests in one batch, and their next turns, over layers that see few tokens."""
    config = replace(CONFIG, windows=(None, 4) * (CONFIG.num_layers // 2))
    alone = LocalTarget(whole_model(config), MAX_CONTEXT)
    drafter = drafter_named(name)
    if isinstance(drafter, DraftModelDrafter):
        drafter = DraftModelDrafter(whole_model(config), vocab_size=CONFIG.vocab_size)
    limits = {"max_cached": 3}
    cluster = make_cluster(3, "streaming", drafter=drafter, model=config, limits=limits)
    prompts = [(PROMPT * 2)[i : i + 6 + 3 * i] for i in range(3)]
    for turn in range(2):
        asked = [
            request(3 * turn + i, prompt=prompt, sampling=T1 if i % 2 else T0, max_new_tokens=8)
            for i, prompt in enumerate(prompts, start=1)
        ]
        completions = generate_all(cluster, asked)
        assert [list(c.tokens) for c in completions] == [alone.generate(one)[0] for one in asked]
        assert all(c.stats.num_prompt_reused for c in completions) == bool(turn)
        prompts = [(*one.prompt, *c.tokens, 7) for one, c in zip(asked, completions, strict=True)]


@pytest.mark.slow
@given(
    seed=st.integers(0, 2**32),
    strategy=st.sampled_from(list(STRATEGIES)),
    script=st.sampled_from(list(SCRIPTS)),
    stages=st.integers(1, 4),
    count=st.integers(2, 6),
    active=st.integers(1, 6),
)
@settings(max_examples=40, deadline=None)
def test_no_timing_mixes_them_up(seed, strategy, script, stages, count, active):
    """Random costs and delays, verdicts that overtake or trail, requests in the queue."""
    asked = several(count, new=5)
    setup = {
        "num_stages": stages,
        "strategy": strategy,
        "drafter": ScriptedDrafter(SCRIPTS[script], seed=seed),
        "charges": adversarial(seed),
        "limits": {"max_num_seqs": active},
    }
    completions, _ = run_all_watched(setup, asked)
    check_answers(asked, completions)


def test_batch_invariant_batches_are_bit_equal():
    """A bfloat16 row has the same bits beside other requests' rows as alone."""
    asked = several(3, new=8)
    together = generate_all(make_cluster(2, bf16=True), asked)
    for one, completion in zip(asked, together, strict=True):
        assert completion.tokens == generate(make_cluster(2, bf16=True), one).tokens


def test_a_request_that_comes_later_joins_the_others():
    """It does not wait for their ends."""
    cluster = make_cluster(2, "streaming")
    first, second = request(1, max_new_tokens=40), request(2, prompt=PROMPT[:4], max_new_tokens=4)
    cluster.simulator.submit(Submit(request=first))
    while not cluster.head.scheduler.running or len(cluster.head.scheduler.running[1].tokens) < 5:
        assert cluster.simulator.step()
    cluster.simulator.submit(Submit(request=second))
    while 2 not in cluster.head.finished:
        assert cluster.simulator.step()
    assert 1 in cluster.head.scheduler.running, "the first one was done before the second"
    cluster.simulator.run()
    own = [
        e.tokens for e in cluster.simulator.to_client if isinstance(e, TokensOut) and e.request == 2
    ]
    assert [token for tokens in own for token in tokens] == expected(second)


def test_prompts_do_not_wait_for_one_another():
    """Short ones share a slot; the next one begins while the first is still in the pipe."""
    cluster = make_cluster(4, "streaming", chunked_prefill_size=8)
    asked = [request(i, prompt=PROMPT[: 3 + i], max_new_tokens=2) for i in range(1, 5)]
    waits = [c.stats.time_to_first_token_s for c in generate_all(cluster, asked)]
    # a forward takes a second: 4 stages, then a slot per 8 rows of prompt
    assert waits[0] < 4.5
    assert max(waits) < 4.5 + 3 + 1


# Fairness ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["ar", "flowspec", "streaming"])
def test_a_long_prompt_does_not_stop_who_decodes(strategy):
    """Another's prompt fills the pipe in pieces; each verdict is still asked for at once."""
    cluster = make_cluster(4, strategy, drafter=ScriptedDrafter(mixed), chunked_prefill_size=4)
    simulator = cluster.simulator
    simulator.submit(Submit(request=request(1, max_new_tokens=40)))
    long = request(2, prompt=(PROMPT * 8)[:96], max_new_tokens=2)
    times: dict[int, list[float]] = {1: [], 2: []}
    while simulator.step():
        while simulator.to_client:
            if isinstance(event := simulator.to_client.popleft(), TokensOut):
                times[event.request].append(simulator.now)
        if len(times[1]) == 3 and 2 not in cluster.head.scheduler.running and not times[2]:
            simulator.submit(Submit(request=long))
            times[2] = [simulator.now]
    begin, end, *_ = times[2]
    assert end - begin > 20.0, "24 pieces, a second each"
    waits = [
        after - before for before, after in pairwise(times[1]) if begin < after and before < end
    ]
    # a trip through four stages, and a piece that has just begun at each
    assert waits
    assert max(waits) < 9.0, waits


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_nobody_starves_beside_good_guessers(strategy):
    """A request whose drafter is always wrong gets a token per pass through the pipeline."""

    class Unequal(ScriptedDrafter):
        def open(self, opening):
            self.script = hostile if opening.request.id == 1 else perfect
            return super().open(opening)

    asked = [request(i, prompt=PROMPT[i:], max_new_tokens=24) for i in range(1, 5)]
    cluster = make_cluster(3, strategy, drafter=Unequal(perfect))
    times: list[float] = []
    streams = [cluster.submit(one) for one in asked]
    streams[0].listen(lambda: times.append(cluster.simulator.now))
    check_answers(asked, [stream.result() for stream in streams])
    waits = [after - before for before, after in pairwise(times)]
    alone = make_cluster(3, strategy, drafter=ScriptedDrafter(hostile))
    lone = generate(alone, asked[0]).stats
    mean = (lone.finished_at - lone.first_token_at) / (lone.num_tokens - 1)
    assert max(waits) <= 4 * mean + 5.0, f"waited {max(waits):.1f} s, alone {mean:.1f} s a token"


def test_a_lone_request_loses_nothing():
    """A request takes the same time before and after it ran beside others."""
    cluster = make_cluster(3, "streaming", drafter=ScriptedDrafter(perfect))

    def seconds(number: int) -> float:
        stats = generate(cluster, request(number, max_new_tokens=20)).stats
        return stats.finished_at - stats.submitted_at

    before = seconds(1)
    generate_all(cluster, several(4, first=2))
    cluster.head.pipe.cost = SegmentCost()
    assert seconds(6) == pytest.approx(before, rel=0.15)


def test_rows_of_all_are_taken_best_first_up_to_the_knee():
    """Beyond it a row must bring more than the average so far, whosever it is."""
    cost = SegmentCost()
    for rows in (1, 2, 4, 8, 16, 32, 64, 128):
        for _ in range(50):
            cost.record(rows, max(8.0, rows))
    sure, doubtful = [1.0, *[0.9] * 5], [1.0, *[0.01] * 20]
    counts = best_counts(cost, [(sure, True), (doubtful, True)])
    assert counts[0] == 6
    assert 1 <= counts[1] <= 3
    assert best_counts(cost, [([1.0] * 40, False), (doubtful, True)])[0] == 40
    crowd = [([1.0], True)] * 12
    assert best_counts(cost, crowd, num_fixed=64) == [1] * 12, "what is certain always goes"
    boasters = [([1.0] * 32, True)] * 8
    assert min(best_counts(cost, boasters)) > 0, "a root was crowded out by sure guesses"


def test_a_slow_line_makes_segments_smaller():
    """Rows that a stage computes for nothing still take their time on the way."""
    cost = SegmentCost()
    for rows in (1, 2, 4, 8, 16, 32, 64, 128):
        cost.record(rows, 60.0)
    falling = [([0.9**k for k in range(100)], True)]
    assert best_counts(cost, falling) == [100]
    fast, slow = (best_counts(cost, falling, row_ms=ms)[0] for ms in (0.05, 0.5))
    assert 100 > fast > slow > 10


def test_guesses_that_cost_more_than_they_bring_stay():
    """Certain rows always go; guesses must be worth the time that others wait."""
    cost = SegmentCost()
    for rows in (1, 2, 4, 8, 16, 32):
        cost.record(rows, 10.0)
    doubtful, fair = [([0.004] * 20, True)], [([0.02] * 20, True)]
    least = 0.5 / (4 * 10.0)  # half a token per trip of four stages
    assert best_counts(cost, doubtful, least_rate=least) == [0]
    assert best_counts(cost, fair, least_rate=least) == [20]
    assert best_counts(cost, fair, least_rate=least, row_ms=10.0) == [0]
    assert best_counts(cost, [([1.0, *doubtful[0][0]], True)], least_rate=least)[0] >= 1


def test_prompts_follow_each_other_without_a_gap():
    """A prompt that is sent and waits for its verdict does not hold up the next one."""
    cluster = make_cluster(4, "ar")
    asked = [request(i, prompt=PROMPT[i:], max_new_tokens=1) for i in range(1, 7)]
    answers = generate_all(cluster, asked)
    check_answers(asked, answers)
    chunks = sum(-(-len(one.prompt) // 5) for one in asked)
    assert max(a.stats.finished_at for a in answers) <= chunks + 4 + 1


def test_who_turns_away_leaves_nothing_behind():
    """The requests are over when the caller goes on."""
    cluster = make_cluster(2, "streaming")
    first, second = request(1, max_new_tokens=40), request(2, max_new_tokens=40)
    with cluster.submit(first) as one, cluster.submit(second) as two:
        next(iter(one))
    assert {one.output.reason, two.output.reason} == {FinishReason.CANCELLED}
    check_empty(cluster)


def test_whole_segments_share_a_slot_while_that_pays():
    """Two trees of four rows cost what one does; the third would cost as much as it brings."""
    cost = SegmentCost()
    assert pays(cost, [60, 60]), "nothing is known: try it"
    for rows in (1, 2, 4, 8, 16, 32):
        for _ in range(50):
            cost.record(rows, max(8.0, rows))
    assert pays(cost, [])
    assert pays(cost, [4])
    assert not pays(cost, [4, 4])
    assert pays(cost, [1] * 7)
    assert not pays(cost, [16])
