"""The filters against the plainest numpy, and their documented order where order matters."""

import math

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from flowspec.request import SamplingParams
from flowspec.speculation.processors import warp

NEAR = 1e-5  # rows with a decision this close are skipped: fp32 and fp64 may differ there


def naive(logits: np.ndarray, params: SamplingParams) -> tuple[np.ndarray, float]:
    """Which tokens stay [V], token by token in fp64, and how close the closest decision was."""
    scaled = logits.astype(np.float64) / params.temperature
    alive = list(range(len(scaled)))
    closest = math.inf

    def probability() -> dict[int, float]:
        top = max(scaled[token] for token in alive)
        weights = {token: math.exp(scaled[token] - top) for token in alive}
        total = sum(weights.values())
        return {token: weight / total for token, weight in weights.items()}

    if 0 < params.top_k < len(scaled):
        alive = sorted(alive, key=lambda token: -scaled[token])[: params.top_k]
    if params.top_p < 1.0:
        chances = probability()
        before, kept = 0.0, []
        for token in sorted(alive, key=lambda token: -chances[token]):
            closest = min(closest, abs(before - params.top_p))
            if before < params.top_p or not kept:
                kept.append(token)
            before += chances[token]
        alive = kept
    if params.min_p > 0.0:
        chances = probability()
        most = max(chances.values())
        closest = min(closest, *(abs(chances[t] / most - params.min_p) for t in alive))
        alive = [token for token in alive if chances[token] >= params.min_p * most]
    stays = np.zeros(len(scaled), dtype=bool)
    stays[alive] = True
    return stays, closest


def kept(probabilities: list[float], **params: float) -> list[int]:
    """Indices that survive, from probabilities at temperature 1 unless told."""
    values = {"temperature": 1.0, **params}
    logits = torch.tensor([probabilities]).log()
    out = warp(logits, SamplingParams(**values))  # type: ignore[arg-type]
    return out[0].isfinite().nonzero().flatten().tolist()


@given(
    st.integers(0, 2**32 - 1),
    st.integers(1, 12),
    st.floats(0.05, 20.0),
    st.integers(0, 14),
    st.sampled_from([1.0, 0.95, 0.7, 0.4, 0.05]),
    st.sampled_from([0.0, 0.02, 0.3, 0.9]),
)
@settings(max_examples=300)
def test_warp_equals_naive(
    seed: int, vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """All filters together, row by row; what stays keeps its logit over temperature."""
    logits = np.random.default_rng(seed).normal(size=(3, vocab_size)).astype(np.float32) * 3
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    expected = [naive(row, params) for row in logits]
    assume(min(closest for _, closest in expected) > NEAR)
    out = warp(torch.from_numpy(logits), params).numpy()
    for row, (stays, _), before in zip(out, expected, logits, strict=True):
        assert (np.isfinite(row) == stays).all()
        np.testing.assert_array_equal(row[stays], before[stays] / np.float32(temperature))
        assert np.isneginf(row[~stays]).all()


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [0, 1, 2, 3]),
        ({"top_k": 2}, [0, 1]),
        ({"top_k": 4}, [0, 1, 2, 3]),
        ({"top_k": 99}, [0, 1, 2, 3]),
        ({"top_p": 0.75}, [0, 1]),
        ({"top_p": 0.85}, [0, 1, 2]),
        ({"min_p": 0.25}, [0, 1, 2]),
        ({"min_p": 0.35}, [0, 1]),
    ],
)
def test_each_filter_alone(params: dict[str, float], expected: list[int]) -> None:
    """Filters of 0.5, 0.3, 0.15, 0.05 give the values computed by hand."""
    assert kept([0.5, 0.3, 0.15, 0.05], **params) == expected


def test_top_k_comes_before_top_p() -> None:
    """Top-k of 0.4, 0.3 leaves 0.57, 0.43, so top-p 0.5 needs one; top-p first needs two."""
    assert kept([0.4, 0.3, 0.2, 0.1], top_k=2, top_p=0.5) == [0]
    assert kept([0.4, 0.3, 0.2, 0.1], top_p=0.5) == [0, 1]


def test_top_p_comes_before_min_p() -> None:
    """min-p first would leave 0.625, 0.375 and top-p 0.6 one of them."""
    assert kept([0.5, 0.3, 0.15, 0.05], min_p=0.5) == [0, 1]
    assert kept([0.5, 0.3, 0.15, 0.05], top_p=0.6, min_p=0.5) == [0, 1]


def test_temperature_comes_first() -> None:
    """A flat distribution needs more tokens for the same mass."""
    assert kept([0.7, 0.2, 0.06, 0.04], top_p=0.6) == [0]
    assert len(kept([0.7, 0.2, 0.06, 0.04], top_p=0.6, temperature=50.0)) == 3
    assert kept([0.7, 0.2, 0.06, 0.04], min_p=0.9, temperature=50.0) == [0, 1, 2, 3]


@example([0.0, 1e-9], 1.0, 0, 1e-9, 0.0)  # their probabilities are equal in fp32
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=8),
    st.sampled_from([1e-9, 1e-3, 1.0, 100.0]),
    st.integers(0, 3),
    st.sampled_from([1e-9, 0.5, 1.0]),
    st.sampled_from([0.0, 0.5, 0.999]),
)
@settings(max_examples=200)
def test_best_token_always_stays(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """No setting may leave nothing to choose, at any scale of logits, ties included."""
    params = SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    before = torch.tensor([logits])
    out = warp(before, params)
    best = int(before.argmax())
    assert not out.isnan().any()
    assert out[0, best] > float("-inf")
    assert out[0, best] == out.max()


def test_half_precision_is_filtered_in_fp32() -> None:
    """bf16 cannot tell cumulated probabilities near 1 apart."""
    logits = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)).bfloat16()
    params = SamplingParams(temperature=0.7, top_p=0.99)
    out = warp(logits, params)
    assert out.dtype == torch.float32
    assert torch.equal(out, warp(logits.float(), params))


def test_rows_do_not_mix() -> None:
    """A row gives the same alone as among others."""
    logits = torch.randn(5, 20, generator=torch.Generator().manual_seed(1))
    params = SamplingParams(temperature=0.8, top_k=9, top_p=0.8, min_p=0.05)
    together = warp(logits, params)
    for index in range(5):
        assert torch.equal(together[index : index + 1], warp(logits[index : index + 1], params))


def test_greedy_has_no_distribution() -> None:
    """Temperature 0 is an arg-max; dividing by it is a bug of the caller."""
    with pytest.raises(AssertionError, match="greedy"):
        warp(torch.zeros(1, 4), SamplingParams())
