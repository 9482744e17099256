"""The table of a what-if: a row per combination of values, speeds by strategy."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from flowspec.eval.aggregate import MEAN, summarize
from flowspec.eval.records import Sample
from flowspec.eval.report import describe
from flowspec.eval.sweeps import Value
from flowspec.eval.tables import Table

BASELINE = "ar"


def what_if_table(
    found: Sequence[tuple[Mapping[str, Value], Sequence[Sample]]], strategies: Sequence[str]
) -> Table:
    """`found`: values and what was run with them, in order. Means over the sets."""
    varied = list(found[0][0])
    compared = [name for name in strategies if BASELINE in strategies and name != BASELINE]
    columns = [*varied, *(f"{name} tokens/s" for name in strategies)]
    columns += [f"{name} over {BASELINE}" for name in compared]
    rows = []
    title = ""
    for values, samples in found:
        baseline = BASELINE if BASELINE in strategies else strategies[0]
        ((setting, own),) = summarize(samples, baseline=baseline).items()
        means = {row.strategy: row for row in own if row.dataset == MEAN}
        if not title:
            plain = replace(
                setting, cluster=setting.cluster.split(" ")[0], model=setting.model.split(" ")[0]
            )
            title = describe(plain, without=["stages"] if "stages" in varied else [])
        row = [f"{value:g}" for value in values.values()]
        row += [f"{means[name].tokens_per_s:.2f}" for name in strategies]
        for name in compared:
            ratio = means[name].speedup
            row.append("-" if ratio is None else f"{ratio.value:.2f}x")
        rows.append(row)
    return Table(f"{title}: what if", columns, rows, ["Mean over the sets"]).without_empty()
