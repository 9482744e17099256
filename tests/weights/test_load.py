"""Complete files load bit for bit; corrupt, missing or foreign ones are refused."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowspec.model.architecture import ModelConfig
from flowspec.speculation.drafters.eagle.load import load_eagle
from flowspec.speculation.drafters.eagle.network import EagleNet
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.load import load_head_part, load_stage, load_whole
from flowspec.weights.manifest import read_manifest
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from tests.support import families
from tests.support.models import randomize

TARGET = ModelConfig.from_hf(
    {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "rope_theta": 500000.0,
    }
)


@pytest.fixture
def model(tmp_path):
    """Return (reference model, split folder of 3+1 layers)."""
    reference = families.save(tmp_path / "hf")
    plan = plan_split(open_checkpoint(tmp_path / "hf"), layers=(3, 1))
    run_split(plan, tmp_path / "out", model_id="tiny")
    return reference, tmp_path / "out"


def test_stages_are_the_models_own_weights(model):
    reference, out = model
    weights = reference.state_dict()
    for stage in (1, 2):
        loaded = load_stage(out, stage)
        assert not any(parameter.requires_grad for parameter in loaded.parameters())
        for name, tensor in loaded.state_dict().items():
            assert torch.equal(tensor, weights[name])
    assert (loaded.first_layer, loaded.last_layer) == (3, 4)


@pytest.mark.parametrize("form", ["single", "sharded", "bin", "bin_sharded"])
@pytest.mark.parametrize("family", ["llama3", "tied"])
def test_the_whole_model_loads_from_any_form(tmp_path, family, form):
    weights = families.save(tmp_path / "hf", family, form=form).state_dict()
    loaded = load_whole(tmp_path / "hf").state_dict()
    assert loaded.keys() == weights.keys()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


@pytest.mark.parametrize("family", ["llama3", "tied"])
def test_a_split_model_loads_as_the_whole(tmp_path, family):
    weights = families.save(tmp_path / "hf", family).state_dict()
    plan = plan_split(open_checkpoint(tmp_path / "hf"), layers=(1, 2, 1))
    run_split(plan, tmp_path / "out", model_id="tiny")
    loaded = load_whole(tmp_path / "out")
    assert all(torch.equal(loaded.state_dict()[name], weights[name]) for name in weights)
    assert load_head_part(tmp_path / "out").config.eos_token_ids == (2, 5)
    tied = loaded.config.tie_word_embeddings
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_loading_in_another_dtype(model):
    reference, out = model
    loaded = load_stage(out, 2, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    expected = reference.state_dict()["lm_head.weight"].bfloat16()
    assert torch.equal(loaded.lm_head.weight, expected)
    assert load_head_part(out, dtype="float16").lm_head.dtype == torch.float16
    with pytest.raises(ValueError, match=r"int4.*float32, float16, bfloat16"):
        load_stage(out, 1, dtype="int4")


@pytest.mark.parametrize("stage", [-1, 0, 3])
def test_a_stage_that_does_not_exist(model, stage):
    with pytest.raises(ValueError, match=f"no stage {stage}: tiny was split into 2"):
        load_stage(model[1], stage)


def test_one_flipped_bit_is_noticed(model):
    path = model[1] / "stage_2" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 4
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"stage_2/model\.safetensors is corrupt"):
        load_stage(model[1], 2)
    load_stage(model[1], 1)
    load_stage(model[1], 2, verify=False)


@pytest.mark.parametrize("name", ["stage_1/model.safetensors", "stage_1/config.json"])
@pytest.mark.parametrize("verify", [True, False])
def test_a_short_or_missing_file_is_noticed_even_unverified(model, name, verify):
    path = model[1] / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"{name} has .* needed"):
        load_stage(model[1], 1, verify=verify)
    path.unlink()
    with pytest.raises(ValueError, match=f"{name} is missing"):
        load_stage(model[1], 1, verify=verify)


def test_stage_folders_cannot_be_swapped(model):
    out = model[1]
    (out / "stage_1").rename(out / "x")
    (out / "stage_2").rename(out / "stage_1")
    with pytest.raises(ValueError, match="stage_1"):
        load_stage(out, 1)


def test_without_a_manifest_nothing_loads(model):
    (model[1] / "manifest.json").unlink()
    for load in (lambda: load_stage(model[1], 1), lambda: load_head_part(model[1])):
        with pytest.raises(ValueError, match="no manifest.json"):
            load()


FILES = {"sha256": "0" * 64, "bytes": 1}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"format_version": 2}, "format_version is 2"),
        ({"layers": [3, 2]}, "model_hash"),
        ({"layers": [3, 0]}, "layers is"),
        ({"layers": []}, "layers is"),
        ({"layers": [10**9]}, "layers is"),
        ({"layers": [2, 1, 1]}, "lacks stage_3"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"model_id": 7}, "model_id is 7"),
        ({"files": []}, "files must be an object"),
        ({"files": {"../x": FILES}}, r"names '\.\./x'"),
        ({"files": {"/etc/passwd": FILES}}, "names '/etc/passwd'"),
        ({"files": {"a\\b": FILES}}, "a path inside"),
        ({"files": {"x": {"sha256": "no", "bytes": 1}}}, "needed: sha256 and bytes"),
        ({"files": {"x": {**FILES, "bytes": -1}}}, "needed: sha256 and bytes"),
        ({"files": {}}, "lacks head/model.safetensors"),
        ({"extra": 1}, "unknown keys"),
        ({"model_hash": "0" * 64}, "model_hash does not match"),
    ],
)
def test_a_manifest_is_read_strictly(model, changes, named):
    path = model[1] / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    with pytest.raises(ValueError, match=named):
        read_manifest(model[1])


def test_model_hash_tells_splits_apart(model, tmp_path):
    hashes = {read_manifest(model[1]).model_hash}
    opened = open_checkpoint(tmp_path / "hf")
    for number, (layers, dtype) in enumerate([((2, 2), None), ((3, 1), "bfloat16")]):
        plan = plan_split(opened, layers=layers, dtype=dtype)
        hashes.add(run_split(plan, tmp_path / str(number), model_id="tiny").model_hash)
    assert len(hashes) == 3


def save_eagle(
    folder, *, form="safetensors", config=TARGET, fc_bias=True, hf=None, drop=(), add=()
):
    """Save an EAGLE-1/2 head in the public layout; return its tensors."""
    net = EagleNet(replace(config, num_layers=1), fc_bias=fc_bias)
    randomize(net, 3)
    tensors = {name: tensor for name, tensor in net.state_dict().items() if name not in drop}
    tensors.update(add)
    folder.mkdir(exist_ok=True)
    if form == "safetensors":
        save_file(tensors, folder / "model.safetensors")
    else:
        torch.save(tensors, folder / "pytorch_model.bin")
    small = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": config.num_heads}
    (folder / "config.json").write_text(json.dumps({**small, **(hf or {})}))
    return tensors


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("fc_bias", [True, False])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_an_eagle_head_is_what_its_tensors_say(tmp_path, form, fc_bias, qkv_bias, num_kv_heads):
    """The config of the checkpoint contradicts the tensors here, as published ones do."""
    config = replace(TARGET, qkv_bias=qkv_bias, num_kv_heads=num_kv_heads)
    flags = {"bias": not fc_bias, "qkv_bias": not qkv_bias, "num_key_value_heads": 1}
    tensors = save_eagle(tmp_path, form=form, config=config, fc_bias=fc_bias, hf=flags)
    net = load_eagle(tmp_path, target_config=TARGET)
    assert net.state_dict().keys() == tensors.keys()
    assert all(torch.equal(net.state_dict()[name], tensors[name]) for name in tensors)
    assert (net.config.num_kv_heads, net.config.head_dim) == (num_kv_heads, 8)


def test_an_eagle_head_has_its_own_rope_base(tmp_path):
    save_eagle(tmp_path)
    assert load_eagle(tmp_path, target_config=TARGET).config.rope_theta == 10000.0
    save_eagle(tmp_path, hf={"rope_theta": 250000.0})
    assert load_eagle(tmp_path, target_config=TARGET).config.rope_theta == 250000.0


def test_an_eagle_head_without_embedding_takes_the_targets(tmp_path):
    save_eagle(tmp_path, drop=["embed_tokens.weight"])
    embedding = torch.randn(61, 32)
    net = load_eagle(tmp_path, target_config=TARGET, embedding=embedding, dtype="bfloat16")
    assert torch.equal(net.embed_tokens.weight, embedding.bfloat16())
    with pytest.raises(ValueError, match="give the target's embedding"):
        load_eagle(tmp_path, target_config=TARGET)


ONE = torch.ones(32)


@pytest.mark.parametrize(
    ("drop", "add", "named"),
    [
        ([], {"midlayer.hidden_norm.weight": ONE}, "EAGLE-3.*midlayer.*--drafter eagle3"),
        ([], {"d2t": torch.ones(5)}, "EAGLE-3.*d2t"),
        ([], {"fc.weight": torch.ones(32, 96)}, "EAGLE-3.*fc.weight"),
        ([], {"layers.0.input_layernorm.weight": ONE}, "unexpected.*input_layernorm"),
        ([], {"embedding_layernorm.weight": ONE}, "embedding_layernorm.weight: a head with norms"),
        (["layers.0.mlp.down_proj.weight"], {}, "missing.*down_proj"),
        (["layers.0.self_attn.k_proj.weight"], {}, "missing.*k_proj"),
        (
            ["fc.weight"],
            {"model.fc.weight": torch.ones(32, 64)},
            "no EAGLE-1/2 head.*no known kind.*layers.0",
        ),
        ([], {"fc.weight": torch.ones(16, 32)}, "another target"),
        ([], {"embed_tokens.weight": torch.ones(62, 32)}, "vocabulary has 62.*61"),
        ([], {"layers.0.self_attn.o_proj.weight": torch.ones(32, 8)}, r"o_proj.*\[32, 8\]"),
        ([], {"fc.bias": ONE.half()}, "mixes float16, float32"),
    ],
)
def test_other_heads_are_refused_by_name(tmp_path, drop, add, named):
    save_eagle(tmp_path, drop=drop, add=add)
    with pytest.raises(ValueError, match=named):
        load_eagle(tmp_path, target_config=TARGET)


def test_a_folder_that_is_no_eagle_head(tmp_path):
    with pytest.raises(ValueError, match="none of model.safetensors, pytorch_model.bin"):
        load_eagle(tmp_path, target_config=TARGET)
    families.save(tmp_path, "biases")
    with pytest.raises(ValueError, match="no EAGLE-1/2 head.*language model"):
        load_eagle(tmp_path, target_config=TARGET)
    assert load_file(tmp_path / "model.safetensors")
