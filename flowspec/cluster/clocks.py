"""Pings by which a trace later puts the stages' clocks on the head's (flowspec/eval/clock.py)."""

import time
from collections.abc import Iterable

from flowspec.driver import Driver
from flowspec.head import Head
from flowspec.trace import OFF
from flowspec.wire import Ping

ROUNDS = 8  # the quickest one counts
ANSWER_TIMEOUT_S = 0.2


def ping_clocks(driver: Driver, head: Head, ranks: Iterable[int]) -> None:
    """Exchange a few pings with each stage, one at a time; does nothing where no trace is made."""
    if driver.trace is OFF:
        return
    for rank in ranks:
        for _ in range(ROUNDS):
            sent_at, ping = time.monotonic(), Ping(rank=0)
            driver.transport.send(rank, ping)
            driver.trace.sent(sent_at, rank, ping)
            while head.heard_at.get(rank, 0.0) < sent_at:
                if time.monotonic() > sent_at + ANSWER_TIMEOUT_S:
                    return  # it hangs or computes; what is known of the clocks must do
                driver.turn(ANSWER_TIMEOUT_S / 4)
