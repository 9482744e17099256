"""A stage process loads its layers and serves until it is told to stop or its parent is gone."""

import traceback
from pathlib import Path

import torch

from flowspec.cluster.device.memory import num_kv_tokens, peak_bytes
from flowspec.config import Config, DeviceConfig, NumericsConfig
from flowspec.cost_model.emulation import read_emulation
from flowspec.engine.build import build_stage
from flowspec.protocol.messages import HEAD, Failed, Ready
from flowspec.request import ClusterError, cause_of
from flowspec.runtime.event_loop import EventLoop, Pace
from flowspec.runtime.recorder import open_trace
from flowspec.system.config_file import MAX_BYTES
from flowspec.transport.base import Transport
from flowspec.transport.by_name import local_transport
from flowspec.transport.emulated import EmulatedTransport

IDLE_WAIT_S = 5.0  # an idle stage wakes this often; messages wake it at once


class StageConfig(Config):
    """The configuration of a stage process: its place, its numerics and its device."""

    split_folder: Path
    socket_folder: str = ""
    rank: int
    num_stages: int
    numerics: NumericsConfig  # the head's
    local: DeviceConfig
    transport: str = "zmq"
    emulate: str = ""  # CLUSTER:MODEL whose pace to keep
    emulate_slowdown: float = 1.0
    trace_file: Path | None = None  # where to record what this process does
    epoch: int = 0  # of the pipeline that this stage joins


def read_stage_config(file: Path) -> StageConfig:
    """Read the configuration that the head has written for a stage. Raises ValueError."""
    text = file.read_bytes()
    if len(text) > MAX_BYTES:
        raise ValueError(f"{file} is larger than {MAX_BYTES} bytes; is it a stage's configuration?")
    return StageConfig.model_validate_json(text)


def run_worker(config: StageConfig) -> int:
    """Serve as stage `rank` of a local cluster; return the exit code."""
    transport = local_transport(
        config.transport,
        config.rank,
        num_stages=config.num_stages,
        folder=config.socket_folder,
        device=config.local.device,
    )
    if not config.emulate:
        return serve(config, transport)
    emulation = read_emulation(config.emulate, drafter="none", slowdown=config.emulate_slowdown)
    return serve(config, EmulatedTransport(transport, config.rank, emulation.link), emulation)


def serve(config: StageConfig, transport: Transport, pace: Pace | None = None) -> int:
    """Load and serve until told to stop; return the exit code. The head is told every failure."""
    torch.set_num_threads(config.local.threads)
    trace = open_trace(config.trace_file, config.rank)
    epoch, stage = config.epoch, None
    try:
        stage, model_hash = build_stage(
            config.split_folder,
            config.rank,
            device=config.local.device,
            numerics=config.numerics,
        )
        stage.epoch = epoch
        stage.num_kv_tokens = num_kv_tokens(
            stage.model, memory_mb=config.local.kv_memory_mb, num_sharing=config.num_stages
        )
        stage.peak_memory_bytes = peak_bytes
        ready = Ready(
            stage=config.rank,
            model=model_hash,
            numerics=config.numerics.model_dump_json(),
            num_kv_tokens=stage.num_kv_tokens,
        )
        transport.send(HEAD, ready)
        driver = EventLoop(stage, transport, config.num_stages, trace, pace=pace)
        while not driver.stopped:
            driver.turn(IDLE_WAIT_S)
    except ClusterError as error:
        _report_lost(config, transport, error, stage.epoch if stage else epoch)
        return 1
    except Exception as error:
        # The head must be told of any error; the traceback is for this process's log.
        traceback.print_exc()
        text, epoch = cause_of(error), stage.epoch if stage else epoch
        transport.send(HEAD, Failed(epoch=epoch, stage=config.rank, request=0, text=text))
        return 1
    finally:
        trace.close()
        transport.close()
    return 0


def _report_lost(
    config: StageConfig, transport: Transport, error: ClusterError, epoch: int
) -> None:
    """Tell the head which rank this stage has lost, as a failure of that rank."""
    if error.rank:
        text = f"{error.cause} (seen by stage {config.rank})"
        transport.send(HEAD, Failed(epoch=epoch, stage=error.rank, request=0, text=text))
