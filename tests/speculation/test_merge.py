"""Branches of the text, merged into any drafter's tree; it meets none that it cannot expand."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from math import exp, log

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.engine.engine import generate
from flowspec.head.pipeline import Pipeline
from flowspec.head.request_state import RequestState
from flowspec.request import NO_NODE, NodeId, Request
from flowspec.runtime.core import Work
from flowspec.simulator.simulator import adversarial, instant_link
from flowspec.speculation.drafters import merge as merging
from flowspec.speculation.drafters.base import DraftJob, Opening, Proposal, draft
from flowspec.speculation.drafters.merge import (
    AGREED,
    OUTSIDER,
    MergedDrafter,
    MergedSession,
    merge,
)
from flowspec.speculation.strategies import STRATEGIES
from flowspec.speculation.strategy import DraftingConfig
from flowspec.speculation.tree import DraftTree, Node
from tests.support.clusters import make_cluster, run_watched
from tests.support.scripted import SCRIPTS, ScriptedDrafter, ScriptedSession, drafter_named
from tests.support.states import running_state
from tests.support.tiny import PROMPT, T0, T1, expected, request, truth

LOOPING = truth(PROMPT, T0, 40)  # the tiny target repeats itself from here on
DRAFTING = [name for name, spec in STRATEGIES.items() if spec.drafts]


class StrictDrafter(ScriptedDrafter):
    """Expands only nodes whose parents it has proposed children for, as EAGLE heads must."""

    def open(self, opening: Opening) -> "StrictSession":
        """Open a strict session."""
        return StrictSession(self, opening.request, opening.draft_topk)


class StrictSession(ScriptedSession):
    """A session that expands only nodes whose parents it has proposed children for."""

    def __init__(self, drafter: ScriptedDrafter, request: Request, draft_topk: int) -> None:
        super().__init__(drafter, request, draft_topk)
        self.spoken: set[NodeId] = set()

    def prefill(self, tree: DraftTree) -> Proposal | None:
        """Prefill, and remember the expandable nodes."""
        if len(tree):
            self.spoken.add(tree.root.id)
        return super().prefill(tree)

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """Expand nodes after checking that they can be expanded."""
        for node in nodes:
            assert node.parent in self.spoken, f"node {node.id}: its parent was never expanded"
        self.spoken.update(node.id for node in nodes)
        return super().expand(nodes, tree)


def session_of(
    text: Sequence[int], script: str = "mixed", **decode
) -> tuple[RequestState, MergedSession]:
    """A request whose text so far is `text`, its last token the root; nothing drafted yet."""
    drafter = MergedDrafter(StrictDrafter(SCRIPTS[script]))
    config = DraftingConfig(merge=True, **decode)
    asked = request(max_new_tokens=40)
    inner = drafter.open(Opening(request=asked, draft_topk=4, coupled=False))
    most = len(text) + 40 - len(asked.prompt_tokens)
    session = running_state(asked, config, Pipeline(2), drafter=inner, max_new_tokens=most)
    inner.accept(text)
    session.tree.plant(NO_NODE, text[-1], len(text) - 1)
    return session, inner


def check_tree(tree: DraftTree) -> None:
    """Check the invariants of any draft tree, merged or not."""
    for node in tree.nodes.values():
        if node.id == tree.root.id:
            continue
        above = tree[node.parent]
        assert above.children[node.token] == node.id
        assert (node.score <= above.score, node.id > above.id) == (True, True)
        assert node.position == above.position + 1
        assert node.expandable == above.expanded
        assert not (node.expanded and not node.expandable)


def test_a_branch_follows_the_text_without_a_forward():
    """Before the root's hidden states come, the tree has the branches from the text."""
    text = [1, 2, 3, 4, 5, 6, 7, 9, 1, 2, 3]
    session, _ = session_of(text)
    session.merge_branches()
    path = max((session.tree.path(n) for n in session.tree.nodes), key=len)
    assert [node.token for node in path[1:5]] == [4, 5, 6, 7]
    assert not session.tree.root.expanded
    assert session.tree.best_unexpanded(9) == [], "the drafter has not come so far"
    check_tree(session.tree)


