"""Commands take a GGUF file where they take a model."""

import json
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from flowspec.cli.common import layerwise_folder, split_folder
from flowspec.cli.main import app
from flowspec.config import EngineConfig
from flowspec.weights.checkpoint import check_model
from flowspec.weights.manifest import read_manifest
from flowspec.weights.transfer.cache import ShardCache
from tests.processes.test_run_command import flowspec_run
from tests.support import families
from tests.support.gguf_files import write_gguf
from tests.support.vocabularies import write_json_form

VOCAB = 340


@pytest.fixture(scope="module")
def model():
    """A model whose vocabulary is that of the test's tokenizers."""
    made = families.make("llama3")
    torch.manual_seed(1)
    made.resize_token_embeddings(VOCAB, mean_resizing=False)
    with torch.no_grad():
        for weight in (made.get_input_embeddings().weight, made.get_output_embeddings().weight):
            weight.copy_(0.15 * torch.randn_like(weight))
    return made


@pytest.fixture
def file(tmp_path, model) -> Path:
    """A quantized file."""
    return write_gguf(tmp_path / "tiny.gguf", model, "Q8_0")


@pytest.fixture
def unknown(tmp_path, model) -> Path:
    """A file with a pre-tokenizer that is not rebuilt."""
    keys = {"tokenizer.ggml.pre": "tekken"}
    return write_gguf(tmp_path / "unknown.gguf", model, "Q8_0", keys=keys)


@pytest.mark.slow
def test_run_answers_exactly_as_the_target_alone(file, tmp_path):
    """End to end in processes: the file is split once, in the dtype of the run."""
    words = ("--model", str(file), "--drafter", "ngram", "--stages", "2", "--max-new-tokens", "12")
    done = flowspec_run(tmp_path, *words, "--prompt", "the cat sat")
    assert done.returncode == 0, done.stderr
    assert "identical to the target alone: yes" in done.stdout
    (folder,) = (tmp_path / "out").iterdir()
    assert re.fullmatch(r"tiny-2\+2-[0-9a-f]{8}-float32", folder.name)
    assert read_manifest(folder).model_id == "tiny"


def test_the_split_has_the_dtype_of_the_run(file, tmp_path, monkeypatch):
    """Dequantized values have no dtype of their own, so none is written wider than it is used."""
    monkeypatch.chdir(tmp_path)
    config = EngineConfig(model=str(file), stages=2)
    folders = [split_folder(config.changed(dtype=dtype)) for dtype in ("bfloat16", "float32")]
    assert [read_manifest(folder).dtype for folder in folders] == ["bfloat16", "float32"]


def flowspec(*words: object) -> str:
    """Run a command that succeeds; return what it prints."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    return done.output


def test_split_and_a_part_of_a_set(tmp_path, model):
    """Any part names the model; the head's folder has the rebuilt tokenizer."""
    write_gguf(tmp_path / "m.gguf", model, "Q4_0", parts=2)
    part, out = tmp_path / "m-00002-of-00002.gguf", tmp_path / "out"
    assert "m: 2 stages, float32, whole" in flowspec("split", part, "--stages", "2", "--out", out)
    config = json.loads((out / "head" / "config.json").read_text())
    assert config["rope_parameters"]["rope_type"] == "factors"
    assert (out / "head" / "tokenizer.json").exists()


def test_an_unknown_pre_tokenizer_needs_another_tokenizer(unknown, tmp_path):
    """The advice works; a split model has its tokenizer already."""
    split = ("split", str(unknown), "--stages", "2", "--out", str(tmp_path / "out"))
    done = CliRunner().invoke(app, split)
    assert isinstance(done.exception, ValueError)
    said = r"'tekken' is not known.*give --tokenizer ID or --tokenizer DIR"
    assert re.search(said, str(done.exception))
    assert not (tmp_path / "out").exists()
    other = write_json_form(tmp_path / "tokenizer")
    flowspec(*split, "--tokenizer", other)
    copied = (tmp_path / "out" / "head" / "tokenizer.json").read_bytes()
    assert copied == (other / "tokenizer.json").read_bytes()
    config = EngineConfig(model=str(tmp_path / "out"), tokenizer=str(other))
    with pytest.raises(ValueError, match="is split, and has its tokenizer"):
        split_folder(config)


@pytest.mark.parametrize("named", [False, True])
def test_verify_finds_no_mismatch(file, unknown, named, tmp_path, monkeypatch):
    """With the file's own tokenizer, and with another one in its place."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.jsonl").write_text(json.dumps({"question_id": 1, "turns": ["the cat"]}) + "\n")
    options = ["--drafters", "ngram", "--stages", "2", "--max-tokens", "6", "--prompts", "p.jsonl"]
    words = [str(unknown if named else file), "--strategies", "ar,streaming", *options]
    words += ["--tokenizer", str(write_json_form(tmp_path / "tokenizer"))] if named else []
    assert "4 runs, 0 mismatches" in flowspec("verify", *words)


def test_plan_takes_the_sizes_of_a_file_and_of_a_split(file, tmp_path):
    """Where a profile would be named, without one."""
    split = tmp_path / "out"
    flowspec("split", file, "--stages", "2", "--out", split)
    for path in (file, split):
        shown = flowspec("plan", "--cluster", "jetson-5", "--model", path, "--tokens", "0")
        assert re.search(r"0-\d \(\d\)", shown)


def test_serve_cuts_a_file_into_single_layers(unknown, tmp_path, monkeypatch):
    """With the tokenizer that was given, from a file whose own is not rebuilt."""
    monkeypatch.chdir(tmp_path)
    other = write_json_form(tmp_path / "tokenizer")
    config = EngineConfig(model=str(unknown), tokenizer=str(other), drafter="ngram")
    folder = layerwise_folder(config, offline=True)
    assert read_manifest(folder).layers == (1, 1, 1, 1)


def test_join_makes_the_heads_layers_from_its_own_copy(unknown, tmp_path):
    """A device needs no tokenizer, so one that is not rebuilt does not matter there."""
    other, split = write_json_form(tmp_path / "tokenizer"), tmp_path / "out"
    flowspec("split", unknown, "--stages", "2", "--out", split, "--tokenizer", other)
    check_model(str(unknown))
    cache = ShardCache(tmp_path / "cache")
    assert cache.adopt(unknown, read_manifest(split), [1, 2]) == []
