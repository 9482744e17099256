"""The walk along the true path, against following the whole tree from the start each time."""

from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec.request import NodeId
from flowspec.stage.verifier import Verifier
from tests.support.models import cut

PROMPT_END = NodeId(0)
VOCAB = 3


@dataclass(frozen=True)
class Row:
    """A node of the tree and what the target chooses after it."""

    node: NodeId
    parent: NodeId
    token: int
    choice: int


@st.composite
def trees(draw: st.DrawFn) -> list[Row]:
    """Rows in some order in which parents come first; the true path is likely to be long."""
    rows: list[Row] = []
    nodes = [0]
    taken: set[tuple[int, int]] = set()
    for node in range(1, draw(st.integers(1, 25)) + 1):
        parent = draw(st.sampled_from(nodes[-4:]))
        token = draw(st.integers(0, VOCAB - 1))
        if (parent, token) not in taken:
            taken.add((parent, token))
            nodes.append(node)
            choice = draw(st.integers(0, VOCAB - 1))
            rows.append(Row(NodeId(node), NodeId(parent), token, choice))
    waiting, order, there = list(rows), [], {0}
    while waiting:  # any order that keeps parents before children
        ready = [row for row in waiting if row.parent in there]
        row = ready[draw(st.integers(0, len(ready) - 1))]
        waiting.remove(row)
        there.add(row.node)
        order.append(row)
    return order


def brute_force(rows: list[Row], choice: int) -> tuple[NodeId, int]:
    """Tip and next token from the prompt's end over all rows seen so far."""
    by_edge = {(row.parent, row.token): row for row in rows}
    tip = PROMPT_END
    while (row := by_edge.get((tip, choice))) is not None:
        tip, choice = row.node, row.choice
    return tip, choice


def observe(verifier: Verifier, rows: list[Row]) -> None:
    """Hand the verifier a segment's rows."""
    verifier.observe(
        [row.node for row in rows],
        [row.parent for row in rows],
        [row.token for row in rows],
        [row.choice for row in rows],
    )


@given(
    trees(),
    st.integers(0, VOCAB - 1),
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.lists(st.booleans(), min_size=1, max_size=5),
    st.booleans(),
)
@settings(max_examples=300)
def test_walk_reaches_what_the_rows_show(
    rows: list[Row], choice: int, sizes: list[int], walks: list[bool], drop_dead: bool
) -> None:
    """Whatever the order, the cuts and the deferred walks: the tip is as far as the rows allow.

    Rows of dead parents may come along (`drop_dead` False) or be dropped before, as stages do.
    """
    verifier = Verifier()
    verifier.begin(PROMPT_END, choice)
    seen: list[Row] = []
    dead: set[int] = set()
    for turn, indices in enumerate(cut(range(len(rows)), sizes)):
        segment = [rows[index] for index in indices]
        seen += segment
        if drop_dead:
            for row in segment:
                if row.parent in dead:
                    dead.add(row.node)
            segment = [row for row in segment if row.node not in dead]
        observe(verifier, segment)
        if not walks[turn % len(walks)]:
            continue
        before = verifier.tip
        expected = brute_force(seen, choice)
        assert verifier.walk() == (expected[0] != before)
        assert (verifier.tip, verifier.next_token) == expected
        assert not verifier.walk(), "a second walk over the same rows finds nothing new"
        if expected[0] != before:
            dead = dead_rows(seen, *expected)
    verifier.walk()
    assert (verifier.tip, verifier.next_token) == brute_force(seen, choice)


def dead_rows(rows: list[Row], tip: NodeId, token: int) -> set[int]:
    """Return the nodes that do not descend from the tip's child with `token`, without the tip."""
    alive: set[int] = set()
    for row in rows:
        if row.parent in alive or (row.parent == tip and row.token == token):
            alive.add(row.node)
    return {row.node for row in rows} - alive - {tip}


def test_prompt_is_not_a_walk() -> None:
    """The prompt's verdict is announced by `begin`; nothing moves until a row agrees with it."""
    verifier = Verifier()
    verifier.begin(NodeId(9), 4)
    assert (verifier.tip, verifier.next_token) == (9, 4)
    assert not verifier.walk()
    observe(verifier, [Row(NodeId(10), NodeId(9), 5, 1)])
    assert not verifier.walk()
    assert (verifier.tip, verifier.next_token) == (9, 4)


def test_a_deferred_walk_crosses_segments() -> None:
    """A round's verdict covers all its chunks at once (naive_pp)."""
    verifier = Verifier()
    verifier.begin(NodeId(0), 1)
    for node in (1, 2, 3):
        observe(verifier, [Row(NodeId(node), NodeId(node - 1), 1, 1)])
    assert verifier.walk()
    assert (verifier.tip, verifier.next_token) == (3, 1)


def test_rows_must_match() -> None:
    """A segment whose lists differ in length is a bug, not a shorter segment."""
    verifier = Verifier()
    with pytest.raises(ValueError, match="zip"):
        verifier.observe([NodeId(1)], [NodeId(0)], [1], [])


def test_verdicts_do_not_pile_up() -> None:
    """A long generation must not hold every row it ever saw."""
    verifier = Verifier()
    verifier.begin(NodeId(0), 1)
    for node in range(1, 500):
        wrong = Row(NodeId(node + 10_000), NodeId(node - 1), 2, 0)
        observe(verifier, [Row(NodeId(node), NodeId(node - 1), 1, 1), wrong])
        assert verifier.walk()
    held = sum(len(value) for value in vars(verifier).values() if isinstance(value, dict))
    assert held <= 4
