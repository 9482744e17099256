"""Membership as a state machine: joins, refusals, losses, spares and new placements."""

from dataclasses import replace

import pytest

from flowspec.cluster.membership.membership import MAX_ATTEMPTS, MAX_STRIKES, STRIKES_S, Phase
from flowspec.cluster.membership.roster import (
    FailRequests,
    Halt,
    LogEvent,
    Place,
    Placement,
    ResumeEpoch,
    SendToDevice,
)
from flowspec.config import NumericsConfig
from flowspec.protocol.control import (
    PROTOCOL_VERSION,
    Addresses,
    Assign,
    Beat,
    Bye,
    Refuse,
    Release,
    Serve,
    StageReady,
    Standby,
    Trouble,
    Welcome,
    WhoAreYou,
)
from flowspec.weights.split_plan import even_layers
from tests.support.membership_world import (
    CONFIG,
    HEAD,
    MODEL,
    NUM_LAYERS,
    OneLayerPerGigabyte,
    World,
)


def test_layers_are_given_out_once_they_are_covered():
    """One device is not enough; with the second, both get layers and each other's addresses."""
    world = World()
    a = world.join("a")
    world.pass_time(3.0, a)
    assert world.last(a, Assign) is None
    assert "8 layers, 1 devices" in world.said()
    b = world.join("b")
    world.pass_time(1.5, a, b)
    first, second = world.last(a, Assign), world.last(b, Assign)
    assert [(x.rank, x.first_layer, x.last_layer) for x in (first, second)] == [
        (1, 0, 4),
        (2, 4, 8),
    ]
    world.load(a)
    assert world.last(a, Serve) is None
    world.load(b)
    serve = world.last(a, Serve)
    assert serve == world.last(b, Serve)
    assert [x.control for x in serve.addresses] == [HEAD.control, "tcp://a/1:1", "tcp://b/2:1"]
    assert isinstance(world.effects[-2], ResumeEpoch)


def test_it_waits_a_moment_for_further_devices():
    """Devices that start together are placed together."""
    world = World(settle_s=2.0)
    a = world.join("a", 8)
    world.pass_time(1.0, a)
    b = world.join("b", 8)
    world.pass_time(1.0, a, b)
    assert world.last(a, Assign) is None
    world.pass_time(1.5, a, b)
    assert world.last(a, Assign) is not None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"protocol": 99}, ("99", f"protocol {PROTOCOL_VERSION}")),
        ({"version": "0.9"}, ("0.9", "1.0")),
        (
            {"pinned": True, "model": MODEL.model_copy(update={"model_hash": "b" * 64})},
            ("aaaaaaaaaaaa", "bbbbbbbbbbbb"),
        ),
        (
            {"pinned": True, "model": MODEL.model_copy(update={"stored_dtype": "float16"})},
            ("float32", "float16"),
        ),
    ],
)
def test_who_does_not_fit_is_refused_with_both_values(fields, words):
    """Protocol, package, model hash, stored dtype: what is here and what is there."""
    world = World()
    refusal = world.last(world.join("a", **fields), Refuse)
    assert not refusal.retry
    assert all(word in refusal.why for word in words)
    assert not world.members.devices
    assert "refused" in world.said()


def test_an_offline_copy_serves_whatever_is_computed_in():
    """The files are the same; the head chooses the dtype of the run."""
    world = World()
    stored = MODEL.model_copy(update={"dtype": "bfloat16"})
    peer = world.join("a", pinned=True, model=stored)
    assert world.last(peer, Welcome) is not None


def test_two_devices_of_one_name_are_told_apart():
    """Boards with one image have one host name."""
    world = World()
    peers = [world.join("orin") for _ in range(3)]
    assert [world.last(peer, Welcome).name for peer in peers] == ["orin", "orin-2", "orin-3"]


