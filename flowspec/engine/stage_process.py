"""A stage process: loads its layers, then serves until told to stop or its parent is gone."""

import traceback
from dataclasses import dataclass
from pathlib import Path

import torch

from flowspec.cluster.device.memory import num_kv_tokens, peak_bytes
from flowspec.cost_model.emulation import read_emulation
from flowspec.engine.build import build_stage
from flowspec.protocol.messages import HEAD, Failed, Ready
from flowspec.request import ClusterError, cause_of
from flowspec.runtime.event_loop import EventLoop, Pace
from flowspec.runtime.recorder import open_trace
from flowspec.transport.base import Transport
from flowspec.transport.by_name import local_transport
from flowspec.transport.emulated import EmulatedTransport

IDLE_WAIT_S = 5.0  # an idle stage wakes this often; messages wake it at once


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """What a stage process is started with."""

    split_folder: Path
    socket_folder: str
    rank: int
    num_stages: int
    transport: str = "zmq"
    device: str = "cpu"
    dtype: str = "float32"
    threads: int = 1
    batch_invariant: bool = False
    kv_memory_mb: int = 0  # 0: half of what is free, shared with the other stages here
    emulate: str = ""  # CLUSTER:MODEL whose pace to keep
    emulate_slowdown: float = 1.0
    trace_file: Path | None = None  # where to record what this process does
    epoch: int = 0  # of the pipeline that this stage joins


def run_worker(config: WorkerConfig) -> int:
    """Serve as stage `rank` of a local cluster; returns the exit code."""
    transport = local_transport(
        config.transport,
        config.rank,
        num_stages=config.num_stages,
        folder=config.socket_folder,
        device=config.device,
    )
    if not config.emulate:
        return serve(config, transport)
    emulation = read_emulation(config.emulate, drafter="none", slowdown=config.emulate_slowdown)
    return serve(config, EmulatedTransport(transport, config.rank, emulation.link), emulation)


def serve(config: WorkerConfig, transport: Transport, pace: Pace | None = None) -> int:
    """Load, serve until told to stop, return the exit code. The head learns of every failure."""
    torch.set_num_threads(config.threads)
    trace = open_trace(config.trace_file, config.rank)
    epoch, stage = config.epoch, None
    try:
        stage, model_hash = build_stage(
            config.split_folder,
            config.rank,
            device=config.device,
            dtype=config.dtype,
            batch_invariant=config.batch_invariant,
        )
        stage.epoch = epoch
        stage.num_kv_tokens = num_kv_tokens(
            stage.model, memory_mb=config.kv_memory_mb, num_sharing=config.num_stages
        )
        stage.peak_memory_bytes = peak_bytes
        ready = Ready(stage=config.rank, model=model_hash, num_kv_tokens=stage.num_kv_tokens)
        transport.send(HEAD, ready)
        driver = EventLoop(stage, transport, config.num_stages, trace, pace=pace)
        while not driver.stopped:
            driver.turn(IDLE_WAIT_S)
    except ClusterError as error:
        _report_lost(config, transport, error, stage.epoch if stage else epoch)
        return 1
    except Exception as error:
        # The head must hear of it whatever it was; the traceback is for this process's log.
        traceback.print_exc()
        text, epoch = cause_of(error), stage.epoch if stage else epoch
        transport.send(HEAD, Failed(epoch=epoch, stage=config.rank, request=0, text=text))
        return 1
    finally:
        trace.close()
        transport.close()
    return 0


def _report_lost(
    config: WorkerConfig, transport: Transport, error: ClusterError, epoch: int
) -> None:
    """Tell the head which rank this stage has lost, as a failure of that rank."""
    if error.rank:
        text = f"{error.cause} (seen by stage {config.rank})"
        transport.send(HEAD, Failed(epoch=epoch, stage=error.rank, request=0, text=text))
