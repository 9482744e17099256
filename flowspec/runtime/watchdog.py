"""Watchdog: decides when to ask silent stages, when to warn, and when to give up. Does no I/O."""

from collections.abc import Collection, Mapping
from enum import Enum

ASK_S = 3.0
WARN_S = 5.0  # how long a person waits without asking


class WatchdogAction(Enum):
    """What the caller must do now."""

    WAIT = "wait"
    ASK = "ask"  # send a Ping to all stages
    WARN = "warn"  # once: the given ranks have not answered
    # the given ranks have not answered; no ranks: all answer, but nothing moves
    GIVE_UP = "give up"


class Watchdog:
    """Compares the time since the last progress with `limit_s`. All times are in seconds."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        # stages are asked at half the limit before any is given up, and a warning comes before that
        half = limit_s / 2
        self._asks_after = (ASK_S, half) if half > WARN_S else (half,)
        self._moved_at = 0.0
        self._asked_at: list[float] = []
        self._has_warned = False

    def step(
        self, now: float, *, moved_at: float, ranks: Collection[int], heard_at: Mapping[int, float]
    ) -> tuple[WatchdogAction, list[int]]:
        """Return the action and its ranks: those not heard since they were last asked."""
        silence = now - moved_at
        if moved_at != self._moved_at:
            self._moved_at, self._asked_at, self._has_warned = moved_at, [], False
        if silence < self._asks_after[0]:
            return WatchdogAction.WAIT, []
        if len(self._asked_at) < sum(silence >= after for after in self._asks_after):
            self._asked_at.append(now)
            return WatchdogAction.ASK, []
        silent = [rank for rank in sorted(ranks) if heard_at.get(rank, 0.0) < self._asked_at[-1]]
        if silence >= self.limit_s:
            return WatchdogAction.GIVE_UP, silent
        may_warn = len(self._asks_after) > 1 and silence >= WARN_S and not self._has_warned
        if may_warn and silent:
            self._has_warned = True
            return WatchdogAction.WARN, silent
        return WatchdogAction.WAIT, []
