"""Coupled sampling: a pure function of seed and position, and an exact sample of the target.

The statistical tests use fixed seeds, so they give the same answer on every run. FALSE_ALARM is the
chance that a correct implementation would have failed one of them when the seeds were chosen.
"""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flowspec.request import SamplingParams
from flowspec.speculation.acceptance import choose
from flowspec.speculation.acceptance.gumbel_coupled import (
    draft_scores,
    gumbel_noise,
    noise_rows,
)
from flowspec.speculation.processors import warp

FALSE_ALARM = 1e-6


def p_value(counts: Sequence[int], probabilities: Sequence[float]) -> float:
    """Pearson's chi-square: the chance of a deviation as large as this under `probabilities`."""
    observed = np.array(counts, dtype=np.float64)
    expected = np.array(probabilities, dtype=np.float64) * observed.sum()
    assert (observed[expected == 0] == 0).all(), "a token of probability 0 was chosen"
    observed, expected = observed[expected > 0], expected[expected > 0]
    assert expected.min() > 10, "too few draws for the test to mean anything"
    statistic = ((observed - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(observed) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, torch.tensor(statistic / 2)))


def target(logits: Tensor, params: SamplingParams) -> list[float]:
    """The distribution that must come out [V]."""
    return warp(logits, params).double().softmax(-1).flatten().tolist()


def test_golden_noise() -> None:
    """The noise is part of the protocol: every device, version and platform has these bits."""
    gumbel_noise.cache_clear()
    expected = [
        "0x1.8e53160000000p-3",
        "-0x1.2c53f40000000p-1",
        "0x1.01a27e0000000p+2",
        "0x1.105b780000000p-2",
    ]
    assert [value.hex() for value in gumbel_noise(7, 3, 4).tolist()] == expected
    pairs = [(7, 3), (7 + 2**32, 3), (7, 3 + 2**32), (2**63 - 1, 3), (2**63 - 2, 3), (3, 7)]
    assert len({tuple(gumbel_noise(*pair, 4).tolist()) for pair in pairs}) == len(pairs)


@given(
    st.lists(st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 10**6)), min_size=1, max_size=8),
    st.randoms(use_true_random=False),
)
def test_noise_does_not_depend_on_the_order_of_calls(pairs: list[tuple[int, int]], random) -> None:
    """Head and stages ask in different orders, at different times, some never."""
    gumbel_noise.cache_clear()
    first = {pair: gumbel_noise(*pair, 16).clone() for pair in pairs}
    gumbel_noise.cache_clear()
    torch.manual_seed(random.getrandbits(32))
    np.random.seed(random.getrandbits(32))
    again = list(pairs)
    random.shuffle(again)
    for pair in again:
        assert torch.equal(gumbel_noise(*pair, 16), first[pair])
    seed = pairs[0][0]
    positions = [position for _, position in pairs]
    rows = noise_rows(seed, positions, 16)
    assert rows.shape == (len(pairs), 16)
    for row, position in zip(rows, positions, strict=True):
        assert torch.equal(row, gumbel_noise(seed, position, 16))


def test_choices_leave_the_noise_alone() -> None:
    """The noise is cached, so its users must not write into it."""
    before = gumbel_noise(5, 9, 8).clone()
    params = SamplingParams(temperature=1.0, top_k=3, seed=5)
    choose(torch.zeros(1, 8), [9], params)
    draft_scores(torch.zeros(1, 8), [9], params, coupled=True)
    assert torch.equal(gumbel_noise(5, 9, 8), before)


def test_noise_is_finite_and_gumbel() -> None:
    """Mean is Euler's constant, variance pi^2/6; 200,000 draws, bounds of five sigma."""
    noise = torch.cat([gumbel_noise(11, position, 1000) for position in range(200)]).double()
    assert noise.isfinite().all()
    sigma = (np.pi**2 / 6 / len(noise)) ** 0.5
    assert abs(noise.mean().item() - 0.5772156649) < 5 * sigma
    assert abs(noise.var().item() / (np.pi**2 / 6) - 1) < 5 * (4.4 / len(noise)) ** 0.5


@given(st.integers(0, 2**32 - 1), st.integers(0, 1000))
def test_greedy_is_the_limit(seed: int, position: int) -> None:
    """Temperature 0 takes the arg-max, and a tiny temperature the same where there is no tie."""
    logits = torch.randperm(12, generator=torch.Generator().manual_seed(seed)).float()[None]
    expected = [int(logits.argmax())]
    assert choose(logits, [position], SamplingParams()) == expected
    assert choose(logits, [position], SamplingParams(temperature=1e-4, seed=seed)) == expected


def test_ties_and_rows_do_not_mix() -> None:
    """A row's choice depends on its logits and its position alone."""
    logits = torch.randn(40, 16, generator=torch.Generator().manual_seed(3))
    positions = [17 * row % 40 for row in range(40)]
    params = SamplingParams(temperature=1.3, top_p=0.9, seed=8)
    together = choose(logits, positions, params)
    alone = [choose(logits[n : n + 1], [positions[n]], params)[0] for n in range(40)]
    assert together == alone
    assert len(set(together)) > 3


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 1.0},
        {"temperature": 0.6},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.5, "top_k": 7, "top_p": 0.95, "min_p": 0.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("over", ["positions", "seeds"])
