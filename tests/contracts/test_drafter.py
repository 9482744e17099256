"""Every drafter gives the same proposals as a fresh one, in any order of events.

Texts, trees and hidden states are random; nothing depends on a drafter's own mathematics.
"""

from collections.abc import Sequence
from functools import lru_cache
from random import Random

import pytest
import torch
from torch import Tensor

from flowspec.request import NO_NODE, Request, SamplingParams
from flowspec.speculation.drafters.base import (
    Drafter,
    DraftJob,
    DraftSession,
    Opening,
    Proposal,
    draft,
)
from flowspec.speculation.tree import DraftTree, Node
from tests.support.scripted import SCRIPTS, drafter_named
from tests.support.tiny import CONFIG, T0, T1, VOCAB
from tests.support.tiny_drafters import MODEL_DRAFTERS

TOLERANCE = 1e-4
MAX_NEW_TOKENS = 96
ALL_DRAFTERS = (*MODEL_DRAFTERS, *SCRIPTS)


@lru_cache(maxsize=1024)
def hidden_state(layer: int, position: int) -> Tensor:
    """Return a possible hidden state of the target at that position."""
    generator = torch.Generator().manual_seed(1000 * (layer + 2) + position)
    return torch.randn(CONFIG.hidden_size, generator=generator)


class Play:
    """A request being drafted: the test decides text and tree, the drafter provides the session."""

    def __init__(
        self,
        drafter: Drafter,
        prompt: Sequence[int],
        *,
        sampling: SamplingParams = T0,
        draft_topk: int = VOCAB,
        reuse: DraftSession | None = None,
        num_cached_tokens: int = 0,
    ) -> None:
        asked = Request(
            id=1, prompt=tuple(prompt), sampling=sampling, max_new_tokens=MAX_NEW_TOKENS
        )
        self.drafter, self.asked, self.draft_topk = drafter, asked, draft_topk
        opening = Opening(
            request=asked,
            draft_topk=draft_topk,
            coupled=True,
            reuse=reuse,
            num_cached_tokens=num_cached_tokens,
        )
        self.session = drafter.open(opening)
        self.tree = DraftTree()
        self.tokens = list(prompt)
        self.num_known = num_cached_tokens  # positions whose hidden states have come
        self.session.accept(prompt)

    def plant(self, token: int) -> None:
        """Give the prompt's verdict."""
        self.tree.plant(NO_NODE, token, len(self.tokens))
        self.take([token])

    def take(self, tokens: Sequence[int]) -> None:
        """Add true tokens."""
        self.tokens += tokens
        self.session.accept(tokens)

    def verdict(self, parent: Node, token: int) -> None:
        """Make the path to `parent` and then `token` true; hidden states come later."""
        path, _ = self.tree.reroot(parent.id, token)
        self.take([*(node.token for node in path[1:]), token])

    def give(self, count: int | None = None, *, random: Random | None = None) -> None:
        """Give hidden states of the next `count` positions (None: all), in any order."""
        end = len(self.tokens) - 1
        end = end if count is None else min(end, self.num_known + count)
        due = [
            (n, at)
            for n in self.drafter.aux_hidden_state_layers
            for at in range(self.num_known, end)
        ]
        if random is not None:
            random.shuffle(due)
        for layer, at in due:
            self.session.accept_hidden_states(layer, {at: hidden_state(layer, at)})
        self.num_known = max(self.num_known, end)

    def prefill(self) -> list[Proposal]:
        """Prefill all that is ready."""
        found = []
        while self.session.num_rows_ready:
            before = self.session.num_rows_ready
            found += draft(self.drafter, [DraftJob(self.session, self.tree, prefills=True)])[0]
            assert self.session.num_rows_ready < before
        return found

    def grow(self, parent: Node, tokens: Sequence[int]) -> list[Node]:
        """Add children that the test chooses."""
        parent.expanded = True
        return [self.tree[self.tree.add(parent.id, token, -1.0).id] for token in tokens]

    def expand(self, nodes: Sequence[Node]) -> list[Proposal]:
        """Run one forward."""
        return draft(self.drafter, [DraftJob(self.session, self.tree, nodes)])[0]

    def fresh(self) -> "Play":
        """The same moment, come to with nothing drafted on the way."""
        other = Play(
            self.drafter,
            self.asked.prompt,
            sampling=self.asked.sampling,
            draft_topk=self.draft_topk,
        )
        new = self.tokens[len(self.asked.prompt) :]
        other.take(new[:-1])
        other.plant(new[-1])
        other.give()
        return other


