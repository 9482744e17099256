"""Figures of one request of a benchmark, from the head's statistics and the records of its run.

The decode time runs from the first token to the last; prefill is separate, and nothing after the
end of the text counts. Times are in seconds of the event loop's clock.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from flowspec.bench.records import RunFigures, hash_tokens, repeated_share
from flowspec.protocol.messages import CLIENT, HEAD
from flowspec.request import DecodeStats, FinishReason, RequestOutput, StageCounts
from flowspec.tracing.idle_time import Span, track
from flowspec.tracing.timeline import HOUSEKEEPING, Timeline

PERCENTILES = {"p50": 0.5, "p95": 0.95, "p99": 0.99}


@dataclass(frozen=True, slots=True)
class RowCounts:
    """Rows of one request on all stages."""

    pruned: int = 0
    run_by_last: int = 0  # prompt rows included


def count_rows(counts: Mapping[int, StageCounts] | None) -> RowCounts | None:
    """Rows by what each stage says of the request; None where a stage has not said so."""
    if not counts:
        return None
    pruned = sum(one.num_rows_pruned for one in counts.values())
    return RowCounts(pruned, counts[max(counts)].num_rows_run)


@dataclass(frozen=True, slots=True)
class Doings:
    """The processes' activity in the decode time, as shares; empty or None if unknown."""

    drafter_busy: float | None = None
    stage_busy: tuple[float, ...] = ()
    stage_idle: tuple[Mapping[str, float], ...] = ()
    link_bytes: Mapping[str, float] = field(default_factory=dict)


class Activity:
    """The activity of every process of a recorded run, looked up by time."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._tracks: dict[int, list[Span]] = {}

    @property
    def stages(self) -> list[int]:
        """Return the ranks of the stages."""
        return sorted(rank for rank in self._timeline.processes if rank != HEAD)

    def shares(self, rank: int, start: float, end: float) -> tuple[float, dict[str, float]]:
        """Return the share of work between `start` and `end`, and of other time by cause."""
        if rank not in self._tracks:
            self._tracks[rank] = track(self._timeline, rank)
        busy, idle = 0.0, defaultdict[str, float](float)
        for span in self._tracks[rank]:
            seconds = min(span.end, end) - max(span.start, start)
            if seconds <= 0:
                continue
            if span.category == "work":
                busy += seconds
            else:
                idle[span.name] += seconds
        whole = end - start
        return busy / whole, {cause: seconds / whole for cause, seconds in sorted(idle.items())}

    def during(self, start: float, end: float) -> Doings:
        """Return the activity from an answer's first token, at `start`, to its last."""
        stages: list[tuple[float, dict[str, float]]] = [(0.0, {}) for _ in self.stages]
        drafter_busy = 0.0
        if end > start:
            stages = [self.shares(rank, start, end) for rank in self.stages]
            drafter_busy = self.shares(HEAD, start, end)[0]
        return Doings(
            drafter_busy=drafter_busy,
            stage_busy=tuple(busy for busy, _ in stages),
            stage_idle=tuple(idle for _, idle in stages),
            link_bytes=self.link_bytes(start, end),
        )

    def link_bytes(self, start: float, end: float) -> dict[str, float]:
        """Return the bytes sent from rank to rank, as "from-to", from `start` up to `end`."""
        sums = defaultdict[str, float](float)
        for process in self._timeline.processes.values():
            for note in process.sent:
                away = note.peer != CLIENT and note.kind not in HOUSEKEEPING
                if away and start <= note.when < end:
                    sums[f"{process.rank}-{note.peer}"] += note.size
        return dict(sorted(sums.items()))


def measure(
    completion: RequestOutput,
    expected: Sequence[int],
    *,
    num_prompt: int,
    doings: Doings,
    rows: RowCounts | None,
) -> RunFigures:
    """Return the figures of one finished request of `num_prompt` prompt tokens.

    `rows` are those of its time, or None if unknown; `expected` are the target's own tokens.
    """
    assert completion.reason in (FinishReason.STOP, FinishReason.LENGTH), completion.error
    stats = completion.stats
    start, end = stats.first_token_at, stats.last_token_at
    decode_s = end - start - stats.resume_s
    not_drafted, not_in_flight = stats.mu
    # the last token's row is never needed
    num_needed = num_prompt - stats.num_prompt_reused + stats.num_tokens - 1
    return RunFigures(
        prompt_tokens=num_prompt,
        tokens=stats.num_tokens,
        token_hash=hash_tokens(completion.tokens),
        mismatch=list(completion.tokens) != list(expected),
        finish=completion.reason.value,
        ttft_s=stats.time_to_first_token_s,
        decode_s=decode_s,
        decode_tokens_per_s=(stats.num_tokens - 1) / decode_s if decode_s > 0 else 0.0,
        end_to_end_tokens_per_s=stats.num_tokens / max(end - stats.submitted_at, 1e-9),
        inter_token_ms={
            name: stats.inter_token.quantile(share) * 1e3 for name, share in PERCENTILES.items()
        },
        tau=stats.mean_accepted_length,
        runs=tuple(accepted_runs(stats)),
        alpha=tuple(stats.acceptance_by_depth()),
        mu=not_drafted + not_in_flight,
        mu_not_drafted=not_drafted,
        mu_not_in_flight=not_in_flight,
        rows_sent=stats.num_rows_sent,
        rows_pruned=None if rows is None else rows.pruned,
        rows_wasted=None if rows is None else rows.run_by_last - num_needed,
        segments=stats.num_segments,
        draft_forwards=stats.num_draft_forwards,
        drafter_busy=doings.drafter_busy,
        stage_busy=doings.stage_busy,
        stage_idle=doings.stage_idle,
        link_bytes=doings.link_bytes,
        tree_size=stats.mean_nodes_alive,
        repeated=repeated_share(completion.tokens),
        resumes=stats.num_resumes,
        outage_s=stats.resume_s,
    )


def accepted_runs(stats: DecodeStats) -> list[int]:
    """Return the numbers of tokens accepted between misses; the run cut off by the end is last."""
    return [*stats.runs, stats.run_length] if stats.run_length else list(stats.runs)
