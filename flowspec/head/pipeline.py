"""Pipe: what the head knows of the pipeline as a whole, whoever's rows are in it.

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
class Trip:
    """What was sent as one message: a segment, or a batch of several requests' segments."""

    num_rows: int
    segments: tuple[tuple[int, int], ...]  # (request, seq_no) of each; the first names the trip
    prompt: bool = False  # nothing but pieces of prompts
    started_at: float | None = None  # when the first stage took it, as the head learnt


@dataclass(slots=True)
class Pipeline:
    """Trips under way, in the order they were sent, and what they cost."""

    num_stages: int
    cost: SegmentCost = field(default_factory=SegmentCost)
    trips: dict[tuple[int, int], Trip] = field(default_factory=dict)
    now: float = 0.0  # at the last event
    draft_s: float = 0.0  # what a drafter forward takes, a running mean
    draft_began_at: float | None = None  # of the one that runs now
    epoch: int = 0  # of the stages that are there now
    num_closes: int = 0  # `FinishRequest`s sent, of this epoch
    link_row_ms: float = 0.0  # what each row adds on the slowest line between stages, if known

    def begin_epoch(self) -> None:
        """The stages are lost, or are others now: what was under way never comes back."""
        self.epoch += 1
        self.num_closes = 0
        self.trips.clear()

    @property
    def num_in_flight(self) -> int:
        """Trips sent and not back."""
        return len(self.trips)

    def num_in_flight_for(self, request: int) -> int:
        """Trips in flight, but for those of nothing but other requests' prompts."""
        return sum(
            not trip.prompt or any(of == request for of, _ in trip.segments)
            for trip in self.trips.values()
        )

    @property
    def num_waiting(self) -> int:
        """Trips that the first stage has not taken yet."""
        return sum(trip.started_at is None for trip in self.trips.values())

    @property
    def is_full(self) -> bool:
        """As much is under way as the stages' bounded queues should ever hold."""
        return self.num_in_flight > 2 * self.num_stages

    @property
    def first_stage_busy_s(self) -> float:
        """How much longer the first stage is expected to compute."""
        running = [trip for trip in self.trips.values() if trip.started_at is not None]
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
        self.trips[segments[0]] = Trip(num_rows, segments, prompt)

    def start(self, trip: tuple[int, int]) -> None:
        """The first stage has taken the trip."""
        if trip in self.trips:
            self.trips[trip].started_at = self.now

    def arrive(self, trip: tuple[int, int]) -> tuple[tuple[int, int], ...]:
        """The trip has left the pipe; returns its segments."""
        done = self.trips.pop(trip, None)
        return done.segments if done is not None else ()

    @property
    def draft_left_s(self) -> float:
        """How much longer the running drafter forward is expected to take, or one begun now."""
        if self.draft_began_at is None:
            return self.draft_s
        return max(0.0, self.draft_began_at + self.draft_s - self.now)

    def count_draft(self, elapsed: float) -> None:
        """A drafter forward took `elapsed` seconds."""
        self.draft_s += (elapsed - self.draft_s) * (0.1 if self.draft_s else 1.0)
