"""Dead stage processes are restarted, and answers continue token for token, up to a limit."""

import os
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from flowspec.engine.build import HeadParts
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.protocol.messages import Status
from flowspec.request import ClusterError, FinishReason, Request, RequestOutput, SamplingParams
from flowspec.weights.load import load_whole
from tests.processes.conftest import stage_pids

T0, T1 = SamplingParams(), SamplingParams(temperature=1.0, seed=5)


def ask(parts: HeadParts, number: int, sampling: SamplingParams) -> Request:
    """Return a request that takes a while."""
    prompt = tuple(parts.tokenizer.encode("the fox")) * number
    return Request(id=number, prompt=prompt, sampling=sampling, max_new_tokens=120)


def answers_with_faults(
    cluster: LocalEngine, asked: list[Request], faults: dict[int, Callable[[], None]]
) -> dict[int, RequestOutput]:
    """The answers; each fault strikes after so many events."""
    done = {}
    for count, event in enumerate(cluster.serve(asked)):
        faults.get(count, lambda: None)()
        if isinstance(event, RequestOutput):
            done[event.request] = event
    return done


def check(parts: HeadParts, asked: list[Request], done: dict[int, RequestOutput]) -> None:
    """Every answer is the target's own."""
    alone = LocalTarget(load_whole(parts.folder), parts.max_context)
    for one in asked:
        assert list(done[one.id].tokens) == alone.generate(one)[0]


def test_all_stages_killed_at_once_end_no_answer(config, parts, all_gone) -> None:
    """Both answers continue, and the restarted stages serve the next request too."""
    asked = [ask(parts, 1, T0), ask(parts, 2, T1)]
    with LocalEngine(config.changed(max_restarts=2), parts) as cluster:
        pids = set(stage_pids(cluster))
        before: dict[int, Status] = {}

        def kill_all() -> None:
            before.update(cluster.statuses())
            for pid in stage_pids(cluster):
                os.kill(pid, signal.SIGKILL)

        check(parts, asked, answers_with_faults(cluster, asked, {8: kill_all}))
        pids.update(stage_pids(cluster))
        after = cluster.statuses()
        for rank in before.keys() & after.keys():  # what was done before the restart counts too
            assert after[rank].busy_s > before[rank].busy_s
        again = [replace(asked[0], id=7, max_new_tokens=8)]
        check(parts, again, answers_with_faults(cluster, again, {}))
    all_gone(pids)


def test_a_stage_that_keeps_dying_is_given_up(config, parts, all_gone) -> None:
    """After as many restarts as allowed: one error, and what was generated."""
    with LocalEngine(config.changed(max_restarts=2), parts) as cluster:
        pids = set(stage_pids(cluster))
        tokens: list[int] = []

        def kill_at_every_fifth_word() -> None:
            for count, event in enumerate(cluster.serve([ask(parts, 1, T0)]), start=1):
                tokens.extend(event.tokens)
                pids.update(stage_pids(cluster))
                if count % 5 == 0:
                    os.kill(cluster.children[2].pid, signal.SIGKILL)

        with pytest.raises(ClusterError, match=r"stage 2 .*SIGKILL") as caught:
            kill_at_every_fifth_word()
        assert len(cluster.restarts) == 2
        assert caught.value.tokens == {1: tuple(tokens)}
    all_gone(pids)


def test_a_request_that_kills_a_stage_ends_and_the_others_go_on(config, parts, all_gone) -> None:
    """It runs alone, or starts again alone, so it is identified after two losses."""
    asked = [ask(parts, 1, T0), ask(parts, 2, T1)]
    with LocalEngine(config.changed(max_restarts=3), parts) as cluster:
        pids = set(stage_pids(cluster))
        done = {}
        for event in cluster.serve(asked):
            pids.update(stage_pids(cluster))
            if isinstance(event, RequestOutput):
                done[event.request] = event
            elif event.request == 1:  # every word of it is the end of stage 2
                os.kill(cluster.children[2].pid, signal.SIGKILL)
        assert len(cluster.restarts) == 2
        pids.update(stage_pids(cluster))
    check(parts, asked[1:], done)
    assert done[1].reason is FinishReason.ERROR
    assert "ended by signal SIGKILL" in done[1].error
    assert "lost 2 times while it served this request" in done[1].error
    all_gone(pids)
