"""Dead stage processes are restarted, and answers continue token for token, up to a limit."""

import logging
import os
import signal
import time
from collections.abc import Callable

import pytest

from flowspec.engine.build import HeadParts
from flowspec.engine.engine import StageStatus, generate
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.engine.stream import Stream
from flowspec.request import (
    ClusterError,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    TokensOut,
)
from flowspec.weights.load import load_whole
from tests.processes.conftest import stage_pids
from tests.processes.test_local_cluster import check_rest

pytestmark = pytest.mark.slow

T0, T1 = SamplingParams(), SamplingParams(temperature=1.0, seed=5)
ANSWER_S = 120.0  # far more than a few restarts take: this machine may be busy


def ask(parts: HeadParts, number: int, sampling: SamplingParams, *, count: int = 120) -> Request:
    """Return a request that takes a while."""
    prompt = tuple(parts.tokenizer.encode("the fox")) * number
    return Request(prompt=prompt, sampling=sampling, max_new_tokens=count)


def kill(cluster: LocalEngine, *ranks: int) -> None:
    """End the processes of these stages, now."""
    for rank in ranks:
        os.kill(cluster.children[rank].pid, signal.SIGKILL)


def act_once(stream: Stream, act: Callable[[], None], *, after: int) -> RequestOutput:
    """The output; `act` is called once `after` tokens have come."""
    seen = 0
    for event in stream:
        if isinstance(event, TokensOut) and seen < after:
            seen += len(event.tokens)
            if seen >= after:
                act()
    assert seen >= after
    return stream.result()


def check(parts: HeadParts, request: Request, output: RequestOutput) -> None:
    """The answer is the target's own."""
    assert output.error is None, output.error
    alone = LocalTarget(load_whole(parts.folder), parts.max_context)
    assert list(output.tokens) == alone.generate(request)[0]


def wait_until(reached: Callable[[], object]) -> None:
    """Poll; the test fails when it is not reached in time."""
    end = time.monotonic() + ANSWER_S
    while not reached():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_all_stages_killed_at_once_end_no_answer(config, parts, all_gone) -> None:
    """Both answers continue, and the restarted stages serve the next request too."""
    first, second = ask(parts, 1, T0), ask(parts, 2, T1)
    with LocalEngine(config.changed(max_restarts=2), parts) as cluster:
        pids = set(stage_pids(cluster))
        before: dict[int, StageStatus] = {}

        def kill_all() -> None:
            before.update(cluster.status().stages)
            kill(cluster, 1, 2)

        stream, other = cluster.submit(first), cluster.submit(second)
        check(parts, first, act_once(stream, kill_all, after=8))
        check(parts, second, other.result(timeout_s=ANSWER_S))
        assert 1 <= len(cluster.restarts) <= 2
        pids.update(stage_pids(cluster))
        after = cluster.status().stages
        for rank in before.keys() & after.keys():  # what was done before the restart counts too
            assert after[rank].busy_s > before[rank].busy_s
        again = ask(parts, 1, T0, count=8)
        check(parts, again, generate(cluster, again))
    all_gone(pids)


def test_a_stage_killed_while_idle_is_restarted_by_the_next_request(
    config, parts, all_gone
) -> None:
    """Nobody waits for it meanwhile, so nothing is started; it costs the request nothing else."""
    request = ask(parts, 1, T0, count=12)
    with LocalEngine(config.changed(max_restarts=1), parts) as cluster:
        pids = set(stage_pids(cluster))
        check(parts, request, generate(cluster, request))
        kill(cluster, 2)
        wait_until(lambda: cluster.children[2].poll() is not None)
        check_rest(cluster)
        check(parts, request, cluster.submit(request).result(timeout_s=ANSWER_S))
        (why,) = cluster.restarts
        assert why.startswith("stage 2: ")
        pids.update(stage_pids(cluster))
    all_gone(pids)


def test_a_stage_killed_while_it_loads_again_is_started_once_more(config, parts, all_gone) -> None:
    """The request waits for both, and continues from its tokens."""
    request = ask(parts, 1, T1)
    with LocalEngine(config.changed(max_restarts=2), parts) as cluster:
        pids = set(stage_pids(cluster))
        stream = cluster.submit(request)
        first = cluster.children[2].pid

        def kill_twice() -> None:
            kill(cluster, 2)
            wait_until(lambda: cluster.children[2].pid != first)
            pids.update(stage_pids(cluster))
            kill(cluster, 2)

        check(parts, request, act_once(stream, kill_twice, after=8))
        assert len(cluster.restarts) == 2
        assert all(why.startswith("stage 2: ") for why in cluster.restarts)
        pids.update(stage_pids(cluster))
    all_gone(pids)


