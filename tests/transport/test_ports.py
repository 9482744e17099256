"""Lines between devices: how long messages occupy them, and which messages wait."""

import math

import pytest

from flowspec.transport.link_occupancy import Egress, Ingress


def ends(egress: Egress[str], until: float = math.inf) -> list[tuple[str, float]]:
    """Return what leaves, and when."""
    return [(sent.item, round(sent.end, 9)) for sent in egress.done(min(until, 1e9))]


def test_one_lane_is_a_queue():
    """The time is bytes divided by the rate, one message after another."""
    egress: Egress[str] = Egress(100.0)
    egress.add(0.0, "data", 50, "a")
    egress.add(0.1, "data", 100, "b")
    assert egress.next_end() == pytest.approx(0.5)
    assert ends(egress) == [("a", 0.5), ("b", 1.5)]
    assert egress.next_end() == math.inf


def test_lanes_share_the_line_fairly():
    """A verdict beside a long segment takes twice its own time, and delays it by as much."""
    egress: Egress[str] = Egress(100.0)
    egress.add(0.0, "data", 100, "segment")
    egress.add(0.2, "control", 5, "verdict")
    assert ends(egress) == [("verdict", 0.3), ("segment", 1.05)]


def test_three_lanes_get_a_third_each():
    """With any number of flows, the line carries exactly its rate."""
    egress: Egress[str] = Egress(90.0)
    for lane, size in (("a", 30), ("b", 60), ("c", 90)):
        egress.add(0.0, lane, size, lane)
    assert ends(egress) == [("a", 1.0), ("b", round(1 + 60 / 90, 9)), ("c", 2.0)]


def test_asked_late_it_tells_the_times_things_left():
    """A process that slept too long must not add its own delay."""
    egress: Egress[str] = Egress(10.0)
    egress.add(0.0, "data", 10, "a")
    egress.add(0.0, "data", 10, "b")
    assert [(s.item, s.start, s.end) for s in egress.done(50.0)] == [("a", 0, 1), ("b", 1, 2)]
    egress.add(60.0, "data", 10, "c")
    assert ends(egress) == [("c", 61.0)]


def test_late_on_the_clock_nothing_is_lost_to_rounding():
    """After days, the clock's resolution is more than a byte's time."""
    egress: Egress[str] = Egress(125e6)
    now = 1e6
    for number in range(200):
        egress.add(now, number % 3, 8212, str(number))
    assert len(egress.done(now + 1.0)) == 200


def test_two_senders_at_once_wait_for_one_another_at_the_receiver():
    """The switch takes both at full rate and passes one after the other."""
    ingress = Ingress(100.0)
    assert ingress.take(0.0, 1.0, 100) == pytest.approx(1.0)  # alone it passes as it comes
    assert ingress.take(0.0, 1.0, 100) == pytest.approx(2.0)
    assert ingress.take(5.0, 6.0, 100) == pytest.approx(6.0)


def test_a_slow_receiver_sets_the_pace():
    """A fast sender does not make a slow line faster."""
    assert Ingress(10.0).take(0.0, 1.0, 100) == pytest.approx(10.0)


def test_a_short_message_holds_up_a_long_one_by_its_own_time_alone():
    """The long one came first and continues behind it; the line never rests meanwhile."""
    ingress = Ingress(100.0)
    assert ingress.take(5.0, 5.1, 10) == pytest.approx(5.1)  # in the middle of the next one
    assert ingress.take(0.0, 10.0, 1000) == pytest.approx(10.1)
    idle = Ingress(100.0)
    assert idle.take(5.0, 5.1, 10) == pytest.approx(5.1)
    assert idle.take(0.0, 10.0, 500) == pytest.approx(10.0)  # there was room for both


def test_what_waits_at_the_receiver_is_all_that_came_at_the_line_s_rate():
    """For any order and overlap, the last one has passed when all bytes have."""
    ingress = Ingress(1.0)
    for start, end, passed in ((0.0, 10.0, 10.0), (5.0, 15.0, 20.0), (12.0, 22.0, 30.0)):
        assert ingress.take(start, end, 10) == pytest.approx(passed)
    slow = Ingress(1.0)  # a slow sender leaves room that cannot be used later
    assert slow.take(0.0, 100.0, 10) == pytest.approx(100.0)
    for _ in range(9):
        last = slow.take(99.0, 100.0, 1)
    assert last == pytest.approx(99.0 + 9 + 0.1)
