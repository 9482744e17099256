"""`flowspec report`: tables from the records of a benchmark."""

from pathlib import Path
from typing import Annotated

import typer
from rich import box
from rich.console import Console
from rich.table import Table as RichTable

from flowspec.bench.report import csv_report, tables
from flowspec.bench.tables import Table, to_latex, to_markdown
from flowspec.cli.common import check_file, read_records, write_whole

FORMATS = ("text", "markdown", "latex", "csv")
MAX_WIDTH = 1000  # wide enough that no figure is folded


def report(
    records: Annotated[
        list[Path], typer.Argument(help="Files or folders that `flowspec bench` wrote.")
    ],
    format_: Annotated[
        str, typer.Option("--format", help=f"One of {', '.join(FORMATS)}.")
    ] = "text",
    baseline: Annotated[
        str, typer.Option(help="Strategy that the others are compared with.")
    ] = "ar",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only records with key=value[,value]: temperature=0, emulated=true; of some "
            "figures key=LOW..HIGH: repeated=0..0.3 leaves out texts that loop."
        ),
    ] = None,
    per_set: Annotated[
        bool,
        typer.Option("--per-set", help="Show acceptance and time of every set, not of the mean."),
    ] = False,
    out: Annotated[Path | None, typer.Option(help="Write there instead of printing.")] = None,
) -> None:
    """Print tables: speed-up with intervals, tokens/s, acceptance, use of the time.

    Emulated and measured records are never compared with one another.
    """
    if format_ not in FORMATS:
        raise ValueError(f"--format must be one of {', '.join(FORMATS)}, not {format_!r}")
    if out:
        check_file("--out", out)
    samples = read_records(records, only or [])
    if format_ == "csv":
        text = csv_report(samples, baseline=baseline)
    else:
        found = tables(samples, baseline=baseline, per_set=per_set)
        text = {"text": _text, "markdown": to_markdown, "latex": to_latex}[format_](found)
    if out:
        write_whole(out, text)
    else:
        typer.echo(text, nl=False)


def _text(found: list[Table]) -> str:
    console = Console(width=MAX_WIDTH, highlight=False)
    with console.capture() as captured:
        for table in found:
            show_table(console, table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()) + "\n"


def show_table(console: Console, table: Table) -> None:
    """Print title, figures and notes. Column heads may be folded, figures never are."""
    console.print(table.title, style="bold")
    drawn = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1), pad_edge=False)
    for place, name in enumerate(table.columns):
        head = name.replace(" ", "\n")
        drawn.add_column(head, justify="right" if place else "left", no_wrap=True)
    for row in table.rows:
        drawn.add_row(*row)
    console.print(drawn)
    if table.notes:
        console.print(f"{'. '.join(table.notes)}.")
    console.print()
