"""Recording a run: a folder for every process's records, which become one trace at the end."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from flowspec.eval.chrome_trace import write_trace
from flowspec.eval.timeline import make_timeline, read_records


@contextlib.contextmanager
def tracing(out: str) -> Iterator[Path | None]:
    """The folder to record into (None without `out`); at the end of the block `out` is written.

    A run that fails leaves its trace too, as far as it came. Raises ValueError where `out` cannot
    be written or nothing was recorded.
    """
    if not out:
        yield None
        return
    target = Path(out)
    if target.is_dir() or not target.parent.is_dir():
        raise ValueError(f"--trace {out} cannot be written: name a file in a folder that exists")
    with tempfile.TemporaryDirectory(prefix="flowspec-trace-") as folder:
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