@pytest.mark.parametrize(
    ("how", "cause"),
    [("silence", "no heartbeat"), ("broken", "connection lost"), ("bye", "left: power off")],
)
def test_a_loss_halts_the_epoch_and_names_device_and_cause(how, cause):
    """Every kind of loss gives one ClusterError, and the others are released."""
    world = World()
    a, b = world.serving(4, 4)
    if how == "silence":
        world.pass_time(2.5, a)
        assert not world.halts()
        world.pass_time(1.0, a)
    elif how == "broken":
        world.apply(world.members.unreachable(b, world.now))
    else:
        world.say(b, Bye(why="power off"))
    (halt,) = world.halts()
    assert halt.failure.place == "stage 2 on b"
    assert cause in halt.failure.cause
    assert world.last(a, Release).epoch == halt.epoch
    assert world.members.phase is Phase.GATHERING
    assert cause in world.members.missing()


def test_a_spare_takes_over_at_once_and_the_others_keep_their_layers():
    """Only the lost layers move."""
    world = World()
    a, b, c = world.serving(4, 4, 4)
    assert world.last(c, Assign) is None
    assert "spare" in world.last(c, Standby).why
    before = world.last(a, Assign)
    world.apply(world.members.unreachable(b, world.now))
    after, taken = world.last(a, Assign), world.last(c, Assign)
    assert (after.first_layer, after.last_layer) == (before.first_layer, before.last_layer)
    assert (taken.rank, taken.first_layer, taken.last_layer) == (2, 4, 8)
    assert after.epoch == before.epoch + 1
    world.load(a, c)
    assert world.members.phase is Phase.SERVING


def test_a_late_device_is_a_spare_and_is_told_so():
    """It must not disturb the running pipeline."""
    world = World()
    world.serving(4, 4)
    late = world.join("late")
    assert "covered" in world.last(late, Standby).why
    assert world.members.phase is Phase.SERVING


class AsManyAsThereAre(OneLayerPerGigabyte):
    """A planner that spreads the layers over all devices."""

    def place(self, reports, *, spares):
        """Return even layers over all devices, in order of their names."""
        layers = even_layers(NUM_LAYERS, len(reports))
        starts = [sum(layers[:k]) for k in range(len(layers))]
        return Placement(
            tuple(
                Place(name, start, start + count)
                for name, start, count in zip(sorted(reports), starts, layers, strict=True)
            )
        )

    def accepts(self, places):
        """Accept any counts: the user has chosen none."""
        return True


def test_devices_that_come_late_share_the_layers_once_nobody_waits_for_an_answer():
    """Devices that a user starts one after the other must share the layers in the end."""
    world = World()
    world.members.planner = AsManyAsThereAre()
    a = world.join("a", 8)
    world.pass_time(1.5, a)
    world.load(a)
    assert [place.last for place in world.members.places] == [8]
    b = world.join("b", 8)
    assert "takes over when a device is lost" in world.last(b, Standby).why
    world.pass_time(3.0, a, b, idle=False)
    assert world.members.epoch == 1, "an answer is under way"
    world.pass_time(0.5, a, b)
    assert [place.last for place in world.members.places] == [4, 8]
    world.load(a, b)
    assert world.members.phase is Phase.SERVING
    world.pass_time(5.0, a, b)
    assert world.members.epoch == 2, "planned once"


def test_layers_do_not_move_for_little():
    """Loading takes longer than a gain of a few percent would bring back."""
    world = World()
    world.members.planner = AsManyAsThereAre()
    world.members.planner.seconds_per_token = lambda reports, places: 10.0 - 0.5 * len(places)
    a = world.join("a", 8)
    world.pass_time(1.5, a)
    world.load(a)
    b = world.join("b", 8)
    world.pass_time(5.0, a, b)
    assert world.members.epoch == 1


def test_a_returning_device_takes_its_own_layers_back():
    """During the wait no other device is asked, and the other one's layers stay."""
    world = World()
    a, b = world.serving(4, 4)
    world.apply(world.members.unreachable(b, world.now))
    world.pass_time(2.0, a)
    again = world.join("b", model=MODEL, layers=(4, 8))
    taken = world.last(again, Assign)
    assert (taken.rank, taken.first_layer) == (2, 4)


