"""Tests of what strategies decide by: learnt costs, the floor of growth, the pipe."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowspec.head.pipeline import Pipeline, SegmentCost
from flowspec.head.request_state import RequestState
from flowspec.request import NodeId
from flowspec.speculation.drafters.base import Proposal
from flowspec.speculation.strategy import RoundConfig
from tests.support.states import decoding_state


def knee(rows: int) -> float:
    """A device's t(n): flat up to 64 rows, then growing."""
    return 10.0 + max(0, rows - 64) * 0.25


def make_session(context: int = 1000, **config: int) -> RequestState:
    """A request that has just planted its root at position 5."""
    return decoding_state(RoundConfig(**config), context=context)


def root_proposal(session: RequestState, *children: tuple[int, float]) -> Proposal:
    """Children for the root."""
    return Proposal(session.tree.root.id, children)


def test_unknown_cost_is_one() -> None:
    """Before the first segment is back all sizes cost the same, so the whole budget may go."""
    assert {SegmentCost().milliseconds(n) for n in (1, 7, 1000)} == {1.0}


@given(
    st.lists(st.tuples(st.integers(0, 1500), st.floats(0.01, 1e4)), min_size=1, max_size=40),
)
@settings(max_examples=100)
def test_cost_never_falls_with_rows(records: list[tuple[int, float]]) -> None:
    """Noise must not make a larger segment look cheaper than a smaller one."""
    cost = SegmentCost()
    for rows, elapsed in records:
        cost.record(rows, elapsed)
    times = [cost.milliseconds(rows) for rows in range(0, 1100, 3)]
    assert all(a <= b + 1e-9 for a, b in zip(times, times[1:], strict=False))
    assert min(times) >= 0.0


def test_cost_learns_the_knee() -> None:
    """Flat before it, rising after it, from noisy measurements of all sizes."""
    cost = SegmentCost()
    for turn in range(200):
        for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            cost.record(rows, knee(rows) * (1.1 if turn % 2 else 0.9))
    for rows in (1, 16, 64, 96, 128, 200, 256):
        assert cost.milliseconds(rows) == pytest.approx(knee(rows), rel=0.1)
    assert cost.milliseconds(64) - cost.milliseconds(1) < 1.0
    assert cost.milliseconds(128) - cost.milliseconds(64) > 10.0


def test_sizes_not_seen_cost_what_smaller_ones_do() -> None:
    """So that they get tried; one trial then tells."""
    cost = SegmentCost()
    cost.record(8, 10.0)
    assert cost.milliseconds(500) == cost.milliseconds(8) == 10.0
    cost.record(512, 90.0)
    assert cost.milliseconds(8) == 10.0
    assert 10.0 < cost.milliseconds(200) < 90.0


def test_cost_shrugs_at_outliers() -> None:
    """One hiccup of the operating system must not shrink segments for long."""
    cost = SegmentCost()
    for _ in range(50):
        cost.record(16, 10.0)
    cost.record(16, 5000.0)
    assert cost.milliseconds(16) <= 13.0 + 1e-9
    for _ in range(30):
        cost.record(16, 10.0)
    assert cost.milliseconds(16) == pytest.approx(10.0, rel=0.02)


def test_cost_follows_a_lasting_change() -> None:
    """A board that throttles is believed after a while."""
    cost = SegmentCost()
    for _ in range(50):
        cost.record(16, 10.0)
    for _ in range(50):
        cost.record(16, 30.0)
    assert cost.milliseconds(16) == pytest.approx(30.0, rel=0.05)


def test_grow_takes_what_beats_the_floor() -> None:
    """Only children among the `floor_count` best enter; the rest would be dropped again at once."""
    session = make_session()
    first = session.grow([root_proposal(session, (1, -0.1), (2, -1.0), (3, -2.0))], floor_count=100)
    assert [node.token for node in first] == [1, 2, 3]
    assert session.tree.root.expanded
    # the floor is now the second best below the root: -1.0
    best = Proposal(first[0].id, ((4, -0.2), (5, -0.8), (6, -1.5)))
    added = session.grow([best], floor_count=2)
    assert [node.token for node in added] == [4, 5]
    assert first[0].expanded
    assert not first[1].expanded


