"""Counts of refusals, with log lines that no flood can multiply."""

import logging
import threading
import time
from collections import Counter

LOG_EVERY_S = 10.0


class Tally:
    """Counts by reason (a fixed few); logs the first of each at once, then sums at intervals."""

    def __init__(self, logger: logging.Logger, what: str) -> None:
        self._logger, self._what = logger, what
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._logged: Counter[str] = Counter()
        self._logged_at: dict[str, float] = {}

    def add(self, reason: str, detail: str) -> None:
        """Count one more refusal; `detail` describes it in a line."""
        now = time.monotonic()
        with self._lock:
            self._counts[reason] += 1
            if now - self._logged_at.get(reason, float("-inf")) < LOG_EVERY_S:
                return
            new = self._counts[reason] - self._logged[reason]
            self._logged[reason], self._logged_at[reason] = self._counts[reason], now
            total = self._counts[reason]
        self._logger.warning(
            "%s: %s, %d new, %d in all; the last: %s", self._what, reason, new, total, detail
        )

    def counts(self) -> dict[str, int]:
        """Return the count of each reason so far."""
        with self._lock:
            return dict(self._counts)
