"""The tables that `flowspec bench` prints."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from flowspec.bench.aggregate import MEAN, Row
from flowspec.bench.experiment import Plan
from flowspec.bench.summary import Line, line_of, time_shares

WIDTH = 120


def show(rows: Sequence[Row], plan: Plan) -> None:
    """Print speeds, speed-ups, and where the time went."""
    console = Console(width=WIDTH)
    where = "on this machine" if plan.remote is None else "on a cluster of devices"
    kind = "emulated" if rows[0].setting.emulated else f"measured {where}"
    about = f"{plan.model} on {plan.cluster}, {plan.stages} stages, table {plan.table} ({kind})"
    sets = list(dict.fromkeys(row.dataset for row in rows))
    repeats = f", median of {plan.repeats} repeats" if plan.repeats > 1 else ""
    console.print(f"tokens/s, {about}{repeats}", highlight=False)
    console.print(_speeds(rows, sets))
    about = "; mean with its 95 % interval" if any(map(_interval, rows)) else ""
    if not any(row.speedup for row in rows):
        about = ": unknown, as ar was not run; add it to --strategies"
    console.print(f"speed-up over ar{about}", highlight=False)
    console.print(_speedups(rows, sets))
    if not any(row.stage_busy for row in rows):
        return  # the cluster did not report it
    console.print("where the stages' decode time went, mean over the sets, in %", highlight=False)
    console.print(_times(rows))


def _names(line: Line) -> tuple[str, str, str]:
    return line[0], line[1], f"{line[2]:g}"


def _new_table() -> Table:
    table = Table(box=None, pad_edge=False)
    for name in ("strategy", "drafter", "T"):
        table.add_column(name, no_wrap=True)
    return table


def _speeds(rows: Sequence[Row], sets: Sequence[str]) -> Table:
    table = _new_table()
    ranges = ["lowest to highest"] if any(len(row.by_repeat) > 1 for row in rows) else []
    bounds = ["bound"] if any(row.bound_share is not None for row in rows) else []
    for name in (*sets, *ranges, "tau", *bounds):
        table.add_column(name, justify="right", no_wrap=True)
    for line in dict.fromkeys(map(line_of, rows)):
        own = {row.dataset: row for row in rows if line_of(row) == line}
        mean = own[MEAN]
        reached = ["" if mean.bound_share is None else f"{mean.bound_share:.0%}"] if bounds else []
        speeds = [f"{own[name].tokens_per_s:.2f}" if name in own else "" for name in sets]
        repeats = mean.by_repeat.values() or [mean.tokens_per_s]
        between = [f"{min(repeats):.2f} to {max(repeats):.2f}"] if ranges else []
        table.add_row(*_names(line), *speeds, *between, f"{mean.tau:.2f}", *reached)
    return table


def _speedups(rows: Sequence[Row], sets: Sequence[str]) -> Table:
    table = _new_table()
    intervals = ["interval"] if any(map(_interval, rows)) else []
    for name in (*sets, *intervals, "mismatches"):
        table.add_column(name, justify="right", no_wrap=True)
    for line in dict.fromkeys(map(line_of, rows)):
        own = {row.dataset: row for row in rows if line_of(row) == line}
        mean = own[MEAN]
        interval = [_interval(mean)] if intervals else []
        ratios = [_ratio(own[name]) if name in own else "" for name in sets]
        table.add_row(*_names(line), *ratios, *interval, str(mean.mismatches))
    return table


def _interval(row: Row) -> str:
    """Return the interval of a mean; an empty text if there is none."""
    ratio = row.speedup
    if row.dataset != MEAN or ratio is None or ratio.low is None or ratio.high is None:
        return ""
    return f"{ratio.low:.2f} to {ratio.high:.2f}"


def _ratio(row: Row) -> str:
    return "" if row.speedup is None else f"{row.speedup.value:.2f}"


def _share(share: float | None) -> str:
    """Return a share in %, without the sign; an empty text if it is unknown."""
    return "" if share is None else f"{share:.0%}".rstrip("%")


def _times(rows: Sequence[Row]) -> Table:
    table = _new_table()
    shares = {line_of(row): time_shares(row) for row in rows if row.dataset == MEAN}
    causes = sorted({cause for found in shares.values() for cause in found.idle})
    for name in ("busy", *causes, "each stage busy", "drafter busy"):
        table.add_column(name, justify="right")
    for line, found in shares.items():
        idle = [f"{found.idle.get(cause, 0.0):.0%}".rstrip("%") for cause in causes]
        each = " ".join(f"{share:.0%}".rstrip("%") for share in found.by_stage)
        table.add_row(*_names(line), _share(found.busy), *idle, each, _share(found.drafter_busy))
    return table
