"""What the stages do during one request, from the totals that they tell anyway."""

import time
from collections.abc import Mapping

from pydantic import ValidationError

from flowspec.head.head import Head
from flowspec.protocol.control import StageFigures
from flowspec.protocol.messages import Status


def settled(head: Head) -> Mapping[int, Status] | None:
    """The stages' totals where all have done with whatever is over; None where one has yet to say.

    `FinishRequest` comes behind a request's rows: who has taken in all that were sent has no such
    rows.
    """
    statuses, pipe = head.statuses, head.pipe
    if not statuses or set(statuses) != set(range(1, pipe.num_stages + 1)):
        return None
    is_last_word = all(s.num_closes == pipe.num_closes for s in statuses.values())
    return dict(statuses) if is_last_word else None


class StageWatch:
    """Compares the stages' totals before a request, at its first token and after it.

    Nothing is known of a request that had not the stages to itself, or that lost one of them.
    """

    def __init__(self, head: Head, *, alone: bool) -> None:
        self.alone = alone
        self.is_whole = True  # no stage was lost, and nobody came before their last word
        self.was_late = head.outage is not None  # its first token waited for lost stages
        self._head = head
        self._before = settled(head)
        self._first_at: float | None = None
        self._first: dict[int, Status] = {}

    def lose(self) -> None:
        """A stage is lost."""
        self.is_whole = False
        self.was_late |= self._first_at is None

    def first_token(self) -> bool:
        """A token has come; whether it is the first, so that the stages are to be asked now."""
        is_first = self._first_at is None
        if is_first:
            self._first_at = time.monotonic()
        return is_first

    def look(self) -> None:
        """Keep what each stage says first after the first token."""
        if self._first_at is None:
            return
        for rank, status in self._head.statuses.items():
            if self._head.heard_at[rank] >= self._first_at:
                self._first.setdefault(rank, status)

    @property
    def is_settled(self) -> bool:
        """Whether nothing is to be waited for once the request is over."""
        return not self._is_usable or settled(self._head) is not None

    @property
    def _is_usable(self) -> bool:
        return self.alone and self.is_whole and self._before is not None

    def figures(self) -> StageFigures | None:
        """What came since the request began; None where it is not known or cannot be."""
        before, after = self._before, settled(self._head)
        if not self._is_usable or before is None or after is None or set(before) != set(after):
            return None
        last, first = max(after), self._first
        since_first = [after[r].busy_s - first[r].busy_s for r in sorted(after) if r in first]
        pruned = sum(after[rank].num_rows_pruned - before[rank].num_rows_pruned for rank in after)
        try:
            return StageFigures(
                rows_pruned=pruned,
                rows_run_by_last=after[last].num_rows_run - before[last].num_rows_run,
                # an answer may be over before a stage has said what it had done by the first token
                busy_s=tuple(since_first) if len(since_first) == len(after) else (),
            )
        except ValidationError:  # a device says whatever it says: totals that go down, say
            return None
