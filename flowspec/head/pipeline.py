"""Pipeline: what the head knows of the pipeline as a whole: batches in flight, costs.

Times in seconds of the driver's clock unless the name says milliseconds.
"""

from dataclasses import dataclass, field


class SegmentCost:
    """t(n): what a segment of n rows costs the slowest stage, learnt from segments that came back.

    Exponential averages at powers of two; between them linear, and never falling with n. Sizes not
    seen yet cost what the largest smaller one does, so they get tried.
    """

    _SIZES = tuple(2**k for k in range(11))

    def __init__(self, decay: float = 0.1) -> None:
        self._decay = decay
        self._mean_ms: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._known: dict[int, float] = {}  # milliseconds() of what was asked since the last record

    def record(self, rows: int, elapsed_ms: float) -> None:
        """A stage took `elapsed_ms` for `rows` rows."""
        self._known.clear()
        size = min((s for s in self._SIZES if s >= rows), default=self._SIZES[-1])
        before = self._mean_ms.get(size, elapsed_ms)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        # The first forward of a size may pay for allocations: early on every one counts alike.
        share = max(self._decay, 1 / count)
        self._mean_ms[size] = before + share * (min(elapsed_ms, 4 * before) - before)

    def milliseconds(self, rows: int) -> float:
        """Expected time of a segment of `rows` rows; 1.0 while nothing is known."""
        if rows not in self._known:
            self._known[rows] = self._interpolate(rows)
        return self._known[rows]

    def _interpolate(self, rows: int) -> float:
        known = [(size, ms) for size, ms in sorted(self._mean_ms.items())]
        if not known:
            return 1.0
        below = max((ms for size, ms in known if size <= rows), default=known[0][1])
        size_below = max((size for size, _ in known if size <= rows), default=known[0][0])
        above = next(((size, ms) for size, ms in known if size > rows), None)
        if above is None or rows <= size_below:
            return below
        share = (rows - size_below) / (above[0] - size_below)
        return below + share * max(0.0, above[1] - below)


@dataclass(slots=True)
class InFlightBatch:
    """What was sent as one message: a segment, or a batch of several requests' segments."""

    num_rows: int
    segments: tuple[tuple[int, int], ...]  # (request, seq_no) of each; the first names the batch
    prompt: bool = False  # nothing but pieces of prompts
    started_at: float | None = None  # when the first stage took it, as the head learnt


@dataclass(slots=True)
class Pipeline:
    """Batches in flight, in the order they were sent, and what they cost."""

    num_stages: int
    cost: SegmentCost = field(default_factory=SegmentCost)
    batches: dict[tuple[int, int], InFlightBatch] = field(default_factory=dict)
    now: float = 0.0  # at the last event
    draft_s: dict[str, float] = field(default_factory=dict)  # mean drafter forward, by drafter
    draft_began_at: float | None = None  # of the one that runs now
    drafting: str = ""  # whose forward runs now
    epoch: int = 0  # of the stages that are there now
    num_closes: int = 0  # `FinishRequest`s sent, of this epoch
    link_row_ms: float = 0.0  # what each row adds on the slowest line between stages, if known
    max_in_flight: int = 0  # segments that the machine computes at once; 0: one per stage

    def begin_epoch(self) -> None:
        """The stages are lost or replaced; what was in flight never comes back."""
        self.epoch += 1
        self.num_closes = 0
        self.batches.clear()

    def forget(self) -> None:
        """Forget what was learnt of costs."""
        self.cost = SegmentCost()
        self.draft_s.clear()

    @property
    def num_in_flight(self) -> int:
        """Batches sent and not back."""
        return len(self.batches)

    def num_in_flight_for(self, request: int) -> int:
        """Batches in flight, but for those of nothing but other requests' prompts."""
        return sum(
            not batch.prompt or any(of == request for of, _ in batch.segments)
            for batch in self.batches.values()
        )

    @property
    def num_waiting(self) -> int:
        """Batches that the first stage has not taken yet."""
        return sum(batch.started_at is None for batch in self.batches.values())

    @property
    def is_full(self) -> bool:
        """Whether as much is in flight as the stages' bounded queues should ever hold."""
        return self.num_in_flight > 2 * self.num_stages

    @property
    def first_stage_busy_s(self) -> float:
        """How much longer the first stage is expected to compute."""
        running = [batch for batch in self.batches.values() if batch.started_at is not None]
        if not running:
            return 0.0
        newest = running[-1]
        assert newest.started_at is not None
        until = newest.started_at + self.cost.milliseconds(newest.num_rows) / 1e3
        return max(0.0, until - self.now)

    def depart(
        self, num_rows: int, segments: tuple[tuple[int, int], ...], *, prompt: bool = False
    ) -> None:
        """Segments leave together; `prompt`: all are pieces of prompts."""
        self.batches[segments[0]] = InFlightBatch(num_rows, segments, prompt)

    def start(self, name: tuple[int, int]) -> None:
        """The first stage has taken the batch of this (request, seq_no)."""
        if name in self.batches:
            self.batches[name].started_at = self.now

    def arrive(self, name: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The batch has left the pipe; returns its segments."""
        done = self.batches.pop(name, None)
        return done.segments if done is not None else ()

    def begin_draft(self, drafter: str) -> None:
        """A forward of `drafter` begins."""
        self.draft_began_at, self.drafting = self.now, drafter

    def end_draft(self) -> None:
        """The forward that ran is over."""
        self.draft_began_at = None

    def draft_left_s(self, drafter: str) -> float:
        """How long the running forward is still expected to take, or one of `drafter` from now."""
        if self.draft_began_at is None:
            return self.draft_s.get(drafter, 0.0)
        mean = self.draft_s.get(self.drafting, 0.0)
        return max(0.0, self.draft_began_at + mean - self.now)

    def count_draft(self, elapsed: float) -> None:
        """The forward that ran took `elapsed` seconds."""
        mean = self.draft_s.get(self.drafting, 0.0)
        self.draft_s[self.drafting] = mean + (elapsed - mean) * (0.1 if mean else 1.0)
