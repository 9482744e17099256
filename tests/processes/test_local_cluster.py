"""Head and stages as processes over ZeroMQ: the same text, and nothing while idle."""

import os
import time
from collections.abc import Iterator

import psutil
import pytest

from flowspec.cluster.base import generate
from flowspec.cluster.local import LocalCluster
from flowspec.config import RunConfig
from flowspec.engine import HeadParts
from flowspec.model.load import load_whole
from flowspec.request import Completion, FinishReason, Request, SamplingParams
from flowspec.strategies import STRATEGIES
from flowspec.targets.local import LocalTarget

IDLE_S = 3.0
NEXT_ID = iter(range(1, 1000))


@pytest.fixture(scope="module")
def cluster(config: RunConfig, parts: HeadParts) -> Iterator[LocalCluster]:
    """Two stage processes for all tests here."""
    with LocalCluster(config, parts) as running:
        yield running


@pytest.fixture(scope="module")
def alone(parts: HeadParts) -> LocalTarget:
    """The target in this process."""
    return LocalTarget(load_whole(parts.folder), parts.max_context)


def ask(
    parts: HeadParts, text: str = "the lazy dog", *, temperature: float = 0.0, count: int = 20
) -> Request:
    """A request for `count` tokens; ids are never used twice in one cluster."""
    return Request(
        id=next(NEXT_ID),
        prompt=tuple(parts.tokenizer.encode(text)),
        sampling=SamplingParams(temperature=temperature, top_p=0.95, seed=5),
        max_new_tokens=count,
        eos_token_ids=parts.eos_token_ids,
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_text_is_the_targets_own(cluster, alone, parts, strategy, temperature):
    """Lossless also over sockets, with whatever timing this machine has now."""
    spec = STRATEGIES[strategy]
    cluster.configure(spec, spec.defaults)
    request = ask(parts, temperature=temperature)
    completion = generate(cluster, request)
    tokens, reason, text = alone.generate(request, parts.new_text)
    assert list(completion.tokens) == tokens
    assert (completion.reason, completion.text) == (reason, text)


def test_requests_follow_one_another_without_a_trace(cluster, alone, parts):
    """Caches of one request are freed before the next and do not leak into it."""
    for number in range(4):
        request = ask(parts, "box of apples " * (number + 1), temperature=number % 2, count=9)
        assert list(generate(cluster, request).tokens) == alone.generate(request)[0]
        statuses = cluster.statuses()
        assert {rank: status.num_requests for rank, status in statuses.items()} == {1: 0, 2: 0}


def test_a_cancelled_request_ends_at_once_and_frees_the_stages(cluster, alone, parts):
    """Thousands of tokens are left to generate; none of them is waited for."""
    spec = STRATEGIES["streaming"]
    cluster.configure(spec, spec.defaults)
    request = ask(parts, count=10_000)
    tokens: list[int] = []
    for event in cluster.serve([request]):
        if isinstance(event, Completion):
            break
        tokens.extend(event.tokens)
        if len(tokens) >= 5:
            cluster.cancel(request.id)
            cancelled_at = time.monotonic()
    assert time.monotonic() - cancelled_at < 2.0
    assert event.reason is FinishReason.CANCELLED
    few = ask(parts, count=len(event.tokens))
    assert list(event.tokens) == alone.generate(few)[0]
    assert not any(status.num_requests for status in cluster.statuses().values())
    assert list(generate(cluster, few).tokens) == list(event.tokens)


def test_waiting_costs_no_cpu(cluster, parts):
    """A cluster without a request sleeps: head and stages take under 1 % of a core each."""
    generate(cluster, ask(parts, count=2))
    pids = [os.getpid(), *(child.pid for child in cluster.children.values())]
    time.sleep(0.3)
    before = [cpu_seconds(pid) for pid in pids]
    end = time.monotonic() + IDLE_S
    while time.monotonic() < end:
        cluster.driver.turn(0.2)
    used = [cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
    assert max(used) <= 0.01 * IDLE_S + 0.011, f"CPU seconds of head and stages: {used}"


def cpu_seconds(pid: int) -> float:
    """User and system time of a process."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)
