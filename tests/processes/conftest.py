"""Fixtures for real processes on a tiny checkpoint, made and split once."""

import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from flowspec.config import EngineConfig
from flowspec.engine.build import HeadParts, load_head_parts
from flowspec.engine.local import LocalEngine
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from tests.support.checkpoints import save_checkpoint

GONE_WITHIN_S = 15.0  # far more than it takes: this machine may be busy


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make `target/` and `eagle/`."""
    torch.set_num_threads(1)
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint") / "tiny", num_layers=2)


def split_target(checkpoint: Path, layers: tuple[int, ...]) -> Path:
    """Split the target as `layers` says."""
    out = checkpoint / f"split-{len(layers)}"
    plan = plan_split(open_checkpoint(checkpoint / "target"), layers=layers, dtype=None)
    run_split(plan, out, model_id="tiny")
    return out


@pytest.fixture(scope="session")
def split(checkpoint: Path) -> Path:
    """Return the target in two stages."""
    return split_target(checkpoint, (1, 1))


@pytest.fixture(scope="session")
def whole_split(checkpoint: Path) -> Path:
    """Return the target in one stage."""
    return split_target(checkpoint, (2,))


@pytest.fixture(scope="session")
def config(checkpoint: Path, split: Path) -> EngineConfig:
    """A run on the tiny checkpoint that keeps nothing of a finished request and restarts nobody."""
    draft = str(checkpoint / "eagle")
    return EngineConfig(model=str(split), draft=draft, stages=2, kept_prefixes=0, max_restarts=0)


@pytest.fixture(scope="session")
def parts(config: EngineConfig, split: Path) -> HeadParts:
    """The head's share, loaded once for all clusters."""
    return load_head_parts(config, split)


def is_running(pid: int) -> bool:
    """Return whether a process still runs; a zombie does not count."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.fixture
def all_gone() -> Iterator[Callable[[Iterable[int]], None]]:
    """Assert that processes end in time; kill those that a failed test leaves."""
    known: set[int] = set()

    def check(pids: Iterable[int]) -> None:
        known.update(pids)
        end = time.monotonic() + GONE_WITHIN_S
        while left := [pid for pid in known if is_running(pid)]:
            assert time.monotonic() < end, f"still running: {left}"
            time.sleep(0.05)

    yield check
    for pid in known:
        if is_running(pid):
            os.kill(pid, signal.SIGKILL)


def stage_pids(cluster: LocalEngine) -> list[int]:
    """Process ids of the stages, stage 1 first."""
    return [cluster.children[rank].pid for rank in sorted(cluster.children)]
