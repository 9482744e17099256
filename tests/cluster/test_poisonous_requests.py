"""Requests that kill a device: head, membership and devices together; others are answered."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from flowspec.cluster.controller.epochs import Blamed, Crossed, Ended, StageLost

from flowspec.cluster.membership.membership import MAX_ATTEMPTS
from flowspec.cluster.membership.roster import (
    Effect,
    FailRequests,
    Halt,
    Member,
    Place,
    ResumeEpoch,
)
from flowspec.engine.build import HeadParts
from flowspec.protocol import messages as wire
from flowspec.protocol.control import Addresses, Assign, Done, Refuse, Trouble
from flowspec.protocol.messages import Batch, Reroot, Segment
from flowspec.request import ClusterError, NodeId
from tests.support.asked import Asking, tiny_parts
from tests.support.membership_world import World

CAUSE = "CUDA error: device-side assert triggered"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> HeadParts:
    """The head's share of a tiny model."""
    return tiny_parts(tmp_path_factory.mktemp("poisonous"))


class Cluster(Asking):
    """Two devices, of which b dies at a poisonous request's rows, and rejoins at once."""

    def __init__(self, parts: HeadParts, *, speaks: bool) -> None:
        """`speaks`: the device tells why, a moment before its connection breaks."""
        super().__init__(parts)
        self.poisonous: set[int] = set()  # tickets
        self.deaths = 0
        self.speaks = speaks
        self.world = World(give_up_s=20.0)
        self.inbox: list[Any] = []
        self.dying = False
        self.a = self.world.join("a")
        self.b = self.world.join("b")
        self._num_seen = self._num_told = 0
        self.world.pass_time(1.5, self.a, self.b)
        self.world.load(self.a, self.b)

    def send(self, to: int, message: Any) -> None:
        """To a stage: the last one's verdict on a whole prompt comes at once."""
        del to
        entries = self.engine._open
        for one in message.segments if isinstance(message, Batch) else [message]:
            if not isinstance(one, Segment):
                continue
            entry = entries.get(one.request)
            if entry is not None and entry.ticket in self.poisonous:
                self.dying = True
            elif one.verify:
                self.inbox.append(self.verdict(one.request, one.nodes[-1]))

    def verdict(self, request: int, parent: NodeId) -> Reroot:
        """The first token of an answer."""
        epoch, position = self.engine.head.pipe.epoch, int(parent) + 1
        return Reroot(epoch=epoch, request=request, position=position, parent=parent, token=3)

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
                        self.engine.post(effect)
            raise ClusterError("stage 2", "connection lost")
        inbox, self.inbox = self.inbox, []
        return inbox

    def obey(self) -> None:
        """What membership has decided, as the server passes it on."""
        for effect in self.new_effects():
            match effect:
                case Halt() | FailRequests():
                    self.engine._do(effect)
                case ResumeEpoch():
                    self.resume(effect.epoch)

    def new_effects(self) -> Iterator[Effect]:
        """Those since the last time."""
        while self._num_seen < len(self.world.effects):
            self._num_seen += 1
            yield self.world.effects[self._num_seen - 1]

    def resume(self, epoch: int) -> None:
        """All stages are there."""
        engine = self.engine
        engine._epoch, engine._num_stages = epoch, 2
        here = Addresses(control="c", data="d")
        engine._members = [
            Member(rank, Place(name, 0, 1), here, num_kv_tokens=0)
            for rank, name in ((1, "a"), (2, "b"))
        ]
        network = SimpleNamespace(send=self.send, wake=lambda: None, receive=self.receive)
        engine._driver.go_on(network, 2)
        engine._inject(wire.Resume(num_stages=2, num_kv_tokens=0))
        engine._is_live = True

    def pass_events(self) -> None:
        """What the head's core has told, as the server takes it."""
        members, now = self.world.members, self.world.now
        while self._num_told < len(self.told):
            event = self.told[self._num_told]
            self._num_told += 1
            match event:
                case StageLost():
                    self.world.apply(members.stage_lost(event.epoch, event.rank, event.cause, now))
                case Crossed():
                    members.crossed(event.epoch)
                case Blamed():
                    members.forgive(event.epochs, now)

    def step(self) -> None:
        """One turn of everything."""
        self.obey()
        if self.engine._is_live:
            self.engine._turn()
        self.pass_events()
        if "b" not in self.world.members.devices:
            self.world.pass_time(0.25, self.a, idle=False)
            self.b = self.world.join("b")
            self.world.load(self.a, self.b)
        self.world.pass_time(0.25, self.a, self.b, idle=False)

    def ends(self) -> dict[int, Done]:
        """By ticket."""
        return {event.ticket: event.done for event in self.told if isinstance(event, Ended)}


@pytest.mark.parametrize("speaks", [False, True])
def test_many_poisonous_requests_end_and_an_innocent_one_is_answered(
    parts: HeadParts, speaks: bool
) -> None:
    """More than the losses in a row after which a cluster gives up; and b is never sent away."""
    cluster = Cluster(parts, speaks=speaks)
    cluster.obey()
    num_poisonous = MAX_ATTEMPTS + 1
    for ticket in range(1, num_poisonous + 2):
        assert cluster.ask(None, max_new_tokens=1) is None
        if ticket <= num_poisonous:
            cluster.poisonous.add(ticket)
    for _ in range(400):
        if len(cluster.ends()) == num_poisonous + 1:
            break
        cluster.step()
    ends = cluster.ends()
    assert len(ends) == num_poisonous + 1
    cause = CAUSE if speaks else "connection lost"
    for ticket in cluster.poisonous:
        assert ends[ticket].error.startswith(f"stage 2 on b: {cause}; a device was lost 2 times")
    assert (ends[num_poisonous + 1].error, ends[num_poisonous + 1].num_tokens) == ("", 1)
    assert cluster.deaths == num_poisonous + 1, "one together, then each by itself"
    assert not any(isinstance(effect, FailRequests) for effect in cluster.world.effects)
    refusals = [m for told in cluster.world.told.values() for m in told if isinstance(m, Refuse)]
    assert refusals
    assert all(refusal.retry for refusal in refusals)
