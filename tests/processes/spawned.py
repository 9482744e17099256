"""`flowspec` commands as processes that are forked from one which has everything imported.

Importing torch takes longer than most tests; a fork takes none of it. They are processes like any
other: with signals, exit codes and output of their own.
"""

import multiprocessing
import os
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["flowspec.cli.serve", "flowspec.cli.join", "transformers"])


def run_command(
    arguments: Sequence[str], log: str, folder: str, environment: Mapping[str, str]
) -> None:
    """`flowspec *arguments` in this process, which was forked for it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(output, number)
    os.chdir(folder)
    os.environ.update(environment)
    sys.argv = ["flowspec", *arguments]
    from flowspec.cli.main import main

    main()


def spawn(
    arguments: Sequence[str], log: Path, folder: Path, environment: Mapping[str, str]
) -> ForkServerProcess:
    """Start `flowspec *arguments` in `folder`; its output is appended to `log`."""
    process = CONTEXT.Process(
        target=run_command, args=(arguments, str(log), str(folder), dict(environment)), daemon=True
    )
    process.start()
    return process
