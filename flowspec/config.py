"""Configuration: frozen dataclasses read from YAML; an unknown key is refused by name."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from flowspec.request import LONGEST_CONTEXT, SamplingParams
from flowspec.system.bundled import find_bundled

MAX_BYTES = 65536
MAX_DEPTH = 8


class _PlainLoader(yaml.SafeLoader):
    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """One node, if it is plain."""
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
    """The value in `text`. Raises ValueError naming `where`."""
    try:
        loader = _PlainLoader(text)
        try:
            return loader.get_single_data()  # type: ignore[no-untyped-call]
        finally:
            loader.dispose()  # type: ignore[no-untyped-call]
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        # dates that do not exist and numbers too long to be read are plain ValueErrors
        raise ValueError(f"{where} is not YAML: {_in_one_line(error)}") from None


def _in_one_line(error: Exception) -> str:
    """PyYAML's errors are spread over many, with the text between them."""
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
    """The value in a file. Raises ValueError naming it: missing, too large or damaged."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ValueError(f"config file {path} does not exist") from None
    except OSError as error:
        raise ValueError(f"config file {path} cannot be read: {error.strerror}") from None
    if len(raw) > MAX_BYTES:
        raise ValueError(f"{path} is larger than {MAX_BYTES} bytes; is it a configuration?")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: {error}") from None
    return parse_yaml(text, where=str(path))


T = TypeVar("T")
_NEEDED = {  # by the beginning of pydantic's kind of error
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "a text",
}
MAX_TIMEOUT_S = 86400.0
MAX_COUNT = 1_000_000  # stages, threads, tokens: beyond, it is a typing error


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """One local run: which model, cut how, decoded how."""

    model: str = "models/demo/target"  # HF id, or folder of a checkpoint or of a split model
    draft: str = ""  # folder of the draft model; default: the drafter's own for the bundled model
    stages: int | None = None  # how many; default: as the model is split, else 4
    layers: str = ""  # explicit split such as 3+3+2; overrides stages
    strategy: str = "streaming"
    drafter: str = "eagle"
    dtype: str = "float32"  # float32, bfloat16 or float16; float32 is exact on any hardware
    device: str = "cpu"
    transport: str = "zmq"  # zmq, gloo or nccl; the latter two for trusted networks only
    threads_per_process: int = 1
    batch_invariant: bool = False  # fixed kernel shapes: bit-equal in fp16 and bf16, slower
    max_new_tokens: int = 200
    context: int = 0  # most tokens of a request, prompt and answer; 0: what the model was made for
    max_num_seqs: int = 8  # served at once; further ones wait
    chunked_prefill_size: int = 64  # prompt tokens per batch
    kept_prefixes: int = 4  # finished requests kept for their conversation's next turn
    kv_memory_mb: int = 0  # KV cache of each stage; 0: half of what is free, shared evenly
    timeout_s: float = 60.0  # longest silence of a stage that has work before the run is given up
    emulate: str = ""  # CLUSTER:MODEL, profiles that the local processes keep the pace of
    emulate_slowdown: float = 1.0  # of an emulated cluster, where this machine is too slow for it
    max_restarts: int = 3  # of stage processes that die, zmq alone; 0: the first death ends the run
    trace: str = ""  # file for a trace of the run; opens in Perfetto
    sampling: SamplingParams = field(default_factory=SamplingParams)
    decode: Mapping[str, Any] = field(default_factory=dict)  # overrides of the strategy's defaults

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16", "float16"):
            raise ValueError(f"dtype must be float32, bfloat16 or float16, not {self.dtype!r}")
        if self.transport not in ("zmq", "gloo", "nccl"):
            raise ValueError(f"transport must be zmq, gloo or nccl, not {self.transport!r}")
        if self.transport == "nccl" and self.device != "cuda":
            raise ValueError(
                f"transport nccl needs device cuda (it gives each process a GPU of its own), not "
                f"{self.device!r}"
            )
        self._check_emulation()
        if not 1 <= self.max_num_seqs <= 16:
            raise ValueError(f"max_num_seqs must be from 1 to 16, not {self.max_num_seqs}")
        for name in ("context", "kept_prefixes", "kv_memory_mb", "max_restarts"):
            value, most = getattr(self, name), LONGEST_CONTEXT if name == "context" else MAX_COUNT
            if not 0 <= value <= most:
                raise ValueError(f"{name} must be from 0 to {most}, not {_shown(value)}")
        if not 0 < self.timeout_s <= MAX_TIMEOUT_S:  # NaN and infinity would wait for ever
            raise ValueError(
                f"timeout_s must be positive, at most {MAX_TIMEOUT_S}, not {self.timeout_s}"
            )
        for name in ("stages", "threads_per_process", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= MAX_COUNT:
                raise ValueError(f"{name} must be from 1 to {MAX_COUNT}, not {_shown(value)}")

    def _check_emulation(self) -> None:
        if self.emulate and self.transport != "zmq":
            raise ValueError(f"emulate needs transport zmq, not {self.transport!r}")
        if not 0.01 <= self.emulate_slowdown <= 1000:
            raise ValueError(
                f"emulate_slowdown must be from 0.01 to 1000, not {self.emulate_slowdown}"
            )


def _what_is_wrong(error: Any) -> str:
    """One of pydantic's errors, with what is needed and what there was."""
    kind = str(error["type"]).partition("_")[0]
    if kind not in _NEEDED:
        return str(error["msg"]).removeprefix("Value error, ")
    return f"needed: {_NEEDED[kind]}, not {_shown(error['input'])}"


