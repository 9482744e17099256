"""In random histories of a cluster, each layer always has one living holder."""

import random

import pytest

from flowspec.cluster.membership.membership import Phase
from flowspec.protocol.control import Assign, Trouble
from tests.support.membership_world import NUM_LAYERS, World


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_each_layer_has_one_living_holder(seed):
    """The events are joins, silences, broken connections, failures and late messages."""
    chance = random.Random(seed)
    world = World(rejoin_wait_s=chance.choice([0.0, 2.0]), spares=chance.choice([0, 1]))
    alive: list[bytes] = []
    for _ in range(120):
        action = chance.random()
        if action < 0.15 or not alive:
            alive.append(world.join(f"d{chance.randrange(4)}", chance.randrange(1, 9)))
        elif action < 0.22:
            alive.remove(chance.choice(alive))  # silent from now on
        elif action < 0.27:
            gone = chance.choice(alive)
            alive.remove(gone)
            world.apply(world.members.unreachable(gone, world.now))
        elif action < 0.32:
            world.say(chance.choice(alive), Trouble(epoch=world.members.epoch, cause="x"))
        elif action < 0.75:
            loading = [p for p in alive if world.last(p, Assign)]
            if loading:
                world.load(chance.choice(loading))
        world.pass_time(chance.choice([0.25, 1.0]), *alive)
        check(world)
    fresh = [world.join(f"new{k}", 8) for k in range(3)]
    world.pass_time(8.0, *alive, *fresh)
    for peer in (*alive, *fresh):
        if (assign := world.last(peer, Assign)) and assign.epoch == world.members.epoch:
            world.load(peer)
    assert world.members.phase is Phase.SERVING
    check(world)


def check(world: World) -> None:
    """Check the serving epoch: consecutive layers, ranks in order, living holders."""
    members = world.members
    if members.phase is Phase.GATHERING:
        assert all(device.rank == 0 for device in members.devices.values())
        return
    stages = sorted((d for d in members.devices.values() if d.rank), key=lambda d: d.rank)
    assert [d.rank for d in stages] == list(range(1, len(stages) + 1))
    assert [d.place for d in stages] == list(members.places)
    edges = [0, *(place.last for place in members.places)]
    assert edges[:-1] == [place.first for place in members.places]
    assert edges[-1] == NUM_LAYERS
    if members.phase is Phase.SERVING:
        assert all(device.ready is not None for device in stages)
