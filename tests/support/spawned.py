"""`flowspec` commands as forks of a process that has imported everything.

Importing torch takes longer than most tests, and a fork needs no import. The commands are otherwise
ordinary processes, with their own signals, exit codes and output.
"""

import functools
import importlib
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from pathlib import Path

SIGNAL_AT = "signal sent at"  # by the clock that all processes of a machine share
CONTEXT = multiprocessing.get_context("forkserver")
_COMMANDS = [f"flowspec.cli.{name}" for name in ("serve", "join", "run", "bench", "verify")]
# transformers' imports for a tokenizer take as long as torch
_SLOW = ("transformers.models.auto.tokenization_auto", "transformers.generation.utils")
CONTEXT.set_forkserver_preload([*_COMMANDS, *_SLOW])


def run_command(
    arguments: Sequence[str],
    log: str,
    folder: str,
    environment: Mapping[str, str],
    interrupt: tuple[str, int] | None = None,
    times: int = 1,
) -> None:
    """Run `flowspec *arguments` in this process, which was forked for it."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for number in (1, 2):
        os.dup2(output, number)
    os.chdir(folder)
    os.environ.update(environment)
    tempfile.tempdir = None  # an import may have used it before TMPDIR was set
    sys.argv = ["flowspec", *arguments]
    if interrupt is not None:
        _interrupt_at(*interrupt, times)
    from flowspec.__main__ import main

    main()


def _interrupt_at(place: str, number: int, times: int) -> None:
    """Send this process `times` signals when the function `module:name` is first called."""
    module, _, name = place.partition(":")
    *owners, last = name.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    usual, pending = getattr(owner, last), [place]

    @functools.wraps(usual)
    def changed(*words: object, **options: object) -> object:
        if pending:
            os.write(1, f"{SIGNAL_AT} {time.monotonic()}\n".encode())
            pending.clear()
            for turn in range(times):
                time.sleep(0.3 if turn else 0.0)  # else two signals become one
                os.kill(os.getpid(), number)
            # With more than one it goes on with nothing, as in a long wait. After one it goes on
            # when another thread has taken the signal: some commands have ended by themselves then.
            time.sleep(60.0 if times > 1 else 0.2)
        return usual(*words, **options)

    setattr(owner, last, changed)


def spawn(
    arguments: Sequence[str],
    log: Path,
    folder: Path,
    environment: Mapping[str, str],
    *,
    interrupt: tuple[str, int] | None = None,
    daemon: bool = True,
    times: int = 1,
) -> ForkServerProcess:
    """Start `flowspec *arguments` in `folder`; its output is appended to `log`.

    `interrupt` is a function, such as flowspec.cli.run:run, and a signal that comes at its first
    call, `times` times; a line of the log has the time. A daemon, which multiprocessing ends with
    this process, can have no workers of its own.
    """
    words = arguments, str(log), str(folder), dict(environment), interrupt, times
    process = CONTEXT.Process(target=run_command, args=words, daemon=daemon)
    process.start()
    return process