def test_without_a_return_the_rest_is_planned_anew():
    """After the wait, a device that was not needed before may be needed now."""
    world = World()
    a, b, c = world.serving(3, 3, 3)
    world.apply(world.members.unreachable(a, world.now))
    late = world.join("late", 2)  # too small for the hole, enough with the others' spare memory
    world.pass_time(4.0, b, c, late)
    assert world.members.phase is Phase.GATHERING
    world.pass_time(2.0, b, c, late)
    assert world.members.phase is Phase.PREPARING
    assert [world.last(p, Assign).last_layer for p in (b, c, late)] == [3, 6, 8]


def test_too_small_devices_are_told_in_numbers():
    """They stay, because the memory may become free."""
    world = World()
    peers = world.serving(4, 4, 0)
    assert "1 GB needed, 0 there" in world.last(peers[2], Standby).why


def test_open_requests_end_when_nobody_comes():
    """They end once, with the reason; a later device still starts the cluster again."""
    world = World(give_up_s=20.0)
    a, b = world.serving(4, 4)
    world.apply(world.members.unreachable(b, world.now))
    world.pass_time(40.0, a)
    ends = [e for e in world.effects if isinstance(e, FailRequests)]
    assert len(ends) == 1
    assert "20 s" in ends[0].failure.cause
    c = world.join("c")
    world.load(a, c)
    assert world.members.phase is Phase.SERVING


@pytest.mark.parametrize(("idle", "level"), [(True, "info"), (False, "error")])
def test_a_head_that_waits_for_devices_has_no_error_unless_somebody_asked(idle, level):
    """A head without any device so far has no problem."""
    world = World(give_up_s=20.0)
    world.pass_time(25.0, idle=idle)
    (said,) = [e for e in world.effects if isinstance(e, LogEvent) and "not been covered" in e.text]
    assert said.level == level
    assert "requests are refused until they are" in said.text


def test_a_stage_that_names_another_loses_that_one():
    """The unreachable stage is at fault, and the error says who saw it."""
    world = World()
    a, b = world.serving(4, 4)
    world.say(a, Trouble(epoch=1, cause="took no Segment for 10 s", lost=2))
    (halt,) = world.halts()
    assert halt.failure.place == "stage 2 on b"
    assert "seen by a" in halt.failure.cause
    assert world.last(b, Refuse).retry


def test_who_fails_again_and_again_need_not_come_back():
    """A device without memory for its layers must not keep the cluster busy for ever."""
    world = World()
    a = world.join("a")
    for _ in range(MAX_STRIKES):
        b = world.join("b")
        world.pass_time(6.0, a, b)
        epoch = world.last(b, Assign).epoch
        world.say(b, Trouble(epoch=epoch, cause="out of memory"))
    assert world.last(b, Refuse) == Refuse(why="out of memory", retry=False)


def test_faults_that_lie_far_apart_are_forgiven():
    """A device that runs out of memory once a day is still useful."""
    world = World()
    a = world.join("a")
    for _ in range(MAX_STRIKES + 1):
        b = world.join("b")
        world.pass_time(6.0, a, b)
        epoch = world.last(b, Assign).epoch
        world.say(b, Trouble(epoch=epoch, cause="out of memory"))
        assert world.last(b, Refuse).retry
        world.pass_time(STRIKES_S, a)


def test_connections_that_break_as_an_epoch_ends_cost_nobody_its_place():
    """Other devices leave the data plane after a loss, and a slow device sees that."""
    world = World(rejoin_wait_s=5.0)
    a, b, c = world.serving(3, 3, 3)
    world.apply(world.members.unreachable(b, world.now))
    assert world.members.phase is Phase.GATHERING
    world.say(a, Trouble(epoch=1, cause="connection lost", lost=3))
    assert set(world.members.devices) == {"a", "c"}


def test_another_model_is_refused_by_both_hashes():
    """The loaded model decides, not the announced one."""
    world = World()
    a, b = world.join("a"), world.join("b")
    world.pass_time(1.5, a, b)
    here = Addresses(control="tcp://x:1", data="tcp://x:2")
    other = MODEL.numerics
    world.say(a, StageReady(epoch=1, model_hash="c" * 64, numerics=other, addresses=here))
    assert "cccccccccccc, needed aaaaaaaaaaaa" in world.last(a, Refuse).why


