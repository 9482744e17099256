"""Output of long-running commands on stderr: lines by device, bars of weight transfers."""

import json
import logging
import sys
import time

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from flowspec.protocol.control import Progress as DeviceProgress

LEVELS = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
PLAIN_INTERVAL_S = 2.0  # between progress lines where stderr is no terminal
REPEAT_AFTER_S = 60.0
log = logging.getLogger("flowspec")


class _LogLines(logging.Formatter):
    """Formats a record as `12:00:01 nano-3: joined ...`; warnings are marked."""

    def format(self, record: logging.LogRecord) -> str:
        when = time.strftime("%H:%M:%S", time.localtime(record.created))
        device = getattr(record, "device", "")
        mark = "" if record.levelno < logging.WARNING else f"{record.levelname.lower()}: "
        text = f"{when} {mark}{f'{device}: ' if device else ''}{record.getMessage()}"
        return f"{text}\n{self.formatException(record.exc_info)}" if record.exc_info else text


class _JsonLines(logging.Formatter):
    """Formats a record as a JSON object: time, level, device, logger, text."""

    def format(self, record: logging.LogRecord) -> str:
        content = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "device": getattr(record, "device", ""),
            "logger": record.name,
            "text": record.getMessage(),
        }
        if record.exc_info:
            content["traceback"] = self.formatException(record.exc_info)
        return json.dumps(content)


class Watch:
    """Shows what this process logs, and bars for what each device loads."""

    def __init__(self, *, log_json: bool, device: str = "") -> None:
        self._device = device
        self._console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._with_bars = self._console.is_terminal and not log_json
        self._bars: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._said: dict[str, float] = {}  # what may come again and again, and when it was said
        self._lines: dict[str, tuple[float, str, bool]] = {}  # when, what and whether all of it
        handler = logging.StreamHandler(sys.stderr) if log_json else _ConsoleHandler(self._console)
        handler.setFormatter(_JsonLines() if log_json else _LogLines())
        root = logging.getLogger()
        root.handlers[:] = [handler]
        root.setLevel(logging.INFO)

    def say_again(self, text: str, *, level: str) -> None:
        """Print a line unless the same one was printed within the last minute."""
        now = time.monotonic()
        if now - self._said.get(text, float("-inf")) >= REPEAT_AFTER_S:
            self._said = {old: at for old, at in self._said.items() if now - at < REPEAT_AFTER_S}
            self._said[text] = now
            self.say(text, level=level)

    def say(self, text: str, *, device: str = "", level: str = "info") -> None:
        """Print one line."""
        log.log(LEVELS[level], "%s", text, extra={"device": device or self._device})

    def progress(self, name: str, progress: DeviceProgress) -> None:
        """Show a device's progress: a bar on a terminal, else a line now and then."""
        if self._with_bars:
            self._bar(name, progress)
            return
        at, phase, was_done = self._lines.get(name, (0.0, "", False))
        is_done = progress.done_bytes >= progress.total_bytes
        now = time.monotonic()
        is_news = progress.phase != phase or is_done != was_done
        if is_news or (not is_done and now - at >= PLAIN_INTERVAL_S):
            self._lines[name] = (now, progress.phase, is_done)
            share = progress.done_bytes / max(progress.total_bytes, 1)
            cached = (
                f", {progress.cached_bytes / 1e6:.1f} MB cached" if progress.cached_bytes else ""
            )
            self.say(
                f"{progress.phase} {share:.0%} of {progress.total_bytes / 1e6:.1f} MB{cached}",
                device=name,
            )

    def _bar(self, name: str, progress: DeviceProgress) -> None:
        if self._bars is None:
            self._bars = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bars.start()
        title = f"{name} {progress.phase}"
        if title not in self._tasks:
            self._tasks[title] = self._bars.add_task(title, total=progress.total_bytes)
        self._bars.update(
            self._tasks[title], completed=progress.done_bytes, total=progress.total_bytes
        )
        if all(task.finished for task in self._bars.tasks):
            self.close()

    def close(self) -> None:
        """Remove the bars."""
        if self._bars is not None:
            self._bars.stop()
            self._bars, self._tasks = None, {}


class _ConsoleHandler(logging.Handler):
    """Prints records through the console, so that lines do not tear the bars."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._console.print(self.format(record), markup=False)
        except OSError:
            return  # the terminal is gone
