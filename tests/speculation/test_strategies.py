"""The table of strategies: each parameter that a strategy takes matters, and no other is taken."""

from collections.abc import Sequence

import pytest

from flowspec.bench.experiment import parse_settings
from flowspec.config import EngineConfig
from flowspec.engine.build import decoding_of
from flowspec.engine.engine import generate
from flowspec.request import Decoding
from flowspec.simulator.simulator import instant_link
from flowspec.speculation.drafters.base import Draft, DraftJob
from flowspec.speculation.strategies import (
    ABLATIONS,
    STRATEGIES,
    find_strategy,
    resolve_decoding,
    strategy_config,
)
from tests.support.clusters import make_cluster
from tests.support.scripted import ScriptedDrafter, drafter_named, mixed
from tests.support.tiny import T1, request

# another value of each parameter, far enough from the tests' sizes to show
OTHERS = {
    "segment_size": 1, "num_draft_tokens": 4, "num_draft_steps": 1, "draft_topk": 2,
    "draft_width": 1, "min_score": 0.3, "max_in_flight": 1,
    "coupled_drafting": True, "refresh": False, "merge": True, "calibrate": True,
}  # fmt: skip
ALWAYS_MAY = ("coupled_drafting", "refresh", "merge", "calibrate", "min_score")


def course(strategy: str, **decode: object) -> list[tuple[object, ...]]:
    """All work of one answer in order, with its size: the same only if nothing changed."""
    cluster = make_cluster(3, strategy, drafter=drafter_named("mixed"), **decode)
    cluster.simulator.work_log = []
    generate(cluster, request(sampling=T1, max_new_tokens=16))
    return list(cluster.simulator.work_log)


def test_the_values_cover_all_parameters():
    """A new parameter needs a line here."""
    assert set(OTHERS) == {name for spec in STRATEGIES.values() for name in spec.parameters}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_each_parameter_of_a_strategy_matters(strategy):
    """Another value gives other work; the drafter's switches may or may not show."""
    usual = course(strategy)
    assert len(usual) > 16
    for name in STRATEGIES[strategy].parameters:
        if name not in ALWAYS_MAY:
            assert course(strategy, **{name: OTHERS[name]}) != usual, name


@pytest.mark.parametrize("strategy", [*STRATEGIES, *ABLATIONS])
def test_a_strategy_takes_its_own_parameters_alone(strategy):
    """Any other is refused by name, with the list of those that it takes."""
    spec = find_strategy(strategy)
    for name, value in OTHERS.items():
        if name in spec.parameters:
            config = strategy_config(strategy, {name: value}, where="decode")
            assert getattr(config, name) == value
            assert config == spec.defaults.model_copy(update={name: value})
            continue
        with pytest.raises(
            ValueError, match=f"decode: {name} is no parameter of .*{strategy}; it "
        ):
            strategy_config(strategy, {name: value}, where="decode")
    with pytest.raises(ValueError, match="it takes: " + (", ".join(spec.parameters) or "nothing")):
        strategy_config(strategy, {"chunked_prefill_size": 3}, where="decode")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_draft_tokens", 0),
        ("num_draft_tokens", 1025),
        ("num_draft_tokens", "many"),
        ("draft_topk", -1),
        ("min_score", 1.0),
        ("min_score", float("nan")),
        ("refresh", 7),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(name, value):
    """The sentence names the place and the parameter."""
    with pytest.raises(ValueError, match=f"--set: {name}"):
        strategy_config("flowspec", {name: value}, where="--set")


def test_a_beam_that_no_forward_holds_is_refused():
    """Children per node times levels has a limit, whichever of the two was set."""
    with pytest.raises(ValueError, match="draft_topk x num_draft_steps is 1200, at most 1024"):
        strategy_config("serial_pp", {"draft_topk": 200}, where="decode")


def test_a_decoding_means_the_first_drafter_unless_it_names_one():
    """Strategies without a tree need none; equal meanings are equal whatever was written."""
    loaded = {"none": object(), "eagle": object(), "ngram": object()}
    first = resolve_decoding(Decoding(), loaded)
    assert first.drafter == "eagle"
    assert resolve_decoding(Decoding(drafter="ngram"), loaded).drafter == "ngram"
    assert resolve_decoding(Decoding(strategy="ar", drafter="ngram"), loaded).drafter == "none"
    assert resolve_decoding(Decoding(strategy="ar"), {}).drafter == "none"
    default = Decoding(drafter="eagle", parameters={"draft_topk": 20})
    assert resolve_decoding(default, loaded) == first
    assert hash(resolve_decoding(default, loaded)) == hash(first)
    with pytest.raises(ValueError, match="drafter medusa is not loaded; loaded: eagle, ngram"):
        resolve_decoding(Decoding(drafter="medusa"), loaded)
    with pytest.raises(ValueError, match="strategy flowspec needs a drafter and none is loaded"):
        resolve_decoding(Decoding(strategy="flowspec"), {"none": object()})


def test_a_run_says_its_decoding():
    """The strategy's parameters come from the file; one that it does not take is an error."""
    decoding = decoding_of(EngineConfig(strategy="flowspec", decode={"num_draft_steps": 3}))
    assert decoding == Decoding(
        strategy="flowspec", parameters={"num_draft_steps": 3}, drafter="eagle"
    )
    with pytest.raises(ValueError, match="decode: num_draft_steps is no parameter of strategy ar"):
        decoding_of(EngineConfig(strategy="ar", decode={"num_draft_steps": 3}))


class Listening(ScriptedDrafter):
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        super().__init__(mixed)
        self.jobs: list[DraftJob] = []

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Begin the jobs, and count them."""
        self.jobs += jobs
        return super().begin(jobs)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "streaming-apart"])
def test_streaming_alone_drafts_while_it_prefills(strategy):
    """The published ones begin with the true hidden states that a verdict brought."""
    drafter = Listening()
    slow = (lambda rank, work: 1.0, instant_link)  # so that there is always a leaf to draft at
    cluster = make_cluster(3, strategy, drafter=drafter, charges=slow)
    generate(cluster, request(sampling=T1, max_new_tokens=24))
    both = sum(job.prefills and bool(job.nodes) for job in drafter.jobs)
    assert (both > 3) == (strategy == "streaming"), both
    assert any(job.prefills for job in drafter.jobs) == (strategy != "ar")


def test_settings_of_a_benchmark_reach_the_strategies_that_take_them():
    """One that is named must take its setting; of all that run, at least one must."""
    for settings, strategies in (
        (["streaming.num_draft_steps=3"], ["streaming", "flowspec"]),
        (["num_draft_steps=3"], ["streaming", "ar"]),
    ):
        with pytest.raises(ValueError, match="num_draft_steps is no parameter of .*streaming"):
            parse_settings(settings, strategies)
    found = parse_settings(["num_draft_steps=3"], ["streaming", "flowspec"])
    assert found == {"streaming": {}, "flowspec": {"num_draft_steps": "3"}}