def test_other_numerics_are_refused_by_name():
    """Every stage computes as the head says, or the cluster does not start with it."""
    world = World()
    a, b = world.join("a"), world.join("b")
    world.pass_time(1.5, a, b)
    here = Addresses(control="tcp://x:1", data="tcp://x:2")
    assert world.last(a, Assign).model.numerics == NumericsConfig()
    other = NumericsConfig(dtype="bfloat16", batch_invariant=True)
    world.say(a, StageReady(epoch=1, model_hash=MODEL.model_hash, numerics=other, addresses=here))
    why = world.last(a, Refuse).why
    assert "dtype is 'bfloat16', needed 'float32'; batch_invariant is True, needed False" in why


def test_words_of_an_old_epoch_change_nothing():
    """They come from a device that was slow to hear of the new placement."""
    world = World()
    a, b, c = world.serving(4, 4, 4)
    world.apply(world.members.unreachable(b, world.now))
    world.say(a, Trouble(epoch=1, cause="lost my neighbour", lost=2))
    assert set(world.members.devices) == {"a", "c"}
    world.load(a, c)
    assert world.members.phase is Phase.SERVING


def test_after_a_restart_of_the_head_devices_keep_what_they_hold():
    """In any order of their return, no device has to load anything."""
    world = World()
    b = world.join("b", 8, model=MODEL, layers=(5, 8))
    c = world.join("c", 8)
    a = world.join("a", 8, model=MODEL, layers=(0, 5))
    world.pass_time(1.5, a, b, c)
    first, second = world.last(a, Assign), world.last(b, Assign)
    assert [(x.rank, x.first_layer, x.last_layer) for x in (first, second)] == [
        (1, 0, 5),
        (2, 5, 8),
    ]
    assert world.last(c, Assign) is None


def test_a_stranger_is_asked_for_its_name():
    """After a restart of the head, heartbeats come from unknown devices."""
    world = World()
    world.say(b"who", Beat())
    assert world.told[b"who"] == [WhoAreYou()]


def test_the_device_count_is_waited_for_and_then_not():
    """After the wait, it starts with the devices that came."""
    world = World(devices=3, wait_for_devices_s=10.0)
    a, b = world.join("a"), world.join("b")
    world.pass_time(5.0, a, b)
    assert world.last(a, Assign) is None
    world.pass_time(6.0, a, b)
    assert world.last(a, Assign) is not None


def test_a_wrong_clock_is_told():
    """It only affects the comparison of logs."""
    world = World()
    world.join("a", clock=5000.0)
    assert "clock is +4900 s off" in world.said()


def test_impossible_rhythms_are_refused():
    """One late heartbeat would count as a loss."""
    with pytest.raises(ValueError, match="two heartbeats"):
        replace(CONFIG, heartbeat_s=1.0, dead_after_s=1.5)


def test_quick_returns_do_not_put_off_the_end_for_ever():
    """A device may die at its first forward and rejoin at once, so that no token ever comes."""
    world = World(give_up_s=20.0)
    a, b = world.serving(4, 4)
    rejoined = 0
    while not any(isinstance(e, FailRequests) for e in world.effects):
        rejoined += 1
        assert rejoined < 50, "it goes on for ever"
        world.apply(world.members.unreachable(b, world.now))
        world.pass_time(0.5, a)
        b = world.join("b")
        world.load(a, b)
    assert rejoined <= MAX_ATTEMPTS
    (end,) = [e for e in world.effects if isinstance(e, FailRequests)]
    assert f"covered {MAX_ATTEMPTS} times" in end.failure.cause
    assert world.members.gave_up
    world.pass_time(1.0, a, b)
    assert world.members.gave_up, "layers that are held have computed nothing yet"
    world.members.crossed(world.members.epoch)
    assert not world.members.gave_up


