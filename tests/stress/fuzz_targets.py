"""The fuzz targets: readers of foreign bytes, each with its seeds and its contract.

A target takes bytes and returns, or raises to report a bug: a reader may refuse input only by its
own error (WireError, else ValueError), and what it accepts it must be able to write and read again.
tests/stress/fuzz.py and tests/stress/test_fuzz.py use them.
"""

import json
import struct
import tempfile
import tracemalloc
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
from safetensors.torch import save_file
from torch import Tensor

from flowspec.config import EngineConfig, as_yaml, read_engine_config
from flowspec.model.architecture import ModelConfig, read_config
from flowspec.protocol import codec
from flowspec.protocol import messages as wire
from flowspec.protocol.codec import WireError, decode, encode
from flowspec.protocol.messages import WireMessage
from flowspec.speculation.drafters.eagle.load import load_eagle
from flowspec.speculation.drafters.eagle.network import EagleNet
from flowspec.speculation.strategies import strategy_config
from flowspec.weights.checkpoint import part_shapes
from flowspec.weights.manifest import (
    FileRecord,
    Manifest,
    model_hash,
    read_manifest,
    write_manifest,
)
from flowspec.weights.tensor_files import header_bytes, read_header

# memory per byte of input that a decoder may take: Python's integers are large
BYTES_PER_BYTE = 256
SPARE_BYTES = 200_000
MAX_FRAMES = 64
DEEP = 3000  # nesting that breaks an unguarded recursive parser
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Target:
    """`run` raises if the contract is broken; `seeds` are the first inputs."""

    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]


@cache
def _folder() -> Path:
    """Return a scratch folder of this process, removed at its end."""
    _folder_owner.append(tempfile.TemporaryDirectory(prefix="flowspec-fuzz-"))
    return Path(_folder_owner[0].name)


_folder_owner: list[tempfile.TemporaryDirectory[str]] = []


# wire: frames as <length u32, bytes> in turn; lengths beyond the input are cut


def pack_frames(frames: list[bytes]) -> bytes:
    """Pack the frames of a message into one input."""
    return b"".join(struct.pack("<I", len(frame)) + frame for frame in frames)


def unpack_frames(data: bytes) -> list[bytes]:
    """Return the frames in any input."""
    frames, at = [], 0
    while at + 4 <= len(data) and len(frames) < MAX_FRAMES:
        (length,) = struct.unpack_from("<I", data, at)
        frames.append(data[at + 4 : at + 4 + length])
        at += 4 + length
    return frames