def test_choices_follow_the_warped_distribution(over: str, params: dict[str, float]) -> None:
    """3,000 draws over positions of one seed and over seeds at one position; FALSE_ALARM each."""
    logits = torch.randn(1, 8, generator=torch.Generator().manual_seed(2))
    counts = [0] * 8
    for n in range(3000):
        seed, position = (123, n) if over == "positions" else (n, 40)
        sampling = SamplingParams(**params, seed=seed)  # type: ignore[arg-type]
        counts[choose(logits, [position], sampling)[0]] += 1
    expected = target(logits, SamplingParams(**params))  # type: ignore[arg-type]
    assert p_value(counts, expected) > FALSE_ALARM


def test_pairs_follow_the_joint_distribution() -> None:
    """A two-token model: P(a, b) = P(a) P(b | a), over 6,000 seeds; FALSE_ALARM."""
    generator = torch.Generator().manual_seed(5)
    first, second = torch.randn(1, 4, generator=generator), torch.randn(4, 4, generator=generator)
    params = SamplingParams(temperature=1.2, top_p=0.97)
    counts = np.zeros((4, 4), dtype=int)
    for seed in range(6000):
        sampling = SamplingParams(temperature=1.2, top_p=0.97, seed=seed)
        a = choose(first, [10], sampling)[0]
        b = choose(second[a : a + 1], [11], sampling)[0]
        counts[a, b] += 1
    p_first = target(first, params)
    joint = [p_first[a] * p for a in range(4) for p in target(second[a : a + 1], params)]
    assert p_value(counts.flatten().tolist(), joint) > FALSE_ALARM


def test_a_whole_text_follows_the_markov_chain() -> None:
    """6,000 tokens of one seed, each from its predecessor's row: transitions per state."""
    rows = torch.randn(4, 4, generator=torch.Generator().manual_seed(6))
    params = SamplingParams(temperature=1.0, seed=99)
    counts = np.zeros((4, 4), dtype=int)
    state = 0
    for position in range(6000):
        token = choose(rows[state : state + 1], [position], params)[0]
        counts[state, token] += 1
        state = token
    for row in range(4):
        expected = target(rows[row : row + 1], params)
        assert p_value(counts[row].tolist(), expected) > FALSE_ALARM / 4


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    st.integers(0, 10),
    st.sampled_from([1.0, 0.9, 0.5]),
    st.sampled_from([0.0, 0.2]),
)
def test_a_perfect_drafter_is_always_right(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """Coupled with q = p, the best-ranked token is the target's at any temperature: alpha = 1."""
    params = SamplingParams(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed
    )
    logits = torch.randn(10, 32, generator=torch.Generator().manual_seed(seed)) * 3
    positions = list(range(5, 15))
    scores = draft_scores(logits, positions, params, coupled=True)
    assert scores.argmax(-1).tolist() == choose(logits, positions, params)


def test_draft_scores_are_log_probabilities() -> None:
    """The tree adds them up, so they must be normalised, forbidden tokens at -inf."""
    logits = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=0.7, top_k=6, seed=4)
    coupled = draft_scores(logits, [1, 2, 3], params, coupled=True)
    plain = draft_scores(logits, [1, 2, 3], params, coupled=False)
    for scores in (coupled, plain):
        assert torch.allclose(scores.exp().sum(-1), torch.ones(3))
        assert not scores.isnan().any()
    assert (coupled > float("-inf")).sum(-1).tolist() == [6, 6, 6]
    assert torch.equal(coupled.isinf(), warp(logits, params).isinf())
    assert torch.allclose(plain, (logits / 0.7).log_softmax(-1))
    greedy = draft_scores(logits, [1, 2, 3], SamplingParams(seed=4), coupled=True)
    assert torch.allclose(greedy, logits.log_softmax(-1))


def test_coupling_finds_the_token_more_often() -> None:
    """Coupling makes a drafter with errors right more often than the mode of q is."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(300, 32, generator=generator) * 2
    guesses = logits + 0.5 * torch.randn(300, 32, generator=generator)
    params = SamplingParams(temperature=1.0, seed=21)
    positions = list(range(300))
    truth = torch.tensor(choose(logits, positions, params))

    def hits(coupled: bool) -> int:
        best = draft_scores(guesses, positions, params, coupled=coupled).argmax(-1)
        return int((best == truth).sum())

    assert hits(True) > hits(False) + 50


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize(
    "filters", [{}, {"top_k": 4}, {"top_p": 0.7}, {"min_p": 0.2}, {"temperature": 0.0}]
)
def test_a_drafter_with_few_tokens_meets_the_noise_of_the_targets_ids(
    filters: dict[str, float], coupled: bool
) -> None:
    """A column is the target's token that it stands for: as if the others were impossible."""
    ids = torch.tensor([9, 2, 17, 11, 5, 30, 3])
    logits = torch.randn(3, len(ids), generator=torch.Generator().manual_seed(1)) * 2
    wide = torch.full((3, 40), float("-inf"))
    wide[:, ids] = logits
    params = SamplingParams(**{"temperature": 0.8, "seed": 6, **filters})  # type: ignore[arg-type]
    got = draft_scores(logits, [4, 5, 9], params, coupled=coupled, target_ids=ids)
    want = draft_scores(wide, [4, 5, 9], params, coupled=coupled)
    torch.testing.assert_close(got, want[:, ids])
