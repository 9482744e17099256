"""A head's membership under test, with a planner, devices, and a log of all effects."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flowspec.cluster.membership.membership import Membership, Phase
from flowspec.cluster.membership.roster import (
    DoesNotFitError,
    Effect,
    Engage,
    Halt,
    LogEvent,
    MembershipConfig,
    Place,
    Placement,
    SendToDevice,
)
from flowspec.protocol.control import (
    Addresses,
    Assign,
    Beat,
    DeviceReport,
    Hello,
    ModelCard,
    StageReady,
)
from flowspec.weights.split_plan import even_layers

MODEL = ModelCard(model_id="m", model_hash="a" * 64, stored_dtype="float32")
CONFIG = MembershipConfig(version="1.0", model=MODEL, settle_s=1.0, rejoin_wait_s=5.0)
NUM_LAYERS = 8
HEAD = Addresses(control="tcp://0.0.0.0:1", data="tcp://0.0.0.0:2")


class OneLayerPerGigabyte:
    """A planner that spreads layers evenly over the first devices that can hold them all."""

    num_layers = NUM_LAYERS

    def place(self, reports: Mapping[str, DeviceReport], *, spares: int) -> Placement:
        """Return a placement on as few devices as possible, the largest first."""
        names = [n for n, report in reports.items() if not self.too_small(report, 1)]
        names.sort(key=lambda n: -reports[n].memory_available_bytes)
        for count in range(1, len(names) - spares + 1):
            layers = even_layers(NUM_LAYERS, count)
            if all(not self.too_small(reports[n], c) for n, c in zip(names, layers, strict=False)):
                starts = [sum(layers[:k]) for k in range(count)]
                places = [
                    Place(n, s, s + c) for n, s, c in zip(names, starts, layers, strict=False)
                ]
                left = {n: self.too_small(reports[n], 1) or "spare" for n in reports}
                return Placement(
                    tuple(places), {n: w for n, w in left.items() if n not in names[:count]}
                )
        raise DoesNotFitError(f"{NUM_LAYERS} layers, {len(names)} devices")

    def accepts(self, places: Sequence[Place]) -> bool:
        """Accept any counts."""
        return bool(places)

    def seconds_per_token(
        self, reports: Mapping[str, DeviceReport], places: Sequence[Place]
    ) -> float:
        """Return the time of the stage with the most layers, the slowest."""
        return float(max(place.last - place.first for place in places))

    def too_small(self, report: DeviceReport, num_layers: int) -> str:
        """Refuse more layers than gigabytes."""
        have = report.memory_available_bytes // 10**9
        return "" if have >= num_layers else f"too small: {num_layers} GB needed, {have} there"


class World:
    """A head's membership and the messages that it has sent."""

    def __init__(self, **changes: object) -> None:
        self.now = 100.0
        self.members = Membership(replace(CONFIG, **changes), OneLayerPerGigabyte(), self.now)
        self.told: dict[bytes, list[object]] = {}
        self.effects: list[Effect] = []
        self._sessions = 0

    def apply(self, effects: list[Effect]) -> None:
        """Record the effects; open the head's own sockets at once."""
        for effect in effects:
            self.effects.append(effect)
            if isinstance(effect, SendToDevice):
                self.told.setdefault(effect.peer, []).append(effect.message)
            if isinstance(effect, Engage):
                self.apply(self.members.head_bound(effect.epoch, HEAD))

    def join(self, name: str, gigabytes: int = 4, *, peer: bytes = b"", **fields: object) -> bytes:
        """Let a device say hello."""
        self._sessions += 1
        peer = peer or f"{name}/{self._sessions}".encode()
        report = DeviceReport(
            hostname=name,
            kind="board",
            memory_available_bytes=gigabytes * 10**9,
            memory_total_bytes=8 * 10**9,
        )
        values = {"version": "1.0", "session": str(self._sessions), "clock": self.now, **fields}
        self.say(peer, Hello(name=name, report=report, **values))
        return peer

    def say(self, peer: bytes, message: object) -> None:
        """Deliver a device's message."""
        self.apply(self.members.handle(peer, message, self.now))

    def pass_time(self, seconds: float, *alive: bytes, idle: bool = True) -> None:
        """Let time pass, in which living devices send heartbeats."""
        end = self.now + seconds
        while self.now < end:
            self.now += 0.25
            for peer in alive:
                self.say(peer, Beat(sent_at=self.now))
            self.apply(self.members.tick(self.now, idle=idle))

    def last(self, peer: bytes, kind: type) -> object:
        """Return the newest message of a kind to the peer, or None."""
        return next((m for m in reversed(self.told.get(peer, [])) if isinstance(m, kind)), None)

    def load(self, *peers: bytes) -> None:
        """Let each device load its assignment and report that."""
        for peer in peers:
            assign = self.last(peer, Assign)
            assert assign is not None, f"{peer!r} has no layers"
            here = Addresses(control=f"tcp://{peer.decode()}:1", data=f"tcp://{peer.decode()}:2")
            ready = StageReady(
                epoch=assign.epoch,
                model_hash=MODEL.model_hash,
                numerics=assign.model.numerics,
                addresses=here,
            )
            self.say(peer, ready)

    def serving(self, *gigabytes: int, **changes: object) -> list[bytes]:
        """Let devices a, b, ... join and serve."""
        peers = [self.join(chr(97 + k), size) for k, size in enumerate(gigabytes)]
        self.pass_time(1.5, *peers)
        self.load(*(p for p in peers if self.last(p, Assign)))
        assert self.members.phase is Phase.SERVING
        return peers

    def said(self) -> str:
        """Return all log lines."""
        return "\n".join(f"{e.device}: {e.text}" for e in self.effects if isinstance(e, LogEvent))

    def halts(self) -> list[Halt]:
        """Return the epochs that ended."""
        return [e for e in self.effects if isinstance(e, Halt)]
