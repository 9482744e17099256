"""The data of the membership: devices, placements, and the effects that it asks the head for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from flowspec.protocol.control import (
    Addresses,
    Beat,
    DeviceReport,
    Hello,
    ModelCard,
    Progress,
    StageReady,
    ToDevice,
)
from flowspec.request import Failure

MIN_HEARTBEAT_S = 0.05


class DoesNotFitError(ValueError):
    """The model does not fit on these devices; the text has the needed and available numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MembershipConfig:
    """How a cluster is put together; times are in seconds."""

    version: str  # version of this package; devices must have the same
    model: ModelCard
    manifest_sha256: str = ""
    shards: str = ""  # address of the shard server; empty host: use the head's address
    devices: int = 0  # number to start with; 0: start when the layers are covered
    spares: int = 0  # devices kept free as replacements
    heartbeat_s: float = 0.5
    dead_after_s: float = 2.5
    settle_s: float = 2.0  # after a join, wait this long for further ones before the first plan
    wait_for_devices_s: float = 60.0  # then start with fewer than `devices`, if they can hold it
    rejoin_wait_s: float = 5.0  # after a loss, wait this long for its return before a new plan
    give_up_s: float = 120.0  # uncovered for longer: open requests end with an error
    stall_s: float = 300.0  # a device that loads and reports nothing for longer is given up
    clock_skew_s: float = 60.0  # warn beyond
    kv_memory_mb: int = 0  # of a device that was given none of its own

    def __post_init__(self) -> None:
        if not MIN_HEARTBEAT_S <= self.heartbeat_s <= 60.0:
            raise ValueError(
                f"heartbeat_s must be from {MIN_HEARTBEAT_S} to 60, not {self.heartbeat_s}"
            )
        if self.dead_after_s < 2 * self.heartbeat_s:
            raise ValueError(
                f"dead_after_s is {self.dead_after_s}, needed: at least two heartbeats of "
                f"{self.heartbeat_s} s, or one late message counts as a loss"
            )
        if self.devices < 0 or self.spares < 0:
            raise ValueError("devices and spares must not be negative")


@dataclass(frozen=True, slots=True)
class Place:
    """The layers first..last (exclusive) on a device."""

    name: str
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Placement:
    """A device for every layer, in order, and the reason for each device without layers."""

    places: tuple[Place, ...]
    left_out: Mapping[str, str] = field(default_factory=dict)
    about: str = ""  # a line for the user, such as "one device alone would be faster"


class Planner(Protocol):
    """Decides which device gets which layers."""

    num_layers: int

    def place(self, reports: Mapping[str, DeviceReport], *, spares: int) -> Placement:
        """Return a placement.

        Raises DoesNotFitError with numbers when the devices cannot hold the model.
        """

    def accepts(self, places: Sequence[Place]) -> bool:
        """Whether these counts of layers are allowed: the user has chosen none, or these."""

    def seconds_per_token(
        self, reports: Mapping[str, DeviceReport], places: Sequence[Place]
    ) -> float:
        """Return the predicted time per token, to compare places."""

    def too_small(self, report: DeviceReport, num_layers: int) -> str:
        """Return why a device cannot hold that many layers; empty if it can."""


@dataclass(slots=True)
class Device:
    """A device that has said hello and is not lost."""

    name: str
    peer: bytes
    hello: Hello
    heard_at: float
    told_at: float = 0.0  # when the head last sent it a beat
    beat: Beat = field(default_factory=Beat)
    rank: int = 0  # in the current epoch; 0: none
    place: Place | None = None  # in the current epoch, or its last one
    progress: Progress | None = None
    progress_at: float = 0.0
    ready: StageReady | None = None
    about: str = ""  # why it has no layers

    @property
    def report(self) -> DeviceReport:
        """Return the device's report."""
        return self.hello.report


@dataclass(frozen=True, slots=True)
class SendToDevice:
    """Send `message` to a device."""

    peer: bytes
    message: ToDevice


@dataclass(frozen=True, slots=True)
class LogEvent:
    """Log `text` and show it to users; `level` as in logging, `device` empty for the head."""

    text: str
    device: str = ""
    level: str = "info"


@dataclass(frozen=True, slots=True)
class Member:
    """A stage of an epoch."""

    rank: int
    place: Place
    addresses: Addresses
    num_kv_tokens: int
    link_bytes_per_s: float = 0.0  # the slower way between it and the head; 0: not known


@dataclass(frozen=True, slots=True)
class Engage:
    """All stages are ready: open the head's end of the data plane and call `head_bound`."""

    epoch: int
    members: Sequence[Member]


@dataclass(frozen=True, slots=True)
class ResumeEpoch:
    """Every stage knows the others' addresses: resume the requests."""

    epoch: int
    addresses: Sequence[Addresses]


@dataclass(frozen=True, slots=True)
class Halt:
    """The epoch is over: close its data plane; requests wait for the next one.

    `in_order` means that a device has left by itself or that layers move, so that no request can be
    the cause.
    """

    epoch: int
    failure: Failure
    in_order: bool = False


@dataclass(frozen=True, slots=True)
class FailRequests:
    """The layers have been without cover for too long: open requests fail with this error."""

    failure: Failure


Effect: TypeAlias = SendToDevice | LogEvent | Engage | ResumeEpoch | Halt | FailRequests