def _shown(value: Any) -> str:
    """A value as it was given, unless it would fill the screen; look-alikes are spelled out."""
    if isinstance(value, int) and abs(value) >= 10**12:
        return "one so long"
    plain = value is None or isinstance(value, str | int | float)
    text = ascii(value) if plain else f"a {type(value).__name__}"
    return "nothing" if value is None else text[:60]


def override(config: T, values: Mapping[str, Any], *, where: str) -> T:
    """A copy with `values` set; an unknown key or a wrong type is a ValueError naming it."""
    is_model = isinstance(config, BaseModel)
    known = list(type(config).model_fields) if is_model else [f.name for f in fields(config)]  # type: ignore
    unknown = sorted(str(key) for key in values if key not in known)
    if unknown:
        named = ", ".join(key if key.isascii() else ascii(key) for key in unknown)
        raise ValueError(f"{where}: unknown key {named}; known: {', '.join(known)}")
    merged = {name: getattr(config, name) for name in known} | dict(values)
    for name, value in values.items():
        inner = getattr(config, name)  # pydantic alone would ignore unknown keys in there
        if isinstance(inner, SamplingParams) and isinstance(value, Mapping):
            merged[name] = override(inner, value, where=f"{where}: {name}")
    merged = {k: asdict(v) if isinstance(v, SamplingParams) else v for k, v in merged.items()}
    try:
        checked = TypeAdapter(type(config)).validate_python(merged)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        raise ValueError(": ".join(filter(None, (where, name, _what_is_wrong(first))))) from None
    if is_model:
        return checked
    changes: dict[str, Any] = {name: getattr(checked, name) for name in known}
    return replace(config, **changes)  # type: ignore[type-var]


def read_run_config(path: Path) -> RunConfig:
    """A RunConfig from YAML. Raises ValueError naming file and key."""
    path = find_bundled(path)
    data = read_yaml(path) or {}
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold a mapping, not {type(data).__name__}")
    return override(RunConfig(), data, where=str(path))


def as_yaml(config: RunConfig) -> str:
    """The effective configuration, in the form `read_run_config` takes."""
    return yaml.safe_dump(asdict(config), sort_keys=False)
