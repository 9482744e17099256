"""What a benchmark asks of a running cluster, and what it is told of an answer.

Times count from when the request came to the head.
"""

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from flowspec.cluster.fields import MAX_STAGES, Count, Name, Seconds, Strict
from flowspec.latencies import Latencies
from flowspec.request import DecodeStats

MAX_TOKENS = 1 << 16  # of an answer with figures: all lists below are bounded by it
MAX_BINS = 1500
MAX_PARAMETERS = 64
COPIED = (  # from DecodeStats as they are
    *("num_tokens", "num_verdicts", "num_segments", "num_rows_sent", "num_draft_forwards"),
    *("num_prompt_reused", "run_length", "num_not_drafted", "num_not_in_flight"),
    *("num_nodes_alive", "num_resumes", "num_prefills", "resume_s", "draft_s"),
)
MOMENTS = ("first_token_at", "last_token_at", "finished_at")

Value = bool | int | Annotated[float, Field(allow_inf_nan=False)]


class Decoding(Strict):
    """Which strategy answers, with which parameters; `run` names what may learn together.

    Another label than the one before means that costs and scores are learnt anew.
    """

    strategy: Name
    parameters: Annotated[Mapping[Name, Value], Field(max_length=MAX_PARAMETERS)]
    run: Name


class StageFigures(Strict):
    """What the stages did for one request that had them to itself."""

    rows_pruned: Count  # by all stages
    rows_run_by_last: Count  # prompt rows included
    busy_s: Annotated[tuple[Seconds, ...], Field(max_length=MAX_STAGES)]  # since the first token


class Figures(Strict):
    """A request's statistics (`DecodeStats`), and what the stages did where that is known.

    `num_resumes` also counts a wait for lost stages before it had begun: `resume_s` has nothing of
    an outage before the first token, which is a part of the time to it. `alone` is of the time
    until it was over; who came after that, before the stages' last word, takes only `stages`.
    """

    num_tokens: Count
    num_verdicts: Count
    num_segments: Count
    num_rows_sent: Count
    num_draft_forwards: Count
    num_prompt_reused: Count
    run_length: Count
    num_not_drafted: Count
    num_not_in_flight: Count
    num_nodes_alive: Count
    num_resumes: Count
    num_prefills: Count
    resume_s: Seconds
    draft_s: Seconds
    first_token_at: Seconds
    last_token_at: Seconds
    finished_at: Seconds
    runs: Annotated[tuple[Count, ...], Field(max_length=MAX_TOKENS)]
    latency_bins: Annotated[tuple[tuple[int, Count], ...], Field(max_length=MAX_BINS)]
    num_zero_latencies: Count
    epoch: Count  # in which it ended
    first_epoch: Count = 0  # in which it came; 0: between two
    alone: bool  # no other request was served meanwhile
    fresh: bool = False  # the first under a strategy just put in force: nothing learnt before it
    stages: StageFigures | None = None


def figures_of(
    stats: DecodeStats,
    *,
    epoch: int,
    alone: bool,
    stages: StageFigures | None,
    first_epoch: int = 0,
    fresh: bool = False,
) -> Figures:
    """What a client is told of a request that is over."""
    return Figures(
        **{name: getattr(stats, name) for name in COPIED},
        **{name: max(0.0, getattr(stats, name) - stats.submitted_at) for name in MOMENTS},
        runs=tuple(stats.runs),
        latency_bins=tuple(stats.inter_token.bins.items()),
        num_zero_latencies=stats.inter_token.num_zero,
        epoch=epoch,
        first_epoch=first_epoch,
        alone=alone,
        fresh=fresh,
        stages=stages,
    )


def stats_of(figures: Figures) -> DecodeStats:
    """The statistics they were made from, submitted at 0."""
    bins = dict(figures.latency_bins)
    count = sum(bins.values()) + figures.num_zero_latencies
    return DecodeStats(
        **{name: getattr(figures, name) for name in (*COPIED, *MOMENTS)},
        runs=list(figures.runs),
        inter_token=Latencies(bins, figures.num_zero_latencies, count),
    )
