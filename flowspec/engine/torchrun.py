"""TorchrunEngine: a cluster whose processes torchrun has started; rank 0 is the head.

All processes run the same command. The head prepares the split and tells the stages where it is.
"""

import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from flowspec.config import Config, EngineConfig, NumericsConfig, override
from flowspec.engine.build import HeadParts
from flowspec.engine.launch import Launch
from flowspec.engine.local import EXIT_TIMEOUT_S, LocalEngine, StageProcess
from flowspec.engine.stage_process import StageConfig, serve
from flowspec.request import ClusterError
from flowspec.runtime.recorder import trace_path
from flowspec.system import signals
from flowspec.transport.base import LostPeer, Transport
from flowspec.transport.by_name import rank_device
from flowspec.transport.torch_dist import TorchDistTransport, hear, meet_by_torchrun, tell
from flowspec.transport.torch_link import Meeting
from flowspec.weights.split_plan import parse_layers

PREPARE_TIMEOUT_S = 3600.0  # the head may have to download and split a model first
START_TIMEOUT_S = 120.0
HEAR_S = 1.0  # torch waits in C, where no signal is noticed
_ORDER = "order"


class Order(Config):
    """The head's settings for every stage; devices and threads are each machine's own."""

    split: str  # folder, the same on every machine
    traces: str  # folder; empty: no trace
    numerics: NumericsConfig


def own_device(config: EngineConfig, launch: Launch) -> str:
    """Return the device of this process."""
    return rank_device(config.transport, config.local.device, launch.local_rank)


def _meet(config: EngineConfig, launch: Launch) -> Meeting:
    """Return the meeting point. Raises ValueError if torch or this machine cannot do it."""
    gpu = own_device(config, launch) if config.transport == "nccl" else ""
    return meet_by_torchrun(gpu=gpu)


def fit_to_launch(config: EngineConfig, launch: Launch) -> EngineConfig:
    """Return the run of torchrun's processes. Raises ValueError if the two contradict."""
    have = f"torchrun started {launch.num_stages + 1} processes"
    if launch.num_stages < 1:
        raise ValueError(f"{have}; a head and one stage are 2: --nproc_per_node 2 or more")
    if config.transport == "zmq":
        raise ValueError(f"{have}, which talk by torch.distributed: add --transport gloo or nccl")
    asked = len(parse_layers(config.layers)) if config.layers else config.stages
    if asked not in (None, launch.num_stages):
        raise ValueError(
            f"{have}: a head and {launch.num_stages} stages, not {asked}; leave the number of "
            f"stages out or start {asked + 1} processes"
        )
    return override(config, {"stages": launch.num_stages}, where="torchrun")


def serve_rank(config: EngineConfig, launch: Launch) -> int:
    """Be a stage until the head stops it or is lost; return the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the head ends the stages
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    meeting = _meet(config, launch)
    tell(meeting, str(launch.rank), f"{os.getpid()} on {socket.gethostname()}")
    text = hear(meeting, _ORDER, PREPARE_TIMEOUT_S)
    if text is None:
        return 1
    order = Order.model_validate_json(text)
    traces = Path(order.traces)
    # on another machine the folder does not exist, and nothing collects from it
    trace_file = trace_path(traces, launch.rank) if order.traces and traces.is_dir() else None
    stage = StageConfig(
        split_folder=Path(order.split),
        rank=launch.rank,
        num_stages=launch.num_stages,
        transport=config.transport,
        numerics=order.numerics,
        local=config.local.changed(device=own_device(config, launch)),
        trace_file=trace_file,
    )
    return serve(stage, TorchDistTransport(launch.rank, launch.num_stages, meeting))


@dataclass(slots=True)
class Elsewhere:
    """A stage process that torchrun starts and ends; its connection shows whether it lives."""

    pid: str
    is_lost: Callable[[], bool]
    stopping: bool = field(default=False)

    def poll(self) -> int | None:
        """Return 0 once it is told to stop and its connection has ended, otherwise None."""
        return 0 if self.stopping and self.is_lost() else None

    def terminate(self) -> None:
        """Do nothing: torchrun ends it."""

    kill = terminate

    def wait(self, timeout: float | None = None) -> int:
        """Return at once: torchrun waits for it."""
        del timeout
        return 0


class TorchrunEngine(LocalEngine):
    """The head's side of a pipeline whose processes torchrun has started."""

    shares_cores = False

    def __init__(
        self,
        config: EngineConfig,
        parts: HeadParts,
        trace_folder: Path | None = None,
        *,
        launch: Launch,
    ) -> None:
        self.meeting = _meet(config, launch)
        traces = str(trace_folder or "")
        order = Order(split=str(parts.folder), traces=traces, numerics=config.numerics)
        tell(self.meeting, _ORDER, order.model_dump_json())
        super().__init__(config, parts, trace_folder)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # When a process has died torchrun sends SIGTERM to all others; the error names the dead
        # one.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        ended = kind is not None and issubclass(kind, signals.EndedBySignal)
        lost = self._find_lost() if ended else None
        super().__exit__(kind, error, trace)
        if lost is not None:
            raise lost

    def _find_lost(self) -> LostPeer | None:
        self.stop_thread("the engine was closed")
        end = time.monotonic() + EXIT_TIMEOUT_S
        try:
            while time.monotonic() < end:
                self.transport.receive(0.1)
        except LostPeer as lost:
            return lost
        return None

    def _explain(self, error: ClusterError) -> ClusterError:
        return error  # only torchrun knows how the process ended

    def close(self) -> None:
        """Tell the stages to stop and wait a little for them. It is safe to call twice."""
        for child in self.children.values():
            assert isinstance(child, Elsewhere)
            child.stopping = True
        super().close()

    def _make_transport(self) -> Transport:
        return TorchDistTransport(0, self.num_stages, self.meeting)

    def _spawn(self, rank: int) -> StageProcess:
        process, end = None, time.monotonic() + START_TIMEOUT_S
        while process is None and time.monotonic() < end:
            signals.check()
            process = hear(self.meeting, str(rank), HEAR_S)
        if process is None:
            raise ClusterError.of_rank(rank, f"not there after {START_TIMEOUT_S:.0f} s")
        transport = self.transport
        assert isinstance(transport, TorchDistTransport)
        return Elsewhere(process, lambda: transport.has_lost(rank))
