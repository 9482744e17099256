"""Losses: which request is taken for the cause of the stages that were lost while it ran."""

from dataclasses import dataclass

MAX_IN_A_ROW = 2  # losses with hardly a verdict between
MAX_RECENT, MIN_ALONE = 4, 2  # losses of which none lies long before the next


@dataclass(slots=True)
class Losses:
    """Stages that were lost while a request was served, and may have been by its doing."""

    in_a_row: int = 0  # with hardly a verdict between
    early: int = 0  # of these, that came with hardly a verdict since it began
    recent: int = 0  # without a minute of service between
    alone: int = 0  # of these, while no other request was served
    last_was_alone: bool = False

    def add(self, *, alone: bool, early: bool) -> None:
        """One more."""
        self.in_a_row += 1
        self.early += early
        self.recent += 1
        self.alone += alone
        self.last_was_alone = alone

    def clear(self) -> None:
        """Some verdicts have come: it did not kill the stages at once."""
        self.in_a_row = self.early = 0

    def forget(self) -> None:
        """It has been served for long, or another request was the cause."""
        self.recent, self.alone = min(self.in_a_row, 1), 0

    @property
    def needs_trial(self) -> bool:
        """Whether it must be served alone, so that the next loss tells more."""
        return self.in_a_row > 0 or self.recent >= MAX_IN_A_ROW

    @property
    def condemns(self) -> int:
        """By how many losses the request is taken for their cause; 0: by none.

        A request may kill its device at once, or a little later each time. The latter looks like
        bad luck, so more losses are needed, some of them while no other request ran. A request
        that was served well and is then lost twice may have run beside the real cause.
        """
        if self.early >= MAX_IN_A_ROW:
            return self.in_a_row
        if not self.last_was_alone:
            return 0
        if self.in_a_row >= MAX_IN_A_ROW:
            return self.in_a_row
        return self.recent if self.recent >= MAX_RECENT and self.alone >= MIN_ALONE else 0
