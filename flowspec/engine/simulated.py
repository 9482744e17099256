"""SimulatedEngine: head and stages in one process, under the simulator's virtual clock."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace

from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import Emulation
from flowspec.engine.build import HeadParts, build_head
from flowspec.engine.engine import EngineStatus, StageStatus
from flowspec.engine.status import progress_of, stage_status
from flowspec.engine.stream import Stream
from flowspec.head.head import Head
from flowspec.protocol.messages import HEAD, AbandonRequests, AbortRequest, ForgetCosts, Submit
from flowspec.request import ClusterError, Failure, FinishReason, Request, RequestOutput, TokensOut
from flowspec.runtime.core import Core
from flowspec.simulator.ablated import arrange
from flowspec.simulator.simulator import (
    ChargeHost,
    ChargeLink,
    ChargeWork,
    Simulator,
    free_host,
    instant_link,
    unit_work,
)
from flowspec.stage.stage import Stage

CLOSED = "the engine was closed"


class SimulatedEngine:
    """Head and stages under one Simulator; reading a stream advances the clock.

    Times in its statistics are virtual seconds. What an ablation of the head's own strategy takes
    away from the pipeline is taken away here (simulator/ablated.py).
    """

    def __init__(  # noqa: PLR0913 - what a simulator charges, by kind
        self,
        head: Head,
        stages: Sequence[Stage],
        *,
        render: Callable[[Request], Request] = lambda request: request,
        work_time: ChargeWork = unit_work,
        link_time: ChargeLink = instant_link,
        host_time: ChargeHost = free_host,
        wrap: Callable[[Core], Core] = lambda core: core,
        beside: Sequence[Core] = (),
    ) -> None:
        self.head = head
        self._render = render
        at_head, self.stages = arrange(head, stages)
        cores: dict[int, Core] = {HEAD: wrap(at_head)}
        cores.update({stage.rank: wrap(stage) for stage in self.stages})
        cores.update({core.rank: core for core in beside})  # such as a drafter that pushes
        self.simulator = Simulator(
            cores, work_time=work_time, link_time=link_time, host_time=host_time
        )
        self._lock = threading.RLock()
        self._newest_id = 0
        self._newest_at = 0.0  # begin of the newest request
        self._streams: dict[int, Stream] = {}
        self._begins: dict[int, float] = {}  # begin of each request
        self._counts_due: dict[int, Stream] = {}
        self._num_finished = self._num_failed = 0
        self._closed = ""

    def submit(self, request: Request, *, at: float | None = None) -> Stream:
        """Begin a request now, or `at` a later virtual time in seconds.

        A request that brings an id keeps it; it must be above earlier ones. Raises ValueError if
        its time is before that of an earlier request, since the head takes ids in rising order.
        Otherwise raises as `Engine.submit` does.
        """
        with self._lock:
            if self._closed:
                raise ClusterError("simulator", f"it takes no more requests: {self._closed}")
            when = max(self.simulator.now, at or 0.0)
            if when < self._newest_at:
                raise ValueError(
                    f"the request is to begin at {when:g} s, and one is submitted for "
                    f"{self._newest_at:g} s already; submit requests in the order of their times"
                )
            self.head.resolve(request.decoding)
            request = self._render(request)
            number = request.id or max(self._newest_id, self.head.newest_id) + 1
            self._newest_id = max(self._newest_id, number)
            stream = Stream(number, abort=self.abort, advance=self.step)
            if number in self._streams:
                raise ValueError(f"request {number} is open already; give each its own id")
            self._streams[number] = stream
            self._newest_at = self._begins[number] = when
            self.simulator.submit(Submit(request=replace(request, id=number)), at=when)
        return stream

    def abort(self, request: int) -> None:
        """End a request, at the earliest when it begins; messages in flight still arrive."""
        with self._lock:
            self.simulator.submit(AbortRequest(request=request), at=self._begins.get(request))
            while request in self._streams and self.step():
                pass

    def step(self) -> bool:
        """Process one event; return False if none is left.

        Then open requests end with an error: the pipeline has stopped without a reason.
        """
        with self._lock:
            try:
                went_on = self.simulator.step()
            except ClusterError as error:  # it never becomes idle
                self._end_all(Failure(cause=error.cause, rank=0))
                return False
            self._deliver_all()
            self._deliver_counts()
            if not went_on and self._streams:
                self._abandon(Failure(cause="nothing is left to do", rank=0))
            return went_on

    def _deliver_all(self) -> None:
        while self.simulator.to_client:
            self._deliver(self.simulator.to_client.popleft())

    def _deliver(self, event: object) -> None:
        assert isinstance(event, TokensOut | RequestOutput), "the head speaks to clients so"
        stream = self._streams.get(event.request)
        if stream is None:
            return
        if isinstance(event, RequestOutput):
            del self._streams[event.request], self._begins[event.request]
            self._num_finished += event.error is None
            self._num_failed += event.error is not None
            self._counts_due[event.request] = stream
        stream.put(event)
        if not self._streams:
            self.simulator.run()  # messages in flight still arrive

    def _deliver_counts(self) -> None:
        for request, stream in list(self._counts_due.items()):
            counts = self.head.finished.get(request)
            is_whole = counts is not None and len(counts) == len(self.stages)
            if counts is None or is_whole:
                del self._counts_due[request]
                stream.put_counts(counts)

    def _abandon(self, failure: Failure) -> None:
        """End open requests with this failure; they keep their tokens."""
        self.simulator.deliver(HEAD, AbandonRequests(failure=failure))
        self._deliver_all()
        self._end_all(failure)

    def _end_all(self, failure: Failure) -> None:
        """End open requests with this failure, even those that the head does not know."""
        for request, stream in list(self._streams.items()):
            del self._streams[request], self._begins[request]
            self._num_failed += 1
            stream.put(RequestOutput(request=request, reason=FinishReason.ERROR, error=failure))

    def stages_status(self) -> dict[int, StageStatus]:
        """Return the newest totals of each stage, by rank."""
        return {rank: stage_status(one) for rank, one in self.head.statuses.items()}

    def status(self) -> EngineStatus:
        """Return the present status, in virtual time."""
        scheduler = self.head.scheduler
        return EngineStatus(
            healthy=not self._closed,
            why=self._closed,
            num_stages=len(self.stages),
            max_context=scheduler.max_context,
            strategy=self.head.decoding.strategy,
            drafters=tuple(name for name in self.head.drafters if name != "none"),
            num_running=len(scheduler.running),
            num_waiting=len(scheduler.waiting),
            num_finished=self._num_finished,
            num_failed=self._num_failed,
            progress=progress_of(scheduler.running.values()),
            stages=self.stages_status(),
        )

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and run the open ones to their ends."""
        del timeout_s  # virtual time passes at once
        with self._lock:
            self._closed = self._closed or "it is draining"
            while self._streams and self.step():
                pass
            return not self._streams

    def forget(self) -> None:
        """Forget learnt costs. Raises as `Engine.forget` does."""
        with self._lock:
            if self._streams:
                raise ValueError(f"{len(self._streams)} requests are open; costs are in use")
            if self._closed == CLOSED:
                raise ClusterError("simulator", CLOSED)
            self.simulator.submit(ForgetCosts())
            self.simulator.run()

    def close(self) -> None:
        """End open requests."""
        with self._lock:
            failure = Failure(cause=CLOSED, rank=0)
            self._closed = failure.cause
            if self._streams:
                self._abandon(failure)
            for stream in self._counts_due.values():
                stream.put_counts(None)
            self._counts_due.clear()


def emulated_engine(
    config: EngineConfig, parts: HeadParts, stages: Sequence[Stage], emulation: Emulation
) -> SimulatedEngine:
    """Return a fresh head and fresh stages over loaded models, on the clock of `emulation`.

    Raises ValueError if the split has another number of stages.
    """
    emulation.check_stages(len(stages))
    fresh = [
        Stage(stage.rank, stage.num_stages, stage.model, batch_invariant=stage.batch_invariant)
        for stage in stages
    ]
    head = build_head(config, parts)
    head.pipe.link_row_ms = emulation.link_row_ms
    return SimulatedEngine(
        head,
        fresh,
        render=parts.render,
        work_time=emulation.work,
        link_time=emulation.link,
        host_time=emulation.host,
    )
