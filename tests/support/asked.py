"""A cluster's engine that a test drives by hand: without devices, or with scripted stages."""

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from flowspec.cluster.membership.roster import Member, Place
from flowspec.engine.build import HeadParts
from flowspec.engine.cluster import ClusterEngine, EngineEvent
from flowspec.engine.stream import Stream
from flowspec.protocol.codec import WireError
from flowspec.protocol.control import Addresses
from flowspec.protocol.messages import Resume, Status
from flowspec.request import ClusterError, Failure, Request, RequestOutput
from tests.support.in_process import TinyModel

HERE = Addresses(control="c", data="d")
KILLED = Failure(cause="killed", rank=1)


class Asking:
    """An engine without devices and without a thread: requests wait."""

    def __init__(self, model: TinyModel) -> None:
        self.told: list[EngineEvent] = []
        no_keys: Any = None
        self.engine = ClusterEngine(model.config, model.parts, no_keys, self.told.append)
        self.engine._suspend(Failure(cause="no device has joined"))
        self.streams: list[Stream] = []

    @property
    def parts(self) -> HeadParts:
        """What the head has loaded."""
        return self.engine.parts

    def ask(self, prompt: Any = "a fox", **fields: Any) -> Stream:
        """A request that has come to the core."""
        stream = self.engine.submit(Request(prompt=prompt, **{"max_new_tokens": 8, **fields}))
        self.streams.append(stream)
        self.obey()
        return stream

    def obey(self) -> None:
        """What clients want is done, as the engine's thread does it."""
        self._do(self.engine.do_commands)

    def turn(self) -> None:
        """One turn of the engine's thread, without a wait."""
        self._do(lambda: (self.engine.do_commands(), self.engine.turn(0.0)))

    def _do(self, work: Any) -> None:
        try:
            work()
        except (ClusterError, WireError) as error:
            self.engine.lose(error)
        self.engine.deliver()

    def abort(self, stream: Stream) -> RequestOutput | None:
        """Its client turns away; how it has ended."""
        stream.abort()
        self.obey()
        return stream.output


class Live(Asking):
    """With two stages that take messages and say what the test has them say."""

    def __init__(self, model: TinyModel) -> None:
        super().__init__(model)
        self.broken: type | None = None  # kind of message that stage 2 does not take
        self.sent: list[Any] = []
        self.begin()

    def begin(self, epoch: int = 0) -> None:
        """Stages are there, and have said so."""
        engine = self.engine
        engine.epoch, engine._num_stages = epoch, 2
        engine._members = [
            Member(rank, Place(name, rank - 1, rank), HERE, num_kv_tokens=0)
            for rank, name in ((1, "ada"), (2, "bob"))
        ]
        network: Any = SimpleNamespace(
            send=self.send, wake=lambda: None, receive=self.receive, close=lambda: None
        )
        engine.loop.go_on(network, 2)
        engine.inject(Resume(num_stages=2, num_kv_tokens=0))
        engine._is_live = True
        self.say(status(1), status(2))

    def send(self, to: int, message: Any) -> None:
        """To a stage."""
        if self.broken is not None and isinstance(message, self.broken):
            raise ClusterError.of_rank(2, f"took no {type(message).__name__} for 5 s")
        self.sent.append(message)

    def receive(self, timeout_s: float) -> Sequence[Any]:
        """What stages say by themselves."""
        del timeout_s
        return ()

    def say(self, *messages: Any) -> None:
        """A stage says it."""
        for one in messages:
            self.engine.inject(one)
        self.engine.deliver()

    @property
    def running(self) -> list[int]:
        """Requests on the stages."""
        return list(self.engine.head.scheduler.running)

    @property
    def epoch(self) -> int:
        """Of the data plane's messages."""
        return self.engine.head.pipe.epoch


def status(stage: int, **fields: Any) -> Status:
    """A stage's totals."""
    zeros = dict.fromkeys(("num_segments", "num_rows_run", "num_rows_pruned", "num_requests"), 0)
    return Status(stage=stage, **{"busy_s": 0.0, **zeros, **fields})
