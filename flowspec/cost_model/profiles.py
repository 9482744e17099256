"""Profiles of emulated devices, links, models and clusters, read from YAML.

Each figure has a `source`: `{value: 68, source: data sheet}`, or one `source` for the whole file. A
name without folder and ending, such as jetson-5, is searched for in config/devices, links, models
or clusters of the working folder, then in the package's own; anything else is the path of a file.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from flowspec.config import read_yaml
from flowspec.system.bundled import DATA, find_bundled

T = TypeVar("T")
BUNDLED = DATA / "config"
HERE = Path()
MAX_STAGES = 64
ABOUT = ("about", "source")


def _check_positive(profile: Any, *may_be_zero: str) -> None:
    for f in fields(profile):
        value = getattr(profile, f.name)
        if isinstance(value, int | float):
            least = value >= 0 if f.name in may_be_zero else value > 0
            if not (least and math.isfinite(value)):
                raise ValueError(f"{f.name} must be a positive number, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """A device, described by figures that decoding reaches in practice, not by peaks."""

    name: str
    memory_gb: float  # 2**30 bytes
    bandwidth_gb_s: float  # 1e9 bytes/s that reading weights reaches
    fp16_tflops: float  # 1e12 operations/s that matrices of few rows reach
    int4_bandwidth_share: float  # share of the bandwidth with 4-bit weights, which are unpacked
    layer_overhead_ms: float  # per layer of a forward; the lm_head counts as one
    host_overhead_ms: float  # per message taken in, and per slot sent

    def __post_init__(self) -> None:
        _check_positive(self, "layer_overhead_ms", "host_overhead_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkProfile:
    """A device's full-duplex line to the switch; `latency_ms` is that between two such devices."""

    name: str
    rate_mbps: float  # 1e6 bits/s
    latency_ms: float

    def __post_init__(self) -> None:
        _check_positive(self, "latency_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSizes:
    """The sizes of a decoder-only transformer, in numbers of weights."""

    layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int

    def __post_init__(self) -> None:
        _check_positive(self)

    @property
    def layer_weights(self) -> int:
        """Return the weights of one layer."""
        return self.attention_weights(self.hidden_size) + self.ffn_weights

    @property
    def ffn_weights(self) -> int:
        """Return the weights of one layer's gated feed-forward part."""
        return 3 * self.hidden_size * self.intermediate_size

    def attention_weights(self, input_size: int) -> int:
        """Return the weights of one layer's projections, from rows of `input_size`."""
        heads, kv = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        return input_size * (heads + 2 * kv) + heads * self.hidden_size

    @property
    def lm_head_weights(self) -> int:
        """Return the weights of the projection to the vocabulary; the embedding has as many."""
        return self.hidden_size * self.vocab_size

    @property
    def kv_bytes(self) -> int:
        """Return the bytes of one row in one layer's KV cache, in 16 bits."""
        return 2 * self.num_kv_heads * self.head_dim * 2


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelProfile(LayerSizes):
    """The emulated model; `draft_model` gives the sizes of the drafter of that name."""

    name: str
    weight_bits: float  # bits of the layers' weights; lm_head, embedding and drafters have 16
    draft_vocab_size: int  # vocabulary of its EAGLE-3 head
    draft_model: LayerSizes

    @property
    def layer_bytes(self) -> float:
        """Return the bytes of one layer's weights."""
        return self.layer_weights * self.weight_bits / 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterProfile:
    """Devices of ranks 0..N, each with its line to one switch."""

    name: str
    devices: tuple[DeviceProfile, ...]
    links: tuple[LinkProfile, ...]
    layers: tuple[int, ...] = ()  # of stages 1..N; default: make the slowest stage fastest

    @property
    def num_stages(self) -> int:
        """Return the number of devices that hold layers."""
        return len(self.devices) - 1

    @property
    def is_homogeneous(self) -> bool:
        """Whether all stages are alike, so that their number may change."""
        return len(set(zip(self.devices[1:], self.links[1:], strict=True))) <= 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _ClusterFile:
    head: str
    stages: tuple[str, ...]
    link: str  # link of every device that `links` does not name
    links: Mapping[int, str]  # by rank
    layers: tuple[int, ...]


def read_device(name: str, *, beside: Path = HERE) -> DeviceProfile:
    """Read a device by name or file; a relative path starts at folder `beside`.

    Raises ValueError that names what is wrong and where.
    """
    return _read(DeviceProfile, "devices", name, beside)


def read_link(name: str, *, beside: Path = HERE) -> LinkProfile:
    """Read a link by name or file, like `read_device`. Raises ValueError."""
    return _read(LinkProfile, "links", name, beside)


def read_model(name: str) -> ModelProfile:
    """Read a model's sizes by name or file. Raises ValueError."""
    path, data = _mapping(ModelProfile, "models", name)
    draft = data.get("draft_model")
    if not isinstance(draft, Mapping):
        raise ValueError(f"{path} needs draft_model: the sizes of a small model of its family")
    where = f"{path}: draft_model"
    data["draft_model"] = _build(LayerSizes, _figures(LayerSizes, draft, where), where)
    return _build(ModelProfile, {"name": path.stem, **data}, str(path))


def is_profile(kind: str, name: str) -> bool:
    """Whether `name` is one of the models, clusters, devices or links, or the file of one."""
    return name in profile_names(kind) or (name.endswith(".yaml") and Path(name).is_file())


def read_cluster(name: str) -> ClusterProfile:
    """Read a cluster by name or file, with its devices and links; its paths start at its folder.

    Raises ValueError that names what is wrong and where.
    """
    path, data = _mapping(_ClusterFile, "clusters", name)
    file = _build(_ClusterFile, {"links": {}, "layers": (), **data}, str(path))
    if not 1 <= len(file.stages) <= MAX_STAGES:
        raise ValueError(f"{path} has {len(file.stages)} stages, needed: 1 to {MAX_STAGES}")
    if file.layers and len(file.layers) != len(file.stages):
        raise ValueError(
            f"{path}: layers of {len(file.layers)} stages are given, there are {len(file.stages)}"
        )
    ranks = range(len(file.stages) + 1)
    if strange := sorted(set(file.links) - set(ranks)):
        raise ValueError(f"{path}: links names rank {strange[0]}, but the last rank is {ranks[-1]}")
    return ClusterProfile(
        name=path.stem,
        devices=tuple(read_device(d, beside=path.parent) for d in (file.head, *file.stages)),
        links=tuple(
            read_link(file.links.get(rank, file.link), beside=path.parent) for rank in ranks
        ),
        layers=file.layers,
    )


def profile_names(kind: str) -> list[str]:
    """Return the named profiles of a kind: devices, links, models or clusters."""
    folders = (Path("config") / kind, BUNDLED / kind)
    return sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})


