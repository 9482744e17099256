"""Head and stages as processes over ZeroMQ give the same text, and rest while idle."""

import os
import time
from collections.abc import Iterator
from dataclasses import replace

import psutil
import pytest

from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts
from flowspec.engine.engine import generate, generate_all
from flowspec.engine.head_engine import IDLE_S as LONGEST_TURN_S
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.request import Decoding, FailureKind, FinishReason, Request, SamplingParams, TokensOut
from flowspec.speculation.strategies import STRATEGIES
from flowspec.weights.load import load_whole

pytestmark = pytest.mark.slow

REST_S = 3.0
# Of a core. Sleeping takes far less, but where the machine takes back memory that rests, a process
# as large as this one fetches it again in every turn. One that does not sleep takes all of a core.
MOST_IDLE_CPU = 0.15
LONG = 10_000  # tokens: more than any test here waits for


@pytest.fixture(scope="module")
def cluster(config: EngineConfig, parts: HeadParts) -> Iterator[LocalEngine]:
    """Two stage processes for all tests here."""
    with LocalEngine(config, parts) as running:
        yield running


@pytest.fixture(scope="module")
def alone(parts: HeadParts) -> LocalTarget:
    """Return the target in this process."""
    return LocalTarget(load_whole(parts.folder), parts.max_context)


def ask(
    parts: HeadParts, text: str = "the lazy dog", *, temperature: float = 0.0, count: int = 20
) -> Request:
    """Return a request for `count` tokens."""
    return Request(
        prompt=tuple(parts.tokenizer.encode(text)),
        sampling=SamplingParams(temperature=temperature, top_p=0.95, seed=5),
        max_new_tokens=count,
        eos_token_ids=parts.eos_token_ids,
    )


def caches_held(cluster: LocalEngine) -> dict[int, int]:
    """Return how many requests each stage holds, once the last one's counts have come."""
    return {rank: stage.num_requests for rank, stage in cluster.status().stages.items()}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_text_is_the_targets_own(cluster, alone, parts, strategy, temperature):
    """Decoding is lossless over sockets, with whatever timing this machine has."""
    request = ask(parts, temperature=temperature)
    completion = generate(cluster, replace(request, decoding=Decoding(strategy=strategy)))
    tokens, reason, text = alone.generate(request, parts.new_text)
    assert list(completion.tokens) == tokens
    assert (completion.reason, completion.text) == (reason, text)


def test_ps_tells_the_stages_apart(cluster):
    """Each process shows its rank, and not what it was started with."""
    shown = {
        rank: " ".join(filter(None, psutil.Process(child.pid).cmdline()))
        for rank, child in cluster.children.items()
    }
    assert shown == {rank: f"flowspec stage {rank}" for rank in cluster.children}
    assert shown


def test_requests_follow_one_another_without_a_trace(cluster, alone, parts):
    """The caches of one request are freed before the next and do not affect it."""
    for number in range(4):
        request = ask(parts, "box of apples " * (number + 1), temperature=number % 2, count=9)
        stream = cluster.submit(request)
        assert list(stream.result().tokens) == alone.generate(request)[0]
        assert set(stream.stage_stats()) == {1, 2}
        assert caches_held(cluster) == {1: 0, 2: 0}


def test_a_cancelled_request_ends_at_once_and_frees_the_stages(cluster, alone, parts):
    """Thousands of tokens are left to generate; the cancellation does not wait for them."""
    stream = cluster.submit(ask(parts, count=LONG))
    tokens: list[int] = []
    for event in stream:
        if not isinstance(event, TokensOut):
            continue
        tokens.extend(event.tokens)
        if len(tokens) >= 5:
            break
    stream.abort()
    aborted_at = time.monotonic()
    output = stream.result(timeout_s=30.0)
    assert time.monotonic() - aborted_at < 2.0
    assert output.reason is FinishReason.CANCELLED
    assert list(output.tokens[: len(tokens)]) == tokens
    few = ask(parts, count=len(output.tokens))
    assert list(output.tokens) == alone.generate(few)[0]
    assert set(stream.stage_stats()) == {1, 2}
    assert caches_held(cluster) == {1: 0, 2: 0}
    assert generate(cluster, few).tokens == output.tokens


def test_waiting_costs_no_cpu(cluster, parts):
    """A cluster without a request sleeps: turns are long, and nearly nothing is computed."""
    generate(cluster, ask(parts, count=2))
    check_rest(cluster)


def check_rest(cluster: LocalEngine) -> None:
    """Check that head and stages sleep while nothing is asked of them."""
    turns: list[float] = []
    turn = cluster.turn
    pids = [
        os.getpid(),
        *(child.pid for child in cluster.children.values() if child.poll() is None),
    ]
    time.sleep(0.3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "turn", lambda limit_s: (turns.append(limit_s), turn(limit_s)))
        before = [cpu_seconds(pid) for pid in pids]
        time.sleep(REST_S)
        used = [cpu_seconds(pid) - start for pid, start in zip(pids, before, strict=True)]
    assert 1 <= len(turns) <= REST_S / LONGEST_TURN_S + 5
    assert max(used) <= MOST_IDLE_CPU * REST_S, f"CPU seconds of head and stages: {used}"


def cpu_seconds(pid: int) -> float:
    """Return user and system time of a process."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def test_requests_at_once_get_their_own_answers(cluster, alone, parts):
    """Batches go over sockets: more requests than run at once, greedy and sampled."""
    asked = [
        ask(parts, "box of apples " * (1 + number % 3), temperature=number % 2, count=9 + number)
        for number in range(10)
    ]
    completions = generate_all(cluster, asked)
    assert [list(c.tokens) for c in completions] == [alone.generate(one)[0] for one in asked]


def test_a_conversation_reuses_what_the_stages_have(config, parts, alone):
    """The second turn's prompt is mostly there; its text is as from nothing."""
    with LocalEngine(config.changed(kept_prefixes=2), parts) as running:
        first = ask(parts, "the lazy dog and the box of apples")
        answer = generate(running, first)
        said = (*first.prompt, *answer.tokens, *parts.tokenizer.encode(" dog"))
        second = replace(ask(parts, temperature=1.0), prompt=said)
        stream = running.submit(second)
        completion = stream.result()
        assert list(completion.tokens) == alone.generate(second)[0]
        assert completion.stats.num_prompt_reused >= len(first.prompt)
        assert set(stream.stage_stats()) == {1, 2}
        stages = running.status().stages
        assert set(stages) == {1, 2}
        assert all(stage.kv_tokens_used > 0 for stage in stages.values())
        assert all(stage.peak_memory_bytes > 0 for stage in stages.values())


def test_a_request_beyond_the_stages_memory_is_refused_with_both_numbers(config, parts):
    """Said before anything is computed, by the numbers the stages have told."""
    with LocalEngine(config.changed(local=config.local.changed(kv_memory_mb=1)), parts) as running:
        large = generate(running, ask(parts, count=16_000))
        assert large.error.kind is FailureKind.TOO_LARGE
        assert "of KV cache on every stage, the tightest stage holds" in large.error.cause
        assert generate(running, ask(parts, count=4)).tokens
