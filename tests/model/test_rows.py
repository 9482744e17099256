"""The batch-invariant mode: the same text within tolerance, and the same bits in every cut."""

from collections.abc import Sequence
from functools import cache as memo

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowspec.model.attention_metadata import STABLE_ROWS, run_rows
from flowspec.model.kv_cache import COMMITTED
from flowspec.model.stage_model import FINAL_NORM, StageModel
from tests.support.models import cut, make_model, split_model

CONTEXT = 96
PROMPT = list(range(1, 41))  # more than one padded forward
# A tree of 36 rows: chains, bushes, and more rows than one padded forward holds.
PARENTS = [-1, 0, 1, 0, -1, 4, 2, 6, 7, 3, 3, 3, *range(11, 35)]
TOKENS = [(7 * row + 3) % 64 for row in range(len(PARENTS))]
FP32, BF16 = make_model(), make_model(dtype=torch.bfloat16)


def run(model: StageModel, chunk: int, sizes: Sequence[int], *, stable: bool) -> list[Tensor]:
    """Hidden states of prompt and tree, their logits, and features of two layers."""
    cache = model.new_cache(CONTEXT + 2 * STABLE_ROWS, stable_context=CONTEXT if stable else None)
    depth: list[int] = []
    hidden, middle, last = [], [], []

    def one(tokens: list[int], where: Sequence[int], parents: list[int] | None) -> None:
        out, owned = run_rows(
            model,
            cache,
            torch.tensor(tokens),
            where,
            parents=parents,
            aux_hidden_state_layers=(1, FINAL_NORM),
        )
        hidden.append(out)
        middle.append(owned[1])
        last.append(owned[FINAL_NORM])

    for start in range(0, len(PROMPT), chunk):
        tokens = PROMPT[start : start + chunk]
        one(tokens, range(start, start + len(tokens)), None)
    for rows in cut(range(len(PARENTS)), sizes):
        for row in rows:
            above = PARENTS[row]
            depth.append(len(PROMPT) if above == COMMITTED else depth[above] + 1)
        one([TOKENS[r] for r in rows], [depth[r] for r in rows], [PARENTS[r] for r in rows])
    assert (cache.prefix_length, cache.num_tree_rows) == (len(PROMPT), len(PARENTS))
    states = torch.cat(hidden)
    logits = [model.logits(piece, batch_invariant=stable) for piece in hidden]
    return [states, torch.cat(middle), torch.cat(last), torch.cat(logits)]


@memo
def reference(dtype: torch.dtype) -> list[Tensor]:
    """The prompt and the tree each in one go: plain in fp32, batch-invariant in bf16."""
    if dtype == torch.float32:
        return run(FP32, 64, [64], stable=False)
    return run(BF16, 64, [64], stable=True)


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@given(st.integers(1, 64), SIZES)
@settings(max_examples=12)
def test_stable_equals_plain_within_tolerance(chunk: int, sizes: list[int]) -> None:
    """It is the same computation in another shape."""
    for got, want in zip(
        run(FP32, chunk, sizes, stable=True), reference(torch.float32), strict=True
    ):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=2e-5)


@given(st.integers(1, 64), SIZES)
@settings(max_examples=15)
def test_stable_bits_do_not_depend_on_the_cut(chunk: int, sizes: list[int]) -> None:
    """A bf16 row has the same bits in every segment, so strategies agree exactly."""
    for got, want in zip(
        run(BF16, chunk, sizes, stable=True), reference(torch.bfloat16), strict=True
    ):
        assert got.dtype == want.dtype
        assert torch.equal(got, want)


def test_stable_bits_survive_rerooting() -> None:
    """Rows gathered to other slots give the same sums: order is by position, not by slot."""

    def branch(*, with_rest: bool) -> Tensor:
        cache = BF16.new_cache(CONTEXT, stable_context=CONTEXT)
        run_rows(BF16, cache, torch.tensor(PROMPT[:5]), range(5), parents=None)
        if with_rest:  # the true path lies between rows that die
            tree = torch.tensor([9, 8, 7, 6, 5])
            run_rows(BF16, cache, tree, [5, 5, 6, 6, 7], parents=[-1, -1, 0, 1, 3])
            cache.reroot([1, 3], [4])
        else:
            run_rows(BF16, cache, torch.tensor([8, 6, 5]), [5, 6, 7], parents=[-1, 0, 1])
            cache.reroot([0, 1], [2])
        hidden, _ = run_rows(BF16, cache, torch.tensor([4]), [8], parents=[0])
        return hidden

    assert torch.equal(branch(with_rest=True), branch(with_rest=False))


@pytest.mark.parametrize("count", [1, STABLE_ROWS - 1, STABLE_ROWS, STABLE_ROWS + 1])
def test_padding_leaves_no_trace(count: int) -> None:
    """The filler rows are gone from outputs, features and cache."""
    cache = FP32.new_cache(128, stable_context=CONTEXT)
    tokens = torch.arange(count) % 64
    hidden, owned = run_rows(
        FP32, cache, tokens, range(count), parents=None, aux_hidden_state_layers=(0,)
    )
    assert hidden.shape[0] == owned[0].shape[0] == cache.prefix_length == count
    run_rows(FP32, cache, tokens, [count] * count, parents=[COMMITTED] * count)
    assert (cache.prefix_length, cache.num_tree_rows) == (count, count)
    logits = FP32.logits(hidden, batch_invariant=True)
    torch.testing.assert_close(logits, FP32.logits(hidden), atol=1e-4, rtol=1e-4)


def test_hidden_states_are_padded_too() -> None:
    """Stages behind the first get hidden states, not tokens."""
    stages = split_model(FP32, [1, 3])
    caches = [s.new_cache(64, stable_context=CONTEXT) for s in stages]
    x = torch.tensor(PROMPT[:7])
    for stage, cache in zip(stages, caches, strict=True):
        x, _ = run_rows(stage, cache, x, range(7), parents=None)
    torch.testing.assert_close(x, reference(torch.float32)[0][:7], atol=2e-5, rtol=2e-5)
