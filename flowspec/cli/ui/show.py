"""What `flowspec run` shows: the text as it comes, a live line, a summary at the end."""

import logging
import os
import queue
import stat
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TextIO

import typer
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flowspec.engine.engine import Engine, StageStatus
from flowspec.engine.stream import Event, Stream
from flowspec.request import Request, RequestOutput, TokensOut
from flowspec.runtime import failures
from flowspec.system import signals

log = logging.getLogger("flowspec")
POLL_S = 0.2
STAGES_S = 1.0  # for the stages to say what they did, once an answer is over
PLAIN_INTERVAL_S = 2.0  # between live lines where stderr is no terminal
CUT_OFF = " ... (cut off)"


def show_answers(engine: Engine, requests: Sequence[Request]) -> tuple[list[RequestOutput], float]:
    """Run all requests at once and show their answers.

    Returns the outputs in order, and the seconds that all took. A single answer streams to stdout;
    of several, each is printed when it is complete. Then the stages have up to STAGES_S to report
    what they did.
    """
    start = time.monotonic()
    console = Console()
    screen = _Screen(console, alone=len(requests) == 1)
    line = _LiveLine(engine, start)
    notes = _Notes(screen)
    log.addHandler(notes)
    streams: dict[int, Stream] = {}
    try:
        for place, request in enumerate(requests, start=1):
            streams[place] = engine.submit(request)
        for place, event in _events(streams):
            if isinstance(event, RequestOutput):
                screen.finish(place, event)
            elif isinstance(event, TokensOut):
                num_open = sum(stream.output is None for stream in streams.values())
                screen.add(place, event.text, partial(line.text, num_open))
        elapsed_s = time.monotonic() - start
        for stream in streams.values():
            if stream.result().tokens:
                stream.stage_stats(STAGES_S)
    except BaseException:
        for stream in streams.values():
            stream.abort()
        screen.cut_off()
        raise
    finally:
        log.removeHandler(notes)
        screen.close()
    return [stream.result() for stream in streams.values()], elapsed_s


def _events(streams: Mapping[int, Stream]) -> Iterator[tuple[int, Event]]:
    """Yield the events of all streams as they come, each with its stream's number."""
    readable: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number, stream in streams.items():
        stream.listen(partial(readable.put, number))
    num_open = len(streams)
    while num_open:
        signals.check()
        try:
            number = readable.get(timeout=POLL_S)
        except queue.Empty:
            continue
        while (event := streams[number].poll()) is not None:
            num_open -= isinstance(event, RequestOutput)
            yield number, event


class _Notes(logging.Handler):
    """Shows log messages of the engine, such as that a stage is restarted."""

    def __init__(self, screen: "_Screen") -> None:
        super().__init__(logging.WARNING)
        self._screen = screen

    def emit(self, record: logging.LogRecord) -> None:
        if record.name == failures.__name__ and self._screen.alone:
            return  # the run ends with this error
        self._screen.note(record.getMessage())  # a person reads it: without a traceback


class _Screen:
    """Shows answers in a live region on a terminal, and elsewhere as plain text on stdout.

    Without a terminal it prints the speed on stderr now and then. Stdout and stderr may be one pipe
    or log, so a single answer, whose text shows its progress, gets such lines only if stdout is a
    file.
    """

    def __init__(self, console: Console, *, alone: bool) -> None:
        self.alone = alone
        self.texts: dict[int, str] = {}  # of answers that are not complete
        self.shown_at = time.monotonic()
        self.mid_line = False  # of an answer that streams to stdout
        self.says_speed = not alone or (sys.stderr.isatty() and _is_file(sys.stdout))
        self.live: Live | None = None
        if sys.stdout.isatty():
            self.live = Live(console=console, refresh_per_second=8, transient=not alone)
            self.live.start()

    def add(self, number: int, text: str, line: Callable[[], str]) -> None:
        """Show more text of one answer."""
        self.texts[number] = self.texts.get(number, "") + text
        if self.live:
            shown = self.texts[number] if self.alone else ""
            self.live.update(Group(Text(shown), Text(line(), style="dim")))
            return
        if self.alone:
            typer.echo(text, nl=False)
            sys.stdout.flush()
            self.mid_line = not (self.texts[number] or "\n").endswith("\n")
        if self.says_speed and time.monotonic() - self.shown_at > PLAIN_INTERVAL_S:
            self.shown_at = time.monotonic()
            typer.echo(f"[{line()}]", err=True)

    def note(self, text: str) -> None:
        """Print a line on stderr; an answer's unfinished line is ended before it."""
        line_end = "\n" if self.mid_line else ""
        sys.stderr.write(f"{line_end}{text}\n")
        sys.stderr.flush()

    def finish(self, number: int, output: RequestOutput) -> None:
        """Show one answer that is over; the caller reports its error, if it has one."""
        self.texts.pop(number, None)
        if not self.alone:
            if output.tokens:
                self._print(f"[{number}] {output.text}{'' if output.error is None else CUT_OFF}\n")
        elif self.live:
            self.live.update(Text(output.text))
        elif output.tokens:
            typer.echo("")
            self.mid_line = False

    def cut_off(self) -> None:
        """Print the text that open answers have so far, because the run ends here."""
        if self.alone:  # it is on the screen already
            if self.live:
                self.live.update(Text("".join(self.texts.values())))  # without the live line
            elif self.mid_line:
                typer.echo("")
            return
        for request, text in self.texts.items():
            self._print(f"[{request}] {text}{CUT_OFF}\n")

    def _print(self, text: str) -> None:
        if self.live:
            self.live.console.print(Text(text))
        else:
            typer.echo(text)

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self.live:
            self.live.stop()


