"""Configuration: pydantic models read from YAML and flags; unknown keys are refused by name.

`EngineConfig` is the configuration of a head. It holds `NumericsConfig`, which decides the bits of
a result and travels whole to every stage, and `DeviceConfig`, which belongs to one machine. A
setting is defined here once, with its default, its limits and its help text.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)
from pydantic_core import PydanticCustomError

from flowspec.request import LONGEST_CONTEXT, SamplingParams
from flowspec.system.bundled import find_bundled
from flowspec.system.config_file import read_config_text

log = logging.getLogger(__name__)
T = TypeVar("T")

# Old names --------------------------------------------------------------------------------------

RENAMED = {  # settings, their flags and the parameters in records of older versions
    "max_requests": "max_num_seqs",
    "prefill_chunk": "chunked_prefill_size",
    "topk": "draft_topk",
    "tree_size": "num_draft_tokens",
    "tree_depth": "num_draft_steps",
    "shape_stable": "batch_invariant",
    "graft": "merge",
    "threads_per_process": "threads",
    "streaming-grafted": "streaming-merged",
}
_told: set[str] = set()


def new_name(name: str) -> str:
    """Return the present name of `name`; warn once per process if it is an old one."""
    if name not in RENAMED:
        return name
    tell_renamed(name, RENAMED[name])
    return RENAMED[name]


def with_new_names(values: Mapping[Any, T]) -> dict[Any, T]:
    """Return `values` with the present names of their keys.

    Raises ValueError if a setting is given by its old and its new name.
    """
    found: dict[Any, T] = {}
    for key, value in values.items():
        name = new_name(key) if isinstance(key, str) else key
        if name in found:
            raise ValueError(f"{name} is given twice, once by its old name; leave one out")
        found[name] = value
    return found


def tell_renamed(old: str, new: str) -> None:
    """Warn that something has another name now, once per process."""
    if old not in _told:
        _told.add(old)
        log.warning("%s is now called %s; the old name will go", old, new)


# YAML -------------------------------------------------------------------------------------------

MAX_DEPTH = 8


class _PlainLoader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Compose one node. Raises YAMLError unless it is plain."""
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        if getattr(event, "anchor", None) is not None:  # an alias names its anchor too
            raise yaml.YAMLError("anchors and aliases are not supported; write the value out")
        if getattr(event, "tag", None) is not None:
            raise yaml.YAMLError(f"the tag {event.tag} is not supported; write a plain value")
        if self._depth >= MAX_DEPTH:
            raise yaml.YAMLError(f"nested deeper than {MAX_DEPTH} levels")
        self._depth += 1
        node = super().compose_node(parent, index)  # type: ignore[no-untyped-call]
        self._depth -= 1
        return node


def parse_yaml(text: str, *, where: str) -> Any:
    """Return the value in `text`. Raises ValueError naming `where`."""
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # Dates that do not exist and numbers that are too long are plain ValueErrors.
        raise ValueError(f"{where} is not YAML: {_in_one_line(error)}") from None


def _in_one_line(error: Exception) -> str:
    """Return PyYAML's error, which has several lines, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    problem = getattr(error, "problem", "") or "cannot be read"
    context = getattr(error, "context", "") or ""
    begun = getattr(error, "context_mark", None)
    if context and begun is not None:
        context = f", {context} that begins in line {begun.line + 1}, column {begun.column + 1}"
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}{context}"


def read_yaml(path: Path) -> Any:
    """Return the value in a file. Raises ValueError if it is missing, too large or damaged."""
    return parse_yaml(read_config_text(path), where=str(path))


# Checking ---------------------------------------------------------------------------------------

_NEEDED = {  # what pydantic's error needed, by the beginning of its kind
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
}
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}  # pydantic's names
MAX_TIMEOUT_S = 86400.0
MAX_COUNT = 1_000_000  # stages, threads, tokens: larger values are typing errors
MAX_TEXT = 4096  # characters of a text, such as a path


def _between(low: float, high: float) -> AfterValidator:
    def check(value: Any) -> Any:
        if value is not None and not low <= value <= high:  # NaN is within nothing
            raise PydanticCustomError(
                "named", "must be from {low} to {high}, not {value}",
                {"low": low, "high": high, "value": _shown(value)},
            )  # fmt: skip
        return value

    return AfterValidator(check)


def _one_of(*names: str) -> AfterValidator:
    def check(value: str) -> str:
        if value not in names:
            known = " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))
            raise PydanticCustomError(
                "named", "must be {known}, not {value}", {"known": known, "value": _shown(value)}
            )
        return value

    return AfterValidator(check)


def _sentence(error: Any) -> str:
    """Return one of pydantic's errors as a sentence with what is needed and what was found."""
    name = ".".join(str(part) for part in error["loc"])
    kind = str(error["type"]).partition("_")[0]
    if error["type"] == "named":
        return f"{name} {error['msg']}"
    if error["type"] == "string_too_long":
        return f"{name}: at most {MAX_TEXT} characters, not {len(error['input'])}"
    for limit, words in _LIMITS.items():
        if limit in error.get("ctx", {}):
            found = _shown(error["input"])
            return f"{name} must be {words} {error['ctx'][limit]}, not {found}"
    what = str(error["msg"]).removeprefix("Value error, ")
    if kind in _NEEDED:
        what = f"needed: {_NEEDED[kind]}, not {_shown(error['input'])}"
    return ": ".join(filter(None, (name, what)))


