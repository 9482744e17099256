"""`flowspec stage`: one stage process; started by the head, not by hand."""

from pathlib import Path
from typing import Annotated

import typer

from flowspec.system.parent import end_with_stdin
from flowspec.system.process_title import name_process


def stage(
    split: Annotated[Path, typer.Option(help="Folder of the split model.")],
    sockets: Annotated[str, typer.Option(help="Folder of the cluster's sockets.")],
    rank: Annotated[int, typer.Option(help="Which stage, from 1.")],
    num_stages: Annotated[int, typer.Option()],
    transport: str = "zmq",
    device: str = "cpu",
    dtype: str = "float32",
    threads: int = 1,
    kv_memory_mb: Annotated[int, typer.Option(help="For KV caches; 0: half of what is free.")] = 0,
    batch_invariant: bool = False,
    emulate: Annotated[str, typer.Option(help="CLUSTER:MODEL whose pace to keep.")] = "",
    emulate_slowdown: float = 1.0,
    trace_file: Path | None = None,
    epoch: Annotated[int, typer.Option(help="Of the pipeline that it joins.")] = 0,
) -> None:
    """Serve one stage until the head says stop or is gone."""
    end_with_stdin()
    name_process(f"stage {rank}")
    # torch takes seconds to import, and the head may be gone before
    from flowspec.engine.stage_process import WorkerConfig, run_worker

    config = WorkerConfig(
        split_folder=split,
        socket_folder=sockets,
        rank=rank,
        num_stages=num_stages,
        transport=transport,
        device=device,
        dtype=dtype,
        threads=threads,
        batch_invariant=batch_invariant,
        kv_memory_mb=kv_memory_mb,
        emulate=emulate,
        emulate_slowdown=emulate_slowdown,
        trace_file=trace_file,
        epoch=epoch,
    )
    raise typer.Exit(run_worker(config))
