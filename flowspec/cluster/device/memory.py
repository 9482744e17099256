"""Memory of this machine and process, as the kernel counts it."""

from pathlib import Path
from typing import Any

import psutil
import torch

from flowspec.model.backend import StageBackend


def peak_bytes() -> int:
    """The most this process has had resident, in bytes; 0 where the system is not Linux."""
    try:  # psutil does not tell; getrusage tells the parent's where that is more
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


def available_bytes(device: torch.device) -> int:
    """What is free on `device`; for the CPU what programs may still take without swapping.

    Boards whose GPU shares the CPU's memory tell it as MemAvailable too: their driver counts the
    page cache, which gives way, as used.
    """
    free = int(psutil.virtual_memory().available)
    if device.type != "cuda":
        return free
    shared = bool(getattr(torch.cuda.get_device_properties(device), "is_integrated", False))
    return free if shared else int(torch.cuda.mem_get_info(device)[0])


def total_bytes(device: torch.device) -> int:
    """All the memory `device` has."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return int(psutil.virtual_memory().total)


def num_kv_tokens(model: StageBackend[Any], *, memory_mb: int, num_sharing: int) -> int:
    """Rows of KV cache that fit `memory_mb`, or half of what is free shared by `num_sharing`.

    0: no limit known.
    """
    budget = memory_mb * 1_000_000 or available_bytes(model.device) // (2 * num_sharing)
    return budget // model.kv_bytes_per_row
