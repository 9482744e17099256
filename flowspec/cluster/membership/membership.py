"""Membership: which devices make up the cluster, from their hello to their loss and return.

This is the head's side: a state machine without input/output, in which `handle(peer, message, now)`
and `tick(now)` return effects. Every placement of the layers is an epoch with its own number and
data sockets, so that messages from devices of an older epoch reach nobody.

    gathering --layers covered--> preparing --all ready--> serving
        ^----------------------- a device is lost -----------'
"""

from collections.abc import Collection
from enum import Enum

from flowspec.cluster.membership.kept_placement import as_held, patched
from flowspec.cluster.membership.roster import (
    Device,
    DoesNotFitError,
    Effect,
    Engage,
    FailRequests,
    Halt,
    LogEvent,
    Member,
    MembershipConfig,
    Place,
    Placement,
    Planner,
    ResumeEpoch,
    SendToDevice,
)
from flowspec.protocol.control import (
    PROTOCOL_VERSION,
    Addresses,
    Assign,
    Beat,
    Bye,
    FromDevice,
    Hello,
    ModelCard,
    Progress,
    Refuse,
    Release,
    Serve,
    StageReady,
    Standby,
    Trouble,
    Welcome,
    WhoAreYou,
)
from flowspec.request import Failure


def refuse(hello: Hello, config: MembershipConfig) -> Refuse | None:
    """Return why a device cannot be part of this cluster, with both values; None if it can."""
    if hello.protocol != PROTOCOL_VERSION:
        return Refuse(
            why=f"the head speaks control protocol {PROTOCOL_VERSION}, the device "
            f"{hello.protocol}; install the same FlowSpec on both ({config.version} is here, "
            f"{hello.version} there)"
        )
    if hello.version != config.version:
        return Refuse(
            why=f"the head runs FlowSpec {config.version}, the device {hello.version}; "
            "install the same version on both"
        )
    held = hello.model
    if hello.pinned and (held is None or not held.is_same_weights(config.model)):
        have = _card(held) if held is not None else "none"
        return Refuse(
            why=f"the head serves {_card(config.model)}, the device is offline and holds "
            f"{have}; let it fetch, or copy the head's model there"
        )
    return None


def introduce(device: Device) -> str:
    """Describe a device in one line."""
    report = device.report
    rate = report.bandwidth_bytes_per_s / 1e9
    return (
        f"joined: {report.kind}, {report.torch_device}, "
        f"{report.memory_available_bytes / 1e9:.1f} of {report.memory_total_bytes / 1e9:.1f} GB "
        f"free, {rate:.1f} GB/s"
    )


def _card(card: ModelCard) -> str:
    return f"{card.model_id} ({card.model_hash[:12]}, {card.stored_dtype})"


MAX_STRIKES = 3  # failures by a device's own fault, after which it is refused ...
STRIKES_S = 600.0  # ... within this time
MAX_ATTEMPTS = 5  # epochs in a row that were lost before a token had passed every stage
WORTH_MOVING = 1.1  # layers move to late devices if a token then takes this factor less time
MAX_GONE = 64  # lost devices that are kept for the status


class Phase(str, Enum):
    """The state of the cluster as a whole."""

    GATHERING = "gathering"  # not enough devices, or waiting for more
    PREPARING = "preparing"  # layers are being transferred and loaded
    SERVING = "serving"


