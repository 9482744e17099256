"""Complete checkpoints open; damaged, foreign or unsafe ones are refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from flowspec.weights.checkpoint import LM_HEAD, open_checkpoint, resolve_model
from flowspec.weights.formats import TensorReader
from flowspec.weights.load import load_whole
from tests.support import families


@pytest.fixture
def checkpoint(tmp_path):
    """Return an untied fp32 checkpoint in one file."""
    families.save(tmp_path / "hf")
    return tmp_path / "hf"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model__norm__weight": None}, r"lacks 1 tensors.*model\.norm\.weight"),
        ({"model__layers__1__self_attn__q_norm__weight": torch.ones(8)}, "q_norm"),
        ({"model__norm__weight": torch.ones(31)}, r"model\.norm\.weight is \[31\].*\[32\]"),
        ({"model__norm__weight": torch.ones(32, dtype=torch.int8)}, "stored as I8"),
    ],
)
def test_tensors_that_do_not_fit_the_config_are_refused_by_name(checkpoint, changes, named):
    families.change(checkpoint, **changes)
    with pytest.raises(ValueError, match=named):
        open_checkpoint(checkpoint)


def test_rope_frequencies_of_old_files_are_ignored(checkpoint, tmp_path):
    families.change(checkpoint, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4))
    load_whole(checkpoint)


def test_a_stored_lm_head_of_a_tied_model_must_be_the_embedding(tmp_path):
    model = families.save(tmp_path / "hf", "tied")
    families.change(tmp_path / "hf", lm_head__weight=model.state_dict()[LM_HEAD].clone())
    assert torch.equal(load_whole(tmp_path / "hf").lm_head.weight, model.state_dict()[LM_HEAD])
    families.change(tmp_path / "hf", lm_head__weight=torch.zeros(families.VOCAB, 32))
    with pytest.raises(ValueError, match="tie_word_embeddings to false"):
        open_checkpoint(tmp_path / "hf")


def test_an_unknown_architecture_is_refused_with_the_known(checkpoint):
    path = checkpoint / "config.json"
    path.write_text(path.read_text().replace("LlamaForCausalLM", "MixtralForCausalLM"))
    with pytest.raises(ValueError, match="Mixtral.*supported: Llama.*Qwen3ForCausalLM"):
        open_checkpoint(checkpoint)


@pytest.mark.parametrize("form", ["sharded", "bin_sharded"])
def test_a_missing_shard_is_named(tmp_path, form):
    families.save(tmp_path, form=form)
    shard = sorted(tmp_path.glob("*model-0*"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"lacks 1 of \d+ shards: {shard.name}"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "model.pkl"])
def test_an_index_cannot_name_files_elsewhere(tmp_path, name):
    families.save(tmp_path, form="sharded")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ValueError, match="needed: a .safetensors file beside it"):
        open_checkpoint(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    families.save(tmp_path, form="sharded")
    first, second = sorted(tmp_path.glob("model-0*"))[:2]
    shutil.copy(first, second)
    with pytest.raises(ValueError, match="is both in"):
        open_checkpoint(tmp_path)


def test_a_folder_without_weights_says_what_it_has(checkpoint):
    (checkpoint / "model.safetensors").rename(checkpoint / "weights.onnx")
    with pytest.raises(ValueError, match="none of model.safetensors.*weights.onnx"):
        open_checkpoint(checkpoint)


def damage(data: bytes) -> dict[str, bytes]:
    """Return ways to break a safetensors file."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    entries = [key for key in header if key != "__metadata__"]

    def with_header(changed: dict) -> bytes:
        text = json.dumps(changed).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    first = header[entries[0]]
    start, end = first["data_offsets"]
    moved = {**first, "data_offsets": [start + 4, end + 4]}
    return {
        "truncated: ": data[:-5],
        "truncated inside its header": data[: 8 + length // 2],
        "not a safetensors file, or": (1 << 60).to_bytes(8, "little") + data[8:],
        "damaged header": data[:8] + b"\xff" * length + data[8 + length :],
        "longer than its header says": data + b"x",
        "overlap or leave a gap": with_header({**header, entries[0]: moved}),
        "does not fill": with_header({**header, entries[0]: {**first, "shape": [1]}}),
        "has sizes": with_header({**header, entries[0]: {**first, "shape": [-1]}}),
    }


@pytest.mark.parametrize(
    "named",
    [
        "truncated: ",
        "truncated inside its header",
        "not a safetensors file, or",
        "damaged header",
        "longer than its header says",
        "overlap or leave a gap",
        "does not fill",
        "has sizes",
    ],
)
def test_a_damaged_safetensors_file_is_named(checkpoint, named):
    path = checkpoint / "model.safetensors"
    path.write_bytes(damage(path.read_bytes())[named])
    with pytest.raises(ValueError, match=f"{path.name}.*{named}"):
        open_checkpoint(checkpoint)


def test_a_truncated_bin_is_named(tmp_path):
    families.save(tmp_path, form="bin")
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match="pytorch_model.bin is truncated"):
        open_checkpoint(tmp_path)


class Payload:
    """An object whose unpickling would run code."""

    def __reduce__(self):
        return (Path.touch, (Path("ran"),))


def test_a_bin_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    families.save(tmp_path, form="bin")
    torch.save({"a": Payload()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="more than tensors"):
        open_checkpoint(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_only_one_source_file_is_open_at_a_time(tmp_path):
    families.save(tmp_path, form="sharded")
    tensors = open_checkpoint(tmp_path).tensors.values()
    with TensorReader() as reader:
        for tensor in tensors:
            assert sum(map(len, reader.pieces(tensor))) == tensor.num_bytes
        last = reader._source
    assert last._file.closed


def test_an_id_goes_to_the_hub_and_its_safetensors_are_preferred(tmp_path, monkeypatch):
    calls = []

    def fake_download(name, *, allow_patterns, ignore_patterns, local_files_only):
        calls.append((name, "*.bin" in allow_patterns, local_files_only))
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fake_download)
    assert resolve_model("owner/name", offline=True) == tmp_path
    assert calls == [("owner/name", False, True), ("owner/name", True, True)]
    calls.clear()
    (tmp_path / "model.safetensors").touch()
    resolve_model("owner/name")
    assert calls == [("owner/name", False, False)]
    assert resolve_model(str(tmp_path)) == tmp_path


def test_an_id_that_cannot_be_had_names_both_ways_out(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="not a folder here.*HF_HUB_OFFLINE=1"):
        resolve_model("nobody/nothing", offline=True)
    with pytest.raises(ValueError, match="neither a folder nor a Hugging Face id"):
        resolve_model("./no/such/folder")
    with pytest.raises(ValueError, match="there is no file model.gguf"):
        resolve_model("model.gguf")
