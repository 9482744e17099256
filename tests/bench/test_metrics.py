"""The figures of a benchmark's sample agree with the run's own records."""

from typing import Any

import pytest

from flowspec.bench.metrics import Activity, Doings, count_rows, measure
from flowspec.bench.records import RunFigures, hash_tokens, repeated_share
from flowspec.engine.engine import generate
from flowspec.request import Request, RequestOutput
from flowspec.speculation.strategies import STRATEGIES
from flowspec.tracing.timeline import Timeline
from flowspec.tracing.totals import count, verdicts
from flowspec.transport.link_occupancy import Passage
from tests.support.clusters import make_cluster
from tests.support.scripted import ScriptedDrafter, mixed, perfect
from tests.support.tiny import PROMPT, T0, T1, expected, request
from tests.support.traces import record, timeline_of

SLOW_LINK = (
    lambda rank, work: 0.3 if work.kind == "draft" else 1.0,
    lambda source, to, message: Passage(latency_s=0.4),
)


def run(
    strategy: str, asked: Request, num_stages: int = 3, **options: Any
) -> tuple[RunFigures, RequestOutput, Timeline]:
    """One request, measured and recorded."""
    cluster = make_cluster(num_stages, strategy, **{"charges": SLOW_LINK, **options})
    recorders = record(cluster)
    stream = cluster.submit(asked)
    completion = stream.result()
    rows = count_rows(stream.stage_stats())
    timeline = timeline_of(recorders)
    truth = expected(asked)
    stats = completion.stats
    found = measure(
        completion,
        truth,
        num_prompt=len(asked.prompt),
        doings=Activity(timeline).during(stats.first_token_at, stats.last_token_at),
        rows=rows,
    )
    return found, completion, timeline