class Membership:
    """The head's record of all devices."""

    def __init__(
        self, config: MembershipConfig, planner: Planner, now: float, *, wall_offset_s: float = 0.0
    ) -> None:
        self.config = config
        self._wall_offset_s = wall_offset_s  # add to `now` for seconds since 1970
        self.planner = planner
        self.phase = Phase.GATHERING
        self.epoch = 0
        self.devices: dict[str, Device] = {}  # by name, in order of arrival
        self.gone: dict[str, str] = {}  # lost devices: name -> reason
        self.places: tuple[Place, ...] = ()  # places of the newest epoch
        self.started_at = now
        self.joined_at = now  # when the newest device came
        self._planned_at = now  # when the placement was last planned over all devices
        self.lost_at: float | None = now  # end of the last epoch; None while one serves
        # None once a token has passed every stage: loaded layers alone do not prove that they
        # compute
        self.uncovered_since: float | None = now
        self.num_attempts = 0  # epochs since `uncovered_since` that served and were lost
        self.gave_up = False  # waited too long, or lost too many epochs
        self._logged = ""  # the last logged reason for waiting
        # name -> time and epoch of each failure by the device's own fault
        self._strikes: dict[str, list[tuple[float, int]]] = {}

    def handle(self, peer: bytes, message: FromDevice, now: float) -> list[Effect]:
        """Handle a device's message; return the effects."""
        if isinstance(message, Hello):
            return self._hello(peer, message, now)
        device = next((d for d in self.devices.values() if d.peer == peer), None)
        if device is None:
            return [SendToDevice(peer, WhoAreYou())]
        device.heard_at = now
        match message:
            case Beat():
                device.beat = message
                return [SendToDevice(peer, Beat(sent_at=message.sent_at))]
            case Bye():
                return self._lose(device, f"left: {message.why}", now, in_order=True)
            case Progress() | StageReady() | Trouble() if message.epoch != self.epoch:
                return []  # the message belongs to an older epoch
            case Progress():
                device.progress, device.progress_at = message, now
            case StageReady():
                return self._ready(device, message, now)
            case Trouble():
                return self._trouble(device, message, now)
        return []

    def tick(self, now: float, *, idle: bool = True) -> list[Effect]:
        """Handle the passing of time; call this several times per heartbeat.

        `idle` means that no request is open, so that layers may move without delaying any.
        """
        effects: list[Effect] = []
        config = self.config
        for device in list(self.devices.values()):
            silence = now - device.heard_at
            if silence > config.dead_after_s:
                effects += self._lose(device, f"no heartbeat for {silence:.1f} s", now)
            elif self._is_stalled(device, now):
                cause = f"no progress for {config.stall_s:.0f} s while it loads"
                effects += self._lose(device, cause, now)
            elif now - device.told_at >= config.heartbeat_s:
                device.told_at = now
                effects.append(SendToDevice(device.peer, Beat()))
        if self.phase is Phase.GATHERING:
            effects += self._try_to_cover(now)
        elif self.phase is Phase.SERVING and idle and self._planned_at < self.joined_at:
            effects += self._try_to_improve(now)
        if self.phase is not Phase.SERVING:
            effects += self._check_given_up(now, idle=idle)
        return effects

    def unreachable(self, peer: bytes, now: float) -> list[Effect]:
        """Handle the loss of the connection to a peer."""
        for device in list(self.devices.values()):
            if device.peer == peer:
                return self._lose(device, "connection lost", now)
        return []

    def head_bound(self, epoch: int, addresses: Addresses) -> list[Effect]:
        """Tell all stages to serve `epoch`, now that the head listens at `addresses`."""
        if epoch != self.epoch or self.phase is not Phase.PREPARING:
            return []
        stages = self._stages()
        all_addresses = (addresses, *(d.ready.addresses for d in stages if d.ready is not None))
        self.phase, self.lost_at = Phase.SERVING, None
        effects: list[Effect] = [
            SendToDevice(device.peer, Serve(epoch=epoch, addresses=all_addresses))
            for device in stages
        ]
        layers = ", ".join(f"{p.name} {p.first}-{p.last - 1}" for p in self.places)
        return [*effects, ResumeEpoch(epoch, all_addresses), LogEvent(f"serving: layers {layers}")]

    def crossed(self, epoch: int) -> None:
        """Note that a token has passed every stage of `epoch`: the cluster really serves."""
        if epoch == self.epoch and self.phase is Phase.SERVING:
            self.uncovered_since, self.num_attempts, self.gave_up = None, 0, False

    def forgive(self, epochs: Collection[int], now: float) -> None:
        """Clear the losses in these epochs: a request that has ended caused them.

        No device is refused for them, and the limits on waiting start again.
        """
        for name, strikes in list(self._strikes.items()):
            self._strikes[name] = [strike for strike in strikes if strike[1] not in epochs]
        self.num_attempts = 0
        if self.uncovered_since is not None:
            self.uncovered_since = now

    def stage_lost(self, epoch: int, rank: int, cause: str, now: float) -> list[Effect]:
        """Handle that the head itself found stage `rank` dead or hanging."""
        stages = {device.rank: device for device in self._stages()}
        if epoch != self.epoch or rank not in stages:
            return []
        return self._lose(stages[rank], cause, now, tell=True)

    def close(self, why: str) -> list[Effect]:
        """Tell every device that the head ends."""
        return [SendToDevice(device.peer, Bye(why=why)) for device in self.devices.values()]

    def _hello(self, peer: bytes, hello: Hello, now: float) -> list[Effect]:
        if refusal := refuse(hello, self.config):
            return [
                SendToDevice(peer, refusal),
                LogEvent(f"refused: {refusal.why}", hello.name, "warning"),
            ]
        effects: list[Effect] = []
        for old in list(self.devices.values()):
            if old.hello.session == hello.session:  # the same process over a new connection
                effects += self._lose(old, "its connection broke; it is back", now)
        name, number = hello.name, 1
        while name in self.devices:
            number += 1
            name = f"{hello.name}-{number}"
        device = self.devices[name] = Device(name, peer, hello, heard_at=now)
        self.gone.pop(name, None)
        self.joined_at = now
        config = self.config
        welcome = Welcome(
            name=name,
            version=config.version,
            heartbeat_s=config.heartbeat_s,
            dead_after_s=config.dead_after_s,
            clock=max(0.0, now + self._wall_offset_s),
        )
        effects += [SendToDevice(peer, welcome), LogEvent(introduce(device), name)]
        skew_s = hello.clock - welcome.clock
        if abs(skew_s) > config.clock_skew_s:
            text = f"its clock is {skew_s:+.0f} s off the head's; log times will not compare"
            effects.append(LogEvent(text, name, "warning"))
        if self.phase is not Phase.GATHERING:
            device.about = "came when the layers were covered; takes over when a device is lost"
            effects += [
                SendToDevice(peer, Standby(why=device.about)),
                LogEvent(f"spare: {device.about}", name),
            ]
        return [*effects, *self._try_to_cover(now)]

    def _ready(self, device: Device, message: StageReady, now: float) -> list[Effect]:
        have, needed = message.model_hash, self.config.model.model_hash
        if have != needed:
            cause = f"loaded model {have[:12]}, needed {needed[:12]}"
            return self._lose(device, cause, now, tell=True)
        if cause := self.config.model.numerics.refusal(message.numerics.model_dump_json()):
            return self._lose(device, cause, now, tell=True)
        device.ready = message
        stages = self._stages()
        if self.phase is not Phase.PREPARING or not all(d.ready for d in stages):
            return []
        members = [
            Member(
                d.rank,
                d.place,
                d.ready.addresses,
                d.ready.num_kv_tokens,
                d.report.link.slower_bytes_per_s,
            )
            for d in stages
            if d.ready is not None and d.place is not None
        ]
        return [Engage(self.epoch, members)]

    def _trouble(self, device: Device, message: Trouble, now: float) -> list[Effect]:
        """Handle a stage that cannot continue: it failed, or it cannot reach another."""
        if message.lost < 0:
            strikes = self._strikes.get(device.name, ())
            recent = [strike for strike in strikes if now - strike[0] < STRIKES_S]
            self._strikes[device.name] = [*recent, (now, message.epoch)]
            final = len(recent) + 1 >= MAX_STRIKES
            return self._lose(device, message.cause, now, tell=True, final=final)
        if not device.rank:
            return []  # the epoch is over: connections break as the others leave it
        cause = f"{message.cause} (seen by {device.name})"
        for other in self._stages():
            if other.rank == message.lost:
                return self._lose(other, cause, now, tell=True)
        # The stage cannot reach the head's data sockets, though its control messages arrive.
        return self._lose(device, cause, now, tell=True)

    def _lose(
        self,
        device: Device,
        cause: str,
        now: float,
        *,
        tell: bool = False,
        final: bool = False,
        in_order: bool = False,
    ) -> list[Effect]:
        """Remove a device.

        `tell` refuses it, because it is useless; unless `final`, it may return.
        """
        del self.devices[device.name]
        self.gone[device.name] = cause
        while len(self.gone) > MAX_GONE:
            del self.gone[next(iter(self.gone))]
        effects: list[Effect] = [LogEvent(cause, device.name, "warning")]
        if device.rank:
            failure = Failure(cause=cause, rank=device.rank, device=device.name)
            effects += self._halt(failure, now, in_order=in_order)
        if tell:
            effects.append(SendToDevice(device.peer, Refuse(why=cause, retry=not final)))
        return [*effects, *self._try_to_cover(now)]

    def _halt(self, failure: Failure, now: float, *, in_order: bool) -> list[Effect]:
        if self.phase is Phase.GATHERING:
            return []
        # the head first: connections that break as stages leave must not look like the cause
        effects: list[Effect] = [
            Halt(self.epoch, failure, in_order),
            *(SendToDevice(device.peer, Release(epoch=self.epoch)) for device in self._stages()),
        ]
        for device in self.devices.values():
            device.rank, device.ready, device.progress = 0, None, None
        if self.phase is Phase.SERVING and self.uncovered_since is not None and not in_order:
            self.num_attempts += 1
        self.phase = Phase.GATHERING
        if self.uncovered_since is None:
            self.uncovered_since = now
        if self.lost_at is None:
            self.lost_at = now
        return effects

    def _stages(self) -> list[Device]:
        """Return the devices of the current epoch, by rank."""
        return sorted((d for d in self.devices.values() if d.rank), key=lambda d: d.rank)

    def _is_stalled(self, device: Device, now: float) -> bool:
        loading = self.phase is Phase.PREPARING and device.rank and device.ready is None
        return bool(loading) and now - device.progress_at > self.config.stall_s

    def _try_to_cover(self, now: float) -> list[Effect]:
        """Begin an epoch if the devices can hold all layers and there is no reason to wait."""
        if self.phase is not Phase.GATHERING or not self.devices:
            return []
        kept = patched(self.places, self.devices, self.planner, self.config.model)
        if kept is not None:
            return self._begin(kept, now)
        if self._waits(now):
            return []
        reports = {name: device.report for name, device in self.devices.items()}
        try:
            held = as_held(self.devices, self.planner, self.config.model)
            placement = held or self.planner.place(reports, spares=self.config.spares)
        except DoesNotFitError as error:
            return self._log_once(f"waiting for more devices: {error}")
        return self._begin(placement, now)

    def _waits(self, now: float) -> bool:
        """Whether more devices may come soon, so that it is too early to plan."""
        config = self.config
        if self.places and self.lost_at is not None:
            return now - self.lost_at < config.rejoin_wait_s
        if config.devices:
            enough = len(self.devices) >= config.devices + config.spares
            return not enough and now - self.started_at < config.wait_for_devices_s
        return now - self.joined_at < config.settle_s

    def _try_to_improve(self, now: float) -> list[Effect]:
        """Plan again for devices that came after the last plan; move layers if that pays."""
        chooses = self.planner.accepts(())  # else the user has chosen the counts of layers
        if now - self.joined_at < self.config.settle_s or not chooses:
            return []
        self._planned_at = now
        reports = {name: device.report for name, device in self.devices.items()}
        try:
            placement = self.planner.place(reports, spares=self.config.spares)
        except DoesNotFitError:  # a device may have less memory free now than its layers take
            return []
        before = self.planner.seconds_per_token(reports, self.places)
        after = self.planner.seconds_per_token(reports, placement.places)
        if before < WORTH_MOVING * after:
            return self._stand_by(placement)
        why = (
            f"planning again with the devices that came: {after * 1e3:.3g} ms per token predicted, "
            f"{before * 1e3:.3g} ms now"
        )
        halt = self._halt(Failure(cause=why, rank=0), now, in_order=True)
        return [LogEvent(why), *halt, *self._begin(placement, now)]

    def _begin(self, placement: Placement, now: float) -> list[Effect]:
        self._planned_at = now
        self.epoch += 1
        self.phase, self.places, self._logged = Phase.PREPARING, placement.places, ""
        effects: list[Effect] = [LogEvent(placement.about)] if placement.about else []
        config = self.config
        for rank, place in enumerate(placement.places, start=1):
            device = self.devices[place.name]
            device.rank, device.place, device.about = rank, place, ""
            device.ready, device.progress, device.progress_at = None, None, now
            assign = Assign(
                epoch=self.epoch,
                rank=rank,
                num_stages=len(placement.places),
                first_layer=place.first,
                last_layer=place.last,
                model=config.model,
                manifest_sha256=config.manifest_sha256,
                shards=config.shards,
                kv_memory_mb=config.kv_memory_mb,
            )
            effects.append(SendToDevice(device.peer, assign))
            effects.append(LogEvent(f"gets layers {place.first} to {place.last - 1}", place.name))
        return [*effects, *self._stand_by(placement)]

    def _stand_by(self, placement: Placement) -> list[Effect]:
        """Tell unused devices the reason, once."""
        effects: list[Effect] = []
        for name, why in placement.left_out.items():
            device = self.devices.get(name)
            if device is not None and not device.rank and device.about != why:
                device.about = why
                effects += [SendToDevice(device.peer, Standby(why=why)), LogEvent(why, name)]
        return effects

    def _check_given_up(self, now: float, *, idle: bool) -> list[Effect]:
        since, limit = self.uncovered_since, self.config.give_up_s
        if since is None or self.gave_up:
            return []
        if self.num_attempts >= MAX_ATTEMPTS:
            cause = (
                f"the layers have been covered {self.num_attempts} times, and each time a device "
                "was lost before a token had crossed all of them"
            )
            until = "a token does"
        elif self.phase is Phase.GATHERING and now - since >= limit:
            cause, until = f"the layers have not been covered for {limit:.0f} s", "they are"
        else:
            return []
        self.gave_up = True
        cause = f"{cause}; {self.missing()}"
        level = "info" if idle else "error"  # nobody has lost anything where nobody asked
        say = LogEvent(f"{cause}; requests are refused until {until}", level=level)
        return [FailRequests(Failure(cause=cause, rank=0)), say]

    def missing(self) -> str:
        """Return why the cluster does not serve now, in one line."""
        if self.phase is Phase.PREPARING:
            late = [d.name for d in self._stages() if d.ready is None]
            return f"layers are being loaded by {', '.join(late)}" if late else "starting"
        lost = "; ".join(f"{name}: {why}" for name, why in list(self.gone.items())[-4:])
        return self._logged or (f"lost {lost}" if lost else "waiting for devices to join")

    def _log_once(self, text: str) -> list[Effect]:
        if text == self._logged:
            return []
        self._logged = text
        return [LogEvent(text, level="warning")]
