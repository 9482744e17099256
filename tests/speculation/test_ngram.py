"""The n-gram drafter: continuations of what is being said, from what was said before."""

from collections.abc import Sequence
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.request import NodeId
from flowspec.speculation.drafters import DRAFTERS, find_drafter
from flowspec.speculation.drafters.base import Opening
from flowspec.speculation.drafters.ngram.drafter import NgramDrafter, NgramSession
from flowspec.speculation.strategies import STRATEGIES
from flowspec.speculation.tree import DraftTree
from tests.support.clusters import run_watched
from tests.support.tiny import PROMPT, T0, T1, expected, request, truth

TOKENS = st.lists(st.integers(0, 4), min_size=1, max_size=30)


def opened(text: Sequence[int], draft_topk: int = 4) -> tuple[NgramSession, DraftTree]:
    """A session that was told `text`, and a tree rooted at its last token."""
    session = NgramDrafter().open(Opening(request=request(), draft_topk=draft_topk, coupled=False))
    session.accept(text)
    tree = DraftTree()
    tree.plant(NodeId(-1), text[-1], len(text) - 1)
    return session, tree


def test_it_needs_no_files():
    """No draft folder, bundled or named, whatever the model."""
    assert find_drafter("ngram").bundled == ""
    assert DRAFTERS["ngram"].load(None).name == "ngram"  # type: ignore[arg-type]


def test_before_the_first_token_there_is_nothing_to_propose():
    """The prompt is taken in while the stages still work on it."""
    session = NgramDrafter().open(Opening(request=request(), draft_topk=4, coupled=False))
    assert session.num_rows_ready == 0
    session.accept(PROMPT)
    assert session.num_rows_ready == len(PROMPT)
    assert session.prefill(DraftTree()) is None
    assert session.num_rows_ready == 0


def test_what_followed_the_longest_context_comes_first():
    """1 2 3 was followed by 4, whatever else followed 3 alone, and however often."""
    text = [1, 2, 3, 4, 0, 3, 5, 0, 3, 5, 0, 1, 2, 3]
    session, tree = opened(text)
    proposal = session.prefill(tree)
    assert proposal is not None
    assert proposal.node == tree.root.id
    assert [token for token, _ in proposal.children] == [4, 5]


def test_a_guess_is_followed_like_text():
    """Children of a guessed node continue the text and the path down to it."""
    text = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3]
    session, tree = opened(text)
    session.prefill(tree)
    node = tree.root
    for token in (4, 5):
        node = tree.add(node.id, token, -0.1)
    unknown = tree.add(node.id, 8, -0.1)
    first, nothing = session.expand([node, unknown], tree)
    assert first.children[0][0] == 6
    assert nothing.children == ()


def test_new_text_replaces_what_was_known_of_a_living_guess():
    """A verdict brings tokens; a path's context is then a longer one, and counts have grown."""
    session, tree = opened([7, 1, 2, 8, 1, 2])
    session.prefill(tree)
    node = tree.add(tree.root.id, 8, -0.1)
    (before,) = session.expand([node], tree)
    assert [token for token, _ in before.children] == [1]
    tree.reroot(tree.root.id, 8)
    session.accept([8])
    below = tree.add(tree.root.id, 1, -0.1)
    tree.reroot(tree.root.id, 1)
    session.accept([1])
    assert session.num_rows_ready == 2
    after = session.prefill(tree)
    assert after is not None
    assert after.node == below.id
    assert after.children[0][0] == 2
    assert after.children[0][1] > before.children[0][1], "8 1 2 was seen, 2 8 1 2 was not"


@pytest.mark.parametrize("more", ["longer", "oftener"])
def test_confidence_grows_with_length_and_with_count(more):
    """A longer context, or one seen more often, speaks with more certainty."""
    less = [1, 2, 9, 0, 3, 1, 2]
    text = {"longer": [3, 1, 2, 9, 0, 3, 1, 2], "oftener": [1, 2, 9, 0, 4, 1, 2, 9, 5, 3, 1, 2]}
    logprobs = []
    for known in (less, text[more]):
        session, tree = opened(known)
        proposal = session.prefill(tree)
        assert proposal is not None
        logprobs.append(dict(proposal.children)[9])
    assert logprobs[0] < logprobs[1] < 0.0


def test_of_equal_continuations_the_most_recent_comes_first():
    """Return the proposal of prompt lookup."""
    session, tree = opened([1, 2, 5, 0, 1, 2, 6, 0, 4, 1, 2])
    proposal = session.prefill(tree)
    assert proposal is not None
    assert [token for token, _ in proposal.children][:2] == [6, 5]


@given(text=TOKENS, path=st.lists(st.integers(0, 5), max_size=6), draft_topk=st.integers(1, 4))
def test_proposals_are_probabilities_best_first(text, path, draft_topk):
    """At most draft_topk different tokens are proposed, in order, with a sum of at most 1."""
    session, tree = opened(text, draft_topk)
    session.prefill(tree)
    node = tree.root
    for token in path:
        node = tree.add(node.id, token, -0.1)
    (proposal,) = session.expand([node], tree)
    tokens = [token for token, _ in proposal.children]
    logprobs = [logprob for _, logprob in proposal.children]
    assert len(tokens) <= draft_topk
    assert len(set(tokens)) == len(tokens)
    assert set(tokens) <= set(text)
    assert logprobs == sorted(logprobs, reverse=True)
    assert sum(exp(logprob) for logprob in logprobs) < 1.0


@pytest.mark.parametrize("strategy", [name for name, spec in STRATEGIES.items() if spec.drafts])
@pytest.mark.parametrize("sampling", [T0, T1], ids=["T0", "T1"])
def test_alone_it_changes_the_speed_and_not_the_text(strategy, sampling):
    """On a repetitive text most tokens are found, and all are the target's own."""
    looping = truth(PROMPT, T0, 40)
    asked = request(prompt=looping, sampling=sampling, max_new_tokens=8)
    setup = {"num_stages": 3, "strategy": strategy, "drafter": NgramDrafter()}
    completion, _ = run_watched(setup, asked)
    assert list(completion.tokens) == expected(asked)
    if sampling is T0:
        assert completion.stats.run_length + sum(completion.stats.runs) >= 4
