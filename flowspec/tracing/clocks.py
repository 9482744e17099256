"""Converts the clocks of all processes to one, by the round trips of the head's pings.

Each ping and its answer give four times (as in NTP, RFC 5905): sent and received by the head's
clock, received and answered by the stage's. The stage's clock is ahead by the mean of the two
differences, and this is wrong by at most half of the round trip without the stage's own time. Pings
before the first request and after the last one give offset and drift. Times are in seconds.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Round:
    """One ping and its answer."""

    sent_at: float  # head's clock
    received_at: float  # stage's clock
    answered_at: float  # stage's clock
    back_at: float  # head's clock

    @property
    def offset(self) -> float:
        """Return how far the stage's clock is ahead of the head's."""
        return ((self.received_at - self.sent_at) + (self.answered_at - self.back_at)) / 2

    @property
    def error(self) -> float:
        """Return the largest error of the offset, for any split of the way into there and back."""
        return ((self.back_at - self.sent_at) - (self.answered_at - self.received_at)) / 2


@dataclass(frozen=True, slots=True)
class Clock:
    """A stage's clock, linear between two moments at which its offset is known."""

    first: tuple[float, float] = (0.0, 0.0)  # (when by the stage's clock, offset)
    last: tuple[float, float] = (0.0, 0.0)
    error: float = 0.0

    @property
    def drift(self) -> float:
        """Return the seconds that the stage's clock gains per second."""
        elapsed = self.last[0] - self.first[0]
        return (self.last[1] - self.first[1]) / elapsed if elapsed > 0 else 0.0

    def to_head(self, when: float) -> float:
        """Convert a time of the stage's clock to the head's."""
        return when - self.first[1] - self.drift * (when - self.first[0])


def estimate(rounds: Sequence[Round], *, before: float, after: float) -> Clock | None:
    """Estimate a stage's clock from its rounds; None if there are none.

    Rounds up to `before` (head's clock) give the first moment, those from `after` on the last one;
    the quickest round of each counts. An offset within its error counts as zero: the clock is
    shared.
    """
    if not rounds:
        return None
    first = _quickest(r for r in rounds if r.back_at <= before) or _quickest(rounds)
    assert first is not None
    last = _quickest(r for r in rounds if r.sent_at >= after) or first
    error = max(first.error, last.error)
    if all(abs(r.offset) <= r.error for r in (first, last)):
        return Clock(error=error)
    return Clock(
        first=(first.answered_at, first.offset),
        last=(last.answered_at, last.offset if last is not first else first.offset),
        error=error,
    )


def _quickest(rounds: Iterable[Round]) -> Round | None:
    return min(rounds, key=lambda r: r.error, default=None)


def pair_rounds(
    pings_sent: Sequence[float],
    pings_received: Sequence[float],
    answers_sent: Sequence[float],
    answers_received: Sequence[float],
) -> list[Round]:
    """Combine four sorted columns of times into rounds.

    A stage also sends its status unasked, so a ping's answer is the first status sent after the
    ping came.
    """
    rounds = []
    index = 0
    answers = list(zip(answers_sent, answers_received, strict=False))
    for sent_at, received_at in zip(pings_sent, pings_received, strict=False):
        while index < len(answers) and answers[index][0] < received_at:
            index += 1
        if index == len(answers):
            break
        rounds.append(Round(sent_at, received_at, *answers[index]))
    return rounds
