"""Calibration: from what a drafter says to what comes true; bounded, orderly, learnt online."""

from math import exp, log
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.bench.reliability import before_and_after, reliability
from flowspec.head.calibration import (
    Calibration,
    Forecast,
    Forecasts,
    NodeForecast,
    SettledForecast,
)
from flowspec.request import NO_NODE, NodeId
from flowspec.speculation.tree import DraftTree

LOGPROBS = st.one_of(st.floats(-40.0, 0.0), st.sampled_from([0.0, -1e-12, -1e9]))
HISTORY = st.lists(st.tuples(LOGPROBS, st.integers(0, 9), st.booleans()), max_size=60)


def child(logprob: float, *, rank: int = 0, depth: int = 1, source: str = "eagle") -> Forecast:
    """Return a forecast of a drafter."""
    return Forecast(source, depth, rank, logprob)


def enter(
    forecasts: Forecasts, parent: NodeId, token: int, logprob: float, *, depth: int = 1
) -> float:
    """A drafter says this of one child; its calibrated log-probability."""
    return forecasts.enter([NodeForecast(parent, depth, ((token, logprob),))])[0][0]


def applied(calibration: Calibration, forecast: Forecast) -> float:
    """The calibrated log-probability of one forecast."""
    return calibration.apply([forecast])[0]


def taught(history: list[tuple[float, int, bool]]) -> Calibration:
    """A calibration that has seen (logprob, rank, happened) forecasts settled."""
    calibration = Calibration()
    for logprob, rank, happened in history:
        calibration.record([(child(logprob, rank=rank), happened)])
    return calibration


@given(logprob=LOGPROBS)
def test_without_evidence_nothing_changes(logprob):
    """The prior is the drafter's own word; certainty alone is taken down a little."""
    calibrated = applied(Calibration(), child(logprob))
    assert calibrated == pytest.approx(logprob, rel=1e-6, abs=2e-4)
    assert calibrated < 0.0


@given(history=HISTORY, logprob=LOGPROBS, rank=st.integers(0, 30), depth=st.integers(1, 99))
def test_a_child_never_scores_above_its_parent(history, logprob, rank, depth):
    """Whatever was seen, a calibrated score is a log-probability."""
    assert applied(taught(history), child(logprob, rank=rank, depth=depth)) < 0.0


@given(history=HISTORY, logprob=LOGPROBS, happened=st.booleans())
def test_evidence_pulls_its_own_way(history, logprob, happened):
    """One more hit never lowers a forecast of its kind, and one more miss never raises it.

    But for the forecast's own share: a hit that was foretold teaches nothing.
    """
    calibration = taught(history)
    before = applied(calibration, child(logprob))
    for _ in range(400):
        calibration.record([(child(logprob), happened)])
    after = applied(calibration, child(logprob))
    sure = 0.0 if happened else float("-inf")
    assert abs(exp(after) - exp(sure)) <= abs(exp(before) - exp(sure)) + 1e-3


@given(history=HISTORY, pair=st.tuples(st.floats(-6.0, -0.01), st.floats(0.0, 0.2)))
def test_alike_siblings_keep_their_order(history, pair):
    """Within a bin of log-odds evidence moves all forecasts together."""
    calibration = taught(history)
    better, gap = pair
    worse = better - gap
    scores = [applied(calibration, child(p)) for p in (worse, better)]
    logits = [p - log(1.0 - exp(p)) for p in (worse, better)]
    if int(logits[0] + 5) == int(logits[1] + 5):
        assert scores[0] <= scores[1]


@pytest.mark.parametrize(("said", "true"), [(0.9, 0.5), (0.05, 0.3), (0.5, 0.5), (0.99, 0.6)])
def test_it_converges_to_what_comes_true(said, true):
    """A drafter that is biased, by its bias, in a few hundred outcomes; an honest one stays."""
    random = Random(1)
    calibration = Calibration()
    for _ in range(3000):
        calibration.record([(child(log(said)), random.random() < true)])
    assert exp(applied(calibration, child(log(said)))) == pytest.approx(true, abs=0.05)


def test_a_drafter_that_changes_is_followed():
    """Old evidence counts for less and less, so nothing is believed for ever."""
    calibration = Calibration()
    for happened, count in ((True, 20_000), (False, 20_000)):
        for _ in range(count):
            calibration.record([(child(log(0.5)), happened)])
    assert exp(applied(calibration, child(log(0.5)))) < 0.05


