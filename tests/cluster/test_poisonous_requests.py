"""Requests that kill a device: head, membership and devices together; others are answered."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from flowspec.cluster.membership.membership import MAX_ATTEMPTS
from flowspec.cluster.membership.roster import (
    Effect,
    FailRequests,
    Halt,
    ResumeEpoch,
)
from flowspec.engine.cluster import RequestBlamed, StageLost, TokenCrossed
from flowspec.protocol.control import Assign, Refuse, Trouble
from flowspec.protocol.messages import Batch, Reroot, Segment
from flowspec.request import ClusterError, NodeId, RequestOutput
from tests.support.asked import Live
from tests.support.in_process import TinyModel, tiny_model
from tests.support.membership_world import World

CAUSE = "CUDA error: device-side assert triggered"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """What the head serves."""
    return tiny_model(tmp_path_factory.mktemp("poisonous"))


class Cluster(Live):
    """Two devices, of which b dies at a poisonous request's rows, and rejoins at once."""

    def __init__(self, model: TinyModel, *, speaks: bool) -> None:
        """`speaks`: the device tells why, a moment before its connection breaks."""
        self.poisonous: set[int] = set()  # requests
        self.deaths = 0
        self.speaks = speaks
        self.world = World(give_up_s=20.0)
        self.inbox: list[Any] = []
        self.dying = False
        self._num_seen = self._num_told = 0
        super().__init__(model)
        self.a = self.world.join("ada")
        self.b = self.world.join("bob")
        self.world.pass_time(1.5, self.a, self.b)
        self.world.load(self.a, self.b)

    def send(self, to: int, message: Any) -> None:
        """To a stage: the last one's verdict on a whole prompt comes at once."""
        del to
        for one in message.segments if isinstance(message, Batch) else [message]:
            if not isinstance(one, Segment):
                continue
            if one.request in self.poisonous:
                self.dying = True
            elif one.verify:
                self.inbox.append(self.verdict(one.request, one.nodes[-1]))

    def verdict(self, request: int, parent: NodeId) -> Reroot:
        """The first token of an answer."""
        position = int(parent) + 1
        return Reroot(epoch=self.epoch, request=request, position=position, parent=parent, token=3)

    def receive(self, timeout_s: float) -> Sequence[Any]:
        """What stages say; the connection to one that has died is gone."""
        del timeout_s
        if self.dying:
            self.dying, self.inbox = False, []
            self.deaths += 1
            if self.speaks:
                epoch = self.world.last(self.b, Assign).epoch
                self.world.say(self.b, Trouble(epoch=epoch, cause=CAUSE))
                for effect in self.new_effects():
                    if isinstance(effect, Halt):
                        self.engine.obey(effect)
            raise ClusterError.of_rank(2, "connection lost")
        inbox, self.inbox = self.inbox, []
        return inbox

    def obey_membership(self) -> None:
        """What membership has decided, as the server passes it on."""
        for effect in self.new_effects():
            match effect:
                case Halt() | FailRequests():
                    self.engine._do(effect)
                case ResumeEpoch():
                    self.begin(effect.epoch)

    def new_effects(self) -> Iterator[Effect]:
        """Those since the last time."""
        while self._num_seen < len(self.world.effects):
            self._num_seen += 1
            yield self.world.effects[self._num_seen - 1]

    def pass_events(self) -> None:
        """What the head's core has told, as the server takes it."""
        members, now = self.world.members, self.world.now
        while self._num_told < len(self.told):
            event = self.told[self._num_told]
            self._num_told += 1
            match event:
                case StageLost():
                    self.world.apply(members.stage_lost(event.epoch, event.rank, event.cause, now))
                case TokenCrossed():
                    members.crossed(event.epoch)
                case RequestBlamed():
                    members.forgive(event.epochs, now)

    def step(self) -> None:
        """One turn of everything."""
        self.obey_membership()
        if self.engine._is_live:
            self.turn()
        self.pass_events()
        if "bob" not in self.world.members.devices:
            self.world.pass_time(0.25, self.a, idle=False)
            self.b = self.world.join("bob")
            self.world.load(self.a, self.b)
        self.world.pass_time(0.25, self.a, self.b, idle=False)

    def ends(self) -> list[RequestOutput]:
        """Of the requests that are over, in the order of their coming."""
        return [stream.output for stream in self.streams if stream.output is not None]


@pytest.mark.parametrize("speaks", [False, True])
def test_many_poisonous_requests_end_and_an_innocent_one_is_answered(
    model: TinyModel, speaks: bool
) -> None:
    """More than the losses in a row after which a cluster gives up; and b is never sent away."""
    cluster = Cluster(model, speaks=speaks)
    cluster.obey_membership()
    num_poisonous = MAX_ATTEMPTS + 1
    for number in range(num_poisonous + 1):
        stream = cluster.ask(max_new_tokens=1)
        assert stream.output is None
        if number < num_poisonous:
            cluster.poisonous.add(stream.request)
    for _ in range(400):
        if len(cluster.ends()) == num_poisonous + 1:
            break
        cluster.step()
    *ends, innocent = cluster.ends()
    assert len(ends) == num_poisonous
    cause = CAUSE if speaks else "connection lost"
    for output in ends:
        said = f"stage 2 on bob: {cause}; a device was lost 2 times"
        assert str(output.error).startswith(said)
    assert (innocent.error, innocent.tokens) == (None, (3,))
    assert cluster.deaths == num_poisonous + 1, "one together, then each by itself"
    assert not any(isinstance(effect, FailRequests) for effect in cluster.world.effects)
    refusals = [m for told in cluster.world.told.values() for m in told if isinstance(m, Refuse)]
    assert refusals
    assert all(refusal.retry for refusal in refusals)
