"""The incremental drafter against the whole thing computed anew, with a plain causal mask.

"Guessed" hidden states are the net's own outputs. If the true hidden states are made equal to them,
rows kept over a verdict are exact, and every proposal must equal the full computation. If they
differ, the proposals below newly prefilled rows must.
"""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowspec.model.llama import rope_angles
from flowspec.model.stage_model import FINAL_NORM
from flowspec.request import NodeId, Request, SamplingParams
from flowspec.speculation.acceptance.gumbel_coupled import draft_scores
from flowspec.speculation.drafters.base import Opening, Proposal
from flowspec.speculation.drafters.cached import MAX_PREFILL_ROWS, SPARE_ROWS
from flowspec.speculation.drafters.hidden_states import HiddenStateSession
from flowspec.speculation.tree import DraftTree, Node
from tests.support.models import TINY, make_drafter, make_model
from tests.support.tiny_drafters import causal_attend

DRAFTER = make_drafter(make_model())
GREEDY, WARM = SamplingParams(), SamplingParams(temperature=0.9, seed=5)
HIDDEN, VOCAB = TINY.hidden_size, TINY.vocab_size
TOLERANCE = 1e-5


def run_anew(tokens: Sequence[int], hidden_states: Sequence[Tensor], path: Sequence[int]) -> Tensor:
    """Guessed hidden state [H] of the last of `tokens` + `path`.

    Row i is tokens[i + 1] over hidden states[i]; each of `path` goes over the guess before it.
    """
    ids, below = list(tokens[1:]), list(hidden_states[: len(tokens) - 1])
    for token in [None, *path]:
        if token is not None:
            ids.append(token)
            below.append(guess)  # noqa: F821  set by the round before
        rope = rope_angles(DRAFTER.frequencies, torch.arange(len(ids)), torch.float32)
        with torch.inference_mode():
            guess = DRAFTER.net(torch.tensor(ids), torch.stack(below), rope, causal_attend)[-1]
    return guess


