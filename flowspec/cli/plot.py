"""`flowspec plot`: pictures of a benchmark's records, or of one traced request."""

from pathlib import Path
from typing import Annotated

import typer

from flowspec.cli.common import check_file, read_records
from flowspec.system import signals
from flowspec.tracing.trace_summary import read_trace

KINDS = ("speedup", "bandwidth", "stages", "sweep", "lengths", "time", "timeline")
SUFFIXES = (".png", ".pdf", ".svg")


def plot(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}.")],
    files: Annotated[
        list[Path],
        typer.Argument(
            metavar="RECORDS",
            help="Files or folders that `flowspec bench` or `simulate` wrote; for timeline, the "
            "file of --trace.",
        ),
    ],
    out: Annotated[Path, typer.Option(help=f"Picture to write ({', '.join(SUFFIXES)}).")],
    theme: Annotated[str, typer.Option(help="light or dark.")] = "light",
    baseline: Annotated[str, typer.Option(help="Strategy that speeds are compared with.")] = "ar",
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Only records with key=value[,value]: temperature=0, emulated=true; of some "
            "figures key=LOW..HIGH: repeated=0..0.3 leaves out texts that loop."
        ),
    ] = None,
    over: Annotated[
        str | None, typer.Option(help="sweep: what was varied, such as num_draft_steps.")
    ] = None,
    request: Annotated[
        int | None, typer.Option(help="timeline: number of the request. [default: the first]")
    ] = None,
    start: Annotated[
        float | None, typer.Option("--from", help="timeline: first second that is shown.")
    ] = None,
    end: Annotated[
        float | None, typer.Option("--to", help="timeline: last second that is shown.")
    ] = None,
) -> None:
    """Draw one picture.

    Kinds: speedup shows bars per set; bandwidth, stages and sweep --over WHAT show the speed by
    what was varied; lengths shows the tokens accepted in a row; time shows what the stages did;
    timeline shows the pipeline during one request.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown plot {kind!r}; known: {', '.join(KINDS)}")
    if out.suffix not in SUFFIXES:
        raise ValueError(f"--out {out} must end in one of {', '.join(SUFFIXES)}")
    check_file("--out", out)
    if (kind == "sweep") != (over is not None):
        raise ValueError("sweep needs --over WHAT, and nothing else takes it")
    # matplotlib takes a second to import, and only plots need it
    from flowspec.bench.plots import kinds, pipeline
    from flowspec.bench.plots.theme import drawing, find_theme, save

    look = find_theme(theme)
    with drawing(look):
        if kind == "timeline":
            if len(files) > 1:
                raise ValueError("timeline takes one trace")
            trace = read_trace(files[0])
            figure = pipeline.pipeline_timeline(trace, look, request=request, start=start, end=end)
        else:
            samples = read_records(files, only or [])
            draw = kinds.over(over) if over else kinds.PLOTS[kind]
            figure = draw(samples, look, baseline)
        with signals.undoing():
            save(figure, out)
    typer.echo(f"{out} written", err=True)
