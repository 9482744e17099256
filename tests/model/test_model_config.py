"""ModelConfig: both config styles are read, and what the block cannot do is refused by name."""

import json
from dataclasses import replace

import pytest
import torch

from flowspec.model.architecture import ModelConfig, read_config
from tests.support import families

GOOD = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def test_what_a_config_leaves_out_has_the_defaults_of_the_family():
    config = ModelConfig.from_hf(GOOD)
    assert (config.num_kv_heads, config.head_dim, config.rope_theta) == (8, 8, 10000.0)
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (False, False, False)
    assert (config.dtype, config.eos_token_ids, config.rope_scaling) == ("float32", (), None)


def test_llama_attention_bias_means_all_four_projections():
    config = ModelConfig.from_hf({**GOOD, "attention_bias": True})
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, True, False)


def test_qwen2_has_biases_on_q_k_v_only_and_a_window_switched_off():
    extra = {"sliding_window": 32768, "use_sliding_window": False, "max_window_layers": 2}
    config = ModelConfig.from_hf({**GOOD, "architectures": ["Qwen2ForCausalLM"], **extra})
    assert (config.qkv_bias, config.output_bias, config.mlp_bias) == (True, False, False)
    assert (config.windows, config.qk_norm) == ((), False)


def test_qwen3_has_norms_of_queries_and_keys_and_heads_of_128():
    config = ModelConfig.from_hf({**GOOD, "architectures": ["Qwen3ForCausalLM"]})
    assert (config.qk_norm, config.head_dim, config.qkv_bias) == (True, 128, False)


MISTRAL = {"architectures": ["MistralForCausalLM"]}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "use_sliding_window": True, "sliding_window": 9}
BOTH = ["full_attention", "sliding_attention"]


@pytest.mark.parametrize(
    ("hf", "windows"),
    [
        ({**MISTRAL, "sliding_window": 9}, (9, 9)),
        ({**MISTRAL, "sliding_window": None}, ()),
        (MISTRAL, (4096, 4096)),
        ({**QWEN3, "max_window_layers": 1}, (None, 9)),
        ({**QWEN3, "max_window_layers": 0}, (9, 9)),
        ({**QWEN3, "max_window_layers": 2}, ()),
        (QWEN3, ()),
        ({**QWEN3, "max_window_layers": 0, "layer_types": BOTH}, (None, 9)),
        ({**QWEN3, "use_sliding_window": False, "max_window_layers": 0}, ()),
    ],
)
def test_sliding_windows_are_those_that_transformers_would_use(hf, windows):
    assert ModelConfig.from_hf({**GOOD, **hf}).windows == windows


def test_windows_are_one_per_layer():
    with pytest.raises(ValueError, match="1 windows for 2 layers"):
        replace(ModelConfig.from_hf(GOOD), windows=(9,))


def test_yarn_takes_the_context_before_scaling_from_the_model_and_zero_as_unset():
    yarn = {"type": "yarn", "factor": 4, "mscale": 0, "mscale_all_dim": 1, "beta_fast": 0}
    full = {"factor": 4.0, "original_max_position_embeddings": 77, "finetuned": True}
    configs = [
        ModelConfig.from_hf({**GOOD, "max_position_embeddings": 77, "rope_scaling": rope})
        for rope in (yarn, {"rope_type": "yarn", **full})
    ]
    assert configs[0] == configs[1]


def test_rope_factors_divide_the_frequencies_one_by_one():
    rope = {"rope_type": "factors", "factors": [1.0, 2.0, 4, 8.0], "rope_theta": 500.0}
    config = ModelConfig.from_hf({**GOOD, "head_dim": 8, "rope_parameters": rope})
    assert config.rope_theta == 500.0
    assert config.rope_scaling is not None
    scaled = config.rope_scaling.scale(torch.ones(4), 500.0)
    assert scaled.tolist() == [1.0, 0.5, 0.25, 0.125]
    assert config.context_length == config.max_position_embeddings
    for wrong in ([1.0, 0.0, 1.0, 1.0], [1.0, True, 1.0, 1.0], "1", [1.0] * 3):
        changed = {**rope, "factors": wrong}
        with pytest.raises(ValueError, match="factors"):
            ModelConfig.from_hf({**GOOD, "head_dim": 8, "rope_parameters": changed})


def test_keys_that_nobody_knows_are_named_once(caplog):
    strange = {**GOOD, "wobble": 3, "model_type": "llama"}
    first, second = ModelConfig.from_hf(strange), ModelConfig.from_hf(strange)
    assert first == second == ModelConfig.from_hf(GOOD)
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "wobble;" in warnings[0]


@pytest.mark.parametrize("name", ["type", "rope_type"])
def test_rope_of_old_and_new_configs_is_the_same(name):
    old = {**GOOD, "rope_theta": 5e5, "rope_scaling": {name: "llama3", **LLAMA3}}
    new = {**GOOD, "rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}}
    assert ModelConfig.from_hf(old) == ModelConfig.from_hf(new)
    assert ModelConfig.from_hf(new).rope_scaling is not None


@pytest.mark.parametrize("dtype", [{"dtype": "bfloat16"}, {"torch_dtype": "torch.bfloat16"}])
def test_dtype_under_either_name(dtype):
    assert ModelConfig.from_hf({**GOOD, **dtype}).dtype == "bfloat16"


def test_end_tokens_of_the_generation_config_are_added(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**GOOD, "eos_token_id": 2}))
    assert read_config(tmp_path).eos_token_ids == (2,)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2]}))
    assert read_config(tmp_path).eos_token_ids == (2, 7)


