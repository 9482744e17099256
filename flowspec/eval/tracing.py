"""Recording a run: a folder for every process's records, which become one trace at the end."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flowspec import signals
from flowspec.eval.chrome_trace import write_trace
from flowspec.eval.timeline import make_timeline, read_records


def check_trace_path(out: str) -> Path:
    """Where the trace will go. Raises ValueError where it cannot be written."""
    target = Path(out)
    if target.is_dir():
        raise ValueError(f"--trace {out} cannot be written: it is a folder; name a file")
    if not target.parent.is_dir():
        raise ValueError(f"--trace {out} cannot be written: {target.parent} is no folder")
    return target


@contextlib.contextmanager
def tracing(out: str) -> Iterator[Path | None]:
    """The folder to record into (None without `out`); at the end of the block `out` is written.

    A run that fails leaves its trace too, as far as it came. Raises ValueError where `out` cannot
    be written or nothing was recorded.
    """
    if not out:
        yield None
        return
    target = check_trace_path(out)
    with signals.undoing(), tempfile.TemporaryDirectory(prefix="flowspec-trace-") as folder:
        try:
            yield Path(folder)
        except BaseException:
            with contextlib.suppress(ValueError, OSError):  # the failure matters more
                save_trace(Path(folder), target)
            raise
        save_trace(Path(folder), target)


def save_trace(folder: Path, out: Path) -> None:
    """Make the trace of the records in `folder`. Raises ValueError where they hold no request."""
    files = sorted(folder.glob("rank-*.jsonl"))
    write_trace(make_timeline(read_records(file) for file in files), out)
