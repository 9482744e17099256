"""Configuration: what is not known is refused by name, what is written can be read again."""

from pathlib import Path
from typing import Any

import pytest

from flowspec.config import (
    RENAMED,
    DeviceConfig,
    EngineConfig,
    NumericsConfig,
    as_yaml,
    override,
    read_engine_config,
)
from flowspec.request import SamplingParams
from flowspec.speculation.strategies import strategy_config


def read(tmp_path: Path, text: str) -> EngineConfig:
    """A EngineConfig from YAML text."""
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return read_engine_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stagse: 3", "unknown key stagse; known: model, draft"),
        ("sampling: {temprature: 1.0}", "temprature"),
        ("sampling: {temperature: 1.0, beam: 4}", "beam"),
        ("sampling: 3", "sampling"),
        ("sampling: [1, 2]", "sampling"),
        ("sampling: {temperature: hot}", "temperature: needed: a number, not 'hot'"),
        ("sampling: {temperature: -1}", "temperature"),
        ("sampling: {top_k: 1.5}", "top_k"),
        ("stages: four", "stages: needed: a whole number, not 'four'"),
        ("stages: 1.5", "stages: needed: a whole number, not 1.5"),
        ("max_num_seqs: \uff18", r"max_num_seqs: needed: a whole number, not '\\uff18'"),
        ("st\u0430ges: 2", r"unknown key 'st\\u0430ges'; known: model"),
        ("3: 4", "unknown key 3"),
        ("threads: null", "threads: needed: a whole number, not nothing"),
        ("stages: 0", "stages must be from 1 to"),
        ("dtype: int8", "run.yaml: dtype must be float32, bfloat16 or float16, not 'int8'"),
        ("max_requests: 3\nmax_num_seqs: 4", "run.yaml: max_num_seqs is given twice, once by its"),
        ("decode: {topk: 3, draft_topk: 4}", "decode: draft_topk is given twice"),
        ("numerics: {dtype: int8}", "run.yaml: numerics: dtype must be float32, bfloat16 or"),
        ("numerics: {dtyp: float16}", "numerics: unknown key dtyp; known: dtype, quantization"),
        ("local: 3", "local: "),
        ("quantization: int3", "quantization must be none, not 'int3'"),
        ("model: " + "x" * 5000, "model: at most 4096 characters, not 5000"),
        ("{emulate: 'a:b', transport: gloo}", "emulate needs transport zmq"),
        ("emulate_slowdown: 0", "emulate_slowdown must be from 0.01"),
        ("timeout_s: 0", "timeout_s"),
        ("decode: 3", "decode"),
        ("batch_invariant: perhaps", "batch_invariant: needed: true or false, not 'perhaps'"),
        ("model: 7", "model: needed: a text, not 7"),
        ("model: {a: 1}", "model: needed: a text, not a dict"),
        ("- a\n- b", "mapping"),
        ("{", "not YAML: line 1, column 2: expected"),
        ("model: a\nseed: [1\ntopk: 3", r"line 3, column 5: .* begins in line 2, column 7$"),
        ("model: \x07", r"not YAML: unacceptable character #x0007: .*"),
        ("decode: &a {x: *a}", r"run\.yaml is not YAML: anchors and aliases"),
        ("<<: *a", "anchors and aliases"),
        ("[" * 3000, "nested deeper than 8"),
        ("model: !!bool x", "tag tag:yaml.org,2002:bool is not supported"),
        ("model: 2020-13-45", r"run\.yaml is not YAML"),
        ("stages: " + "9" * 5000, r"run\.yaml is not YAML"),
        ("stages: 0x" + "f" * 5000, "stages must be from 1 to"),
        ("max_new_tokens: 0", "max_new_tokens must be from 1 to"),
        ("timeout_s: .nan", "timeout_s"),
        ("timeout_s: .inf", "timeout_s"),
        ("#" * 65537, "larger than 65536 bytes"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    """A typing error must not silently run with a default; the key is named, in one line."""
    with pytest.raises(ValueError, match=message) as refused:
        read(tmp_path, text)
    assert "\n" not in str(refused.value)


def test_unknown_keys_name_the_file(tmp_path: Path) -> None:
    """Several files may be in play; at any depth the message leads to the right one."""
    for text in ("stagse: 3", "stages: four", "sampling: {temprature: 1.0}"):
        with pytest.raises(ValueError, match=r"run\.yaml"):
            read(tmp_path, text)


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    """Bytes that are no UTF-8, and a folder."""
    (tmp_path / "bytes.yaml").write_bytes(b"model: \xff")
    for name, message in (("bytes.yaml", "not UTF-8"), (".", "cannot be read")):
        with pytest.raises(ValueError, match=message):
            read_engine_config(tmp_path / name)


def test_missing_file(tmp_path: Path) -> None:
    """Named, without a traceback of the YAML library."""
    with pytest.raises(ValueError, match=r"nowhere\.yaml does not exist"):
        read_engine_config(tmp_path / "nowhere.yaml")


def test_empty_file_is_the_defaults(tmp_path: Path) -> None:
    """A file of comments is a valid file."""
    assert read(tmp_path, "# nothing\n") == EngineConfig()


def test_values_are_read(tmp_path: Path) -> None:
    """Integers where floats are due are fine."""
    config = read(
        tmp_path, "stages: 2\ntimeout_s: 5\nsampling: {temperature: 1, seed: 9}\nlayers: 2+2\n"
    )
    assert (config.stages, config.timeout_s, config.layers) == (2, 5.0, "2+2")
    assert config.sampling == SamplingParams(temperature=1.0, seed=9)
    assert isinstance(config.sampling.temperature, float)


@pytest.mark.parametrize(
    "config",
    [
        EngineConfig(),
        EngineConfig(
            model="a/b",
            draft="c",
            stages=7,
            layers="1+2",
            strategy="ar",
            drafter="none",
            dtype="bfloat16",
            device="cuda:1",
            threads=3,
            transport="gloo",
            batch_invariant=True,
            max_new_tokens=5,
            timeout_s=2.5,
            sampling=SamplingParams(temperature=0.7, top_k=3, top_p=0.9, min_p=0.1, seed=2**62),
            decode={"segment_size": 5, "refresh": False, "min_score": 1e-05},
        ),
    ],
)
def test_yaml_round_trip(tmp_path: Path, config: EngineConfig) -> None:
    """A run prints its effective configuration; giving that back repeats the run."""
    assert read(tmp_path, as_yaml(config)) == config


def test_nested_override_refuses_unknown_keys() -> None:
    """Also from code, where the value is a plain dict."""
    with pytest.raises(ValueError, match="sampling.*draft_topk"):
        override(EngineConfig(), {"sampling": {"draft_topk": 4}}, where="here")


def test_override_keeps_the_rest() -> None:
    """Only what is named changes, and the original does not."""
    config = EngineConfig(stages=3, sampling=SamplingParams(temperature=0.5, seed=4))
    changed = override(config, {"dtype": "float16"}, where="here")
    assert changed == config.changed(dtype="float16")
    assert config.numerics.dtype == "float32"
    assert override(config, {}, where="here") == config
    given = SamplingParams(top_k=3)
    assert override(config, {"sampling": given}, where="here").sampling == given


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"segment": 4}, "segment is no parameter of strategy streaming; it takes: .*segment_size"),
        ({"num_draft_steps": 4}, "num_draft_steps is no parameter of strategy streaming"),
        ({"chunked_prefill_size": 64}, "chunked_prefill_size is no parameter"),
        ({"segment_size": 0}, "segment_size must be at least 1, not 0"),
        ({"segment_size": 1025}, "segment_size must be at most 1024, not 1025"),
        ({"num_draft_tokens": 0}, "num_draft_tokens"),
        ({"num_draft_tokens": 2049}, "num_draft_tokens must be at most 1024, not 2049"),
        ({"draft_topk": 0}, "draft_topk"),
        ({"max_in_flight": -1}, "max_in_flight"),
        ({"max_in_flight": 1025}, "max_in_flight"),
        ({"min_score": 1.0}, "min_score"),
        ({"min_score": float("nan")}, "min_score"),
        ({"refresh": "perhaps"}, "refresh"),
        ({"draft_topk": [1]}, "draft_topk"),
    ],
)
def test_decode_values_are_checked(values: dict[str, Any], message: str) -> None:
    """Sizes bound queues and caches on every device."""
    with pytest.raises(ValueError, match=message) as caught:
        strategy_config("streaming", values, where="decode")
    assert "decode" in str(caught.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"transport": "tcp"}, "zmq, gloo or nccl, not 'tcp'"),
        ({"transport": "nccl"}, "needs device cuda"),
        ({"transport": "nccl", "device": "cuda:1"}, "a GPU of its own"),
    ],
)
def test_transports_are_checked(values: dict[str, Any], message: str) -> None:
    """Before anything is loaded."""
    with pytest.raises(ValueError, match=message):
        override(EngineConfig(), values, where="options")


