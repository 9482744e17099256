"""Memory of this machine and process, as the kernel counts it; 0 where it does not say."""

from pathlib import Path
from typing import Any

import torch

from flowspec.model.backend import StageBackend


def peak_bytes() -> int:
    """The most this process has had resident, in bytes."""
    return _kib(Path("/proc/self/status"), "VmHWM") * 1024


def available_bytes(device: torch.device) -> int:
    """What is free on `device`; for the CPU what programs may still take without swapping.

    Boards whose GPU shares the CPU's memory tell it as MemAvailable too: their driver counts the
    page cache, which gives way, as used.
    """
    free = _kib(Path("/proc/meminfo"), "MemAvailable") * 1024
    if device.type != "cuda":
        return free
    shared = bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))
    return free if shared else int(torch.cuda.mem_get_info(device)[0])


def total_bytes(device: torch.device) -> int:
    """All the memory `device` has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return _kib(Path("/proc/meminfo"), "MemTotal") * 1024


def kv_rows(model: StageBackend[Any], *, memory_mb: int, num_sharing: int) -> int:
    """Rows of KV cache that fit `memory_mb`, or half of what is free shared by `num_sharing`.

    0: no limit known.
    """
    budget = memory_mb * 1_000_000 or available_bytes(model.device) // (2 * num_sharing)
    return budget // model.kv_bytes_per_row


def _kib(file: Path, name: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), 0)