def test_grow_rescores_what_is_there() -> None:
    """A new forecast of a known child counts even below the floor."""
    session = make_session()
    session.grow([root_proposal(session, (1, -0.1), (2, -1.0))], floor_count=10)
    session.grow([root_proposal(session, (1, -0.2), (2, -5.0))], floor_count=1)
    children = session.tree.root.children
    assert session.tree[children[1]].score == -0.2
    assert session.tree[children[2]].score == -5.0
    assert len(session.tree) == 3


def test_grow_ignores_the_dead() -> None:
    """A forward may end after the verdict that killed its node."""
    session = make_session()
    assert session.grow([Proposal(NodeId(77), ((1, -0.1),))], floor_count=10) == []


def test_grow_ends_with_the_context() -> None:
    """The last position's token needs no row of its own, since nothing follows it."""
    session = make_session(context=8)
    (child,) = session.grow([root_proposal(session, (1, -0.1))], floor_count=10)
    assert child.position == 6
    assert session.grow([Proposal(child.id, ((1, -0.1),))], floor_count=10) == []
    assert child.expanded, "or the strategy would ask for it again"


def test_drop_tree_keeps_the_newest_word_on_the_root() -> None:
    """A new round begins from the true hidden state's proposal, without another forward."""
    session = make_session()
    proposal = root_proposal(session, (1, -0.1), (2, -1.0))
    session.grow([proposal], floor_count=10)
    session.grow([Proposal(session.tree.root.children[1], ((3, -0.1),))], floor_count=10)
    session.root_proposal = proposal
    session.drop_tree()
    assert sorted(node.token for node in session.tree.nodes.values()) == [1, 2, 7]
    session.root_proposal = Proposal(NodeId(99), ((4, -0.1),))
    session.drop_tree()
    assert len(session.tree) == 1
    assert not session.tree.root.expanded


def test_round_is_over_when_the_pipe_is_empty_and_the_root_is_new() -> None:
    """Only this request's own segments count."""
    session = make_session()
    session.pipe.depart(4, ((9, 0),))
    assert session.drained
    assert session.round_over
    session.tree.send([session.tree.root])
    assert not session.round_over
    session.flights |= {0, 1}
    assert (session.num_in_flight, session.drained) == (2, False)


def test_pipe_state() -> None:
    """A batch waits before the first stage, runs in it, or is gone."""
    pipe = Pipeline(3)
    pipe.cost.record(4, 100.0)
    pipe.depart(4, ((1, 0), (2, 0)))
    pipe.depart(1, ((1, 1),))
    assert (pipe.num_in_flight, pipe.num_waiting, pipe.first_stage_busy_s) == (2, 2, 0.0)
    pipe.now = 1.0
    pipe.start((1, 0))
    pipe.start((7, 7))  # a late word about nothing known
    assert pipe.num_waiting == 1
    pipe.now = 1.04
    assert pipe.first_stage_busy_s == pytest.approx(0.06)
    pipe.now = 2.0
    assert pipe.first_stage_busy_s == 0.0
    assert pipe.arrive((1, 0)) == ((1, 0), (2, 0))
    assert pipe.arrive((1, 0)) == ()
    assert pipe.num_in_flight == 1


def test_positions_are_known_until_all_hidden_states_have_come() -> None:
    """Hidden states may come before or after a node's verdict; nothing is kept for long."""
    session = make_session()
    session.num_aux_hidden_state_layers = 2
    root = session.tree.root.id
    assert session.locate(root) == 5, "alive: the verdict is late"
    session.tree.reroot(root, 3)
    session.commit([(root, 5)])
    newer = session.tree.root.id
    assert session.locate(newer) == 6
    assert session.locate(newer) == 6
    session.tree.reroot(newer, 4)
    session.commit([(newer, 6)])
    assert session.positions == {root: 5}, "of the newer one nothing more can come"
    assert session.locate(root) == 5
    assert not session.positions
    assert not session.num_layers_come
    with pytest.raises(AssertionError, match="never accepted"):
        session.locate(NodeId(50))


def test_draft_time_is_a_running_mean() -> None:
    """The first measurement counts in full."""
    pipe = Pipeline(1)
    pipe.begin_draft("eagle")
    pipe.count_draft(0.5)
    assert pipe.draft_s == {"eagle": 0.5}
    pipe.count_draft(1.5)
    assert pipe.draft_s == {"eagle": pytest.approx(0.6)}
    assert pipe.draft_left_s("ngram") == pytest.approx(0.6), "whose forward runs decides"
    pipe.end_draft()
    assert pipe.draft_left_s("ngram") == 0.0