def test_slow_returns_count_as_uncovered_until_a_token_has_come_through():
    """Being covered for a moment between two losses does not count as served."""
    world = World(give_up_s=20.0)
    a, b = world.serving(4, 4)
    for _ in range(3):
        world.apply(world.members.unreachable(b, world.now))
        world.pass_time(4.5, a)
        b = world.join("b")
        world.load(a, b)
        world.pass_time(2.0, a, b)
    world.apply(world.members.unreachable(b, world.now))
    world.pass_time(4.5, a)
    (end,) = [e for e in world.effects if isinstance(e, FailRequests)]
    assert "not been covered for 20 s" in end.failure.cause


def test_a_cluster_that_has_served_begins_to_count_anew():
    """Losses with tokens between them are no reason to give up."""
    world = World(give_up_s=20.0)
    a, b = world.serving(4, 4)
    for _ in range(3 * MAX_ATTEMPTS):
        world.members.crossed(world.members.epoch)
        world.apply(world.members.unreachable(b, world.now))
        world.pass_time(4.5, a)
        b = world.join("b")
        world.load(a, b)
    assert not any(isinstance(e, FailRequests) for e in world.effects)


def test_a_halt_says_whether_a_request_can_be_its_cause():
    """A device that leaves in order is not a request's doing."""
    world = World()
    a, b = world.serving(4, 4)
    world.say(b, Bye(why="stopped"))
    world.pass_time(1.0, a)
    b = world.join("b")
    world.pass_time(6.0, a, b)
    world.load(a, b)
    world.apply(world.members.unreachable(b, world.now))
    assert [halt.in_order for halt in world.halts()] == [True, False]


def test_failures_that_a_request_caused_are_no_strikes():
    """Otherwise a client with three bad requests could exclude a device for good."""
    world = World()
    a = world.join("a")
    for number in range(2 * MAX_STRIKES):
        b = world.join("b")
        world.pass_time(6.0, a, b)
        epoch = world.last(b, Assign).epoch
        world.say(b, Trouble(epoch=epoch, cause="CUDA error: device-side assert triggered"))
        assert world.last(b, Refuse).retry
        if number % 2:
            world.members.forgive((epoch - 1, epoch), world.now)


def test_what_a_request_caused_is_forgiven_to_the_device_it_hit_alone():
    """Another device's own failures still count, and the wait starts again."""
    world = World(give_up_s=20.0)
    a = world.join("a")
    for _ in range(MAX_STRIKES):  # of its own
        b = world.join("b")
        world.pass_time(6.0, a, b)
        epoch = world.last(b, Assign).epoch
        if epoch == MAX_STRIKES:
            world.members.forgive((epoch + 1,), world.now)
        world.say(b, Trouble(epoch=epoch, cause="out of memory"))
    assert not world.last(b, Refuse).retry


def test_the_end_of_a_cause_is_progress():
    """As after a token, attempts and waiting time start from zero."""
    world = World(give_up_s=20.0)
    a, b = world.serving(4, 4)
    for _ in range(3 * MAX_ATTEMPTS):
        epoch = world.members.epoch
        world.apply(world.members.unreachable(b, world.now))
        world.pass_time(4.5, a)
        b = world.join("b")
        world.load(a, b)
        world.members.forgive((epoch,), world.now)
    assert not any(isinstance(e, FailRequests) for e in world.effects)
    assert world.members.uncovered_since == world.now


def test_the_head_hears_of_a_loss_before_stages_leave():
    """Their connections break when they leave, which must not look like the cause."""
    world = World()
    a, _ = world.serving(4, 4)
    count = len(world.effects)
    world.say(a, Trouble(epoch=1, cause="IndexError: boom"))
    new = world.effects[count:]
    halt = next(k for k, effect in enumerate(new) if isinstance(effect, Halt))
    tells = [
        k
        for k, effect in enumerate(new)
        if isinstance(effect, SendToDevice) and isinstance(effect.message, Release | Refuse)
    ]
    assert len(tells) == 2
    assert halt < min(tells)
