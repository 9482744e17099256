"""A hanging stage is asked, reported within seconds, and given up after the usual limit."""

import pytest

from flowspec.runtime.watchdog import ASK_S, WARN_S, Watchdog, WatchdogAction

TICK_S = 0.25


def story(
    limit_s: float, *, answers: dict[int, float], moves: tuple[float, ...] = ()
) -> list[tuple[float, WatchdogAction, list[int]]]:
    """Return the actions other than WAIT with their times, until the end.

    A rank of `answers` answers until the given time; something moves at each of `moves`.
    """
    silence, heard_at = Watchdog(limit_s), dict.fromkeys(answers, 0.0)
    told = []
    for tick in range(1, int(3 * limit_s / TICK_S)):
        now = tick * TICK_S
        moved_at = max((at for at in moves if at <= now), default=0.0)
        step, ranks = silence.step(now, moved_at=moved_at, ranks=answers, heard_at=heard_at)
        if step is WatchdogAction.ASK:
            heard_at.update({rank: now for rank, until in answers.items() if now < until})
        if step is not WatchdogAction.WAIT:
            told.append((now, step, ranks))
        if step is WatchdogAction.GIVE_UP:
            break
    return told


ALWAYS = float("inf")


def test_who_hangs_is_told_about_at_once_and_given_up_later() -> None:
    """One warning comes long before the end, and does not name ranks that answer."""
    assert story(60.0, answers={1: ALWAYS, 2: 0.0, 3: 0.0}) == [
        (ASK_S, WatchdogAction.ASK, []),
        (WARN_S, WatchdogAction.WARN, [2, 3]),
        (30.0, WatchdogAction.ASK, []),
        (60.0, WatchdogAction.GIVE_UP, [2, 3]),
    ]


def test_nobody_is_named_where_all_answer() -> None:
    """The stages are not to blame for a slow or faulty head."""
    steps = story(60.0, answers={1: ALWAYS, 2: ALWAYS})
    assert [step for _, step, _ in steps] == [
        WatchdogAction.ASK,
        WatchdogAction.ASK,
        WatchdogAction.GIVE_UP,
    ]
    assert steps[-1] == (60.0, WatchdogAction.GIVE_UP, [])


def test_who_hangs_later_is_given_up_without_the_others() -> None:
    """The last question decides."""
    steps = story(60.0, answers={1: ALWAYS, 2: 10.0})
    assert (WARN_S, WatchdogAction.WARN, [2]) not in steps
    assert steps[-1] == (60.0, WatchdogAction.GIVE_UP, [2])


@pytest.mark.parametrize("limit_s", [1.0, 2 * ASK_S, 2 * WARN_S])
def test_a_short_limit_needs_no_warning(limit_s: float) -> None:
    """The error comes just as soon."""
    assert story(limit_s, answers={1: 0.0}) == [
        (limit_s / 2, WatchdogAction.ASK, []),
        (limit_s, WatchdogAction.GIVE_UP, [1]),
    ]


def test_what_moves_begins_anew() -> None:
    """A stage that hangs again is reported again."""
    steps = story(60.0, answers={1: 0.0}, moves=(20.0,))
    assert [(at, step) for at, step, _ in steps] == [
        (ASK_S, WatchdogAction.ASK),
        (WARN_S, WatchdogAction.WARN),
        (20.0 + ASK_S, WatchdogAction.ASK),
        (20.0 + WARN_S, WatchdogAction.WARN),
        (50.0, WatchdogAction.ASK),
        (80.0, WatchdogAction.GIVE_UP),
    ]


def test_work_in_long_steps_is_no_silence() -> None:
    """Each step ends before any stage is asked."""
    moves = tuple(2.5 * count for count in range(80))
    assert story(60.0, answers={1: 0.0}, moves=moves) == []
