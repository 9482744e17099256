"""The true time of joined clocks lies within the reported error."""

from random import Random

import pytest

from flowspec.tracing.clocks import Clock, Round, estimate, pair_rounds

START, END = 100.0, 160.0  # first request and last token, by the head's clock


def pings(
    random: Random, *, offset: float, drift: float, when: float, count: int = 8
) -> list[Round]:
    """Return pings with random delays to a stage whose clock is ahead and too fast."""

    def stage_clock(true: float) -> float:
        return true * (1 + drift) + offset

    rounds = []
    for number in range(count):
        sent_at = when + number * 0.05
        there, at_work, back = (random.expovariate(1 / 0.002) for _ in range(3))
        received_at = stage_clock(sent_at + there)
        answered_at = stage_clock(sent_at + there + at_work)
        rounds.append(Round(sent_at, received_at, answered_at, sent_at + there + at_work + back))
    return rounds


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("offset", "drift"), [(3600.0, 0.0), (-1e6, 5e-5), (0.5, -2e-5)])
def test_the_true_time_lies_within_the_error(seed, offset, drift):
    """This holds at any moment of the run, however uneven the delays."""
    random = Random(seed)
    rounds = pings(random, offset=offset, drift=drift, when=START - 1)
    rounds += pings(random, offset=offset, drift=drift, when=END + 1)
    clock = estimate(rounds, before=START, after=END)
    assert clock is not None
    assert 0.0 < clock.error < 0.01
    for true in (START, (START + END) / 2, END):
        # the offset is told for a moment that is itself known no better than the round trip
        slack = clock.error + 0.01 * abs(drift) + 1e-9
        assert abs(clock.to_head(true * (1 + drift) + offset) - true) <= slack


def test_one_clock_is_left_alone():
    """All processes of one machine read the same clock; measurement errors must not move it."""
    rounds = pings(Random(1), offset=0.0, drift=0.0, when=START - 1)
    clock = estimate(rounds, before=START, after=END)
    assert clock is not None
    assert clock.to_head(123.0) == 123.0
    assert clock.error > 0.0


def test_without_the_last_pings_there_is_no_drift():
    """A killed stage answers none of them; without any ping, nothing is known."""
    rounds = pings(Random(1), offset=50.0, drift=1e-5, when=START - 1)
    clock = estimate(rounds, before=START, after=END)
    assert clock is not None
    assert clock.drift == 0.0
    assert clock.to_head(150.0) == pytest.approx(100.0, abs=0.01)
    assert estimate([], before=START, after=END) is None


def test_the_quickest_round_counts():
    """A ping that waited for a forward is imprecise."""
    slow = Round(0.0, 5.0, 5.0, 1.0)
    quick = Round(2.0, 6.51, 6.51, 2.02)
    clock = estimate([slow, quick], before=START, after=END)
    assert clock == Clock(first=(6.51, quick.offset), last=(6.51, quick.offset), error=quick.error)
    assert quick.error == pytest.approx(0.01)


def test_an_answer_is_the_first_status_after_its_ping():
    """Stages also send statuses unasked; one from before the ping is no answer."""
    rounds = pair_rounds([1.0, 3.0, 9.0], [1.1, 3.1], [0.5, 1.2, 2.0, 3.2], [0.6, 1.3, 2.1, 3.3])
    assert rounds == [Round(1.0, 1.1, 1.2, 1.3), Round(3.0, 3.1, 3.2, 3.3)]
    assert pair_rounds([1.0], [1.1], [0.5], [0.6]) == []