def _is_file(stream: TextIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(stream.fileno()).st_mode)
    except (OSError, ValueError):  # it is closed, or none of the system's
        return False


class _LiveLine:
    """Speed, acceptance, and the share of the time in which each stage computed."""

    def __init__(self, engine: Engine, start: float) -> None:
        self.engine, self.start = engine, start
        self._seen: dict[int, tuple[float, float]] = {}  # (when, busy seconds) per stage
        self._shares: dict[int, float] = {}

    def text(self, num_open: int) -> str:
        """Return the line as of now; `num_open` answers are not complete."""
        now, status = time.monotonic(), self.engine.status()
        progress = status.progress
        self._update(status.stages, now)
        stages = " ".join(f"{rank}:{share:.0%}" for rank, share in sorted(self._shares.items()))
        tau = progress.num_decoded / progress.num_verdicts if progress.num_verdicts else 0.0
        begin = max(progress.first_token_at or now, self.start)
        rate = progress.num_decoded / max(now - begin, 1e-9)
        waiting = f"{num_open} open, " if num_open > 1 else ""
        return (
            f"{waiting}{max(rate, 0.0):.1f} tokens/s, {tau:.2f} tokens per verdict, "
            f"stages busy {stages or '-'}"
        )

    def _update(self, statuses: Mapping[int, StageStatus], now: float) -> None:
        for rank, status in sorted(statuses.items()):
            when, busy_s = self._seen.get(rank, (now, status.busy_s))
            if status.busy_s != busy_s and now > when:
                self._shares[rank] = min(1.0, (status.busy_s - busy_s) / (now - when))
            if status.busy_s != busy_s or rank not in self._seen:
                self._seen[rank] = (now, status.busy_s)


def show_summary(
    completions: Sequence[RequestOutput], statuses: Mapping[int, StageStatus], elapsed_s: float
) -> None:
    """Print a table of several requests, then the figures of all together."""
    console = Console(width=100)
    if len(completions) > 1:
        console.print(_requests_table(completions))
    table = Table(show_header=False, box=None, pad_edge=False)
    all_stats = [completion.stats for completion in completions]
    if len(completions) == 1:
        _add_request(table, completions[0])
    else:
        total = sum(stats.num_tokens for stats in all_stats)
        table.add_row(
            "all together", f"{total} tokens, {total / elapsed_s:.1f} tokens/s end to end"
        )
    busy = {r: min(1.0, s.busy_s / max(elapsed_s, 1e-9)) for r, s in sorted(statuses.items())}
    table.add_row("stages busy", " ".join(f"{rank}:{share:.0%}" for rank, share in busy.items()))
    rows, segments = (
        sum(getattr(s, n) for s in all_stats) for n in ("num_rows_sent", "num_segments")
    )
    drafts = sum(stats.num_draft_forwards for stats in all_stats)
    table.add_row("sent", f"{rows} rows in {segments} segments, {drafts} drafter forwards")
    pruned = sum(status.num_rows_pruned for status in statuses.values())
    table.add_row("pruned in flight", f"{pruned} rows")
    peaks = {rank: status.peak_memory_bytes for rank, status in sorted(statuses.items())}
    if all(peaks.values()):
        table.add_row("peak memory", " ".join(f"{r}:{b / 1e6:.0f} MB" for r, b in peaks.items()))
    console.print(table)


def _add_request(table: Table, completion: RequestOutput) -> None:
    stats = completion.stats
    alphas = " ".join(f"{alpha:.2f}" for alpha in stats.acceptance_by_depth()[:8])
    table.add_row("finished", f"{completion.reason.value}, {stats.num_tokens} tokens")
    table.add_row("speed", f"{stats.tokens_per_s:.1f} tokens/s after the first token")
    table.add_row("first token", f"{stats.time_to_first_token_s * 1e3:.0f} ms")
    table.add_row("tau", f"{stats.mean_accepted_length:.2f} tokens per verdict")
    table.add_row("alpha per depth", alphas or "-")


def _requests_table(completions: Sequence[RequestOutput]) -> Table:
    table = Table("request", "finished", "tokens", "first token", "tokens/s", "tau", box=None)
    for number, completion in enumerate(completions, start=1):
        stats = completion.stats
        table.add_row(
            *(str(number), completion.reason.value, str(stats.num_tokens)),
            f"{stats.time_to_first_token_s * 1e3:.0f} ms",
            *(f"{stats.tokens_per_s:.1f}", f"{stats.mean_accepted_length:.2f}"),
        )
    return table
