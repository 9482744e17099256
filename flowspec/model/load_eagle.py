"""Loading public EAGLE-1/2 draft heads (arXiv 2401.15077, 2406.16858).

What such a checkpoint is, is decided by its tensors: the configs published with them name a Llama
model and leave out or contradict half of what matters.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowspec.model.config import ModelConfig, positive_int, read_json
from flowspec.model.eagle_net import EagleNet
from flowspec.model.load import fill, read_tensors

_FILES = ("model.safetensors", "pytorch_model.bin")
_EAGLE3_MARKS = ("midlayer.", "d2t", "t2d", "lm_head.", "fc_norm.", "hidden_norm.", "mask_hidden")
_ATTENTION = "layers.0.self_attn."


def load_eagle(
    folder: Path | str,
    *,
    target_config: ModelConfig,
    embedding: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
) -> EagleNet:
    """An EAGLE-1/2 head for the target of `target_config`.

    `embedding` [V, H] is the target's, used where the checkpoint has none of its own. Raises
    ValueError for another kind of head, for tensors missing or unknown, and for a head that was
    made for another target.
    """
    folder = Path(folder)
    path = next((folder / name for name in _FILES if (folder / name).exists()), None)
    if path is None:
        raise ValueError(f"{folder} has neither {' nor '.join(_FILES)}; is it an EAGLE checkpoint?")
    tensors = read_tensors(path, device=device, dtype=dtype)
    _check_kind(tensors, path)
    hf = read_json(folder / "config.json")
    config = _eagle_config(hf, tensors, target_config, path)
    if "embed_tokens.weight" not in tensors:
        if embedding is None:
            raise ValueError(f"{path} has no embed_tokens.weight; give the target's embedding")
        tensors["embed_tokens.weight"] = embedding.to(device, tensors["fc.weight"].dtype)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise ValueError(f"{path} mixes {', '.join(dtypes)}; choose one dtype to load it in")
    with torch.device("meta"):
        net = EagleNet(config, fc_bias="fc.bias" in tensors)
    return fill(net, tensors, path)


def _check_kind(tensors: Mapping[str, Tensor], path: Path) -> None:
    marks = sorted(n for n in tensors if any(mark in n for mark in _EAGLE3_MARKS))
    fc = tensors.get("fc.weight")
    wide = fc is not None and fc.dim() == 2 and fc.shape[1] >= 3 * fc.shape[0]
    if marks or wide:
        raise ValueError(
            f"{path} is an EAGLE-3 head or a later kind (it has {(marks or ['fc.weight'])[:3]}), "
            "which is not supported yet; use an EAGLE-1 or EAGLE-2 checkpoint"
        )
    needed = [
        "fc.weight",
        *(f"{_ATTENTION}{x}_proj.weight" for x in "qkvo"),
        "layers.0.mlp.gate_proj.weight",
    ]
    missing = [name for name in needed if name not in tensors or tensors[name].dim() != 2]
    if missing:
        raise ValueError(
            f"{path} is no EAGLE-1/2 head: it lacks {missing[:3]}; found {sorted(tensors)[:6]}"
        )


def _eagle_config(
    hf: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ModelConfig, path: Path
) -> ModelConfig:
    """Sizes from the tensors, RoPE and norm from the head's own config, never from the target."""
    hidden, double = tensors["fc.weight"].shape
    if hidden != target.hidden_size or double != 2 * hidden:
        raise ValueError(
            f"{path}: fc.weight is [{hidden}, {double}], a head for this target has "
            f"[{target.hidden_size}, {2 * target.hidden_size}]; it was made for another target"
        )
    own = tensors.get("embed_tokens.weight")
    vocab = target.vocab_size if own is None else own.shape[0]
    if vocab != target.vocab_size:
        raise ValueError(
            f"{path}: its vocabulary has {vocab} tokens, the target's {target.vocab_size}; it was "
            "made for another target"
        )
    heads = positive_int(hf, "num_attention_heads", target.num_heads)
    query_rows = tensors[f"{_ATTENTION}q_proj.weight"].shape[0]
    head_dim = positive_int(hf, "head_dim", query_rows // heads)
    sizes = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": tensors["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "num_key_value_heads": tensors[f"{_ATTENTION}k_proj.weight"].shape[0] // head_dim,
        "max_position_embeddings": hf.get("max_position_embeddings")
        or target.max_position_embeddings,
        # One switch in the Llama config for all four, decided apart below.
        "attention_bias": False,
        "mlp_bias": "layers.0.mlp.gate_proj.bias" in tensors,
        "layer_types": None,
    }
    ids = {"bos_token_id": target.bos_token_id, "eos_token_id": list(target.eos_token_ids)}
    config = ModelConfig.from_hf({**hf, **sizes, **ids})
    return replace(
        config,
        qkv_bias=f"{_ATTENTION}q_proj.bias" in tensors,
        output_bias=f"{_ATTENTION}o_proj.bias" in tensors,
    )
