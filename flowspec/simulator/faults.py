"""Faults in the simulator: devices crash and return; messages are lost, doubled, overtaken.

A small stand-in for the membership declares silent devices lost, replaces them, and lets the head
resume, also when nothing has moved for a while. Times are in virtual seconds; all follows from one
seed.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random

from flowspec.protocol.messages import CLIENT, DATA, HEAD, Message, Resume, Status, Suspend
from flowspec.protocol.sequencing import SequenceNumbers
from flowspec.request import Failure
from flowspec.runtime.core import Core
from flowspec.simulator.simulator import ChargeLink, ChargeWork, Simulator

NewStage = Callable[[int, int, int], Core]  # (rank, number of stages, epoch) -> an empty stage


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultPlan:
    """How much goes wrong; chances are per message unless stated otherwise."""

    crash_every_s: float = 0.0  # mean time between crashes, 0: none
    cut_every_s: float = 0.0  # mean time between cuts of a connection
    cut_s: float = 1.0  # messages in flight, or sent this soon after a cut, are lost
    drop: float = 0.0
    duplicate: float = 0.0
    reorder: float = 0.0
    until_s: float = 100.0  # end of the faults, so that a run can end
    detect_s: float = 3.0  # time from a crash to its detection
    repair_s: float = 2.0  # time from there until a device replaces it
    stall_s: float = 60.0  # time without any message after which a new epoch begins
    other_counts: tuple[int, ...] = ()  # numbers of stages that a repair may choose from


@dataclass(slots=True)
class FaultCounts:
    """Counts of the events by kind."""

    counts: dict[str, int] = field(default_factory=dict)

    def add(self, kind: str) -> None:
        """Count one more event of this kind."""
        self.counts[kind] = self.counts.get(kind, 0) + 1


class FaultySimulator(Simulator):
    """A simulator whose devices and connections fail by plan."""

    def __init__(
        self,
        cores: Mapping[int, Core],
        *,
        work_time: ChargeWork,
        link_time: ChargeLink,
        plan: FaultPlan,
        seed: int,
        new_stage: NewStage,
        max_events: int = 200_000,
    ) -> None:
        super().__init__(cores, work_time=work_time, link_time=link_time, max_events=max_events)
        self.plan, self.random, self.new_stage = plan, Random(seed), new_stage
        self.totals = FaultCounts()
        self.num_stages = len(cores) - 1
        self.epoch_of_head: Callable[[], int] = lambda: 0
        self.outage_of_head: Callable[[], object | None] = lambda: None
        self.is_idle: Callable[[], bool] = lambda: False
        self._numbers = {rank: SequenceNumbers(rank) for rank in cores}
        self._cuts: dict[tuple[int, int], float] = {}  # when a connection was cut last
        self._arrivals: dict[tuple[int, int, bool], float] = {}  # newest, by (from, to, is data)
        self._moved_at = 0.0
        self._repairing = False
        for every_s, strike in (
            (plan.crash_every_s, self._crash),
            (plan.cut_every_s, self._cut),
        ):
            if every_s:
                self._plan_next(every_s, strike)
        self._at(1.0, self._watch)

    def deliver(self, rank: int, message: Message) -> None:
        """Deliver by sequence number: drop what came twice, report a gap to the head."""
        if rank not in self.actors:
            return
        taken = self._numbers[rank].take(message)
        if taken is None:
            self.totals.add("dropped again")
        elif taken is not message and rank != HEAD:
            self.totals.add("gap")
            self._send(rank, HEAD, taken)
        else:
            if not isinstance(message, Status):
                self._moved_at = self.now
            super().deliver(rank, taken)

    def _send(self, source: int, to: int, message: Message) -> None:
        if to == CLIENT:
            self._moved_at = self.now
            super()._send(source, to, message)
            return
        if source not in self.actors:
            return
        message = self._numbers[source].number(to, message)
        plan, random = self.plan, self.random
        sent_at, copies, overtakes = self.now, 1, False
        if self.now < plan.until_s:
            if random.random() < plan.drop:
                self.totals.add("drop")
                return
            if random.random() < plan.duplicate:
                self.totals.add("duplicate")
                copies = 2
            overtakes = random.random() < plan.reorder
        channel = source, to, isinstance(message, DATA)
        for _ in range(copies):
            when = self.now + self._link_time(source, to, message).latency_s
            if overtakes:
                self.totals.add("reorder")
            else:
                when = max(when, self._arrivals.get(channel, 0.0))
                self._arrivals[channel] = when
            self._at(when, lambda: self._reach(source, to, message, sent_at))

    def _reach(self, source: int, to: int, message: Message, sent_at: float) -> None:
        cut_at = self._cuts.get((source, to))
        if cut_at is not None and sent_at <= cut_at + self.plan.cut_s and self.now >= cut_at:
            self.totals.add("lost in a cut")
            return
        self.deliver(to, message)

    def _plan_next(self, every_s: float, strike: Callable[[], None]) -> None:
        when = self.now + self.random.expovariate(1.0 / every_s)
        if when < self.plan.until_s:
            self._at(when, lambda: self._strike(every_s, strike))

    def _strike(self, every_s: float, strike: Callable[[], None]) -> None:
        strike()
        self._plan_next(every_s, strike)

    def _cut(self) -> None:
        """Cut a connection and restore it: messages in flight, both ways, are lost."""
        ranks = sorted(self.actors)
        if len(ranks) < 2 or self.is_idle():
            return
        one, other = self.random.sample(ranks, 2)
        self._cuts[one, other] = self._cuts[other, one] = self.now
        self.totals.add("cut")

    def _crash(self) -> None:
        """Stop a stage's power; nobody knows it yet."""
        alive = [rank for rank in self.actors if rank != HEAD]
        if not alive or self.is_idle():
            return
        rank = self.random.choice(alive)
        del self.actors[rank]
        self.totals.add("crash")
        failure = Failure(cause=f"no heartbeat for {self.plan.detect_s} s", rank=rank)
        suspend = Suspend(failure=failure)
        self._at(self.now + self.plan.detect_s, lambda: self.deliver(HEAD, suspend))

    def _watch(self) -> None:
        """Act as the membership does every second, until every request is answered."""
        if self.is_idle():
            return
        self._at(self.now + 1.0, self._watch)
        if self.outage_of_head() is not None:
            if not self._repairing:
                self._repairing = True
                self._at(self.now + self.random.uniform(0, self.plan.repair_s), self._repair)
        elif self.now - self._moved_at > self.plan.stall_s:
            self.totals.add("stall")
            self._moved_at = self.now
            self.deliver(HEAD, Suspend(failure=Failure(cause="nothing moves")))

    def _repair(self) -> None:
        """Give every layer a device again: new ones replace the lost ones."""
        self._repairing = False
        if self.outage_of_head() is None:
            return
        before = self.num_stages
        if self.plan.other_counts and self.random.random() < 0.5:
            self.num_stages = self.random.choice(self.plan.other_counts)
        for rank in [rank for rank in self.actors if rank != HEAD]:
            if self.num_stages != before:
                del self.actors[rank]
        for rank in range(1, self.num_stages + 1):
            if rank not in self.actors:
                self.replace(self.new_stage(rank, self.num_stages, self.epoch_of_head()))
                self._numbers[rank] = SequenceNumbers(rank)
        self.totals.add("resume" if self.num_stages == before else "resume with another number")
        self._moved_at = self.now
        self.deliver(HEAD, Resume(num_stages=self.num_stages))