@pytest.mark.parametrize("sampling", [T0, T1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_books_balance(strategy, sampling):
    """Rows are pruned, wasted or accepted; a stage works or has a cause of idleness.

    The totals of the trace are counted from messages, those of the sample in head and stages.
    """
    asked = request(sampling=sampling, max_new_tokens=24)
    found, completion, timeline = run(strategy, asked)
    assert not found.mismatch
    assert (found.tokens, found.prompt_tokens) == (24, len(PROMPT))
    assert found.repeated == repeated_share(completion.tokens)
    assert found.rows_sent == found.rows_pruned + found.rows_wasted + found.tokens - 1
    totals = count(timeline)
    assert found.rows_sent == totals.rows_sent
    assert found.rows_pruned == totals.rows_pruned
    assert found.segments == totals.num_segments
    for busy, idle in zip(found.stage_busy, found.stage_idle, strict=True):
        assert busy + sum(idle.values()) == pytest.approx(1.0)
    misses = sum(verdict.hit is False for verdict in verdicts(timeline))
    stats = completion.stats
    assert misses == stats.num_not_drafted + stats.num_not_in_flight
    assert found.mu == pytest.approx(misses / 23)
    assert sum(found.runs) + stats.num_not_drafted == 23
    assert found.tau == pytest.approx(23 / totals.num_verdicts)
    gaps = stats.inter_token
    assert gaps.count == 23
    assert gaps.count - gaps.num_zero <= totals.num_verdicts
    if strategy != "ar":
        assert 1.0 < found.tree_size < 24 + 2 * 64  # tree_size, and what flowspec drafts anew


def test_plain_decoding_misses_every_token():
    """Nothing is drafted, so a token takes one trip, whose causes are known."""
    found, _, _ = run("ar", request(max_new_tokens=11), num_stages=2)
    assert (found.mu_not_drafted, found.mu_not_in_flight, found.tau) == (1.0, 0.0, 1.0)
    trip_s = 2 * 1.0 + 3 * 0.4
    assert found.decode_s == pytest.approx(10 * trip_s)
    assert found.decode_tokens_per_s == pytest.approx(1 / trip_s)
    assert found.ttft_s >= trip_s
    assert found.end_to_end_tokens_per_s == pytest.approx(11 / (found.ttft_s + 10 * trip_s))
    assert all(ms == pytest.approx(trip_s * 1e3, rel=0.01) for ms in found.inter_token_ms.values())
    assert found.stage_busy == (pytest.approx(1 / trip_s), pytest.approx(1 / trip_s))
    assert (found.draft_forwards, found.drafter_busy) == (0, 0.0)


def test_what_was_drafted_but_not_sent_is_told_from_what_was_not_drafted():
    """The drafter is always right, and the pipe takes one row at a time."""
    options = {"segment_size": 1, "max_in_flight": 1, "drafter": ScriptedDrafter(perfect)}
    found, _, _ = run("streaming", request(max_new_tokens=20), **options)
    assert found.mu_not_in_flight > 0.5
    assert found.mu_not_drafted < 0.2
    found, _, _ = run("serial_pp", request(max_new_tokens=20))
    assert found.mu_not_in_flight == 0.0
    assert found.mu_not_drafted > 0.1


def test_nothing_after_the_end_counts():
    """The end token is the last one, even if more was accepted in the same verdict."""
    whole = expected(request(max_new_tokens=20))
    asked = request(max_new_tokens=20, eos=(whole[6],))
    truth = expected(asked)
    for strategy in STRATEGIES:
        found, completion, _ = run(strategy, asked, drafter=ScriptedDrafter(perfect))
        assert (found.finish, found.tokens) == ("stop", len(truth))
        assert found.token_hash == hash_tokens(completion.tokens) == hash_tokens(truth)
        assert sum(found.runs) + completion.stats.num_not_drafted == len(truth) - 1
        assert completion.stats.inter_token.count == len(truth) - 1


def test_a_single_token_has_no_decode_time():
    """There is no division by zero."""
    found, _, _ = run("streaming", request(max_new_tokens=1))
    assert (found.decode_s, found.decode_tokens_per_s, found.tau) == (0.0, 0.0, 0.0)
    assert found.ttft_s > 0
    assert (found.mu, found.runs, found.tree_size) == (0.0, (), 0.0)


def test_another_text_is_a_mismatch():
    """All other figures stay right."""
    asked = request(max_new_tokens=6)
    completion = generate(make_cluster(2, "ar"), asked)
    truth = expected(asked)
    for other in ([*truth[:-1], truth[-1] + 1], truth[:-1], [*truth, 3]):
        num_prompt = len(asked.prompt)
        found = measure(completion, other, num_prompt=num_prompt, doings=Doings(), rows=None)
        assert found.mismatch


def test_link_bytes_are_those_of_the_decode_time():
    """Rows with hidden states between stages outweigh ids from the head and verdicts to it."""
    found, _, _ = run("ar", request(max_new_tokens=8))
    assert set(found.link_bytes) == {"0-1", "1-0", "1-2", "2-3", "3-0", "3-1", "3-2"}
    assert found.link_bytes["1-2"] == found.link_bytes["2-3"] > found.link_bytes["0-1"] > 0
    longer, _, _ = run("ar", request(max_new_tokens=15))
    # the headers have numbers in decimals, so that those of later tokens may be a byte longer
    assert longer.link_bytes["1-2"] == pytest.approx(2 * found.link_bytes["1-2"], rel=0.002)
    unlike = run("streaming", request(max_new_tokens=8), drafter=ScriptedDrafter(mixed))[0]
    assert unlike.link_bytes["1-2"] > found.link_bytes["1-2"]


def test_the_hosts_own_time_is_neither_work_nor_waiting():
    """A simulator may charge it: it appears as host overhead, and the rest still adds up."""
    cluster = make_cluster(2, "ar", charges=SLOW_LINK)
    cluster.simulator._host_time = lambda rank, message: 0.05
    recorders = record(cluster)
    asked = request(max_new_tokens=11)
    completion = generate(cluster, asked)
    activity = Activity(timeline_of(recorders))
    stats = completion.stats
    for rank in (1, 2):
        busy, idle = activity.shares(rank, stats.first_token_at, stats.last_token_at)
        assert busy + sum(idle.values()) == pytest.approx(1.0)
        assert idle["host overhead"] > 0.01