def test_the_drafters_own_word_makes_a_merged_child_expandable():
    """First the root's children, then theirs: a merged branch is met level by level."""
    session, inner = session_of([1, 2, 3, 4, 5, 9, 1, 2, 3], "perfect")
    session.merge_branches()
    proposal = inner.prefill(session.tree)
    assert proposal is not None
    session.grow([proposal], floor_count=50)
    below = [session.tree[n] for n in session.tree.root.children.values()]
    assert {n.id for n in session.tree.best_unexpanded(50)} == {n.id for n in below}
    four = next(n for n in below if n.token == 4)
    (five,) = [session.tree[n] for n in four.children.values() if session.tree[n].token == 5]
    assert not five.expandable
    session.grow(inner.expand([four], session.tree), floor_count=50)
    assert five.expandable
    check_tree(session.tree)


@pytest.mark.parametrize("room", [0, 1, 3, 48])
def test_merged_branches_never_fill_the_tree_beyond_its_size(room):
    """Rows per call are bounded by what the tree has room for, and by their own limit."""
    session, _ = session_of([5] * 60, num_draft_tokens=room or 1)
    for _ in range(room == 0):
        session.tree.add(session.tree.root.id, 9, -0.1)
    session.merge_branches()
    grown = len(session.tree) - 1
    assert grown <= max(room, 1)
    assert grown <= merging.MAX_DEPTH * merging.WIDTH
    assert all(
        node.position - session.tree.root.position <= merging.MAX_DEPTH
        for node in session.tree.nodes.values()
    )


def test_an_unlikely_branch_is_not_worth_a_row():
    """No branch has a path score below the least one."""
    session, _ = session_of([1, 2, 3, 4, 1, 9, 1, 7, 1], min_score=0.3)
    session.merge_branches()
    assert all(exp(node.score) >= 0.3 - 1e-9 for node in session.tree.nodes.values())


def test_both_words_on_one_node_are_merged():
    """Agreement keeps the higher probability; an outsider gets a share of what is left."""
    own = Proposal(NodeId(1), ((4, log(0.5)), (5, log(0.3))))
    text = Proposal(NodeId(1), ((5, log(0.6)), (8, log(0.2))))
    both = merge(own, text, "eagle")
    assert [token for token, _ in both.children] == [5, 4, 8]
    assert [exp(p) for _, p in both.children] == pytest.approx([0.6, 0.5, 0.04])
    assert both.sources == (AGREED, "eagle", OUTSIDER)


@given(
    own=st.dictionaries(st.integers(0, 6), st.floats(-9.0, 0.0), max_size=4),
    text=st.dictionaries(st.integers(0, 6), st.floats(-9.0, 0.0), max_size=4),
)
def test_a_merged_proposal_is_in_order_and_names_each_child_once(own, text):
    """Whatever two drafters say, also where their probabilities add up to more than 1."""
    both = merge(Proposal(NodeId(0), (*own.items(),)), Proposal(NodeId(0), (*text.items(),)), "x")
    scores = [p for _, p in both.children]
    assert {token for token, _ in both.children} == own.keys() | text.keys()
    assert len(both.children) == len(both.sources) == len(own.keys() | text.keys())
    assert scores == sorted(scores, reverse=True)
    assert all(p <= 0.0 for p in scores)
    for (token, p), source in zip(both.children, both.sources, strict=True):
        assert (source == OUTSIDER) == (token not in own)
        assert token not in own or p >= own[token]


