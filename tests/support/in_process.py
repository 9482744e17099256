"""A head and the devices that join it, all threads of this process, over the loopback."""

import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import flowspec
from flowspec.cluster.controller.server import HeadServer
from flowspec.cluster.device.agent import DeviceAgent, JoinConfig
from flowspec.cluster.membership.device_planner import (
    DevicePlanner,
    model_profile,
    model_sizes,
    needs_of,
)
from flowspec.cluster.membership.membership import Membership
from flowspec.cluster.membership.roster import LogEvent, MembershipConfig
from flowspec.config import EngineConfig, override
from flowspec.engine.build import HeadParts, load_head_parts
from flowspec.engine.cluster import ClusterEngine
from flowspec.engine.remote import RemoteEngine
from flowspec.model.architecture import read_config
from flowspec.model.stage_model import StageModel
from flowspec.protocol.control import Assign, DeviceReport, FromDevice, ModelCard
from flowspec.stage.stage import Stage
from flowspec.transport.control_sockets import ControlServer
from flowspec.transport.secure.keys import Keys
from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.load import load_stage_range
from flowspec.weights.manifest import HEAD_FOLDER
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from tests.support.checkpoints import save_checkpoint

CONTEXT = 400  # tokens of a request; the tiny model was made for more
HOST = "127.0.0.1"
SOON_S = 60.0  # far more than it takes: this machine may be busy
REPORT = DeviceReport(
    hostname="here",
    kind="CPU",
    memory_available_bytes=8 * 10**9,
    memory_total_bytes=8 * 10**9,
)


def wait_for(is_true: Callable[[], object], what: str = "it") -> None:
    """Until it is."""
    end = time.monotonic() + SOON_S
    while not is_true():
        assert time.monotonic() < end, f"{what} did not come"
        time.sleep(0.01)


@dataclass(frozen=True)
class TinyModel:
    """A tiny model in two stages on disk, its configuration, and what a head loads of it."""

    config: EngineConfig
    parts: HeadParts
    folder: Path  # of the split

    def with_config(self, **changes: Any) -> "TinyModel":
        """The same model, run in another way."""
        return replace(self, config=override(self.config, changes, where="the test"))


def tiny_model(folder: Path) -> TinyModel:
    """Make one in `folder`."""
    save_checkpoint(folder / "tiny", num_layers=2)
    plan = plan_split(open_checkpoint(folder / "tiny" / "target"), layers=(1, 1), dtype=None)
    run_split(plan, folder / "split", model_id="tiny")
    draft = str(folder / "tiny" / "eagle")
    config = EngineConfig(model=str(folder / "split"), draft=draft, stages=2, context=CONTEXT)
    return TinyModel(config, load_head_parts(config, folder / "split"), folder / "split")


@dataclass
class Layers:
    """A device's layers, loaded from the split's folder."""

    folder: Path

    def load(self, assign: Assign, report: Callable[[FromDevice], None]) -> StageModel:
        """The assigned ones."""
        del report
        first, last = assign.first_layer, assign.last_layer
        return load_stage_range(
            self.folder, first, last, device="cpu", dtype="float32", verify=False
        )


class Device:
    """A device that joins the head at `port`, in a thread of its own."""

    def __init__(self, name: str, port: int, keys: Keys, folder: Path) -> None:
        config = JoinConfig(host=HOST, port=port, name=name, version=flowspec.__version__)
        self.agent = DeviceAgent(config, keys, Layers(folder), lambda: REPORT)
        self._thread = threading.Thread(target=self.agent.run, name=name, daemon=True)
        self._thread.start()

    @property
    def stage(self) -> Stage | None:
        """What it serves in this epoch."""
        job = self.agent._job
        return job.stage if job is not None else None

    def fail(self, cause: str) -> None:
        """Its next turn raises; it comes back by itself."""
        stage = self.stage
        assert stage is not None, "it serves nothing"

        def broken(now: float) -> None:
            raise RuntimeError(cause)

        stage.poll = broken  # type: ignore[assignment, method-assign]

    def leave(self) -> None:
        """In order."""
        self.agent.stop("the test is over")
        self._thread.join(SOON_S)


@dataclass
class InProcessCluster:
    """A HeadServer and its devices."""

    model: TinyModel
    keys: Keys
    server: HeadServer
    devices: dict[str, Device] = field(default_factory=dict)
    said: list[str] = field(default_factory=list)

    @property
    def engine(self) -> ClusterEngine:
        """The head's own."""
        return self.server.engine

    @property
    def port(self) -> int:
        """Where the head listens."""
        return self.server.control.port

    def join(self, *names: str) -> None:
        """Devices of these names come, and the layers are covered."""
        for name in names:
            self.devices[name] = Device(name, self.port, self.keys, self.model.folder)
        self.wait_until_served()

    def wait_until_served(self) -> None:
        """Until a token has crossed every stage."""
        wait_for(lambda: self.engine.status().healthy, "a cluster that serves")
        wait_for(lambda: self.engine.crossed_at, "a token")

    def client(self) -> RemoteEngine:
        """A new connection."""
        return RemoteEngine(HOST, self.port, self.keys)

    def close(self) -> None:
        """Head first: devices then wait for another."""
        self.server.close()
        for device in self.devices.values():
            device.leave()


def new_server(
    model: TinyModel, keys: Keys, *, port: int = 0, settings: Mapping[str, Any] = {}
) -> HeadServer:
    """A head that has not started yet."""
    config, parts = model.config, model.parts
    sizes = model_sizes(read_config(model.folder / HEAD_FOLDER))
    needs = needs_of(config.numerics.dtype, context=CONTEXT, requests=1, reserve_bytes=0.0)
    planner = DevicePlanner(
        model_profile("tiny", sizes, config.numerics.dtype), needs, layers=(1, 1)
    )
    manifest = parts.manifest
    times = {"settle_s": 0.05, "heartbeat_s": 0.25, "dead_after_s": 10.0, "rejoin_wait_s": 5.0}
    membership = MembershipConfig(
        version=flowspec.__version__,
        model=ModelCard(
            model_id=manifest.model_id,
            model_hash=manifest.model_hash,
            stored_dtype=manifest.dtype,
            numerics=config.numerics,
        ),
        devices=2,
        **{**times, **settings},
    )
    said: list[LogEvent] = []
    return HeadServer(
        ControlServer(HOST, port, keys),
        Membership(membership, planner, time.monotonic()),
        lambda tell: ClusterEngine(config, parts, keys, tell, host=HOST),
        sizes=sizes,
        on_say=said.append,
    )


@contextmanager
def cluster(
    model: TinyModel, *names: str, keys: Keys | None = None, port: int = 0, **settings: Any
) -> Iterator[InProcessCluster]:
    """A head with devices of these names; without any it waits for some."""
    keys = keys or derive_keys(new_token())
    running = InProcessCluster(model, keys, new_server(model, keys, port=port, settings=settings))
    running.server.start()
    try:
        if names:
            running.join(*names)
        yield running
    finally:
        running.close()
