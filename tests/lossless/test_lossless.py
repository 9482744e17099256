"""Lossless or it is a bug: every strategy gives exactly the tokens of the target alone."""

from dataclasses import replace

import pytest

from flowspec.engine.engine import generate
from flowspec.engine.reference import LocalTarget
from flowspec.model.rope import LinearRopeScaling, YarnRopeScaling
from flowspec.protocol.messages import Segment
from flowspec.speculation.strategies import ABLATIONS, STRATEGIES
from tests.support.clusters import check_empty, grid, make_cluster, run_watched
from tests.support.scripted import ScriptedDrafter, drafter_named, mixed
from tests.support.tiny import (
    CONFIG,
    MAX_CONTEXT,
    SAMPLINGS,
    T0,
    T1,
    expected,
    local_target,
    request,
    whole_model,
    whole_model_bf16,
)
from tests.support.tiny_drafters import eagle_drafter

STAGE_COUNTS = (1, 2, 3, 8)
TOKENS = 8


@pytest.mark.parametrize("drafter", ["eagle", "perfect", "hostile"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_text_is_the_targets_own(strategy, drafter):
    """Strategy, drafter, temperature and cut may change the speed, never a token."""
    cases = [(count, T0) for count in STAGE_COUNTS]
    cases += grid(STAGE_COUNTS, SAMPLINGS[1:])
    for num_stages, sampling in cases:
        asked = request(sampling=sampling, max_new_tokens=TOKENS)
        setup = {"num_stages": num_stages, "strategy": strategy}
        if drafter == "eagle":
            setup["draft_topk"] = 12  # untrained: a wide net is right now and then
        completion, _ = run_watched({**setup, "drafter": drafter_named(drafter)}, asked)
        where = f"{num_stages} stages, {sampling}"
        assert list(completion.tokens) == expected(asked), where


@pytest.mark.parametrize("sampling", [T0, T1], ids=["T0", "T1"])
@pytest.mark.parametrize("strategy", ABLATIONS)
def test_a_mechanism_taken_away_changes_the_speed_alone(strategy, sampling):
    """Every strategy gives the same text and reaches an end."""
    asked = request(sampling=sampling, max_new_tokens=TOKENS)
    completion, _ = run_watched({"num_stages": 3, "strategy": strategy}, asked)
    assert list(completion.tokens) == expected(asked)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_shared_noise_in_the_drafter_changes_the_drafts_alone(strategy):
    """Coupled drafting is there for the hit rate: other rows are sent, the text stays."""
    asked = request(sampling=replace(T1, top_k=12), max_new_tokens=TOKENS)
    rows_sent = []
    for coupled in (False, True):
        setup = {"num_stages": 2, "strategy": strategy, "drafter": eagle_drafter()}
        completion, watches = run_watched({**setup, "coupled_drafting": coupled}, asked)
        assert list(completion.tokens) == expected(asked)
        segments = [m for m in watches[1].seen if isinstance(m, Segment)]
        rows_sent.append([segment.tokens for segment in segments])
    assert (rows_sent[0] != rows_sent[1]) == STRATEGIES[strategy].drafts


@pytest.mark.parametrize("strategy", ["ar", "serial_pp", "streaming"])
def test_batch_invariant_mode_is_exact_in_bfloat16(strategy):
    """In 16 bits sums depend on kernel shapes; with fixed shapes texts are equal."""
    alone = replace(local_target(), model=whole_model_bf16(), batch_invariant=True)
    for sampling in (T0, T1):
        asked = request(sampling=sampling, max_new_tokens=6)
        cluster = make_cluster(2, strategy, drafter=drafter_named("mixed"), bf16=True)
        assert list(generate(cluster, asked).tokens) == alone.generate(asked)[0]


YARN = YarnRopeScaling(factor=4.0, original_max_position_embeddings=16, attention_factor=1.14)
FAMILIES = {
    "mistral": replace(CONFIG, windows=(6,) * 8),
    "qwen2": replace(CONFIG, qkv_bias=True, rope_scaling=YARN, windows=(None,) * 5 + (9,) * 3),
    "qwen3": replace(CONFIG, qk_norm=True, head_dim=12, windows=(7, None) * 4),
    "linear": replace(CONFIG, rope_scaling=LinearRopeScaling(factor=2.0)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_exact(family):
    """Trees, commits and re-rooting under sliding windows, norms and stretched positions."""
    config = FAMILIES[family]
    alone = LocalTarget(whole_model(config), MAX_CONTEXT)
    for strategy, sampling in (("streaming", T0), ("streaming", T1), ("pipedec", T0)):
        asked = request(sampling=sampling, max_new_tokens=20)
        tokens = alone.generate(asked)[0]
        drafter = ScriptedDrafter(mixed, true=(*asked.prompt, *tokens))
        cluster = make_cluster(3, strategy, drafter=drafter, model=config)
        assert list(generate(cluster, asked).tokens) == tokens, f"{strategy}, {sampling}"
        check_empty(cluster)