def check_shape(proposal: Proposal, node: Node, draft_topk: int) -> None:
    """Children of the node asked for, best first, finite, each token once."""
    assert proposal.node == node.id
    tokens = [token for token, _ in proposal.children]
    values = [value for _, value in proposal.children]
    assert len(tokens) <= draft_topk
    assert len(set(tokens)) == len(tokens)
    assert all(0 <= token < VOCAB for token in tokens)
    assert all(float("-inf") < value <= 1e-6 for value in values)
    assert values == sorted(values, reverse=True)


def check_same(got: Sequence[Proposal], want: Sequence[Proposal]) -> None:
    """Check that children and scores are equal; ids may differ."""
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        mine, theirs = dict(one.children), dict(other.children)
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, abs=TOLERANCE)


def check_fresh(play: Play) -> None:
    """Check that it drafts like a fresh session: root, children, grandchildren."""
    play.give()
    other = play.fresh()
    (got,), (want,) = play.prefill()[-1:], other.prefill()
    assert got.node == play.tree.root.id
    check_same([got], [want])
    used = {play.tree[n].token for n in play.tree.root.children.values()}
    new = [token for token in range(VOCAB) if token not in used][:2]
    nodes = [p.grow(p.tree.root, new) for p in (play, other)]
    for _ in range(3):
        check_same(play.expand(nodes[0]), other.expand(nodes[1]))
        nodes = [p.grow(own[-1], [5, 9]) for p, own in zip((play, other), nodes, strict=True)]


PROMPT = (3, 14, 15, 9, 26, 5, 35)


@pytest.mark.parametrize("sampling", [T0, T1], ids=["T0", "T1"])
@pytest.mark.parametrize("name", ALL_DRAFTERS)
def test_proposals_are_for_the_nodes_asked_for(name: str, sampling: SamplingParams) -> None:
    """The root's once all is prefilled, then one per expanded node, in order."""
    play = Play(drafter_named(name), PROMPT, sampling=sampling, draft_topk=4)
    play.plant(8)
    play.give()
    assert play.session.num_rows_ready > 0
    (proposal,) = play.prefill()
    assert proposal.node == play.tree.root.id
    children = play.grow(play.tree.root, [1, 2, 40])
    proposals = play.expand(children[::-1])
    assert [own.node for own in proposals] == [node.id for node in children[::-1]]
    if name in MODEL_DRAFTERS:
        for own, node in zip(
            [proposal, *proposals], [play.tree.root, *children[::-1]], strict=True
        ):
            assert len(own.children) == 4
            check_shape(own, node, draft_topk=4)


@pytest.mark.parametrize("name", MODEL_DRAFTERS)
def test_prefilling_in_pieces_is_prefilling_at_once(name: str) -> None:
    """Hidden states and tokens come in any order and portion; the root comes up exactly once."""
    for seed in range(6):
        random = Random(seed)
        play = Play(drafter_named(name), PROMPT, sampling=T1)
        plant_at = random.randrange(4)
        found = []
        for turn in range(5):
            if turn == plant_at:
                play.plant(8)
            play.give(random.randrange(4), random=random)
            if random.random() < 0.5:
                found += play.prefill()
        play.give(random=random)
        found += play.prefill()
        check_same(found, play.fresh().prefill())


