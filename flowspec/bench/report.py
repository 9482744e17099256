"""Reports on sample records: speeds, acceptance, and where the time went."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields

from flowspec.bench.aggregate import MEAN, Row, mean_idle, summarize
from flowspec.bench.datasets import TITLES
from flowspec.bench.records import Sample
from flowspec.bench.settings import Setting, sets_of
from flowspec.bench.statistics import LEVEL, MIN_PROMPTS, Interval
from flowspec.bench.tables import NO_FIGURE, Table, to_csv

DEPTHS = 4  # alphas shown; the CSV has all


def tables(
    samples: Sequence[Sample], *, baseline: str = "ar", per_set: bool = False
) -> list[Table]:
    """Make the tables of each setting: speed-ups, tokens/s, acceptance and time.

    `per_set` splits the last two by set. Raises ValueError when the baseline is missing or there
    are no samples.
    """
    found: list[Table] = []
    for setting, rows in summarize(samples, baseline=baseline).items():
        sets = sets_of(s for s in samples if Setting.of(s) == setting)
        sets = [*(name for name in sets if any(row.dataset == name for row in rows)), MEAN]
        title = describe(setting)
        found.append(_speedups(title, rows, sets, baseline))
        found.append(_speeds(title, rows, sets))
        for name in sets if per_set else [MEAN]:
            where = "mean over the sets" if name == MEAN else TITLES.get(name, name)
            own = [row for row in rows if row.dataset == name]
            found.append(_acceptance(f"{title}: what was accepted, {where}", own))
            found.append(_time(f"{title}: where the time went, {where}", own))
    return [table.without_empty() for table in found]


def describe(setting: Setting, *, without: Collection[str] = ()) -> str:
    """Describe a setting in words, without the fields in `without`; "emulated" comes first."""
    words = {
        "emulated": "Emulated" if setting.emulated else "Measured",
        "cluster": setting.cluster,
        "model": setting.model,
        "stages": f"{setting.stages} {'stage' if setting.stages == 1 else 'stages'}",
        "drafter": f"drafter {setting.drafter}",
        "table": f"table {setting.table}",
        "max_tokens": f"{setting.max_tokens} tokens",
        "temperature": f"T = {setting.temperature:g}",
        "warm": "warm" if setting.warm and setting.emulated else "",  # real ones always are
    }
    return ", ".join(word for name, word in words.items() if word and name not in without)


def _by_set(
    rows: Sequence[Row], sets: Sequence[str], cell: Callable[[Row], str]
) -> tuple[list[list[str]], bool]:
    """Return a line per strategy with a cell per set, and whether a mean covers too few sets."""
    lines, partial = [], False
    for strategy in dict.fromkeys(row.strategy for row in rows):
        own = {row.dataset: row for row in rows if row.strategy == strategy}
        line = [strategy]
        for name in sets:
            text = cell(own[name]) if name in own else NO_FIGURE
            if name == MEAN and own[name].num_sets < len(sets) - 1:
                first, line_break, rest = text.partition("\n")
                text, partial = f"{first} *{line_break}{rest}", True
            line.append(text)
        lines.append(line)
    return lines, partial


def _speedups(title: str, rows: Sequence[Row], sets: Sequence[str], baseline: str) -> Table:
    lines, partial = _by_set(rows, sets, lambda row: _interval(row.speedup))
    means = [row for row in rows if row.dataset == MEAN]
    for line, row in zip(lines, means, strict=True):
        line += [f"{row.prompts}", f"{row.mismatches} of {row.samples}"]
    if has_intervals(rows):
        notes = [f"{LEVEL:.0%} bootstrap intervals, paired by question".replace("%", " %")]
    else:
        notes = [f"No intervals: a set has fewer than {MIN_PROMPTS} questions that both ran"]
    if any(len(row.by_repeat) > 1 for row in rows):
        notes.append("Of every answer the median time of its repeats")
    if any(row.paired < row.prompts for row in means):
        notes.append(f"Only questions that {baseline} ran too are compared")
    if partial:
        notes.append("* not all sets: not to be compared with the others")
    return Table(
        f"{title}: speed-up over {baseline}",
        ["strategy", *_names(sets), "questions", "mismatches"],
        lines,
        notes,
    )


def _speeds(title: str, rows: Sequence[Row], sets: Sequence[str]) -> Table:
    lines, _ = _by_set(rows, sets, _speed)
    most = max(len(row.by_repeat) for row in rows)
    notes = (
        [f"Medians of up to {most} repeats, with the lowest and the highest"] if most > 1 else []
    )
    return Table(f"{title}: tokens/s after the first", ["strategy", *_names(sets)], lines, notes)


def _speed(row: Row) -> str:
    speeds = row.by_repeat.values()
    between = f"\n{min(speeds):.2f}–{max(speeds):.2f}" if len(speeds) > 1 else ""
    return f"{row.tokens_per_s:.2f}{between}"


def _names(sets: Iterable[str]) -> list[str]:
    return [TITLES.get(name, name) for name in sets]


def has_intervals(rows: Iterable[Row]) -> bool:
    """Whether any speed-up has an interval."""
    ratios = (row.speedup for row in rows)
    return any(ratio is not None and ratio.low is not None for ratio in ratios)


def _interval(speedup: Interval | None) -> str:
    if speedup is None:
        return NO_FIGURE
    if speedup.low is None or speedup.high is None:
        return f"{speedup.value:.2f}x"
    return f"{speedup.value:.2f}x\n{speedup.low:.2f}–{speedup.high:.2f}"


def _acceptance(title: str, rows: Sequence[Row]) -> Table:
    depths = min(DEPTHS, max((len(row.alpha) for row in rows), default=0))
    columns = ["strategy", "tau", *(f"alpha {depth}" for depth in range(depths))]
    columns += ["mu", "not drafted", "not in flight", "tree"]
    columns += ["rows sent", "pruned", "wasted"]
    lines = []
    for row in rows:
        alphas = [f"{a:.2f}" for a in row.alpha[:depths]]
        line = [row.strategy, f"{row.tau:.2f}", *alphas, *[NO_FIGURE] * (depths - len(alphas))]
        line += [_percent(v) for v in (row.mu, row.mu_not_drafted, row.mu_not_in_flight)]
        counts = (row.tree_size, row.rows_sent, row.rows_pruned, row.rows_wasted)
        lines.append([*line, *(NO_FIGURE if v is None else f"{v:.1f}" for v in counts)])
    return Table(title, columns, lines, ["Rows per token"])


def _time(title: str, rows: Sequence[Row]) -> Table:
    causes = causes_of(rows)
    columns = [
        "strategy",
        "first token s",
        "end-to-end tokens/s",
        "p50 ms",
        "p95 ms",
        "p99 ms",
        "drafter busy",
    ]
    columns += ["stages busy %", *causes, "of the bound"]
    lines = []
    for row in rows:
        ttft = NO_FIGURE if row.ttft_s is None else f"{row.ttft_s:.2f}"
        line = [row.strategy, ttft, f"{row.end_to_end_tokens_per_s:.2f}"]
        line += [f"{row.inter_token_ms.get(name, 0.0):.0f}" for name in ("p50", "p95", "p99")]
        line += [_percent(row.drafter_busy), stages_busy(row)]
        line += [_percent(mean_idle(row, cause)) for cause in causes]
        lines.append([*line, _percent(row.bound_share)])
    notes = ["p50, p95, p99: means of the answers' own"]
    notes += ["Causes of idleness: mean over the stages"] if causes else []
    return Table(title, columns, lines, notes)


def stages_busy(row: Row) -> str:
    """Return the per cent of each stage: 61/60/62/71."""
    return "/".join(f"{100 * share:.0f}" for share in row.stage_busy) or NO_FIGURE


def causes_of(rows: Iterable[Row]) -> list[str]:
    """Return the causes of idleness of any stage, the one with the most time first."""
    totals: dict[str, float] = {}
    for row in rows:
        for stage in row.stage_idle:
            for cause, share in stage.items():
                totals[cause] = totals.get(cause, 0.0) + share
    return sorted((cause for cause, total in totals.items() if total > 0), key=lambda c: -totals[c])


def _percent(share: float | None) -> str:
    return NO_FIGURE if share is None else f"{100 * share:.0f} %"


def csv_report(samples: Sequence[Sample], *, baseline: str = "ar") -> str:
    """Write everything as CSV: a line per setting, strategy and set; shares from 0 to 1."""
    found = [row for rows in summarize(samples, baseline=baseline).values() for row in rows]
    records = [flat(row) for row in found]
    columns = list(dict.fromkeys(name for record in records for name in record))
    return to_csv(columns, ([record.get(name) for name in columns] for record in records))


def flat(row: Row) -> dict[str, object]:
    """Return a row's figures by name; lists and mappings become several columns."""
    record: dict[str, object] = {f.name: getattr(row.setting, f.name) for f in fields(Setting)}
    for field in fields(Row):
        value = getattr(row, field.name)
        if field.name in ("setting", "pairs"):
            continue
        if field.name == "depths":
            record |= _spread("alpha", row.alpha)
            continue
        if field.name == "by_repeat":
            speeds = list(row.by_repeat.values()) or [row.tokens_per_s]
            record |= {"repeats": len(speeds), "lowest": min(speeds), "highest": max(speeds)}
            continue
        if field.name == "speedup":
            known = value or Interval(float("nan"))
            record |= {
                "speedup": None if value is None else known.value,
                "ci_low": known.low,
                "ci_high": known.high,
            }
        else:
            record |= _spread(field.name, value)
    return record


def _spread(name: str, value: object) -> dict[str, object]:
    if isinstance(value, Mapping):
        return {f"{name} {key}": one for key, one in value.items()}
    if isinstance(value, tuple):
        spread: dict[str, object] = {}
        first = 0 if name == "alpha" else 1  # depths count from 0, stages from 1
        for place, one in enumerate(value, start=first):
            spread |= _spread(f"{name} {place}", one)
        return spread
    return {name: value}