def test_a_stage_that_hangs_is_restarted(config, parts, all_gone, caplog) -> None:
    """It keeps its sockets open and says nothing; the answer continues without it."""
    request = ask(parts, 1, T0)
    with LocalEngine(config.changed(max_restarts=1, timeout_s=1.0), parts) as cluster:
        pids = set(stage_pids(cluster))

        def stop() -> None:
            os.kill(cluster.children[1].pid, signal.SIGSTOP)

        check(parts, request, act_once(cluster.submit(request), stop, after=8))
        (why,) = cluster.restarts
        assert why.startswith("stage 1: process ")
        assert "it hangs" in why
        pids.update(stage_pids(cluster))
    told = [one.getMessage() for one in caplog.records if one.levelno >= logging.WARNING]
    assert any(line.endswith("; restarting it, answers go on") for line in told), told
    all_gone(pids)


def test_a_stage_that_keeps_dying_is_given_up(config, parts, all_gone) -> None:
    """After as many restarts as allowed: one error, and what was generated."""
    with LocalEngine(config.changed(max_restarts=2), parts) as cluster:
        pids = set(stage_pids(cluster))
        tokens: list[int] = []
        stream = cluster.submit(ask(parts, 1, T0))
        num_events = 0
        for event in stream:
            if not isinstance(event, TokensOut):
                continue
            tokens.extend(event.tokens)
            pids.update(stage_pids(cluster))
            num_events += 1
            if num_events % 5 == 0 and cluster.children[2].poll() is None:
                kill(cluster, 2)
        output = stream.result()
        assert output.reason is FinishReason.ERROR
        assert str(output.error).startswith("stage 2: process ")
        assert "SIGKILL" in output.error.cause
        assert list(output.tokens) == tokens
        assert len(cluster.restarts) == 2
        assert cluster.status().num_failed == 1
        late = generate(cluster, ask(parts, 1, T0, count=4))  # nothing is restarted for it either
        assert late.error.rank == 2
        assert late.tokens == ()
    all_gone(pids)


def test_a_request_that_kills_a_stage_ends_and_the_others_go_on(config, parts, all_gone) -> None:
    """It runs alone, or starts again alone, so it is identified after two losses."""
    first, second = ask(parts, 1, T0), ask(parts, 2, T1)
    with LocalEngine(config.changed(max_restarts=3), parts) as cluster:
        pids = set(stage_pids(cluster))
        stream, other = cluster.submit(first), cluster.submit(second)
        for event in stream:
            pids.update(stage_pids(cluster))
            if isinstance(event, TokensOut) and cluster.children[2].poll() is None:
                kill(cluster, 2)  # every word of it is the end of stage 2
        output = stream.result()
        check(parts, second, other.result(timeout_s=ANSWER_S))
        assert len(cluster.restarts) == 2
        pids.update(stage_pids(cluster))
    assert output.reason is FinishReason.ERROR
    assert "ended by signal SIGKILL" in output.error.cause
    assert "lost 2 times while it served this request" in output.error.cause
    all_gone(pids)


def test_a_request_is_aborted_while_a_stage_is_restarted(config, parts, all_gone) -> None:
    """It does not wait for the stage, and the next request finds the pipeline whole."""
    with LocalEngine(config.changed(max_restarts=1), parts) as cluster:
        pids = set(stage_pids(cluster))
        stream = cluster.submit(ask(parts, 1, T0, count=10_000))
        first = cluster.children[2].pid

        def abort_in_outage() -> None:
            kill(cluster, 2)
            wait_until(lambda: cluster.children[2].pid != first)
            stream.abort()

        output = act_once(stream, abort_in_outage, after=8)
        assert output.reason is FinishReason.CANCELLED
        assert cluster.status().num_stages == 0  # it is not there yet
        request = ask(parts, 1, T1, count=12)
        check(parts, request, cluster.submit(request).result(timeout_s=ANSWER_S))
        assert cluster.status().num_stages == 2
        pids.update(stage_pids(cluster))
    all_gone(pids)


def test_an_error_in_the_heads_thread_ends_all_with_its_text(
    config, parts, all_gone, monkeypatch
) -> None:
    """Requests that are open end, no more are taken, and every stage ends with the engine."""
    with LocalEngine(config, parts) as cluster:
        pids = set(stage_pids(cluster))
        stream = cluster.submit(ask(parts, 1, T0, count=10_000))
        next(iter(stream))
        monkeypatch.setattr(cluster.head, "poll", lambda now: 1 / 0)
        output = stream.result(timeout_s=ANSWER_S)
        assert output.reason is FinishReason.ERROR
        assert str(output.error) == "head: ZeroDivisionError: division by zero; see its log"
        assert output.tokens
        status = cluster.status()
        assert (status.healthy, status.why) == (False, "ZeroDivisionError: division by zero")
        with pytest.raises(ClusterError, match="head: ZeroDivisionError: division by zero"):
            cluster.submit(ask(parts, 1, T0))
    all_gone(pids)
