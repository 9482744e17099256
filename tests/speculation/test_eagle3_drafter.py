"""The EAGLE-3 drafter against its net run anew; hidden states come layer by layer."""

from collections.abc import Sequence
from random import Random

import pytest
import torch
from torch import Tensor

from flowspec.model.llama import rope_angles
from flowspec.request import NO_NODE, Request, SamplingParams
from flowspec.speculation.acceptance.gumbel_coupled import draft_scores
from flowspec.speculation.drafters.base import Opening, Proposal
from flowspec.speculation.drafters.hidden_states import HiddenStateSession
from flowspec.speculation.tree import DraftTree, Node
from tests.support.tiny import CONFIG, PROMPT, T0, T1, VOCAB
from tests.support.tiny_drafters import DRAFT_TO_TARGET, causal_attend, eagle3_drafter

DRAFTER = eagle3_drafter()
LAYERS = DRAFTER.net.aux_hidden_state_layers
HIDDEN_STATES = torch.randn(
    3, len(PROMPT), CONFIG.hidden_size, generator=torch.Generator().manual_seed(0)
)  # low, middle, high


@torch.inference_mode()
def scores_anew(path: Sequence[int], sampling: SamplingParams) -> list[float]:
    """log-probabilities [Vd] after the prompt, its verdict 8 and then `path`, without a cache."""
    net = DRAFTER.net
    hidden_states = net.fuse(torch.cat(tuple(HIDDEN_STATES), dim=-1))
    tokens = [*PROMPT[1:], 8]
    for step in range(len(path) + 1):
        rope = rope_angles(DRAFTER.frequencies, torch.arange(len(tokens)), torch.float32)
        states = net(torch.tensor(tokens), hidden_states, rope, causal_attend)
        hidden_states = torch.cat(
            (hidden_states, states[-1:])
        )  # a draft step feeds its own output back
        tokens += path[step : step + 1]
    where = [len(PROMPT) + 1 + len(path)]
    ids = torch.tensor(DRAFT_TO_TARGET)
    logits: Tensor = net.logits(states[-1:])
    return draft_scores(logits, where, sampling, coupled=True, target_ids=ids)[0].tolist()


def check(proposal: Proposal, path: Sequence[int], sampling: SamplingParams) -> None:
    """Children by target id, all that the head's vocabulary can say."""
    want = dict(zip(DRAFT_TO_TARGET, scores_anew(path, sampling), strict=True))
    assert dict(proposal.children) == pytest.approx(want, abs=1e-4)


def planted(sampling: SamplingParams) -> tuple[HiddenStateSession, DraftTree]:
    """The prompt and its verdict are known, no hidden state yet."""
    asked = Request(id=1, prompt=PROMPT, sampling=sampling, max_new_tokens=20)
    session = DRAFTER.open(Opening(request=asked, draft_topk=VOCAB, coupled=True))
    tree = DraftTree()
    tree.plant(NO_NODE, 8, len(PROMPT))
    session.accept([*PROMPT, 8])
    return session, tree


@pytest.mark.parametrize("sampling", [T0, T1], ids=["T0", "T1"])
@pytest.mark.parametrize("seed", range(3))
def test_a_position_waits_for_its_three_layers(seed: int, sampling: SamplingParams) -> None:
    """Hidden states come from three stages in any order; a row needs all three."""
    session, tree = planted(sampling)
    due = [(which, at) for which in range(3) for at in range(len(PROMPT))]
    Random(seed).shuffle(due)
    given: list[tuple[int, int]] = []
    proposals = []
    for which, at in due:
        session.accept_hidden_states(LAYERS[which], {at: HIDDEN_STATES[which, at]})
        given.append((which, at))
        whole = 0
        while all((n, whole) in given for n in range(3)):
            whole += 1
        assert session.num_prefilled + session.num_rows_ready == whole
        if len(given) % 4 == 0 and session.num_rows_ready:
            proposals.append(session.prefill(tree))
    if session.num_rows_ready:
        proposals.append(session.prefill(tree))
    assert proposals[:-1] == [None] * (len(proposals) - 1)
    assert proposals[-1] is not None
    check(proposals[-1], [], sampling)
    assert not session.hidden_states, "hidden states are let go once prefilled"


def test_guesses_feed_on_the_heads_own_states() -> None:
    """A tree below the root, at temperature 1: each node as if its path were a text."""
    session, tree = planted(T1)
    for which, layer in enumerate(LAYERS):
        session.accept_hidden_states(layer, dict(enumerate(HIDDEN_STATES[which])))
    assert session.prefill(tree) is not None
    level: list[Node] = [tree.add(tree.root.id, token, -1.0) for token in (1, 2)]
    for _ in range(3):
        for node, proposal in zip(level, session.expand(level, tree), strict=True):
            path = [above.token for above in tree.path(node.id)[1:]]
            check(proposal, path, T1)
        level = [tree.add(level[-1].id, token, -1.0) for token in (5, 40, 7)]


def test_only_asked_layers_are_taken() -> None:
    """Hidden states of another layer would be silent nonsense."""
    session, _ = planted(T0)
    with pytest.raises(AssertionError, match="layer 2"):
        session.accept_hidden_states(2, {0: HIDDEN_STATES[0, 0]})
