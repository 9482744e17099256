"""A cluster in one process on the simulator's virtual clock, with the interface of a real one."""

from collections.abc import Callable, Iterator, Sequence

from flowspec.config import DecodeConfig, EngineConfig
from flowspec.cost_model.emulation import Emulation
from flowspec.engine.build import HeadParts, build_head
from flowspec.head.answers import Answers
from flowspec.head.head import Head
from flowspec.protocol.messages import HEAD, AbortRequest, Status, Submit, Tokens
from flowspec.request import ClusterError, Completion, Request
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
from flowspec.speculation.strategies import StrategySpec
from flowspec.stage.stage import Stage
from flowspec.system import signals


class SimulatedCluster:
    """Head and stages under one Simulator. Times in its statistics are virtual seconds.

    What the head's strategy takes away from the pipeline itself is taken away here (ablated.py).
    """

    def __init__(
        self,
        head: Head,
        stages: Sequence[Stage],
        *,
        work_time: ChargeWork = unit_work,
        link_time: ChargeLink = instant_link,
        host_time: ChargeHost = free_host,
        wrap: Callable[[Core], Core] = lambda core: core,
    ) -> None:
        self.head = head
        at_head, self.stages = arrange(head, stages)
        cores: dict[int, Core] = {HEAD: wrap(at_head)}
        cores.update({stage.rank: wrap(stage) for stage in self.stages})
        self.simulator = Simulator(
            cores, work_time=work_time, link_time=link_time, host_time=host_time
        )

    def configure(self, spec: StrategySpec, config: DecodeConfig) -> None:
        """See Cluster.configure. Raises ValueError where `spec` needs another pipeline."""
        if spec.without is not self.head.spec.without:
            raise ValueError(
                "an ablation of the pipeline needs a cluster that was made for it; run it with "
                "`flowspec bench`"
            )
        self.head.configure(spec, config)

    def serve(self, requests: Sequence[Request]) -> Iterator[Tokens | Completion]:
        """See Cluster.serve."""
        simulator = self.simulator
        answers = Answers(self.head, requests)
        for request in requests:
            simulator.submit(Submit(request=request))
        try:
            while simulator.step():
                signals.check()
                while simulator.to_client:
                    event = answers.take(simulator.to_client.popleft())
                    if event is None:
                        continue
                    if not answers.open:
                        simulator.run()  # what is on its way still arrives
                    yield event
                    if not answers.open:
                        return
        except GeneratorExit:  # the caller has turned away: do not go on without it
            for left in answers.open:
                self.cancel(left)
            simulator.run()
            raise
        raise ClusterError(
            "simulator", "nothing is left to do and a request is not over", answers.tokens
        )

    def cancel(self, request: int) -> None:
        """See Cluster.cancel."""
        self.simulator.submit(AbortRequest(request=request))

    def statuses(self) -> dict[int, Status]:
        """See Cluster.statuses."""
        return dict(self.head.statuses)

    def close(self) -> None:
        """Nothing to end."""


def emulated_cluster(
    config: EngineConfig, parts: HeadParts, stages: Sequence[Stage], emulation: Emulation
) -> SimulatedCluster:
    """A fresh head and fresh stages over loaded models, on the clock of `emulation`.

    Raises ValueError where the split has another number of stages.
    """
    emulation.check_stages(len(stages))
    fresh = [
        Stage(stage.rank, stage.num_stages, stage.model, batch_invariant=stage.batch_invariant)
        for stage in stages
    ]
    head = build_head(config, parts)
    head.pipe.link_row_ms = emulation.link_row_ms
    return SimulatedCluster(
        head,
        fresh,
        work_time=emulation.work,
        link_time=emulation.link,
        host_time=emulation.host,
    )