@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family_as_transformers_writes_it_is_accepted(family, caplog):
    content = {**families.make(family).config.to_dict()}
    if content.get("architectures") is None:
        content["architectures"] = [type(families.make(family)).__name__]
    assert ModelConfig.from_hf(content).num_layers == families.NUM_LAYERS
    assert not caplog.records, "a key of an ordinary config was not known"


REFUSED = {
    "MixtralForCausalLM": {"architectures": ["MixtralForCausalLM"]},
    "none": {"architectures": None},
    "hidden_act": {"hidden_act": "gelu"},
    "RoPE type 'dynamic'.*delete rope_scaling": {
        "rope_scaling": {"rope_type": "dynamic", "factor": 4.0}
    },
    "RoPE type 'longrope'": {"rope_scaling": {"type": "longrope", "factor": 2.0}},
    "rope_scaling.factor is missing, .*'yarn'.*; write a number from 1": {
        "rope_scaling": {"rope_type": "yarn"}
    },
    "rope_parameters.factor is missing": {"rope_parameters": {"rope_type": "linear"}},
    "rope_scaling.low_freq_factor is missing": {"rope_scaling": {"type": "llama3", "factor": 8.0}},
    "rope_scaling.factor is 0": {"rope_scaling": {"rope_type": "linear", "factor": 0}},
    "yarn needs one above 1": {"rope_theta": 1, "rope_scaling": {"type": "yarn", "factor": 2}},
    "'full_attention'": {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    "rope_scaling is": {"rope_scaling": "llama3"},
    "quantised .gptq.; use the checkpoint": {"quantization_config": {"quant_method": "gptq"}},
    "sliding_window": {"sliding_window": 4096},
    "use_sliding_window": {"use_sliding_window": True},
    "sliding_window is None": {**QWEN3, "sliding_window": None},
    "max_window_layers": {**QWEN3, "max_window_layers": -1},
    "layer_types": {"layer_types": ["full_attention", "chunked_attention"]},
    "sliding_window None of Llama": {"layer_types": BOTH},
    "sliding_window None of Qwen3": {**QWEN3, "use_sliding_window": False, "layer_types": BOTH},
    "sliding_window 9 of Mistral": {**MISTRAL, "sliding_window": 9, "layer_types": BOTH},
    "names 1 layers": {"layer_types": ["full_attention"]},
    "attn_logit_softcapping": {"attn_logit_softcapping": 50.0},
    "num_local_experts": {"num_local_experts": 8},
    "partial_rotary_factor": {"partial_rotary_factor": 0.5},
    "partial_rotary_factor of RoPE": {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "embedding_multiplier": {"embedding_multiplier": 12.0},
    "logits_scaling": {"logits_scaling": 8.0},
    "rope_interleaved": {"rope_interleaved": True},
    "use_qk_norm": {"use_qk_norm": True},
    "auto_map.*delete auto_map": {"auto_map": {"AutoModelForCausalLM": "own.Model"}},
    "vocab_size": {"vocab_size": 0},
    "hidden_size": {"hidden_size": 3.5},
    "num_hidden_layers": {"num_hidden_layers": True},
    "num_key_value_heads": {"num_key_value_heads": 3},
    "head_dim 7": {"head_dim": 7},
    "there is no head_dim": {"hidden_size": 65},
    "rope_theta": {"rope_theta": -1},
    "rms_norm_eps": {"rms_norm_eps": "small"},
    "attention_bias": {"attention_bias": "yes"},
    "int8": {"dtype": "int8"},
    "eos_token_id": {"eos_token_id": [2, "</s>"]},
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_is_not_supported_is_refused_by_name(named):
    with pytest.raises(ValueError, match=named):
        ModelConfig.from_hf({**GOOD, **REFUSED[named]})


@pytest.mark.parametrize("missing", [key for key in GOOD if key != "architectures"])
def test_a_missing_size_is_named(missing):
    content = {key: value for key, value in GOOD.items() if key != missing}
    with pytest.raises(ValueError, match=missing):
        ModelConfig.from_hf(content)


@pytest.mark.parametrize(
    "neutral",
    [
        {"num_local_experts": 0},
        {"embedding_multiplier": 1.0},
        {"final_logit_softcapping": None},
        {"rope_scaling": None},
        {"quantization_config": None},
        {"quantization_config": {}, "auto_map": {}, "compression_config": ""},
        {"hidden_act": None, "layer_types": [], "rope_scaling": {}, "rope_parameters": {}},
        {"head_dim": None, "num_key_value_heads": "", "dtype": "", "eos_token_id": []},
        {"rope_scaling": {"rope_type": "", "factor": None}, "partial_rotary_factor": None},
        {"pretraining_tp": 1, "use_cache": True, "transformers_version": "4.40"},
    ],
)
def test_features_switched_off_change_nothing(neutral):
    assert ModelConfig.from_hf({**GOOD, **neutral}) == ModelConfig.from_hf(GOOD)


@pytest.mark.parametrize(("text", "named"), [("[]", "JSON object"), ("{", "JSON"), (None, "exist")])
def test_a_damaged_config_file_is_named(tmp_path, text, named):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=named):
        read_config(tmp_path)
