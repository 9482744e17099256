"""The table of strategies: what a strategy is said to ignore changes nothing, the rest does."""

from collections.abc import Sequence

import pytest

from flowspec.bench.experiment import parse_settings
from flowspec.config import DecodeConfig, EngineConfig
from flowspec.engine.build import decode_config
from flowspec.engine.engine import generate
from flowspec.simulator.simulator import instant_link
from flowspec.speculation.drafters.base import Draft, DraftJob
from flowspec.speculation.strategies import STRATEGIES, check_taken
from tests.support.clusters import make_cluster
from tests.support.scripted import ScriptedDrafter, drafter_named, mixed
from tests.support.tiny import T1, request

# another value of each parameter, far enough from the tests' sizes to show
OTHERS = {
    "segment_size": 1, "num_draft_tokens": 4, "num_draft_steps": 1, "draft_topk": 2,
    "draft_width": 1, "min_score": 0.3, "max_in_flight": 1, "chunked_prefill_size": 2,
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
    assert set(OTHERS) == set(DecodeConfig.__dataclass_fields__)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ignored_parameters_change_nothing_and_others_do(strategy):
    """The same work at the same times, or not; of the drafter's switches nothing is said."""
    usual = course(strategy)
    assert len(usual) > 16
    for name, value in OTHERS.items():
        if name in STRATEGIES[strategy].ignores:
            assert course(strategy, **{name: value}) == usual, name
        elif name not in ALWAYS_MAY:
            assert course(strategy, **{name: value}) != usual, name


class Listening(ScriptedDrafter):
    """Keeps what it is asked for."""

    def __init__(self) -> None:
        super().__init__(mixed)
        self.jobs: list[DraftJob] = []

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """See Drafter.begin."""
        self.jobs += jobs
        return super().begin(jobs)


@pytest.mark.parametrize("strategy", [*STRATEGIES, "streaming-apart"])
def test_streaming_alone_drafts_while_it_absorbs(strategy):
    """The published ones begin with the true features that a verdict brought."""
    drafter = Listening()
    slow = (lambda rank, work: 1.0, instant_link)  # so that there is always a leaf to draft at
    cluster = make_cluster(3, strategy, drafter=drafter, charges=slow)
    generate(cluster, request(sampling=T1, max_new_tokens=24))
    both = sum(job.absorbs and bool(job.nodes) for job in drafter.jobs)
    assert (both > 3) == (strategy == "streaming"), both
    assert any(job.absorbs for job in drafter.jobs) == (strategy != "ar")


def test_what_changes_nothing_is_refused():
    """By name, with what the strategy does take; for all at once only if none takes it."""
    with pytest.raises(
        ValueError, match=r"num_draft_steps changes nothing for .* streaming; .*draft_topk"
    ):
        check_taken("streaming", {"num_draft_steps": 3}, where="--set")
    with pytest.raises(ValueError, match="num_draft_steps changes nothing"):
        parse_settings(["streaming.num_draft_steps=3"], ["streaming", "flowspec"])
    with pytest.raises(ValueError, match="num_draft_steps changes nothing"):
        parse_settings(["num_draft_steps=3"], ["streaming", "ar"])
    found = parse_settings(["num_draft_steps=3"], ["streaming", "flowspec"])
    assert found == {"streaming": {}, "flowspec": {"num_draft_steps": "3"}}
    _, decode = decode_config(EngineConfig(strategy="flowspec", decode={"num_draft_steps": 3}))
    assert decode.num_draft_steps == 3
