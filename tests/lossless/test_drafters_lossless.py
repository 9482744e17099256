"""Every strategy with every model drafter gives the target's own text."""

import pytest

from flowspec.speculation.drafters.cached import IncrementalDrafter
from flowspec.speculation.strategies import STRATEGIES
from tests.support.clusters import run_watched
from tests.support.tiny import T0, T1, expected, request
from tests.support.tiny_drafters import MODEL_DRAFTERS, draft_model, model_drafter

DRAFTING = [name for name, spec in STRATEGIES.items() if spec.drafts]
TOKENS = 12


def check(strategy: str, drafter: IncrementalDrafter) -> int:
    """Compare texts at temperature 0 and 1; return how many tokens were in the tree."""
    found = 0
    for sampling in (T0, T1):
        asked = request(sampling=sampling, max_new_tokens=TOKENS)
        # untrained heads: a wide net is right now and then
        setup = {"num_stages": 3, "strategy": strategy, "drafter": drafter, "draft_topk": 12}
        completion, _ = run_watched(setup, asked)
        assert list(completion.tokens) == expected(asked), sampling
        found += sum(completion.stats.runs) + completion.stats.run_length
    return found


@pytest.mark.parametrize("drafter", MODEL_DRAFTERS)
@pytest.mark.parametrize("strategy", DRAFTING)
def test_text_is_the_targets_own(strategy: str, drafter: str) -> None:
    """Hidden states from one stage, from three, or none; guesses that are right and wrong."""
    assert check(strategy, model_drafter(drafter)) > 0, "the drafter was never right"


@pytest.mark.parametrize("strategy", DRAFTING)
def test_a_drafter_whose_context_ends_leaves_the_target_alone(strategy: str) -> None:
    """The draft model has nothing more to say in the middle of the answer; the text goes on."""
    prompt = len(request().prompt)
    assert check(strategy, draft_model(max_positions=prompt + 5)) > 0
    assert check(strategy, draft_model(max_positions=prompt - 2)) == 0
