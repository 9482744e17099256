"""Pipeline: the head's view of the pipeline: batches in flight and their costs.

Times are in seconds of the event loop's clock unless the name says milliseconds.
"""

from dataclasses import dataclass, field


class SegmentCost:
    """t(n), the time that the slowest stage takes for a segment of n rows.

    It is learnt from segments that came back. It keeps exponential averages at powers of two, is
    linear between them, and never falls with n. Sizes that were not seen cost as much as the
    largest smaller one, so they get tried.
    """

    _SIZES = tuple(2**k for k in range(11))

    def __init__(self, decay: float = 0.1) -> None:
        self._decay = decay
        self._mean_ms: dict[int, float] = {}
        self._counts: dict[int, int] = {}
        self._known: dict[int, float] = {}  # results of milliseconds() since the last record

    def record(self, rows: int, elapsed_ms: float) -> None:
        """Record that a stage took `elapsed_ms` for `rows` rows."""
        self._known.clear()
        size = min((s for s in self._SIZES if s >= rows), default=self._SIZES[-1])
        before = self._mean_ms.get(size, elapsed_ms)
        count = self._counts[size] = self._counts.get(size, 0) + 1
        # The first forward of a size may pay for allocations, so early ones count alike.
        share = max(self._decay, 1 / count)
        self._mean_ms[size] = before + share * (min(elapsed_ms, 4 * before) - before)

    def milliseconds(self, rows: int) -> float:
        """Return the expected time of a segment of `rows` rows; 1.0 while nothing is known."""
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
    """One message in flight: a segment, or a batch with segments of several requests."""

    num_rows: int
    segments: tuple[tuple[int, int], ...]  # (request, seq_no) of each; the first names the batch
    prompt: bool = False  # whether it holds only pieces of prompts
    started_at: float | None = None  # when the first stage began with it, as the head learnt


@dataclass(slots=True)
class Pipeline:
    """Batches in flight, in the order they were sent, and their costs."""

    num_stages: int
    cost: SegmentCost = field(default_factory=SegmentCost)
    batches: dict[tuple[int, int], InFlightBatch] = field(default_factory=dict)
    now: float = 0.0  # time of the last event
    draft_s: dict[str, float] = field(default_factory=dict)  # mean time of a forward, by drafter
    draft_began_at: float | None = None  # start of the forward that runs now
    drafting: str = ""  # drafter whose forward runs now
    epoch: int = 0  # of the present stages
    num_closes: int = 0  # `FinishRequest`s sent in this epoch
    link_row_ms: float = 0.0  # time that a row takes on the slowest link, if known
    max_in_flight: int = 0  # segments that the machine computes at once; 0: one per stage

    def begin_epoch(self) -> None:
        """Forget the batches in flight: the stages are lost or replaced."""
        self.epoch += 1
        self.num_closes = 0
        self.batches.clear()

    def forget(self) -> None:
        """Forget learnt costs."""
        self.cost = SegmentCost()
        self.draft_s.clear()

    @property
    def num_in_flight(self) -> int:
        """Number of batches that were sent and have not come back."""
        return len(self.batches)

    def num_in_flight_for(self, request: int) -> int:
        """Return the batches in flight, without those that hold only other requests' prompts."""
        return sum(
            not batch.prompt or any(of == request for of, _ in batch.segments)
            for batch in self.batches.values()
        )

    @property
    def num_waiting(self) -> int:
        """Number of batches that the first stage has not begun with."""
        return sum(batch.started_at is None for batch in self.batches.values())

    @property
    def is_full(self) -> bool:
        """Whether the stages' bounded queues should hold no more."""
        return self.num_in_flight > 2 * self.num_stages

    @property
    def first_stage_busy_s(self) -> float:
        """Expected time until the first stage is free."""
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
        """Add a batch that was sent; `prompt`: all its segments are pieces of prompts."""
        self.batches[segments[0]] = InFlightBatch(num_rows, segments, prompt)

    def start(self, name: tuple[int, int]) -> None:
        """Note that the first stage has begun with the batch of this (request, seq_no)."""
        if name in self.batches:
            self.batches[name].started_at = self.now

    def arrive(self, name: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """Remove a batch that has left the pipe, and return its segments."""
        done = self.batches.pop(name, None)
        return done.segments if done is not None else ()

    def begin_draft(self, drafter: str) -> None:
        """Note that a forward of `drafter` begins."""
        self.draft_began_at, self.drafting = self.now, drafter

    def end_draft(self) -> None:
        """Note that the running forward is over."""
        self.draft_began_at = None

    def draft_left_s(self, drafter: str) -> float:
        """Return the expected rest of the running forward, or the time of a new `drafter` one."""
        if self.draft_began_at is None:
            return self.draft_s.get(drafter, 0.0)
        mean = self.draft_s.get(self.drafting, 0.0)
        return max(0.0, self.draft_began_at + mean - self.now)

    def count_draft(self, elapsed: float) -> None:
        """Record that the running forward took `elapsed` seconds."""
        mean = self.draft_s.get(self.drafting, 0.0)
        self.draft_s[self.drafting] = mean + (elapsed - mean) * (0.1 if mean else 1.0)