@pytest.mark.parametrize("name", MODEL_DRAFTERS)
def test_a_long_prompt_comes_in_bounded_forwards(name: str) -> None:
    """The end state equals that of prefilling as the hidden states come."""
    play = Play(drafter_named(name), [(5 * n) % VOCAB for n in range(200)])
    play.plant(8)
    play.give()
    ready = play.session.num_rows_ready
    assert draft(play.drafter, [DraftJob(play.session, play.tree, prefills=True)]) == [[]]
    assert play.session.num_rows_ready == ready - 128
    slow = Play(play.drafter, play.asked.prompt)
    slow.plant(8)
    found = []
    while slow.num_known < len(play.asked.prompt):
        slow.give(50)
        found += slow.prefill()
    check_same(play.prefill(), found)


@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("hit", [True, False])
@pytest.mark.parametrize("name", MODEL_DRAFTERS)
def test_a_verdict_leaves_nothing_false_behind(name: str, hit: bool, depth: int) -> None:
    """The verdict is a hit or a miss, at the root or far below, with and without siblings."""
    play = Play(drafter_named(name), PROMPT, sampling=T1)
    play.plant(8)
    play.give()
    play.prefill()
    node = play.tree.root
    path = [node]
    for level in range(depth + 2):
        children = play.grow(node, [level, level + 10])
        play.expand(children)
        node = children[level % 2]
        path.append(node)
    play.verdict(path[depth], path[depth + 1].token if hit else 47)
    assert (play.tree.root is path[depth + 1]) == hit
    check_fresh(play)
    play.verdict(play.tree.root, 46)
    check_fresh(play)


@pytest.mark.parametrize("name", MODEL_DRAFTERS)
def test_true_rows_beside_guesses_change_neither(name: str) -> None:
    """The root's proposal equals that of prefilling alone, a guess's equals the one before."""
    joint, apart = (Play(drafter_named(name), PROMPT, sampling=T1) for _ in range(2))
    found = []
    for play in (joint, apart):
        play.plant(8)
        play.give()
        play.prefill()
        first, other = play.grow(play.tree.root, [1, 2])
        play.expand([first, other])
        below = play.grow(first, [3, 4])
        if play is apart:
            found += play.expand(below)
        play.verdict(play.tree.root, 1)
        play.give()
        if play is apart:
            found = [*play.prefill(), *found]
            continue
        job = DraftJob(play.session, play.tree, below, prefills=True)
        (got,) = draft(play.drafter, [job])
        assert [p.node for p in got] == [first.id, *(node.id for node in below)]
    check_same(got, found)
    for play in (joint, apart):
        play.verdict(play.tree.root, 4)
        check_fresh(play)


def act(play: Play, seed: int) -> DraftJob | None:
    """Cause a random event of a generation; return its forward, if any."""
    random = Random(seed)
    kind = random.choice(["grow", "grow", "verdict", "some hidden states", "hidden states"])
    if kind == "verdict" and len(play.tokens) < len(play.asked.prompt) + MAX_NEW_TOKENS - 8:
        nodes = sorted(play.tree.nodes.values(), key=lambda node: node.id)
        node, token = random.choice(nodes), random.randrange(4)
        if (drafted := list(play.tree.root.children)) and random.random() < 0.7:
            node, token = play.tree.root, random.choice(drafted)
        play.verdict(node, token)
        play.give(random.choice([0, None]), random=random)
    elif kind == "some hidden states":
        play.give(2, random=random)
    elif kind == "hidden states":
        play.give(random=random)
    prefills = play.session.num_rows_ready > 0 and random.random() < 0.8
    if prefills and random.random() < 0.5:
        return DraftJob(play.session, play.tree, prefills=True)
    grown = [n for n in play.tree.nodes.values() if n is not play.tree.root]
    nodes = [n for n in grown if play.tree[n.parent].expanded]
    picked = random.sample(nodes, min(len(nodes), random.randint(1, 4)))
    if not picked and not prefills:
        return None
    return DraftJob(play.session, play.tree, picked, prefills)


def settle(play: Play, job: DraftJob, proposals: Sequence[Proposal], seed: int) -> None:
    """Do the head's part after a forward: give nodes their children."""
    random = Random(seed)
    expanded = [n.id for n in job.nodes]
    assert [p.node for p in proposals][len(proposals) - len(expanded) :] == expanded
    assert len(proposals) <= len(expanded) + job.prefills
    for proposal in proposals:
        check_shape(proposal, play.tree[proposal.node], play.draft_topk)
        play.grow(play.tree[proposal.node], random.sample(range(4), 2))


