"""The simulator repeats a run to the last event, and charges the given costs."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from flowspec.engine.engine import generate
from flowspec.protocol.messages import EVERY_STAGE, FinishRequest, Message, Ping, Reroot, Started
from flowspec.request import ClusterError, Failure
from flowspec.runtime.core import Send, Step, Work
from flowspec.simulator.simulator import Simulator, adversarial, instant_link
from flowspec.transport.link_occupancy import Passage
from tests.support.clusters import check_empty, make_cluster
from tests.support.scripted import ScriptedDrafter, mixed, perfect
from tests.support.tiny import T1, expected, request


def history(seed: int) -> tuple[list[Any], tuple[int, ...], float]:
    """Return every message, computation and token of one adversarial run."""
    work, link = adversarial(seed)
    events: list[Any] = []

    def noted(source: int, to: int, message: Message) -> Passage:
        delay = link(source, to, message)
        about = getattr(message, "seq_no", None), getattr(message, "nodes", None)
        events.append((source, to, type(message).__name__, about, delay))
        return delay

    drafter = ScriptedDrafter(mixed)
    cluster = make_cluster(3, "streaming", drafter=drafter, charges=(work, noted))
    cluster.simulator.work_log = log = []
    completion = generate(cluster, request(sampling=T1))
    return [*events, *log], completion.tokens, cluster.simulator.now


def test_the_same_seed_gives_the_same_history():
    """A failure can be reproduced from its seed."""
    assert history(4) == history(4)


def test_another_seed_gives_another_history_and_the_same_text():
    """Otherwise the seeds would test only one schedule."""
    one, other = history(4), history(5)
    assert one[0] != other[0]
    assert one[1] == other[1]


@pytest.mark.parametrize("num_stages", [1, 2, 3, 8])
def test_a_plain_pipeline_takes_a_trip_per_token(num_stages):
    """The closed form is N forwards of t and N + 1 links of d per token, nothing else."""
    took, delay = 0.25, 0.125
    charges = (lambda rank, work: took, lambda source, to, message: Passage(latency_s=delay))
    cluster = make_cluster(num_stages, "ar", charges=charges)
    stats = generate(cluster, request(max_new_tokens=9)).stats
    per_token = (stats.finished_at - stats.first_token_at) / 8
    assert per_token == pytest.approx(num_stages * took + (num_stages + 1) * delay)


def test_each_rank_is_charged_its_own_cost():
    """The clock is the only measure of an emulated run: busy times are sums of charges."""
    charges = (lambda rank, work: 1.0 + rank, instant_link)
    cluster = make_cluster(3, "ar", charges=charges, chunked_prefill_size=64)
    generate(cluster, request(max_new_tokens=5))
    forwards = 1 + 4  # the prompt, and every token but the last
    charged = {rank: forwards * (1.0 + rank) for rank in (1, 2, 3)}
    assert cluster.simulator.busy_s == {0: 0.0, **charged}
    assert {rank: status.busy_s for rank, status in cluster.status().stages.items()} == charged


def test_right_guesses_buy_time():
    """With a drafter that is always right, streaming is far faster than the plain pipeline."""
    speeds = {}
    for strategy in ("ar", "streaming"):
        cluster = make_cluster(4, strategy, drafter=ScriptedDrafter(perfect))
        speeds[strategy] = generate(cluster, request(max_new_tokens=24)).stats.tokens_per_s
    assert speeds["streaming"] > 2.5 * speeds["ar"]


@dataclass(slots=True)
class Sender:
    """Sends its messages once, when it receives one."""

    rank: int
    outgoing: list[Send] = field(default_factory=list)
    received: list[tuple[float, Message]] = field(default_factory=list)

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Record the message; return the waiting sends."""
        self.received.append((now, message))
        sends, self.outgoing = self.outgoing, []
        return sends

    def poll(self, now: float) -> Step | None:
        """Return no step."""
        del now
        return None


def test_data_keeps_its_order_and_control_overtakes_it():
    """A slow segment delays later segments, but not a verdict, as over two ZeroMQ sockets."""
    data = [FinishRequest(request=number) for number in range(4)]
    verdict = Reroot(request=9, position=1, parent=0, token=0)
    head = Sender(0, [*(Send(1, message) for message in data), Send(1, verdict)])
    stage = Sender(1)
    delays = iter([5.0, 1.0, 2.0, 0.5, 0.1])
    simulator = Simulator({0: head, 1: stage}, link_time=lambda *_: Passage(latency_s=next(delays)))
    simulator.submit(Ping(rank=0))
    simulator.run()
    assert [message for _, message in stage.received] == [verdict, *data]
    assert [when for when, _ in stage.received] == [0.1, 5.0, 5.0, 5.0, 5.0]


def test_broadcasts_reach_every_stage_but_the_sender():
    """The last stage has applied its own verdict already; the head gets its own copy."""
    cores = {rank: Sender(rank) for rank in range(4)}
    cores[0].outgoing = [Send(3, Ping(rank=0))]
    cores[3].outgoing = [Send(EVERY_STAGE, Started(request=1, seq_no=1))]
    simulator = Simulator(cores)
    simulator.submit(Ping(rank=0))
    simulator.run()
    assert [len(cores[rank].received) for rank in range(4)] == [1, 1, 1, 1]
    assert isinstance(cores[1].received[0][1], Started)


def test_messages_wait_while_a_core_computes():
    """A device does one thing at a time; messages that come meanwhile are handled afterwards."""

    class Worker(Sender):
        def poll(self, now: float) -> Step | None:
            if len(self.received) != 1 or self.outgoing:
                return None
            self.outgoing = [Send(0, Ping(rank=1))]
            return Step(work=Work("forward", 1, 0, lambda: None, lambda now, elapsed: ()))

    worker = Worker(1)
    head = Sender(0, [Send(1, Ping(rank=0)), Send(1, Ping(rank=0))])
    delays = iter([1.0, 2.0, 0.0])
    simulator = Simulator(
        {0: head, 1: worker},
        work_time=lambda *_: 10.0,
        link_time=lambda *_: Passage(latency_s=next(delays)),
    )
    simulator.submit(Ping(rank=0))
    simulator.run()
    assert [when for when, _ in worker.received] == [1.0, 11.0]


def test_a_cluster_that_never_rests_is_stopped():
    """Two cores that answer each other for ever must not hang the tests."""

    class Echo(Sender):
        def handle(self, message: Message, now: float) -> Sequence[Send]:
            return [Send(1 - self.rank, message)]

    simulator = Simulator({0: Echo(0), 1: Echo(1)}, max_events=500)
    simulator.submit(Ping(rank=0))
    with pytest.raises(ClusterError, match="500 events"):
        simulator.run()


def test_a_cluster_with_nothing_left_to_do_is_an_error():
    """A lost message ends the request with an error and the tokens so far; there is no wait."""
    cluster = make_cluster(2, "ar")
    last = cluster.stages[-1]
    verdict, given = last._verdict, []

    def silent(state, segment):
        given.append(verdict(state, segment))
        return given[-1] if len(given) != 5 else []  # the prompt has three pieces

    last._verdict = silent  # type: ignore[method-assign]
    output = generate(cluster, request())
    assert output.error == Failure(cause="nothing is left to do", rank=0)
    assert list(output.tokens) == expected(request())[:2]
    assert list(generate(cluster, request(2)).tokens) == expected(request(2))
    check_empty(cluster)