def _shown(value: Any) -> str:
    """Return a value as given, cut to a readable length; look-alike characters are escaped."""
    if isinstance(value, int) and abs(value) >= 10**12:
        return "one so long"
    plain = value is None or isinstance(value, str | int | float)
    text = ascii(value) if plain else f"a {type(value).__name__}"
    return "nothing" if value is None else text[:60]


def _names(kind: type) -> tuple[str, ...]:
    if is_dataclass(kind):
        return tuple(f.name for f in fields(kind))
    return tuple(kind.model_fields)  # type: ignore[attr-defined]


def _sections(kind: type) -> dict[str, type]:
    """Return the fields of a model that are configurations themselves, with their types."""
    found = {} if is_dataclass(kind) else kind.model_fields  # type: ignore[attr-defined]
    types = {name: one.annotation for name, one in found.items()}
    return {
        name: type_
        for name, type_ in types.items()
        if isinstance(type_, type) and (issubclass(type_, BaseModel) or is_dataclass(type_))
    }


def _split(
    kind: type, values: Mapping[Any, Any]
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Split values into those of `kind` itself and those of its sections, by section."""
    own: dict[str, Any] = {}
    inner: dict[str, dict[str, Any]] = {}
    names, sections = _names(kind), _sections(kind)
    for name, value in with_new_names(values).items():
        home = next((one for one, type_ in sections.items() if name in _names(type_)), None)
        if name in names or home is None:
            own[name] = value
        else:
            inner.setdefault(home, {})[name] = value
    return own, inner


def override(config: T, values: Mapping[str, Any], *, where: str) -> T:
    """Return a copy with `values` set. Raises ValueError for an unknown key or a wrong type.

    A key of a section, such as `dtype` of `numerics`, may stand beside the section's own name. An
    old name of a key is understood, with a hint. The error names the key.
    """
    known = _names(type(config))
    try:
        own, inner = _split(type(config), values)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    unknown = sorted(str(key) for key in own if key not in known)
    if unknown:
        named = ", ".join(key if key.isascii() else ascii(key) for key in unknown)
        raise ValueError(f"{where}: unknown key {named}; known: {', '.join(known)}")
    merged = {name: getattr(config, name) for name in known}
    for name, value in own.items():
        section = name in _sections(type(config)) and isinstance(value, Mapping)
        merged[name] = override(merged[name], value, where=f"{where}: {name}") if section else value
    for name, parts in inner.items():
        merged[name] = override(merged[name], parts, where=where)
    try:
        return TypeAdapter(type(config)).validate_python(merged)
    except ValidationError as error:
        raise ValueError(f"{where}: {_sentence(error.errors()[0])}") from None


C = TypeVar("C", bound="Config")


class Config(BaseModel):
    """Base of the configurations: frozen, known keys only, texts of bounded length."""

    model_config = ConfigDict(frozen=True, extra="forbid", str_max_length=MAX_TEXT)

    def __init__(self, **values: Any) -> None:
        """Raise ValueError with one sentence, as `override` does."""
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ValueError(_sentence(error.errors()[0])) from None

    @model_validator(mode="before")
    @classmethod
    def _take_flat_keys(cls, values: Any) -> Any:
        """Move keys of a section, given without naming it, into the section."""
        if not isinstance(values, Mapping):
            return values
        own, inner = _split(cls, values)
        for name, parts in inner.items():
            section = own.get(name, cls.model_fields[name].get_default(call_default_factory=True))
            if not isinstance(section, Mapping):
                section = {one: getattr(section, one) for one in _names(type(section))}
            own[name] = {**section, **parts}
        return own

    def changed(self: C, **values: Any) -> C:
        """Return a checked copy with these values. Raises ValueError."""
        return override(self, values, where="configuration")


# The models -------------------------------------------------------------------------------------

Count = Annotated[int, _between(1, MAX_COUNT)]
CountOrNone = Annotated[int, _between(0, MAX_COUNT)]


class NumericsConfig(Config):
    """The settings that decide the bits of a result: equal on every stage, and hashed."""

    dtype: Annotated[str, _one_of("float32", "bfloat16", "float16")] = Field(
        default="float32",
        description="float32, bfloat16 or float16; float32 is exact on any hardware.",
    )
    quantization: Annotated[str, _one_of("none")] = Field(
        default="none", description="How weights are kept in memory: none."
    )
    backend: Annotated[str, _one_of("torch")] = Field(
        default="torch", description="What computes a stage's layers: torch."
    )
    batch_invariant: bool = Field(
        default=False, description="Fixed kernel shapes: bit-equal in 16 bits, slower."
    )

    @property
    def fingerprint(self) -> str:
        """Return a hash of all settings."""
        return sha256(self.model_dump_json().encode()).hexdigest()

    def refusal(self, found: str) -> str:
        """Return how `found`, the JSON of a stage's numerics, differs from this; empty if equal."""
        needed = self.model_dump_json()
        if found == needed:
            return ""
        try:
            there = json.loads(found)
        except ValueError:
            there = None
        if not isinstance(there, dict):
            return f"it does not say how it computes; needed: {needed}"
        here = json.loads(needed)
        parts = [
            f"{name} is {_shown(there.get(name))}, needed {_shown(here.get(name))}"
            for name in dict.fromkeys((*here, *there))
            if here.get(name) != there.get(name)
        ]
        return f"it computes otherwise than the head: {'; '.join(parts)}"[:1000]


class DeviceConfig(Config):
    """The settings of one machine; a head sets them for the processes that it starts itself."""

    device: str = Field(default="cpu", description="cpu or cuda[:n].")
    threads: Count = Field(default=1, description="CPU threads of each process.")
    kv_memory_mb: CountOrNone = Field(
        default=0, description="KV cache of each stage, MB; 0: half of what is free, shared evenly."
    )


class EngineConfig(Config):
    """The configuration of a head: model, stages, decoding and limits."""

    model: str = Field(
        default="models/demo/target",
        description="HF id, GGUF file, or folder of a model or of a split model "
        "[default: bundled].",
    )
    draft: str = Field(
        default="", description="Folder of the draft model [default: the bundled model's own]."
    )
    tokenizer: str = Field(
        default="",
        description="HF id or folder with the tokenizer, where the model has none that is read.",
    )
    stages: Annotated[int | None, _between(1, MAX_COUNT)] = Field(
        default=None,
        description="Number of stage processes [default: as the model is split, else 4].",
    )
    layers: str = Field(
        default="", description="Layers per stage, as in 3+3+2, instead of their number."
    )
    strategy: str = "streaming"
    drafter: str = "eagle"
    numerics: NumericsConfig = NumericsConfig()
    local: DeviceConfig = DeviceConfig()  # for the processes that this head starts, and its own
    transport: Annotated[str, _one_of("zmq", "gloo", "nccl")] = Field(
        default="zmq",
        description="zmq, gloo or nccl; the latter two are torch.distributed, which neither "
        "encrypts nor authenticates: for trusted networks only.",
    )
    max_new_tokens: Count = Field(default=200, description="Length limit of an answer.")
    context: Annotated[int, _between(0, LONGEST_CONTEXT)] = Field(
        default=0,
        description="Most tokens of a request, prompt and answer; 0: what the model was made for.",
    )
    max_num_seqs: Annotated[int, _between(1, 16)] = Field(
        default=8, description="Most requests decoded at the same time, at most 16."
    )
    chunked_prefill_size: Annotated[int, _between(1, 4096)] = Field(
        default=64, description="Most prompt tokens in a batch."
    )
    kept_prefixes: CountOrNone = Field(
        default=4, description="Finished requests kept for their conversation's next turn."
    )
    timeout_s: float = Field(
        default=60.0,
        description="Longest silence of a stage that has work before the run is given up, s.",
    )
    emulate: str = Field(
        default="",
        description="CLUSTER:MODEL, such as jetson-5:vicuna-7b: keep the pace of that cluster "
        "running that model (profiles in config/).",
    )
    emulate_slowdown: Annotated[float, _between(0.01, 1000)] = Field(
        default=1.0, description="Of an emulated cluster, where this machine is too slow for it."
    )
    max_restarts: CountOrNone = Field(
        default=3,
        description="Restarts of stage processes that die, so that answers go on; zmq alone.",
    )
    trace: str = Field(default="", description="Write a trace of the run there, for Perfetto.")
    sampling: SamplingParams = Field(default_factory=SamplingParams)
    # override the strategy's defaults
    decode: Annotated[Mapping[str, Any], AfterValidator(with_new_names)] = Field(
        default_factory=dict
    )

    @model_validator(mode="after")
    def _check(self) -> "EngineConfig":
        if self.transport == "nccl" and self.local.device != "cuda":
            raise ValueError(
                f"transport nccl needs device cuda (it gives each process a GPU of its own), not "
                f"{self.local.device!r}"
            )
        if self.emulate and self.transport != "zmq":
            raise ValueError(f"emulate needs transport zmq, not {self.transport!r}")
        if not 0 < self.timeout_s <= MAX_TIMEOUT_S:  # NaN and infinity would wait for ever
            raise ValueError(
                f"timeout_s must be positive, at most {MAX_TIMEOUT_S}, not {self.timeout_s}"
            )
        return self


def read_engine_config(path: Path) -> EngineConfig:
    """Read an EngineConfig from YAML. Raises ValueError naming file and key."""
    path = find_bundled(path)
    data = read_yaml(path) or {}
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping, not {type(data).__name__}")
    return override(EngineConfig(), data, where=str(path))


def as_yaml(config: EngineConfig) -> str:
    """Return the effective configuration in the form that `read_engine_config` takes."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)