@pytest.mark.parametrize("name", MODEL_DRAFTERS)
@pytest.mark.parametrize("seed", range(4))
def test_one_forward_for_many_requests_is_one_for_each(name: str, seed: int) -> None:
    """Prefilling and expanding are mixed; afterwards each request drafts like a fresh one."""
    drafter = drafter_named(name)
    prompts = [PROMPT, PROMPT[:2], (9, 9, 4, 1), tuple(range(20))]
    plays = [[Play(drafter, own, sampling=T1) for own in prompts] for _ in range(2)]
    for play in [*plays[0], *plays[1]]:
        play.plant(3)
        play.give()
    num_joint = num_both = 0
    for turn in range(40):
        found = []
        for index in range(len(prompts)):
            step = 1000 * seed + 10 * turn + index
            jobs = [act(side[index], step) for side in plays]
            assert (jobs[0] is None) == (jobs[1] is None)
            if jobs[0] is not None and jobs[1] is not None:
                found.append((index, step, jobs))
        joint = draft(drafter, [jobs[0] for _, _, jobs in found])
        single = [draft(drafter, [jobs[1]])[0] for _, _, jobs in found]
        num_joint += len(found) > 1
        num_both += any(jobs[0].prefills and jobs[0].nodes for _, _, jobs in found)
        for (index, step, jobs), got, want in zip(found, joint, single, strict=True):
            check_same(got, want)
            settle(plays[0][index], jobs[0], got, step)
            settle(plays[1][index], jobs[1], want, step)
    assert num_joint > 10, "hardly anything ran together"
    assert num_both > 2, "hardly any forward was of true rows and guesses"
    for play in plays[0]:
        play.verdict(play.tree.root, 45)
        check_fresh(play)


@pytest.mark.parametrize("name", MODEL_DRAFTERS)
@pytest.mark.parametrize("late", [0, 3])
def test_the_next_turn_goes_on_where_the_last_ended(name: str, late: int) -> None:
    """Hidden states from `num_cached_tokens` on are enough, wherever the texts differ."""
    first = Play(drafter_named(name), PROMPT)
    first.plant(8)
    first.give()
    first.prefill()
    children = first.grow(first.tree.root, [1, 2])
    first.expand(children)
    first.verdict(children[0], 30)
    first.give()
    first.prefill()
    first.verdict(first.tree.root, 31)
    first.verdict(first.tree.root, 32)
    first.give(late)  # come too late to be prefilled
    most = first.session.num_reusable
    assert most >= len(PROMPT) + 1, "all that was prefilled counts"
    assert most < len(first.tokens)
    for num_cached_tokens in (most, most - 1, len(PROMPT), 2, 1, 0):
        prompt = [*first.tokens[: num_cached_tokens + 1], 40, 41, 42]
        play = Play(first.drafter, prompt, reuse=first.session, num_cached_tokens=num_cached_tokens)
        play.plant(7)
        check_fresh(play)
    num_cached_tokens = play.session.num_reusable
    prompt = [*play.tokens[: num_cached_tokens + 1], 43]
    third = Play(first.drafter, prompt, reuse=play.session, num_cached_tokens=num_cached_tokens)
    third.plant(9)
    check_fresh(third)


@pytest.mark.parametrize("name", MODEL_DRAFTERS)
def test_reusing_what_is_not_shared_is_noticed(name: str) -> None:
    """The row of the last shared position holds the token after it."""
    first = Play(drafter_named(name), PROMPT)
    first.plant(8)
    first.give()
    first.prefill()
    with pytest.raises(AssertionError, match="first 6 tokens"):
        Play(first.drafter, [*PROMPT[:5], 1, 2], reuse=first.session, num_cached_tokens=5)
    with pytest.raises(AssertionError, match="reusable"):
        Play(first.drafter, [*PROMPT, 8, 1, 2], reuse=first.session, num_cached_tokens=9)
