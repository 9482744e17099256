"""Progress of a long command: a bar on a terminal, a line now and then in a log."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_EVERY_S = 30.0


class Tell(Protocol):
    """A function that shows progress."""

    def __call__(self, done: int, total: int, words: str = "") -> None:
        """Show that `done` of `total` are finished; `words` names what was finished last."""


@contextmanager
def shown(console: Console, units: str, *, what: str = "") -> Iterator[Tell]:
    """Show on `console` how many of the `units` are done, with the label `what`."""
    if not console.is_terminal:
        yield _Lines(console, units, what)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task(what or "starting")

        def tell(done: int, total: int, words: str = "") -> None:
            description = " ".join(filter(None, (what, words))) or units
            bar.update(task, description=description, total=total, completed=done)

        yield tell


class _Lines:
    """Prints a line at once, which says how much is ahead, and then one now and then."""

    def __init__(self, console: Console, units: str, what: str) -> None:
        self._console, self._units = console, units
        self._what = f"{what}: " if what else ""
        self._told_at: float | None = None

    def __call__(self, done: int, total: int, words: str = "") -> None:
        now = time.monotonic()
        if done == total and self._told_at is None:
            return  # nothing is to be run
        if self._told_at is None:
            text = f"{total - done} {self._units} ahead"
        elif now - self._told_at >= LINE_EVERY_S:
            text = f"{done} of {total} {self._units}" + (f", the last: {words}" if words else "")
        else:
            return
        self._told_at = now
        line = f"{self._what}{text}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
