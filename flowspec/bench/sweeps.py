"""Sweep the records of runs that differ in one value, sorted by it.

A varied value of an emulated cluster or model is part of its name ("jetson-5 link_mbps=125"); a
varied value of the decoding is in the parameters.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache

from flowspec.bench.aggregate import MEAN, Row, summarize
from flowspec.bench.records import Sample
from flowspec.bench.report import describe
from flowspec.bench.settings import Setting, check_one
from flowspec.config import new_name
from flowspec.cost_model.profiles import ClusterProfile, read_cluster, read_model
from flowspec.speculation.strategies import STRATEGIES

Value = float


@dataclass(frozen=True, slots=True)
class Axis:
    """A value to vary. `moves` are the fields of a setting that change with it."""

    name: str
    label: str
    moves: tuple[str, ...]
    of: Callable[[Sample], Value | None]  # None: the sample does not have it


def with_values(name: str, values: Mapping[str, Value]) -> str:
    """Return a cluster's or model's name with the changed values: "jetson-5 link_mbps=125"."""
    return " ".join([name, *(f"{key}={value:g}" for key, value in values.items())])


def values_in(name: str) -> dict[str, Value]:
    """Return the values that `with_values` put into a name."""
    pairs = (word.partition("=") for word in name.split(" ")[1:])
    return {key: float(value) for key, equals, value in pairs if equals}


@cache  # read once for all samples
def _profile(name: str) -> ClusterProfile:
    return read_cluster(name)


def _of_links(key: str, value: Callable[[ClusterProfile], set[Value]]) -> Callable[[Sample], Value]:
    def find(sample: Sample) -> Value:
        named = values_in(sample.cluster)
        if key in named:
            return named[key]
        if not sample.emulated:
            raise ValueError(
                f"records measured on {sample.cluster} do not say {key}: it is known of emulated "
                "clusters alone; choose these with --only emulated=true"
            )
        found = value(_profile(sample.cluster.split(" ")[0]))
        if len(found) != 1:
            raise ValueError(f"the links of cluster {sample.cluster} differ: no place on {key}")
        return found.pop()

    return find


def _of_cluster(key: str, default: Value) -> Callable[[Sample], Value]:
    return lambda sample: values_in(sample.cluster).get(key, default)


def _weight_bits(sample: Sample) -> Value:
    named = values_in(sample.model).get("weight_bits")
    if named is None and not sample.emulated:
        raise ValueError(
            "measured records do not say weight_bits; choose others with --only emulated=true"
        )
    return read_model(sample.model.split(" ")[0]).weight_bits if named is None else named


def _of_parameters(key: str) -> Callable[[Sample], Value | None]:
    def find(sample: Sample) -> Value | None:
        if sample.strategy in STRATEGIES and key not in STRATEGIES[sample.strategy].parameters:
            return None
        value = sample.parameters.get(key)
        return float(value) if isinstance(value, int | float) else None

    return find


_PARAMETERS = {
    "segment_size": "rows in a segment, at most",
    "num_draft_tokens": "nodes of the tree, at most",
    "num_draft_steps": "levels that one draft grows",
    "draft_topk": "children per node",
    "min_score": "least probability worth a row",
    "max_in_flight": "segments in the pipe, at most (0: one per stage, at least two)",
}

_CLUSTER = ("cluster", "emulation")  # its name, and its content

AXES: dict[str, Axis] = {
    axis.name: axis
    for axis in (
        # the target's hash covers its cuts
        Axis("stages", "stages", (*_CLUSTER, "stages", "target"), lambda sample: sample.stages),
        Axis(
            "link_mbps",
            "link rate, Mbit/s",
            _CLUSTER,
            _of_links("link_mbps", lambda cluster: {link.rate_mbps for link in cluster.links}),
        ),
        Axis(
            "latency_ms",
            "latency between two devices, ms",
            _CLUSTER,
            _of_links("latency_ms", lambda cluster: {link.latency_ms for link in cluster.links}),
        ),
        Axis(
            "drafter_speed",
            "speed of the drafter's forwards, times the cluster's own",
            _CLUSTER,
            _of_cluster("drafter_speed", 1.0),
        ),
        Axis(
            "weight_bits",
            "bits per weight",
            ("model", "emulation"),
            _weight_bits,
        ),
        *(Axis(name, label, (), _of_parameters(name)) for name, label in _PARAMETERS.items()),
    )
}


@dataclass(frozen=True, slots=True)
class Sweep:
    """Means over the sets by strategy, then by the axis's value, in order."""

    axis: Axis
    about: str  # what all its points have in common
    lines: Mapping[str, Mapping[Value, Row]]
    has_baseline: bool


def find_axis(name: str) -> Axis:
    """Return an axis by name. Raises ValueError that lists the known ones."""
    name = new_name(name)
    if name not in AXES:
        raise ValueError(f"nothing to vary is called {name!a}; known: {', '.join(AXES)}")
    return AXES[name]


def sweep(samples: Sequence[Sample], axis: Axis, *, baseline: str = "ar") -> Sweep:
    """Sort records by the value of `axis`; those that do not depend on it count at every value.

    Raises ValueError when there are fewer than two values, or other fields differ too.
    """
    at: dict[Value, list[Sample]] = defaultdict(list)
    everywhere: list[Sample] = []
    for sample in samples:
        value = axis.of(sample)
        (everywhere if value is None else at[value]).append(sample)
    if len(at) < 2:
        there = ", ".join(f"{value:g}" for value in at) or "none"
        raise ValueError(
            f"a sweep of {axis.name} needs two values of it; the records have: {there}"
        )
    has_baseline = all(
        any(s.strategy == baseline for s in [*own, *everywhere]) for own in at.values()
    )
    lines: dict[str, dict[Value, Row]] = defaultdict(dict)
    settings: set[Setting] = set()
    for value in sorted(at):
        own = [*at[value], *everywhere]
        found = summarize(own, baseline=baseline if has_baseline else own[0].strategy)
        check_one(found, f"at {axis.name}={value:g} ")
        ((setting, rows),) = found.items()
        settings.add(setting)
        for row in rows:
            if row.dataset == MEAN:
                lines[row.strategy][value] = row
    check_one(settings, f"besides {axis.name} ", free=axis.moves)
    return Sweep(axis, _in_common(settings), dict(lines), has_baseline)


def _in_common(settings: Iterable[Setting]) -> str:
    """Return the title without values that vary; a name that all have in common stays."""
    plain = [
        replace(s, cluster=s.cluster.split(" ")[0], model=s.model.split(" ")[0]) for s in settings
    ]
    moved = [f.name for f in fields(Setting) if len({getattr(s, f.name) for s in plain}) > 1]
    return describe(plain[0], without=moved)