def test_a_batch_of_jobs_reaches_the_base_drafter_as_one():
    """Wrapping hides neither batching nor whose proposal is whose."""
    base = StrictDrafter(SCRIPTS["perfect"])
    calls = []
    begin = base.begin
    base.begin = lambda jobs: calls.append(len(jobs)) or begin(jobs)  # type: ignore[method-assign]
    drafter = MergedDrafter(base)
    jobs = []
    for number, text in enumerate(([1, 2, 3, 1, 2], [4, 5, 6, 4, 5]), start=1):
        session = drafter.open(Opening(request=request(number), draft_topk=4, coupled=False))
        session.accept(text)
        tree = DraftTree()
        tree.plant(NO_NODE, text[-1], len(text) - 1)
        jobs.append(DraftJob(session, tree, prefills=True))
    first, second = draft(drafter, jobs)
    assert calls == [2]
    assert 3 in dict(first[0].children)
    assert 6 in dict(second[0].children)


@pytest.mark.parametrize("sampling", [T0, T1], ids=["T0", "T1"])
@pytest.mark.parametrize("strategy", DRAFTING)
def test_merged_branches_change_the_speed_and_not_the_text(strategy, sampling, monkeypatch):
    """Under any timing; and the drafter is only asked what it can answer."""
    offered = []
    merge_branches = RequestState.merge_branches

    def watched(session: RequestState) -> None:
        before = set(session.tree.nodes)
        merge_branches(session)
        offered.extend(set(session.tree.nodes) - before)
        if session.is_decoding:
            check_tree(session.tree)

    monkeypatch.setattr(RequestState, "merge_branches", watched)
    asked = request(prompt=LOOPING, sampling=sampling, max_new_tokens=8)
    for seed, script in enumerate(SCRIPTS):
        setup = {
            "num_stages": 3,
            "strategy": strategy,
            "drafter": StrictDrafter(SCRIPTS[script], seed=seed),
            "charges": adversarial(seed),
            "merge": True,
            "calibrate": script != "perfect",
        }
        completion, _ = run_watched(setup, asked)
        assert list(completion.tokens) == expected(asked)
    assert offered, "no branch was ever offered"


@pytest.mark.parametrize("strategy", ["serial_pp", "streaming"])
def test_merged_branches_find_what_the_drafter_misses(strategy):
    """A drafter that is always wrong, on a text that repeats itself: the text is right."""
    asked = request(prompt=LOOPING, max_new_tokens=10)
    hits = []
    for on in (False, True):
        setup = {"num_stages": 2, "strategy": strategy, "drafter": drafter_named("hostile")}
        completion, _ = run_watched({**setup, "merge": on}, asked)
        hits.append(completion.stats.run_length + sum(completion.stats.runs))
    assert hits[0] == 0
    assert hits[1] >= 4


def test_an_eagle_head_lives_with_merged_branches():
    """Its rows and guesses are by node: none is missing, none is taken for another."""
    for sampling in (T0, T1):
        asked = request(prompt=LOOPING, sampling=sampling, max_new_tokens=12)
        setup = {
            "num_stages": 2,
            "drafter": drafter_named("eagle"),
            "merge": True,
            "draft_topk": 12,
        }
        completion, _ = run_watched({**setup, "num_draft_tokens": 40}, asked)
        assert list(completion.tokens) == expected(asked)


def drafting_takes(draft_s: float, rank: int, work: Work) -> float:
    """Seconds; a forward of a stage takes one."""
    del rank
    return draft_s if work.kind == "draft" else 1.0


def test_an_answer_may_end_while_the_drafter_runs():
    """Its last verdict goes beyond the end of the text; what was being drafted comes too late."""
    text = expected(request(max_new_tokens=24))
    for count, draft_s in product(range(2, 20, 2), (0.15, 0.35, 0.8)):
        cluster = make_cluster(
            2,
            "streaming",
            drafter=ScriptedDrafter(SCRIPTS["perfect"]),
            charges=(partial(drafting_takes, draft_s), instant_link),
            merge=True,
        )
        asked = replace(request(max_new_tokens=24), eos_token_ids=(text[count],))
        assert list(generate(cluster, asked).tokens) == text[: text.index(text[count]) + 1]
        cluster.simulator.run()  # what still runs, ends
