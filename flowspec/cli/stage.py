"""`flowspec stage`: one stage process; started by the head, not by hand."""

from pathlib import Path
from typing import Annotated

import typer

from flowspec.system.parent import end_with_stdin
from flowspec.system.process_title import name_process


def stage(
    config: Annotated[Path, typer.Argument(help="What the head has written for this stage.")],
) -> None:
    """Serve one stage until the head says stop or is gone."""
    end_with_stdin()
    # torch takes seconds to import, and the head may be gone before
    from flowspec.engine.stage_process import read_stage_config, run_worker

    stage_config = read_stage_config(config)
    name_process(f"stage {stage_config.rank}")
    raise typer.Exit(run_worker(stage_config))