@contextmanager
def _memory_bound(num_bytes: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    allowed = BYTES_PER_BYTE * num_bytes + SPARE_BYTES
    assert peak <= allowed, f"{num_bytes} bytes made the decoder take {peak}, at most {allowed}"


def run_wire(data: bytes) -> None:
    """Check that input gives WireError or a message that survives the wire, in bounded memory."""
    frames = unpack_frames(data)
    with _memory_bound(len(data)):
        try:
            message = decode(frames)
        except WireError:
            return
    again = [bytes(frame) for frame in encode(message)]
    assert [bytes(frame) for frame in encode(decode(again))] == again, f"{message} is not stable"


def seeds_wire() -> list[bytes]:
    """Every kind of message, with few and with no rows, small and large numbers; broken headers."""
    messages = [
        _example(kind, rows=rows, number=number, given=given)
        for kind in get_args(WireMessage)
        for rows, number, given in ((2, 1, True), (0, 0, False), (3, 7, True), (1, 3, False))
    ]
    frames = [[bytes(frame) for frame in encode(message)] for message in messages]
    begin = b"FS" + bytes([codec.PROTOCOL_VERSION])
    failed = b'{"kind":"failed","stage":1,"request":0,"text":"'
    frames += [[begin + failed + b'\xc3\xa9"}', b""], [begin + failed + b'\xff"}']]
    listed = b'{"kind":"segment","request":1,"seq_no":1,"nodes":[' + b"{}," * 9000 + b"{}]}"
    frames += [[begin + one] for one in [listed, *_broken_json()]]
    return [pack_frames(one) for one in frames]


def _example(kind: type, *, rows: int, number: int, given: bool) -> WireMessage:
    """Make a message of `kind` from its fields' types alone, so that new kinds are covered."""
    # the module itself has the name of tensors for its checker alone
    hints = get_type_hints(kind, {**vars(wire), "Tensor": Tensor})
    values = {
        f.name: _value(hints[f.name], f.name, rows, number, given)
        for f in fields(kind)
        if given or f.default is MISSING
    }
    if kind is wire.DraftSubtree:  # a chain: a guess comes after its parent
        values["parents"] = tuple(range(-1, rows - 1))
    return kind(**values)


def _value(hint: Any, name: str, rows: int, number: int, given: bool) -> Any:
    origin, inner = get_origin(hint), get_args(hint)
    if origin is Literal:
        return inner[0]
    if origin in (types.UnionType, Union):
        return _value(inner[0], name, rows, number, given) if given else None
    if name == "candidates":
        return ()  # these have no place in a frame yet
    if origin is tuple and is_dataclass(inner[0]):
        parts = [_value(inner[0], name, rows, number, given) for _ in range(max(rows, 1))]
        return tuple(_of_request(part, i + 1) for i, part in enumerate(parts))
    if origin is tuple:
        return tuple(range(number, number + rows))
    if hint is Tensor:
        return torch.zeros(rows, 4, dtype=DTYPES[number % 3])
    if is_dataclass(hint) and name == "sampling":
        return hint()
    if is_dataclass(hint):
        return _example(hint, rows=rows, number=number, given=given)
    simple = getattr(hint, "__supertype__", hint)
    return {int: number, float: number / 2, bool: given, str: "é" * rows}[simple]


def _of_request(segment: Any, request: int) -> Any:
    verdict = segment.verdict and replace(segment.verdict, request=request)
    return replace(segment, request=request, verdict=verdict)


# files of a model and of a run


def run_manifest(data: bytes) -> None:
    """Check that input gives ValueError or a manifest that can be written and read again."""
    folder = _folder() / "manifest"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(data)
    with suppress(ValueError):
        manifest = read_manifest(folder)
        write_manifest(folder, manifest)
        assert read_manifest(folder) == manifest


def seeds_manifest() -> list[bytes]:
    """Return complete and damaged manifests, and brackets without end."""
    names = [f"{part}/{name}" for part in ("head", "stage_1", "stage_2")
             for name in ("model.safetensors", "config.json")]  # fmt: skip
    files = {name: FileRecord(sha256="0f" * 32, bytes=5) for name in names}
    about = {"architecture": "LlamaForCausalLM", "dtype": "float32"}
    digest = model_hash(files, layers=(1, 2), **about)  # type: ignore[arg-type]
    manifest = Manifest(
        model_id="m", source="s", layers=(1, 2), files=files, model_hash=digest, **about
    )  # type: ignore[arg-type]
    content = asdict(manifest)
    changes: list[Mapping[str, Any]] = [
        {},
        {"layers": [10**18, -1]},
        {"layers": True, "format_version": 1.0},
        {"files": {"../x": {}}},
        {"files": {"head/config.json": {"sha256": 5, "bytes": "5"}}},
        {"dtype": [], "model_id": None},
    ]
    return [json.dumps({**content, **change}).encode() for change in changes] + _broken_json()


def _broken_json() -> list[bytes]:
    texts = [b"{", b"[" * DEEP, b'{"a":' * DEEP, b'{"a": ' + b"9" * 5000 + b"}", b"\xff{}", b"[]"]
    return [*texts, b'{"hidden_size": NaN}', b'{"architectures": ["\\ud800"]}']


def run_config(data: bytes) -> None:
    """Check that input gives ValueError or a run whose printed configuration repeats it."""
    path = _folder() / "run.yaml"
    path.write_bytes(data)
    with suppress(ValueError):
        config = read_engine_config(path)
        decode = strategy_config(config.strategy, config.decode, where="decode")
        effective = config.changed(decode=decode.model_dump())
        path.write_text(as_yaml(effective), encoding="utf-8")
        try:
            again = read_engine_config(path)
        except ValueError as error:
            raise AssertionError(f"its own output is refused: {error}") from error
        assert again == effective, "what was written reads as something else"
        assert strategy_config(again.strategy, again.decode, where="decode") == decode


LAUGHS = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}]\n" for a, b in zip("abc", "bcd", strict=True)
)  # noqa: E501


def seeds_config() -> list[bytes]:
    """Return the defaults, each key once, and YAML's known traps."""
    texts = [
        as_yaml(EngineConfig()),
        "stages: 2\nsampling: {temperature: 1, top_p: 0.9}\ndecode: {draft_topk: 3, refresh: no}\n",
        LAUGHS,
        "decode: &a {x: *a}",
        "[" * DEEP,
        "a: " * DEEP,
        "- " * DEEP,
        "stages: " + "9" * 5000,
        "stages: 0x" + "f" * 5000,
        "timeout_s: .inf\nmodel: 2020-13-45",
        "timeout_s: .nan\nstages: 0b_",
        "timeout_s: " + "1:" * 200 + "1.5",
        "model: !!bool x\nlayers: !!int ''",
        "<<: {stages: 3}\nmodel: !!binary 'x'",
        "? [a]\n: b",
    ]
    return [text.encode() for text in texts] + [b"model: \xff", b"\xef\xbb\xbfstages: 2"]


MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 16,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def run_model(data: bytes) -> None:
    """Check that input gives ValueError or a config whose tensors can be listed."""
    folder = _folder() / "model"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_bytes(data)
    with suppress(ValueError):
        config = read_config(folder)
        # all layers have the same tensors, so four are enough
        few = replace(config, num_layers=min(config.num_layers, 4))
        assert part_shapes(few, first_layer=0, last_layer=few.num_layers)


def seeds_model() -> list[bytes]:
    """Return both families, old and new RoPE keys, and absurd sizes."""
    changes: list[Mapping[str, Any]] = [
        {},
        {"architectures": ["Qwen2ForCausalLM"], "tie_word_embeddings": True},
        {"rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}, "eos_token_id": [1, 2]},
        {"num_hidden_layers": 10**12},
        {"hidden_size": 10**15, "num_attention_heads": 1, "head_dim": 2**40},
        {"vocab_size": 2**62, "intermediate_size": 2**62},
        {"rope_theta": 10**400, "rms_norm_eps": 10**400},
        {"eos_token_id": 10**40, "bos_token_id": [[]]},
        {"dtype": {}, "torch_dtype": [], "layer_types": {"a": 1}, "hidden_act": []},
        {"rope_scaling": {"rope_type": []}, "embedding_multiplier": [1]},
    ]
    return [json.dumps({**MODEL, **change}).encode() for change in changes] + _broken_json()


@cache
def _eagle_folder() -> Path:
    folder = _folder() / "eagle"
    folder.mkdir()
    torch.manual_seed(0)
    net = EagleNet(ModelConfig.from_hf(MODEL), fc_bias=False)
    save_file(net.state_dict(), folder / "model.safetensors")
    return folder


def run_eagle(data: bytes) -> None:
    """Check that a draft head under any config.json is loaded, or ValueError."""
    folder = _eagle_folder()
    (folder / "config.json").write_bytes(data)
    with suppress(ValueError):
        load_eagle(folder, target_config=ModelConfig.from_hf(MODEL))


def seeds_eagle() -> list[bytes]:
    """Return the fields that decide how the tensors are read."""
    changes: list[Mapping[str, Any]] = [
        {},
        {"num_attention_heads": "2"},
        {"num_attention_heads": 10**6},
        {"num_attention_heads": True, "head_dim": []},
        {"head_dim": "4"},
        {"head_dim": -4},
        {"head_dim": 10**30, "max_position_embeddings": {}},
    ]
    return [json.dumps({**MODEL, **change}).encode() for change in changes] + _broken_json()


def run_tensors(data: bytes) -> None:
    """Check that input gives ValueError or tensors that all lie within the file."""
    path = _folder() / "fuzz.safetensors"
    path.write_bytes(data)
    with suppress(ValueError):
        for tensor in read_header(path).values():
            assert isinstance(tensor.dtype, str)
            assert tensor.offset + tensor.num_bytes <= len(data), f"{tensor} ends beyond the file"


def seeds_tensors() -> list[bytes]:
    """Return complete files, holes, overlaps, and absurd sizes."""
    plain = header_bytes({"a": ("float32", (2, 3)), "b": ("bfloat16", (5,))})
    huge = {"dtype": "X", "shape": [10**4000] * 60, "data_offsets": [0, 4]}
    odd: list[Any] = [
        {"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}},
        {"a": {"dtype": 5, "shape": [0], "data_offsets": [0, 4]}},
        {"a": {"dtype": [], "shape": "ab", "data_offsets": [4, 0]}},
        {"a": huge},
        {"a": {"dtype": "F32", "shape": [0], "data_offsets": [10**30, 10**30]}},
        {"a": None},
        [],
    ]
    seeds = [plain + b"\0" * 34, plain, b"", b"\xff" * 8, b"\xff" * 9]
    texts = [json.dumps(one).encode() for one in odd] + _broken_json()
    return seeds + [len(text).to_bytes(8, "little") + text + b"\0" * 4 for text in texts]


TARGETS: dict[str, Target] = {
    "wire": Target(run_wire, seeds_wire),
    "manifest": Target(run_manifest, seeds_manifest),
    "config": Target(run_config, seeds_config),
    "model": Target(run_model, seeds_model),
    "eagle": Target(run_eagle, seeds_eagle),
    "tensors": Target(run_tensors, seeds_tensors),
}
