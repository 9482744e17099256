"""Losses: decides which request is the likely cause of lost stages."""

from dataclasses import dataclass

MAX_IN_A_ROW = 2  # losses with hardly a verdict between
MAX_RECENT, MIN_ALONE = 4, 2  # losses without a minute of service between them


@dataclass(slots=True)
class Losses:
    """Losses of stages while a request ran, which it may have caused."""

    in_a_row: int = 0  # with hardly a verdict between
    early: int = 0  # of these: soon after it began
    recent: int = 0  # without a minute of service between
    alone: int = 0  # of these: while no other request ran
    last_was_alone: bool = False

    def add(self, *, alone: bool, early: bool) -> None:
        """Count one more loss."""
        self.in_a_row += 1
        self.early += early
        self.recent += 1
        self.alone += alone
        self.last_was_alone = alone

    def clear(self) -> None:
        """Forget the losses in a row: verdicts have come, so it did not kill the stages at once."""
        self.in_a_row = self.early = 0

    def forget(self) -> None:
        """Forget all losses: it ran for long, or another request was the cause."""
        self.recent, self.alone = min(self.in_a_row, 1), 0

    @property
    def needs_trial(self) -> bool:
        """Whether it must run alone, so that the next loss tells more."""
        return self.in_a_row > 0 or self.recent >= MAX_IN_A_ROW

    @property
    def condemns(self) -> int:
        """Return the number of losses that make the request their likely cause; 0: it is not.

        A request may kill its device at once, or a little later each time. The latter looks like
        bad luck, so more losses are needed, some of them while no other request ran. A request that
        ran well and is then lost twice may have run beside the real cause.
        """
        if self.early >= MAX_IN_A_ROW:
            return self.in_a_row
        if not self.last_was_alone:
            return 0
        if self.in_a_row >= MAX_IN_A_ROW:
            return self.in_a_row
        return self.recent if self.recent >= MAX_RECENT and self.alone >= MIN_ALONE else 0
