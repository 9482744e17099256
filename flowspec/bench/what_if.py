"""What-if predictions: profiles of a cluster, model or tree with one or more figures changed.

The changed cluster's or model's name contains the changes (sweeps.py reads them back).
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

from flowspec.bench.aggregate import MEAN, summarize
from flowspec.bench.records import Sample
from flowspec.bench.report import describe
from flowspec.bench.sweeps import AXES, Value, find_axis, with_values
from flowspec.bench.tables import Table
from flowspec.cost_model.emulation import Emulation, balanced_layers, with_stages
from flowspec.cost_model.profiles import (
    MAX_STAGES,
    ClusterProfile,
    DeviceProfile,
    ModelProfile,
    read_cluster,
    read_model,
)

BASELINE = "ar"


def what_if_table(
    found: Sequence[tuple[Mapping[str, Value], Sequence[Sample]]], strategies: Sequence[str]
) -> Table:
    """Make the table of `found`: values and their samples, in order; means over the sets."""
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


Values = Mapping[str, Value]
BITS = (4.5, 16)  # per weight in total, as in config/models: quantized weights have scales
PARAMETERS = tuple(name for name, axis in AXES.items() if not axis.moves)
_OF_CLUSTER = ("link_mbps", "latency_ms", "drafter_speed")
_OF_MODEL = ("weight_bits",)


def parse_variations(texts: Sequence[str]) -> list[dict[str, Value]]:
    """Parse `link_mbps=125,1000` and more: every combination, the last one varying fastest.

    Raises ValueError for names that cannot be varied and values that are not numbers.
    """
    axes: dict[str, list[Value]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals:
            raise ValueError(f"--vary takes name=value,value, not {text!r}")
        name = find_axis(name).name
        if name in axes:
            raise ValueError(f"--vary names {name} twice; give all its values at once")
        try:
            axes[name] = list(dict.fromkeys(float(value) for value in values.split(",")))
        except ValueError:
            raise ValueError(f"--vary {text!a}: the values must be numbers") from None
        for value in axes[name]:
            _check(name, value)
    return [dict(zip(axes, values, strict=True)) for values in product(*axes.values())]


def _check(name: str, value: Value) -> None:
    whole = {"stages": (1, MAX_STAGES)}.get(name)
    if whole and not (value.is_integer() and whole[0] <= value <= whole[1]):
        raise ValueError(f"{name} must be from {whole[0]} to {whole[1]}, not {value:g}")
    if name == "weight_bits" and value not in BITS:
        raise ValueError(
            f"weight_bits must be 16, or 4.5 for 4-bit weights and their scales, not {value:g}"
        )
    least = {"link_mbps": 0.001, "drafter_speed": 0.001, "latency_ms": 0.0}.get(name)
    if least is not None and not least <= value <= 1e6:  # also excludes NaN and infinity
        raise ValueError(f"{name} must be from {least:g} to 1e6, not {value:g}")


def settings_of(values: Values) -> dict[str, str]:
    """Return those of `values` that are parameters of the decoding."""
    return {name: f"{value:g}" for name, value in values.items() if name in PARAMETERS}


def emulate(cluster: str, model: str, values: Values, *, drafter: str) -> Emulation:
    """Return an emulation of named profiles in which `values` replace theirs.

    Raises ValueError that names what is unknown, inconsistent or too large.
    """
    changed = _cluster(read_cluster(cluster), values)
    sizes = _model(read_model(model), values)
    layers = changed.layers or balanced_layers(changed, sizes)
    return Emulation(cluster=changed, model=sizes, drafter=drafter, layers=layers)


def _cluster(cluster: ClusterProfile, values: Values) -> ClusterProfile:
    if "stages" in values:
        cluster = with_stages(cluster, int(values["stages"]))
    fields = {"link_mbps": "rate_mbps", "latency_ms": "latency_ms"}
    of_links = {field: values[name] for name, field in fields.items() if name in values}
    head = _faster(cluster.devices[0], values.get("drafter_speed", 1.0))
    return replace(
        cluster,
        name=with_values(cluster.name, {n: values[n] for n in _OF_CLUSTER if n in values}),
        devices=(head, *cluster.devices[1:]),
        links=tuple(replace(link, **of_links) for link in cluster.links),  # type: ignore[arg-type]
    )


def _faster(device: DeviceProfile, factor: Value) -> DeviceProfile:
    """Multiply the speed of forwards by `factor`; the head runs only the drafter's."""
    return replace(
        device,
        bandwidth_gb_s=device.bandwidth_gb_s * factor,
        fp16_tflops=device.fp16_tflops * factor,
        layer_overhead_ms=device.layer_overhead_ms / factor,
    )


def _model(model: ModelProfile, values: Values) -> ModelProfile:
    changed = {name: values[name] for name in _OF_MODEL if name in values}
    return replace(model, name=with_values(model.name, changed), **changed)  # type: ignore[arg-type]
