"""Configs as published checkpoints have them: RoPE is that of transformers, context that of vLLM.

Sizes that matter for neither are left small.
"""

import copy
import logging
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flowspec.model.architecture import ModelConfig
from flowspec.model.llama import rope_frequencies
from flowspec.request import LONGEST_CONTEXT

SIZES: dict[str, Any] = {
    "hidden_act": "silu",
    "hidden_size": 512,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_hidden_layers": 2,
    "num_key_value_heads": 4,
    "vocab_size": 100,
}
LLAMA = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **SIZES}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", **SIZES}
QWEN2 = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **SIZES}
QWEN2 |= {"max_window_layers": 28, "sliding_window": 131072, "use_sliding_window": False}
QWEN3 = {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", **SIZES}
QWEN3 |= {"head_dim": 128, "max_window_layers": 36, "use_sliding_window": False}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32768, "type": "yarn"}


def llama(max_positions: int, rope: Any = None, **more: Any) -> dict[str, Any]:
    """One whose config names a length, and perhaps a scaling."""
    return {**LLAMA, "max_position_embeddings": max_positions, "rope_scaling": rope, **more}


# name -> (context in tokens, words that a warning must hold, config)
PUBLISHED: dict[str, tuple[int, tuple[str, ...], dict[str, Any]]] = {
    "Llama 3.1": (131072, (), llama(131072, LLAMA3, rope_theta=500000.0)),
    "Llama 3.2": (131072, (), llama(131072, {**LLAMA3, "factor": 32.0}, head_dim=64)),
    "Llama 3.1, transformers 5": (
        131072,
        (),
        {**LLAMA, "max_position_embeddings": 131072,
         "rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    ),
    "R1-0528-Qwen3-8B": (
        131072,
        ("the near key is attention_factor",),
        {**QWEN3, "max_position_embeddings": 131072, "rope_theta": 1000000,
         "rope_scaling": {"rope_type": "yarn", "attn_factor": 0.8782488562869419, "factor": 4.0,
                          "original_max_position_embeddings": 32768}},
    ),
    "Qwen2.5 with yarn": (
        131072, (), {**QWEN2, "max_position_embeddings": 32768, "rope_scaling": YARN}
    ),
    "Qwen3": (40960, (), {**QWEN3, "max_position_embeddings": 40960, "rope_theta": 1000000}),
    "Mistral v0.1": (
        32768, (), {**MISTRAL, "max_position_embeddings": 32768, "sliding_window": 4096}
    ),
    "Mistral v0.3": (
        32768, (), {**MISTRAL, "max_position_embeddings": 32768, "sliding_window": None}
    ),
    "Mistral Nemo": (
        1024000,
        (),
        {**MISTRAL, "max_position_embeddings": 1024000, "sliding_window": None, "head_dim": 128,
         "rope_theta": 1e6},
    ),
    "Vicuna 16k": (
        16384,
        (),
        llama(4096, {"factor": 4.0, "type": "linear"}, max_sequence_length=16384, pad_token_id=0),
    ),
    "Code Llama": (16384, (), llama(16384, rope_theta=1000000)),
    "Yi 200K": (200000, (), llama(200000, rope_theta=10000000.0)),
    "SmolLM2": (8192, (), llama(8192, is_llama_config=True, rope_interleaved=False)),
    "TinyLlama": (2048, (), llama(2048)),
    "Llama 1": (2048, (), {**LLAMA, "max_sequence_length": 2048}),
    "Yarn Llama 2": (
        131072,
        (),
        llama(131072, {"factor": 32.0, "original_max_position_embeddings": 4096, "type": "yarn",
                       "finetuned": True}),
    ),
    "DeepSeek Coder": (65536, (), llama(16384, {"factor": 4.0, "type": "linear"})),
    "no length, Llama": (2048, (), LLAMA),
    "no length, Mistral": (131072, (), MISTRAL),
    "no length, Qwen2": (32768, (), QWEN2),
    "no length, Qwen3": (32768, (), QWEN3),
    # What transformers warns of, or passes over, and goes on.
    "two blocks": (
        4096,
        ("rope_scaling is used",),
        llama(2048, {"type": "linear", "factor": 2.0},
              rope_parameters={"rope_type": "default", "rope_theta": 5e5}),
    ),
    "llama3 alone": (
        1024,
        ("should be below max_position_embeddings",),
        llama(1024, {key: LLAMA3[key] for key in LLAMA3 if "original" not in key}),
    ),
    "llama3 outside": (
        9999,
        ("333 outside and 8192 inside",),
        llama(9999, LLAMA3, original_max_position_embeddings=333),
    ),
    "llama3 upside down": (
        16384,
        ("low_freq_factor 9 should be below",),
        llama(16384, {**LLAMA3, "low_freq_factor": 9.0}),
    ),
    "llama3 with yarn's key": (
        16384, ("set rope_type to yarn",), llama(16384, {**LLAMA3, "beta_fast": 32})
    ),
    "yarn upside down": (
        4096,
        ("beta_fast 1 should not be below",),
        llama(1024, {"type": "yarn", "factor": 4, "beta_fast": 1, "beta_slow": 2}),
    ),
    "yarn by ratio": (
        1024,
        ("has no factor; 4",),
        llama(1024, {"type": "yarn", "factor": None, "original_max_position_embeddings": 256}),
    ),
    "yarn with another ratio": (
        2048,
        ("factor is used",),
        llama(1024, {"type": "yarn", "factor": 8, "original_max_position_embeddings": 256}),
    ),
    "factor without a type": (
        1024, ("set rope_type to linear or llama3 or yarn",), llama(1024, {"factor": 8})
    ),
    "two types": (
        1024,
        ("rope_type is used", "factor means nothing"),
        llama(1024, {"factor": 8, "type": "linear", "rope_type": "default"}),
    ),
    "sections": (
        1024, ("mrope_section",), llama(1024, {"rope_type": "default", "mrope_section": [1, 2]})
    ),
    "a typing error": (LONGEST_CONTEXT, (), llama(2048, {"type": "linear", "factor": 1e9})),
    "half": (512, ("below 1",), llama(1024, {"rope_type": "linear", "factor": 0.5})),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_rope_context_and_warnings(name: str, caplog: pytest.LogCaptureFixture) -> None:
    context, words, hf = PUBLISHED[name]
    said: list[str] = []
    config = ModelConfig.from_hf(copy.deepcopy(hf), warn=said.append)
    assert config.context_length == context
    assert len(said) == len(words)
    for word in words:
        assert word in " ".join(said)
    caplog.set_level(logging.CRITICAL)  # what transformers says of the same
    values = {key: value for key, value in copy.deepcopy(hf).items() if key != "architectures"}
    theirs = CONFIG_MAPPING[hf["model_type"]].from_dict(values)
    rope = LlamaRotaryEmbedding(theirs)
    torch.testing.assert_close(rope_frequencies(config), rope.inv_freq, rtol=1e-5, atol=0)
    scaling = config.rope_scaling
    factor = 1.0 if scaling is None else scaling.attention_factor
    assert factor == pytest.approx(rope.attention_scaling, abs=1e-12)
    assert config.max_position_embeddings == theirs.max_position_embeddings
