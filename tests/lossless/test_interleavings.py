"""Every order of events gives the same text: random delays, costs, sizes, strategies, drafters."""

from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowspec.request import FinishReason
from flowspec.simulator.simulator import adversarial
from flowspec.speculation.strategies import STRATEGIES
from flowspec.stage.stage import Stage
from tests.support.clusters import run_watched
from tests.support.scripted import drafter_named
from tests.support.tiny import PROMPT, SAMPLINGS, expected, request

CHECKED = settings(
    max_examples=90,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

SETUPS = st.fixed_dictionaries(
    {
        "num_stages": st.integers(1, 8),
        "strategy": st.sampled_from(sorted(STRATEGIES)),
        "segment_size": st.integers(1, 12),
        "num_draft_tokens": st.integers(1, 30),
        "num_draft_steps": st.integers(1, 5),
        "draft_topk": st.integers(1, 6),
        "chunked_prefill_size": st.integers(1, 12),
        "max_in_flight": st.sampled_from([0, 1, 3]),
        "refresh": st.booleans(),
        "merge": st.booleans(),
        "calibrate": st.booleans(),
    }
)


@pytest.mark.slow
@CHECKED
@given(
    setup=SETUPS,
    drafter=st.sampled_from(["perfect", "hostile", "mixed", "eagle", "ngram"]),
    sampling=st.sampled_from(SAMPLINGS),
    prompt_length=st.integers(1, len(PROMPT)),
    max_new_tokens=st.integers(1, 14),
    ends_early=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_every_order_of_events_gives_the_targets_text(
    setup, drafter, sampling, prompt_length, max_new_tokens, ends_early, seed
):
    """Verdicts may overtake segments or trail far behind them: output, end and memory hold."""
    asked = request(prompt=PROMPT[:prompt_length], sampling=sampling, max_new_tokens=max_new_tokens)
    if ends_early:
        asked = replace(asked, eos_token_ids=(expected(asked)[max_new_tokens // 2],))
    completion, watches = run_watched(
        {**setup, "drafter": drafter_named(drafter, seed=seed), "charges": adversarial(seed)},
        asked,
    )
    assert list(completion.tokens) == expected(asked)
    last = completion.tokens[-1]
    at_eos = last in asked.eos_token_ids
    assert completion.reason is (FinishReason.STOP if at_eos else FinishReason.LENGTH)
    # A segment per stage, one waiting and one on the way; rounds send their chunks at once.
    bound = max(2 * setup["num_stages"] + 2, setup["num_draft_tokens"] + 2)
    for watch in watches:
        if isinstance(watch.core, Stage):
            assert watch.max_queued <= bound, f"{watch.max_queued} segments wait at {watch.rank}"