def test_sources_ranks_and_depths_are_learnt_apart():
    """The errors of one drafter, rank or depth do not change the record of another."""
    calibration = Calibration()
    for _ in range(1500):
        calibration.record([(child(log(0.5), rank=0), True)])
        calibration.record([(child(log(0.5), rank=5), False)])
        calibration.record([(child(log(0.5), depth=9), False)])
    assert exp(applied(calibration, child(log(0.5), rank=0))) > 0.9
    assert exp(applied(calibration, child(log(0.5), rank=5))) < 0.1
    assert exp(applied(calibration, child(log(0.5), depth=9))) < 0.1
    assert exp(applied(calibration, child(log(0.5), source="merge"))) == pytest.approx(0.5)


def test_its_memory_is_bounded():
    """However long it runs: bins are by source, not by text."""
    random = Random(2)
    calibration = Calibration()
    for _ in range(20_000):
        forecast = child(-random.expovariate(0.3), rank=random.randrange(40))
        forecast = forecast._replace(depth=random.randint(1, 300))
        calibration.record([(forecast, random.random() < 0.3)])
    assert calibration.num_bins <= 10 * (1 + 5 * 5)


def test_a_verdict_settles_the_forecasts_on_its_path_alone():
    """Off the path the parent was not true, and the forecast said nothing about that."""
    calibration = Calibration()
    calibration.outcomes = []
    forecasts = Forecasts(calibration, "eagle", sampled=False)
    root, good, bad, below = (NodeId(i) for i in range(4))
    for parent, token, logprob in ((root, 5, -0.5), (root, 6, -1.5), (bad, 7, -0.1)):
        enter(forecasts, parent, token, logprob)
    enter(forecasts, good, 8, -0.2, depth=2)
    enter(forecasts, below, 9, -0.3, depth=3)
    forecasts.settle([root, good], [5, 1], alive={below})
    said = [(outcome.raw, outcome.happened) for outcome in calibration.outcomes]
    assert said == [(-0.5, True), (-1.5, False), (-0.2, False)]
    forecasts.settle([below], [9], alive=())
    assert calibration.outcomes[-1][1:] == (-0.3, pytest.approx(-0.3, abs=0.2), True)
    forecasts.settle([root, good, bad, below], [5, 8, 7, 9], alive=())
    assert len(calibration.outcomes) == 4, "each forecast is settled once"


def test_paths_are_logged_with_the_newest_word_on_each_step():
    """A path's score is the sum of its steps', as they were said and as calibrated."""
    calibration = Calibration()
    calibration.paths = []
    forecasts = Forecasts(calibration, "eagle", sampled=True)
    tree = DraftTree()
    root = tree.plant(NO_NODE, 1, 10)
    enter(forecasts, root.id, 2, -0.7, depth=2)
    enter(forecasts, root.id, 2, -0.5)
    node = tree.add(root.id, 2, -0.4)
    calibrated = enter(forecasts, node.id, 3, -1.0, depth=2)
    forecasts.log_paths(tree.path(node.id), [(3, calibrated)])
    (path,) = calibration.paths
    assert (path.position, path.tokens) == (10, (2, 3))
    assert path.raw == pytest.approx(-1.5)
    assert path.calibrated == pytest.approx(-0.4 + calibrated)


def test_an_overconfident_drafter_is_more_reliable_afterwards():
    """Each forecast is judged as it was made: calibrated by the outcomes before it."""
    random = Random(3)
    calibration = Calibration()
    outcomes = []
    for _ in range(3000):
        p = random.random()
        forecast, happened = child(log(p)), random.random() < p * p
        calibrated = applied(calibration, forecast)
        outcomes.append(SettledForecast("eagle", forecast.logprob, calibrated, happened))
        calibration.record([(forecast, happened)])
    before, after = before_and_after(outcomes)
    assert after.error < before.error / 2
    assert after.brier < before.brier
    # an honest forecaster of p * p has no error, and the Brier score that chance leaves
    honest = reliability((2 * outcome.raw, outcome.happened) for outcome in outcomes)
    assert honest.error < 0.04
    assert after.brier == pytest.approx(honest.brier, abs=0.01)
