"""`flowspec trace`: summaries of a traced run."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from flowspec.tracing.trace_summary import ProcessShare, Summary, summarize

WIDTH = 100
trace = typer.Typer(no_args_is_help=True, add_completion=False, rich_markup_mode=None)


@trace.callback()
def root() -> None:
    """Look at what `flowspec run --trace FILE` recorded."""


@trace.command("summary", short_help="Where the time went, and what held the run up.")
def summary(
    file: Annotated[Path, typer.Argument(help="The file that --trace wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")] = False,
) -> None:
    """Show where the time went: work, idle time by cause, links, rows, critical path."""
    found = summarize(file)
    if as_json:
        data = asdict(found)
        data["critical_resource"] = found.critical_resource[0]
        typer.echo(json.dumps(data, indent=1))
        return
    console = Console(width=WIDTH)
    console.print(_processes(found))
    console.print(_links(found))
    console.print(_totals(found))


def _processes(found: Summary) -> Table:
    table = Table(title="Where each process's time went")
    for name in ("process", "", "what", "seconds", "share"):
        table.add_column(name, justify="right" if name in ("seconds", "share") else "left")
    for share in found.processes:
        rows = list(_rows(share))
        for index, (group, what, seconds) in enumerate(rows):
            name = share.name if index == 0 else ""
            part = seconds / share.wall_s if share.wall_s else 0.0
            last = index == len(rows) - 1
            table.add_row(name, group, what, f"{seconds:.3f}", f"{part:.1%}", end_section=last)
    return table


def _rows(share: ProcessShare) -> Iterator[tuple[str, str, float]]:
    """Return group, name and seconds of each row; the longest come first in each group."""
    groups: tuple[tuple[str, Mapping[str, float]], ...] = (
        ("busy", share.busy_s),
        ("idle", share.idle_s),
    )
    for group, times in groups:
        for what, seconds in sorted(times.items(), key=lambda item: -item[1]):
            yield group, what, seconds


def _links(found: Summary) -> Table:
    table = Table(title="Hops (times: of messages that found their receiver waiting)")
    for name in ("link", "messages", "bytes", "timed", "median ms", "p95 ms"):
        table.add_column(name, justify="left" if name == "link" else "right")
    for link in found.links:
        table.add_row(
            link.name,
            f"{link.num_messages:,}",
            f"{link.num_bytes:,}",
            f"{link.num_timed:,}",
            f"{link.median_ms:.3f}",
            f"{link.p95_ms:.3f}",
        )
    return table


def _totals(found: Summary) -> Table:
    totals = found.totals
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_row("wall", f"{found.wall_s:.3f} s, {totals['num_tokens']} tokens")
    prompt = f"{totals['num_prompt_segments']} of prompts"
    table.add_row("segments", f"{totals['num_segments']} of trees, {prompt}")
    sent, pruned = f"{totals['rows_sent']} sent", f"{totals['rows_pruned']} pruned in flight"
    run = f"{totals['rows_run']} run on all stages ({totals['rows_wasted']} of them wasted)"
    table.add_row("tree rows", f"{sent}, {run}, {pruned}")
    hits = f"{totals['num_hits']} found their token sent already"
    table.add_row("verdicts", f"{totals['num_verdicts']}, {hits}")
    slowest = f"{found.slowest_stage}, {found.slowest_stage_ms:.3f} ms per forward"
    table.add_row("slowest stage", slowest)
    path_s = sum(seconds for _, _, seconds in found.critical_path)
    parts = [
        f"{where} {what} {seconds / path_s:.0%}"
        if where != "links"
        else f"links {seconds / path_s:.0%}"
        for where, what, seconds in found.critical_path
        if path_s and seconds / path_s >= 0.005
    ]
    table.add_row("critical path", ", ".join(parts) or "-")
    where, seconds = found.critical_resource
    table.add_row("critical resource", f"{where}, {seconds / path_s if path_s else 0.0:.0%} of it")
    error = found.clock_error_s
    table.add_row("clock error", "unknown" if error is None else f"at most {error * 1e3:.3f} ms")
    if found.num_dropped:
        table.add_row("records dropped", f"{found.num_dropped}: the end of the run is missing")
    if found.cut_off:
        table.add_row("cut off", f"{', '.join(found.cut_off)}: its last records are missing")
    return table
