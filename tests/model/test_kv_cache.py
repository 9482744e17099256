"""The tree cache: attention over a tree is attention over each of its paths, whatever the cuts.

The reference is always the same model run from nothing over one path, without any tree.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowspec.model.attention_metadata import run_rows
from flowspec.model.kv_cache import COMMITTED, CacheFull, JointAttentionMetadata, TreeKVCache
from flowspec.model.stage_model import StageModel
from tests.support.models import TINY, TINY_MHA, TINY_MQA, cut, full_forward, make_model

MODELS = {
    "gqa": make_model(TINY),
    "mha": make_model(TINY_MHA, seed=1),
    "mqa": make_model(TINY_MQA, seed=2),
}
NAMES = st.sampled_from(sorted(MODELS))
PREFIX = st.lists(st.integers(0, 63), min_size=1, max_size=6)
SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)
NUMBERS = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 63)), min_size=1, max_size=12)
TOLERANCE = 1e-5


@dataclass
class Grown:
    """A cache with the text that each of its tree rows stands for, from the first token on."""

    model: StageModel
    cache: TreeKVCache
    prefix: list[int]
    texts: list[list[int]] = field(default_factory=list)  # by tree row

    def add_prefix(self, tokens: Sequence[int]) -> None:
        """Commit tokens and compare their hidden states."""
        where = range(len(self.prefix), len(self.prefix) + len(tokens))
        hidden, _ = run_rows(self.model, self.cache, torch.tensor(tokens), where, parents=None)
        self.prefix += tokens
        whole, _ = full_forward(self.model, self.prefix)
        assert_close(hidden, whole[-len(tokens) :])

    def add_rows(self, parents: Sequence[int], tokens: Sequence[int]) -> None:
        """Run a segment of tree rows and compare each with its own path."""
        for parent, token in zip(parents, tokens, strict=True):
            above = self.prefix if parent == COMMITTED else self.texts[parent]
            self.texts.append([*above, token])
        own = self.texts[-len(tokens) :]
        hidden, _ = run_rows(
            self.model,
            self.cache,
            torch.tensor(tokens),
            [len(text) - 1 for text in own],
            parents=parents,
        )
        for row, text in zip(hidden, own, strict=True):
            assert_close(row, full_forward(self.model, text)[0][-1])

    def reroot(self, last: int, keep: Sequence[int]) -> None:
        """Commit the path to tree row `last` (or nothing) and keep `keep`."""
        path: list[int] = []
        if last != COMMITTED:
            text = self.texts[last]
            path = [self.texts.index(text[:n]) for n in range(len(self.prefix) + 1, len(text) + 1)]
            self.prefix = list(text)
        self.cache.reroot(path, keep)
        self.texts = [self.texts[row] for row in keep]
        assert self.cache.prefix_length == len(self.prefix)
        assert self.cache.num_tree_rows == len(self.texts)

    def below(self, last: int) -> list[int]:
        """Tree rows that descend from tree row `last`."""
        text = self.prefix if last == COMMITTED else self.texts[last]
        return [
            row
            for row, own in enumerate(self.texts)
            if len(own) > len(text) and own[: len(text)] == text
        ]


def assert_close(got: Tensor, want: Tensor) -> None:
    """Hidden states are of order 1."""
    torch.testing.assert_close(got, want, atol=TOLERANCE, rtol=TOLERANCE)


def begin(name: str, prefix: Sequence[int], capacity: int = 64) -> Grown:
    """A cache that holds `prefix`."""
    model = MODELS[name]
    grown = Grown(model, model.new_cache(capacity), [])
    grown.add_prefix(list(prefix))
    return grown


def new_rows(grown: Grown, numbers: Sequence[tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Parents (any row there is, or COMMITTED) and tokens; no path twice."""
    first = len(grown.texts)
    taken = {tuple(text) for text in grown.texts}
    own: list[list[int]] = []
    parents, tokens = [], []
    for number, token in numbers:
        parent = number % (first + len(own) + 1) - 1
        text = [*(grown.prefix if parent == COMMITTED else [*grown.texts, *own][parent]), token]
        if tuple(text) not in taken:
            taken.add(tuple(text))
            own.append(text)
            parents.append(parent)
            tokens.append(token)
    return parents, tokens


@given(NAMES, PREFIX, NUMBERS, SIZES)
def test_a_tree_is_its_paths(
    name: str, prefix: list[int], numbers: list[tuple[int, int]], sizes: list[int]
) -> None:
    """Any tree in any cut, single rows included, GQA, MHA and MQA."""
    grown = begin(name, prefix)
    parents, tokens = new_rows(grown, numbers)
    for rows in cut(range(len(tokens)), sizes):
        grown.add_rows([parents[row] for row in rows], [tokens[row] for row in rows])


