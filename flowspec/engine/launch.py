"""Reads what torchrun has told this process, without importing torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Launch:
    """The place of this process among those that torchrun has started."""

    rank: int
    local_rank: int  # on this machine
    num_stages: int


def find_launch(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return the launch that torchrun's environment describes; None without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    rank, local_rank, size = (
        int(environment[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
    )
    return Launch(rank, local_rank, size - 1)