def test_nested_override_keeps_the_rest() -> None:
    """One sampling value given later does not put the others back to their defaults."""
    config = EngineConfig(sampling=SamplingParams(temperature=0.5, seed=4))
    changed = override(config, {"sampling": {"seed": 5}}, where="here")
    assert changed.sampling == SamplingParams(temperature=0.5, seed=5)


def test_keys_of_a_section_may_stand_alone(tmp_path: Path) -> None:
    """Files of before the sections have them so; a section's name may be written too."""
    flat = read(tmp_path, "dtype: float16\ndevice: cuda\nkv_memory_mb: 7\nseed: 3\n")
    assert flat.numerics == NumericsConfig(dtype="float16")
    assert flat.local == DeviceConfig(device="cuda", kv_memory_mb=7)
    assert flat.sampling == SamplingParams(seed=3)
    nested = "numerics: {dtype: float16}\nlocal: {device: cuda, kv_memory_mb: 7}\nseed: 3\n"
    assert read(tmp_path, nested) == flat == EngineConfig(**flat.model_dump())
    both = read(tmp_path, "numerics: {dtype: float16}\nbatch_invariant: true\n")
    assert both.numerics == NumericsConfig(dtype="float16", batch_invariant=True)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("max_requests: 3", ["max_requests is now called max_num_seqs; the old name will go"]),
        ("shape_stable: true", ["shape_stable is now called batch_invariant"]),
        ("threads_per_process: 2", ["threads_per_process is now called threads"]),
        ("decode: {topk: 4, graft: true}", ["topk is now called draft_topk", "graft is now"]),
        ("max_num_seqs: 3", []),
    ],
)
def test_old_names_are_understood_and_told(
    tmp_path: Path,
    text: str,
    said: list[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In one line, once; the value is that of the new name."""
    monkeypatch.setattr("flowspec.config._told", set())
    config = read(tmp_path, text)
    assert read(tmp_path, text) == config
    assert len(caplog.messages) == len(said)
    assert all(line.startswith(start) for line, start in zip(caplog.messages, said, strict=True))
    values: dict[str, Any] = {**config.model_dump(), **config.decode}
    flat = {**values, **values["numerics"], **values["local"]}
    for old, new in RENAMED.items():
        if f"{old}:" in text:
            assert flat[new] in (3, True, 2, 4)
    assert not RENAMED.keys() & flat.keys()


def test_numerics_that_differ_are_named() -> None:
    """By setting, needed and found; also what only one of the two versions knows."""
    needed = NumericsConfig(dtype="float16")
    assert needed.refusal(NumericsConfig(dtype="float16").model_dump_json()) == ""
    other = NumericsConfig(batch_invariant=True)
    why = needed.refusal(other.model_dump_json())
    assert why.endswith(
        "dtype is 'float32', needed 'float16'; batch_invariant is True, needed False"
    )

    class Wider(NumericsConfig):
        kernels: str = "plain"

    assert needed.refusal(Wider(dtype="float16").model_dump_json()).endswith(
        "kernels is 'plain', needed nothing"
    )
    for strange in ("", "[]", "{"):
        assert "does not say how it computes" in needed.refusal(strange)
    assert needed.fingerprint == NumericsConfig(dtype="float16").fingerprint != other.fingerprint