def _read(cls: type[T], kind: str, name: str, beside: Path) -> T:
    path, data = _mapping(cls, kind, name, beside)
    return _build(cls, {"name": path.stem, **data}, str(path))


def _mapping(cls: type, kind: str, name: str, beside: Path = HERE) -> tuple[Path, dict[str, Any]]:
    """Return the profile's path and its figures without their sources."""
    path = find_bundled(Path("config") / kind / f"{name}.yaml")
    if "/" in name or not path.is_file():
        path = beside / name
        if not path.exists():
            path = find_bundled(name)  # a name of the form config/...
    if not path.is_file():
        raise ValueError(
            f"{name!r} is neither a file nor one of the {kind}: {', '.join(profile_names(kind))}"
        )
    data = read_yaml(path)
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping, not {type(data).__name__}")
    return path, _figures(cls, data, str(path))


def _figures(cls: type, data: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return plain values by name. Raises ValueError for an unknown one, or one without source."""
    _check_known(cls, [name for name in data if name not in ABOUT], where)
    sourced = _is_text(data.get("source"))
    values: dict[str, Any] = {}
    for name, value in data.items():
        if name in ABOUT:
            continue
        if isinstance(value, Mapping) and set(value) == {"value", "source"}:
            if not _is_text(value["source"]):
                raise ValueError(f"{where}: {name}: its source must name where the value is from")
            value = value["value"]
        elif not sourced and not isinstance(value, Mapping):
            raise ValueError(
                f"{where}: {name} has no source; write {{value: {value}, source: ...}}, or one "
                "source for the file"
            )
        values[name] = value
    return values


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _check_known(cls: type, names: Iterable[str], where: str) -> None:
    known = {f.name for f in fields(cls)}
    if unknown := sorted(str(name) for name in names if name not in known):
        raise ValueError(f"{where}: unknown key {', '.join(unknown)}; known: {_known_names(cls)}")


def _known_names(cls: type) -> str:
    return ", ".join([*ABOUT, *(f.name for f in fields(cls) if f.name != "name")])


def _build(cls: type[T], values: Mapping[str, Any], where: str) -> T:
    """Build a profile from values that `_figures` has checked."""
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    needed = [n for n, f in known.items() if f.default is MISSING and n not in values]
    if needed:
        raise ValueError(f"{where}: {', '.join(needed)} is missing; known: {_known_names(cls)}")
    try:
        return TypeAdapter(cls).validate_python(dict(values))
    except ValidationError as error:
        first = error.errors()[0]
        at = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ")
        raise ValueError(": ".join(part for part in (where, at, message) if part)) from None