def random_hidden_states(count: int, seed: int) -> list[Tensor]:
    """Return hidden states that the target might give."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randn(count, HIDDEN, generator=generator))


class Play:
    """A request being drafted, and all that is needed to compute any of its proposals anew."""

    def __init__(
        self, prompt: Sequence[int], *, sampling: SamplingParams, coupled: bool, exact: bool
    ) -> None:
        request = Request(id=1, prompt=tuple(prompt), sampling=sampling, max_new_tokens=64)
        self.session: HiddenStateSession = DRAFTER.open(
            Opening(request=request, draft_topk=VOCAB, coupled=coupled)
        )
        self.sampling, self.coupled, self.exact = sampling, coupled, exact
        self.tree = DraftTree()
        self.tokens = list(prompt)
        self.truth = random_hidden_states(len(prompt), seed=len(prompt))  # by position
        self.session.accept(prompt)
        self.late = list(range(len(prompt)))  # positions whose hidden state has not been given yet
        self.fresh: set[NodeId] = set()  # nodes whose row is what a full computation gives

    def plant(self, token: int) -> None:
        """The prompt's verdict."""
        self.tree.plant(NodeId(-1), token, len(self.tokens))
        self.session.accept([token])
        self.tokens.append(token)

    def give_hidden_states(self, positions: Sequence[int]) -> None:
        """Some of the late hidden states arrive, in this order."""
        for position in positions:
            self.session.accept_hidden_states(FINAL_NORM, {position: self.truth[position]})
            self.late.remove(position)

    def prefill(self) -> list[Proposal]:
        """All that is ready; the root's proposal, if it comes, is compared."""
        proposals = []
        while self.session.num_rows_ready:
            proposal = self.session.prefill(self.tree)
            if not self.exact:
                self.fresh.clear()  # what was guessed over guesses is stale now
            if proposal is not None:
                assert proposal.node == self.tree.root.id
                self.fresh.add(self.tree.root.id)
                self.check(proposal, self.tree.root)
                proposals.append(proposal)
        return proposals

    def expand(self, nodes: Sequence[Node]) -> None:
        """One forward over `nodes`; those over fresh parents are compared."""
        proposals = self.session.expand(nodes, self.tree)
        assert [proposal.node for proposal in proposals] == [node.id for node in nodes]
        parents = {node.parent for node in nodes}
        assert parents.isdisjoint(node.id for node in nodes), "a test's mistake"
        for node, proposal in zip(nodes, proposals, strict=True):
            node.expanded = True
            self.fresh.discard(node.id)
            if node.parent in self.fresh:
                self.fresh.add(node.id)
                self.check(proposal, node)
            assert all(value <= 0.0 for _, value in proposal.children)

    def path_to(self, node: Node) -> list[int]:
        """Tokens below the root down to `node`."""
        return [above.token for above in self.tree.path(node.id)[1:]]

    def check(self, proposal: Proposal, node: Node) -> None:
        """The children and their scores are those of the full computation."""
        guess = run_anew(self.tokens, self.truth, self.path_to(node))
        logits = torch.nn.functional.linear(guess, DRAFTER.lm_head)[None]
        where = [node.position + 1]
        scores = draft_scores(logits, where, self.sampling, coupled=self.coupled)[0].tolist()
        got = dict(proposal.children)
        assert set(got) == {token for token, s in enumerate(scores) if s > float("-inf")}
        for token, value in got.items():
            assert value == pytest.approx(scores[token], abs=20 * TOLERANCE)
        ordered = [value for _, value in proposal.children]
        assert ordered == sorted(ordered, reverse=True), "children come best first"

    def verdict(self, parent: Node, token: int) -> None:
        """Accept the path to `parent` and then `token`; its hidden states come later."""
        path = [node.token for node in self.tree.path(parent.id)]
        for depth in range(len(path)):  # hidden states of root .. parent
            exact = run_anew(self.tokens, self.truth, path[1 : depth + 1])
            position = self.tree.root.position + depth
            value = exact if self.exact else exact + 0.3 * random_hidden_states(1, position)[0]
            self.late.append(position)
            self.pending = [*getattr(self, "pending", []), value]
        self.tree.reroot(parent.id, token)
        self.truth += self.pending
        self.pending = []
        self.session.accept([*path[1:], token])
        self.tokens += [*path[1:], token]
        self.fresh &= set(self.tree.nodes)

    def growable(self) -> list[Node]:
        """Nodes that may be expanded: they hang below an expanded one that has a guess."""
        return [
            node
            for node in self.tree.nodes.values()
            if node is not self.tree.root and self.tree[node.parent].expanded
        ]


def add_children(play: Play, node: Node, tokens: Sequence[int]) -> None:
    """The head's part of growing."""
    for token in tokens:
        play.tree.add(node.id, token, -1.0)


@given(
    st.lists(st.integers(0, VOCAB - 1), min_size=2, max_size=10),
    st.randoms(use_true_random=False),
    st.integers(1, 4),
)
@settings(max_examples=30)
def test_prefilling_in_any_order_is_computing_at_once(prompt, random, chunk: int) -> None:
    """The order and the chunks in which hidden states come do not change the proposals."""
    play = Play(prompt, sampling=GREEDY, coupled=False, exact=False)
    order = list(range(len(prompt)))
    random.shuffle(order)
    plant_after = random.randrange(len(order) + 1)
    proposals = []
    for turn in range(len(order) + 1):
        if turn == plant_after:
            play.plant(9)
        if turn < len(order):
            play.give_hidden_states([order[turn]])
        if turn % chunk == 0:
            proposals += play.prefill()
    proposals += play.prefill()
    assert len(proposals) == 1
    assert play.session.num_prefilled == len(prompt)
    assert not play.session.hidden_states, "hidden states are let go once prefilled"


