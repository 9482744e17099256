"""A short soak (tests/stress/soak.py) gives right answers and flat memory, and detects a leak."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts
from flowspec.engine.local import LocalEngine
from flowspec.head.head import Head
from flowspec.request import Request, SamplingParams
from tests.stress.soak import (
    MIB,
    Sample,
    answers_alone,
    growth,
    private_bytes,
    soak_requests,
    soak_tokens,
)  # fmt: skip

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent.parent


NUM_REQUESTS = 40
NUM_TOKENS = 600
BOUND_MIB = 8.0  # this process is pytest, whose memory is its own affair within reason
LEAK_BYTES = 2 * MIB  # per request: 40 MiB over the last half


def cases(parts: HeadParts) -> list[Request]:
    """Return two short requests, greedy and sampled, and a long one that no token ends."""
    short = [
        Request(
            id=1,
            prompt=tuple(parts.tokenizer.encode("the lazy dog")),
            sampling=SamplingParams(temperature=temperature, seed=3),
            max_new_tokens=6,
            eos_token_ids=parts.eos_token_ids,
        )
        for temperature in (0.0, 1.0)
    ]
    return [*short, replace(short[0], max_new_tokens=NUM_TOKENS, eos_token_ids=())]


@pytest.fixture(scope="module")
def answers(parts: HeadParts) -> list[list[int]]:
    """Return the target's own answer to each case."""
    return [alone.tokens for alone in answers_alone(parts.folder, parts.max_context, cases(parts))]


def worst(samples: list[Sample]) -> float:
    """Return the largest growth of any process, in MiB."""
    return max(max(found.by_slope, found.by_median) for found in growth(samples))


def test_short_soak(config: EngineConfig, parts: HeadParts, answers: list[list[int]]) -> None:
    """Requests one after the other, then one long answer, on the same processes."""
    *short, long = cases(parts)
    with LocalEngine(config, parts) as cluster:
        watch, wrong = soak_requests(cluster, short, answers, NUM_REQUESTS)
        assert (wrong, watch.samples[-1].done) == (0, NUM_REQUESTS)
        assert worst(watch.samples) < BOUND_MIB, watch.samples
        watch, wrong = soak_tokens(cluster, long, answers[-1])
        assert (wrong, watch.samples[-1].done) == (0, NUM_TOKENS)
        assert worst(watch.samples) < BOUND_MIB, watch.samples


def test_a_leak_and_a_wrong_answer_are_seen(
    config: EngineConfig,
    parts: HeadParts,
    answers: list[list[int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head keeps something of every request, and one answer is not the target's."""
    kept: list[bytes] = []
    finish = Head._finish

    def leaking(self: Head, *args: object, **kwargs: object) -> object:
        kept.append(b"x" * LEAK_BYTES)
        return finish(self, *args, **kwargs)

    monkeypatch.setattr(Head, "_finish", leaking)
    short = cases(parts)[:2]
    with LocalEngine(config, parts) as cluster:
        watch, wrong = soak_requests(cluster, short, [answers[0], answers[0]], 24)
    assert wrong == 12
    assert len(kept) == 24
    by_process = {found.process: found for found in growth(watch.samples)}
    assert not by_process["head"].is_flat(BOUND_MIB)
    assert by_process["stage 1"].is_flat(BOUND_MIB)


@pytest.mark.parametrize(
    ("memory", "flat"),
    [
        (lambda n: 100, True),
        (lambda n: 100 + min(n, 40), True),  # grows while it starts
        (lambda n: 100 + 3 * (n % 2), True),  # goes up and down
        (lambda n: 100 + 0.1 * n, False),
        (lambda n: 100 + 9 * (n >= 80), False),  # one step, late
    ],
)
def test_what_counts_as_flat(memory: Callable[[int], float], flat: bool) -> None:
    """Memory may grow at the start, but not in the last half."""
    samples = [Sample(n, float(n), {"head": int(memory(n) * MIB)}) for n in range(1, 101)]
    (found,) = growth(samples)
    assert found.is_flat(4.0) is flat


def test_too_few_samples_are_refused() -> None:
    """Three points allow any slope."""
    with pytest.raises(ValueError, match="at least 12 needed"):
        growth([Sample(n, 1.0, {"head": 1}) for n in range(3)])


def test_a_process_that_is_gone_is_named() -> None:
    """A missing process must not count as 0 bytes."""
    with pytest.raises(ValueError, match="cannot be read"):
        private_bytes(2**30)