@given(PREFIX, st.lists(st.integers(0, 63), min_size=1, max_size=10), SIZES)
@settings(max_examples=20)
def test_a_prompt_may_come_in_chunks(prefix: list[int], more: list[int], sizes: list[int]) -> None:
    """Chunked prefill equals the prompt in one go."""
    grown = begin("gqa", prefix)
    for rows in cut(range(len(more)), sizes):
        grown.add_prefix([more[row] for row in rows])


@given(
    NAMES,
    PREFIX,
    st.lists(
        st.tuples(NUMBERS, SIZES, st.integers(0, 99), st.sets(st.integers(0, 15))),
        min_size=1,
        max_size=4,
    ),
)
def test_rerooting_keeps_surviving_rows_right(
    name: str,
    prefix: list[int],
    rounds: list[tuple[list[tuple[int, int]], list[int], int, set[int]]],
) -> None:
    """Round after round: grow, commit a path, drop some of the rest, grow on below what is left.

    A kept row may lose a sibling or its whole other family, never an ancestor.
    """
    grown = begin(name, prefix, capacity=128)
    for numbers, sizes, number, dropped in rounds:
        parents, tokens = new_rows(grown, numbers)
        for rows in cut(range(len(tokens)), sizes):
            grown.add_rows([parents[row] for row in rows], [tokens[row] for row in rows])
        last = number % (len(grown.texts) + 1) - 1
        alive = grown.below(last)
        gone = {row for drop in dropped if drop in alive for row in [drop, *grown.below(drop)]}
        grown.reroot(last, [row for row in alive if row not in gone])
    final, tokens = new_rows(grown, [(n, n) for n in range(8)])
    if tokens:
        grown.add_rows(final, tokens)


def test_kept_keys_and_values_are_moved_not_changed() -> None:
    """Compaction copies bits; the prefix before it is not touched."""
    grown = begin("gqa", [1, 2, 3])
    grown.add_rows([-1, 0, 0, 1, 2, -1], [4, 5, 6, 7, 8, 9])
    cache = grown.cache
    keys, values = cache.keys.clone(), cache.values.clone()
    grown.reroot(0, [2, 4])  # commit row 0, keep rows 2 and 4: slots 0..2 | 3 | 5, 7
    for before, after in ((keys, cache.keys), (values, cache.values)):
        assert torch.equal(after[:, :, :6], before[:, :, [0, 1, 2, 3, 5, 7]])
    grown.add_rows([1, COMMITTED], [10, 11])


def test_ancestors_of_rows() -> None:
    """The drafter keeps what leads to a living row, dead or not."""
    grown = begin("gqa", [1, 2])
    grown.add_rows([-1, 0, 0, 1, -1, 4], [4, 5, 6, 7, 8, 9])
    assert grown.cache.with_ancestors([3]) == [0, 1, 3]
    assert grown.cache.with_ancestors([2, 5]) == [0, 2, 4, 5]
    assert grown.cache.with_ancestors([]) == []
    grown.reroot(0, [1, 3])
    assert grown.cache.with_ancestors([1]) == [0, 1]


def test_many_tree_rows_grow_the_mask() -> None:
    """More rows than the mask was first made for, in chains and in one bush."""
    grown = begin("gqa", [1, 2], capacity=256)
    parents = [row - 1 for row in range(70)]
    grown.add_rows(parents, [row % 64 for row in range(70)])
    grown.add_rows([3] * 60, list(range(4, 64)))


@pytest.mark.parametrize("tree", [False, True])
def test_a_full_cache_says_so_and_stays_usable(tree: bool) -> None:
    """The request fails by name; rows already there are right, and smaller segments still fit."""
    grown = begin("gqa", [1, 2, 3], capacity=6)
    append = grown.cache.append_tree if tree else grown.cache.append_prefix
    with pytest.raises(CacheFull, match="holds 6 rows, 7 are needed"):
        append([COMMITTED] * 4 if tree else 4)  # type: ignore[operator]
    assert (grown.cache.prefix_length, grown.cache.num_tree_rows) == (3, 0)
    grown.add_rows([-1, 0, -1], [4, 5, 6])
    with pytest.raises(CacheFull):
        grown.cache.append_tree([COMMITTED])
    grown.reroot(1, [])
    grown.add_prefix([9])


