"""Turns the stages' own messages into the status that engines report."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from flowspec.engine.engine import RunningProgress, StageStatus
from flowspec.head.request_state import RequestState
from flowspec.protocol.messages import Status

_COUNTED = ("busy_s", "num_segments", "num_rows_run", "num_rows_pruned")


def stage_status(status: Status) -> StageStatus:
    """Return a stage's totals in the form that clients see."""
    return StageStatus(
        busy_s=status.busy_s,
        num_segments=status.num_segments,
        num_rows_run=status.num_rows_run,
        num_rows_pruned=status.num_rows_pruned,
        num_requests=status.num_requests,
        kv_tokens_used=status.num_kv_tokens_used,
        peak_memory_bytes=status.peak_memory_bytes,
    )


def progress_of(running: Iterable[RequestState]) -> RunningProgress:
    """Return the progress of the running requests taken together."""
    stats = [request.stats for request in list(running) if request.stats.num_tokens]
    return RunningProgress(
        num_decoded=sum(one.num_tokens - 1 for one in stats),
        num_verdicts=sum(one.num_verdicts for one in stats),
        first_token_at=min((one.first_token_at for one in stats), default=0.0),
    )


class StageTotals:
    """Adds the counts of a stage's earlier processes to its present status."""

    def __init__(self) -> None:
        self._newest: dict[int, Status] = {}  # of each stage's present process
        self._ended: dict[int, Status] = {}  # sums over its earlier processes

    def of(self, statuses: Mapping[int, Status]) -> dict[int, Status]:
        """Return `statuses` with the counts of all processes, and remember them for `lose`."""
        self._newest.update(statuses)
        return {rank: self._sum(rank, status) for rank, status in statuses.items()}

    def lose(self, ranks: Iterable[int]) -> None:
        """Note that these stages' processes have ended; the next ones begin at 0."""
        for rank in ranks:
            if (last := self._newest.pop(rank, None)) is not None:
                self._ended[rank] = self._sum(rank, last)

    def _sum(self, rank: int, status: Status) -> Status:
        ended = self._ended.get(rank)
        if ended is None:
            return status
        sums = {name: getattr(ended, name) + getattr(status, name) for name in _COUNTED}
        return replace(status, **sums)
