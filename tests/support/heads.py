"""Tiny EAGLE-3 checkpoints as the official code, SpecForge and speculators write them."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from flowspec.model.architecture import ModelConfig
from flowspec.speculation.drafters.eagle3.network import Eagle3Layout, Eagle3Net
from tests.support.tiny import randomize

ORIGINS = ("official", "specforge", "speculators", "speculators-0.1", "eagle3.1")
ROPE_BASE = 500000.0  # of heads in the form of speculators; other forms use the default
IDS = (0, 2, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41)  # the draft vocabulary, as ids of the target


def save_eagle3(
    folder: Path,
    target: ModelConfig,
    origin: str = "official",
    *,
    layers: tuple[int, ...] | None = None,
    ids: tuple[int, ...] | None = IDS,
    hf: dict[str, Any] | None = None,
    drop: tuple[str, ...] = (),
    add: dict[str, Tensor] | None = None,
) -> Eagle3Net:
    """Save a random head with `origin`'s names and config; return the net that was stored.

    `layers` are output-of-layer ids, None leaves them out of the config; `ids` None means the
    target's whole vocabulary, without maps. `hf`, `drop` and `add` change what is written.
    """
    wanted = layers or (1, target.num_layers // 2 - 1, target.num_layers - 4)
    known = torch.tensor(ids) if ids else torch.arange(target.vocab_size)
    speculators, newest = origin.startswith("speculators"), origin == "eagle3.1"
    norms = origin == "speculators"  # its first version did not have these
    layout = Eagle3Layout(
        aux_hidden_state_layers=wanted,
        target_hidden_size=target.hidden_size,
        norm_before_residual=speculators,
        norm_before_fc=norms,
        fc_norm=norms or newest,
        norm_output=norms or newest,
    )
    net = Eagle3Net(head_sizes(target), layout, draft_to_target=known)
    randomize(net, 5)
    tensors = dict(net.state_dict())
    if ids:
        mask = torch.zeros(target.vocab_size, dtype=torch.bool)
        mask[known] = True
        tensors |= {"d2t": known - torch.arange(len(known)), "t2d": mask}
    tensors = {n: t.contiguous() for n, t in tensors.items() if n not in drop} | (add or {})
    if speculators:
        tensors = {name.replace("midlayer.", "layers.0."): t for name, t in tensors.items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    config = _config(net, origin, layers) | (hf or {})
    (folder / "config.json").write_text(json.dumps(config))
    return net


def head_sizes(target: ModelConfig) -> ModelConfig:
    """Return sizes that differ from the target's where this is allowed."""
    return ModelConfig(
        architecture="LlamaForCausalLM",
        vocab_size=target.vocab_size,
        hidden_size=target.hidden_size,
        intermediate_size=56,
        num_layers=1,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
    )


def _config(net: Eagle3Net, origin: str, layers: tuple[int, ...] | None) -> dict[str, Any]:
    config = net.config
    sizes: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "num_hidden_layers": 1,
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "head_dim": config.head_dim,
    }
    head: dict[str, Any] = {"draft_vocab_size": net.lm_head.out_features}
    if origin.startswith("speculators"):
        return head | _speculators(net, origin, layers, sizes)
    named = "LlamaForCausalLM" if origin == "official" else "LlamaForCausalLMEagle3"
    head |= {"architectures": [named], **sizes}
    if net.layout.norm_output:
        head |= {"fc_norm": True, "norm_output": True}
    if layers:
        head["eagle_config"] = {"eagle_aux_hidden_state_layer_ids": list(layers)}
    return head


def _speculators(
    net: Eagle3Net, origin: str, layers: tuple[int, ...] | None, sizes: dict[str, Any]
) -> dict[str, Any]:
    """Return the library's config without `draft_vocab_size`, of its first and newer versions."""
    whole: dict[str, Any] = {
        "speculators_model_type": "eagle3",
        "norm_before_residual": net.layout.norm_before_residual,
        "target_hidden_size": None,
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [{"proposal_type": "greedy", "speculative_tokens": 3}],
            "verifier": {"architectures": ["LlamaForCausalLM"], "name_or_path": "some/target"},
        },
    }
    if layers:
        whole["eagle_aux_hidden_state_layer_ids"] = [layer + 1 for layer in layers]
    layer = {
        "attention_bias": False,
        "attention_dropout": 0.0,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "llama",
        "pretraining_tp": 1,
        "use_cache": True,
        **sizes,
    }
    if origin == "speculators-0.1":
        return whole | {
            "architectures": ["Eagle3Speculator"],
            "auto_map": {"": "eagle3.Eagle3SpeculatorConfig"},
            "has_no_defaults_at_init": False,
            "speculators_version": "0.1.0.dev14",
            "torch_dtype": "bfloat16",
            "transformer_layer_config": layer | {"rope_scaling": None, "rope_theta": ROPE_BASE},
        }
    return (
        {"eagle_aux_hidden_state_layer_ids": None}
        | whole
        | {
            "architectures": ["Eagle3DraftModel"],
            "dtype": "bfloat16",
            "embed_requires_grad": False,
            "fc_norm": net.layout.fc_norm,
            "norm_before_fc": net.layout.norm_before_fc,
            "norm_output": net.layout.norm_output,
            "speculators_version": "0.6.0",
            "tie_word_embeddings": False,
            "transformer_layer_config": layer
            | {
                "layer_types": ["full_attention"],
                "rope_parameters": {"rope_type": "default", "rope_theta": ROPE_BASE},
            },
        }
    )