def test_order_is_checked() -> None:
    """Parents first, and no prefix behind a standing tree: both would give wrong attention."""
    cache = begin("gqa", [1]).cache
    with pytest.raises(AssertionError, match="before its parent"):
        cache.append_tree([0])
    cache = begin("gqa", [1]).cache
    cache.append_tree([COMMITTED])
    with pytest.raises(AssertionError, match="prefix"):
        cache.append_prefix(1)


def test_drop_last_forgets_the_newest() -> None:
    """Padding goes as if it had never been, from the tree and from the prefix."""
    grown = begin("gqa", [1, 2, 3])
    grown.add_rows([-1, 0], [4, 5])
    grown.cache.append_tree([0, COMMITTED, 2])
    grown.cache.drop_last(3)
    assert (grown.cache.prefix_length, grown.cache.num_tree_rows) == (3, 2)
    grown.add_rows([1, COMMITTED], [6, 7])
    grown.reroot(COMMITTED, [])
    grown.cache.append_prefix(4)
    grown.cache.drop_last(4)
    grown.add_prefix([8, 9])


@pytest.mark.parametrize("capacity", [4, 200])
def test_a_resized_cache_goes_on_from_the_kept_prefix(capacity: int) -> None:
    """Later committed rows and all tree rows are left behind; the old cache stays as it is."""
    grown = begin("gqa", [1, 2, 3, 4, 5])
    grown.add_rows([COMMITTED, 0], [6, 7])
    keys = grown.cache.keys.clone()
    other = Grown(grown.model, grown.cache.resized(capacity, prefix_length=3), [1, 2, 3])
    assert (other.cache.prefix_length, other.cache.num_tree_rows) == (3, 0)
    other.add_prefix([9])
    with pytest.raises(CacheFull, match=f"holds {capacity} rows"):
        other.cache.append_tree([COMMITTED] * (capacity - 3))
    if capacity > 4:
        other.add_rows([COMMITTED, COMMITTED, 1], [10, 11, 12])
    assert torch.equal(grown.cache.keys, keys)
    grown.add_rows([1, COMMITTED], [8, 9])
    with pytest.raises(AssertionError, match="not there"):
        grown.cache.resized(64, prefix_length=6)


def test_requests_in_one_forward_see_their_own_keys_alone() -> None:
    """Rows of several caches run side by side: each gets what it would get alone."""
    several = [begin("gqa", [1, 2, 3]), begin("gqa", [7]), begin("gqa", [4, 5])]
    parents, tokens = (
        [[COMMITTED, 0, COMMITTED], [COMMITTED], [COMMITTED, 0]],
        [[4, 5, 6], [8], [6, 7]],
    )
    windows = [
        grown.cache.append_tree(above) for grown, above in zip(several, parents, strict=True)
    ]
    where = torch.tensor([3, 4, 3, 1, 2, 3])
    ids = torch.tensor([token for own in tokens for token in own])
    hidden, _ = MODELS["gqa"](ids, where, JointAttentionMetadata(windows))
    texts = [[1, 2, 3, 4], [1, 2, 3, 4, 5], [1, 2, 3, 6], [7, 8], [4, 5, 6], [4, 5, 6, 7]]
    for row, text in zip(hidden, texts, strict=True):
        assert_close(row, full_forward(MODELS["gqa"], text)[0][-1])


class Moved(TorchDispatchMode):
    """Counts the elements that tensor operations write, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        if isinstance(out, Tensor) and (alias is None or alias.is_write):
            self.num_elements += out.numel()
        return out


def elements_moved(context: int, path: Sequence[int], keep: Sequence[int]) -> int:
    """Return the slots that a re-rooting writes behind `context` committed rows."""
    cache = TreeKVCache(num_layers=3, num_kv_heads=2, head_dim=8, capacity=context + 64)
    cache.append_prefix(context)
    cache.append_tree([COMMITTED, 0, 1, 0, 3, 4])
    with Moved() as moved:
        cache.reroot(path, keep)
    return moved.num_elements


def test_rerooting_costs_nothing_per_context() -> None:
    """A verdict at token 4000 moves as many bytes as one at token 4: those of the rows kept."""
    short = elements_moved(4, [0, 3], [4, 5])
    assert short == elements_moved(4000, [0, 3], [4, 5])
    # keys and values of three rows: gathered once, written once; and the index
    assert 0 < short <= 2 * 2 * 3 * (3 * 2 * 8) + 16
    assert elements_moved(4000, [0, 1], [2]) == 0, "rows already in place stay there"