def test_a_long_prompt_is_prefilled_in_pieces() -> None:
    """No single forward keeps the head from its inbox for long."""
    prompt = [(5 * n) % VOCAB for n in range(2 * MAX_PREFILL_ROWS + 10)]
    play = Play(prompt, sampling=GREEDY, coupled=False, exact=False)
    play.plant(3)
    play.give_hidden_states(range(len(prompt)))
    assert play.session.prefill(play.tree) is None
    assert play.session.num_rows_ready == MAX_PREFILL_ROWS + 10
    (proposal,) = play.prefill()
    assert proposal.node == play.tree.root.id


ACTIONS = st.lists(
    st.tuples(
        st.sampled_from(["grow", "grow", "grow", "verdict", "hidden states", "some hidden states"]),
        st.integers(0, 999),
        st.integers(0, 5),
    ),
    min_size=4,
    max_size=14,
)


def act(play: Play, action: str, number: int, token: int) -> None:
    """One step of a generation."""
    nodes = sorted(play.tree.nodes.values(), key=lambda node: node.id)
    if action == "hidden states":
        play.give_hidden_states(sorted(play.late))
    elif action == "some hidden states":
        play.give_hidden_states(sorted(play.late)[: len(play.late) // 2 + 1])
    elif action == "verdict":
        play.verdict(nodes[number % len(nodes)], token)
    elif grow := play.growable():
        picked = [grow[number % len(grow)], grow[number // 7 % len(grow)], grow[-1]]
        picked = list({node.id: node for node in picked}.values())
        picked = [node for node in picked if node.parent not in {other.id for other in picked}]
        play.expand(picked)
        for node in picked:
            add_children(play, node, [token, (token + 1) % 6])
    for proposal in play.prefill():
        play.tree[proposal.node].expanded = True
        add_children(play, play.tree.root, [token, (token + 2) % 6, (token + 3) % 6])


@given(ACTIONS, st.booleans(), st.booleans())
@settings(max_examples=60)
def test_a_generation_equals_computing_anew(actions, exact: bool, coupled: bool) -> None:
    """Growing, re-growing, verdicts that hit and miss, hidden states late and in parts.

    With `exact` rows that survive a verdict are compared as well: kept, moved, and nothing of what
    is dead or prefilled is seen twice.
    """
    play = Play([1, 2, 3], sampling=WARM if coupled else GREEDY, coupled=coupled, exact=exact)
    play.plant(4)
    act(play, "hidden states", 0, 0)
    for action in actions:
        act(play, *action)
    act(play, "hidden states", 0, 0)
    assert play.tree.root.id in play.fresh


def grown(*, exact: bool) -> Play:
    """Root with children 10 and 11; 10 has 12 and 13, 12 has 14."""
    play = Play([1, 2, 3], sampling=GREEDY, coupled=False, exact=exact)
    play.plant(4)
    act(play, "hidden states", 0, 0)
    root = play.tree.root
    root.children.clear()
    play.tree.nodes = {root.id: root}
    add_children(play, root, [10, 11])
    ten = play.tree[root.children[10]]
    play.expand([ten, play.tree[root.children[11]]])
    add_children(play, ten, [12, 13])
    play.expand([play.tree[ten.children[12]], play.tree[ten.children[13]]])
    add_children(play, play.tree[ten.children[12]], [14])
    return play


def test_surviving_rows_are_kept() -> None:
    """A verdict costs the rows of the accepted tokens, not of the guesses that live on."""
    play = grown(exact=False)
    session = play.session
    root = play.tree.root
    ten = play.tree[root.children[10]]
    row = session._rows[ten.children[13]]
    slot = session.cache.prefix_length + row
    key = session.cache.keys[:, :, slot].clone()
    play.verdict(root, 10)
    play.give_hidden_states(sorted(play.late))
    assert session.num_rows_ready == 1
    play.prefill()
    # rows of 12 and 13 live on; that of 10 is prefilled, that of 11 dead
    assert session.cache.num_tree_rows == 2
    slot = session.cache.prefix_length + session._rows[ten.children[13]]
    assert torch.equal(session.cache.keys[:, :, slot], key)
    fourteen = play.tree[play.tree[ten.children[12]].children[14]]
    (proposal,) = session.expand([fourteen], play.tree)
    assert len(proposal.children) == VOCAB


@pytest.mark.parametrize("num_given", [0, 1, 2])
def test_hidden_states_in_parts_show_each_token_once(num_given: int) -> None:
    """A survivor sees each accepted node's row or guess when prefill is halfway to the root.

    The guesses are exact here: seeing both, or neither, would change the result.
    """
    play = grown(exact=True)
    twelve = play.tree[play.tree[play.tree.root.children[10]].children[12]]
    fourteen = play.tree[twelve.children[14]]
    play.expand([fourteen])
    add_children(play, fourteen, [15])
    play.verdict(twelve, 14)  # tokens 10, 12, 14; the first two have rows to prefill
    play.give_hidden_states(sorted(play.late)[:num_given])
    assert play.prefill() == []
    assert play.session.num_prefilled == len(play.tokens) - 4 + num_given
    if num_given == 0:
        play.session._keep_rows(play.tree, path=())  # as when room runs out
    assert fourteen is play.tree.root
    fifteen = play.tree[fourteen.children[15]]
    assert fourteen.id in play.fresh
    play.expand([fifteen])
    assert fifteen.id in play.fresh, "the comparison has been made"


def test_expanding_again_makes_a_row_fresh() -> None:
    """A survivor drafted again after true hidden states is exact and not doubled."""
    play = grown(exact=False)
    play.verdict(play.tree.root, 10)
    play.give_hidden_states(sorted(play.late))
    play.prefill()
    root = play.tree.root
    twelve = play.tree[root.children[12]]
    assert twelve.id not in play.fresh
    play.expand([twelve])
    assert twelve.id in play.fresh, "the comparison has been made"
    before = play.session.cache.num_tree_rows
    play.expand([twelve])
    play.expand([play.tree[twelve.children[14]]])
    play.session._keep_rows(play.tree, path=())
    assert play.session.cache.num_tree_rows <= before + 2
    play.expand([play.tree[twelve.children[14]]])


def test_dead_rows_are_cleared_when_room_runs_out() -> None:
    """A long wait for hidden states must not fill the cache with guesses that died."""
    play = grown(exact=False)
    children = [play.tree[node] for node in play.tree.root.children.values()]
    for _ in range(SPARE_ROWS):
        play.session.expand(children, play.tree)
    play.expand(children)
    assert play.session.cache.num_tree_rows < SPARE_ROWS


def test_the_noise_ranks_the_children() -> None:
    """Coupled and uncoupled drafting differ in order and scores, not in what is computed."""
    orders = []
    for coupled in (False, True):
        play = Play([1, 2, 3], sampling=WARM, coupled=coupled, exact=False)
        play.plant(4)
        play.give_hidden_states([0, 1, 2])
        (proposal,) = play.prefill()
        orders.append([token for token, _ in proposal.children])
    assert orders[0] != orders[1]


def test_draft_topk_bounds_the_children() -> None:
    """Tokens that the filters forbid are no children."""
    for draft_topk, top_k, want in ((3, 0, 3), (8, 5, 5), (1000, 0, VOCAB)):
        sampling = SamplingParams(temperature=1.0, top_k=top_k, seed=1)
        request = Request(id=1, prompt=(1, 2), sampling=sampling, max_new_tokens=4)
        session = DRAFTER.open(Opening(request=request, draft_topk=draft_topk, coupled=True))
        tree = DraftTree()
        tree.plant(NodeId(-1), 5, 2)
        session.accept([1, 2, 5])
        session.accept_hidden_states(FINAL_NORM, dict(enumerate(random_hidden_states(2, 0))))
        proposal = session.prefill(tree)
        assert proposal is not None
        assert len(proposal.children) == want


def test_only_asked_hidden_states_are_taken() -> None:
    """Hidden states of another layer would be silent nonsense."""
    play = Play([1, 2], sampling=GREEDY, coupled=False, exact=False)
    with pytest.raises(AssertionError, match="layer 3"):
        play.session.accept_hidden_states(3, {0: torch.zeros(HIDDEN)})
