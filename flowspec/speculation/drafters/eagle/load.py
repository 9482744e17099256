"""Loads public EAGLE-1/2 draft heads (arXiv 2401.15077, 2406.16858)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowspec.model.architecture import ModelConfig, read_json
from flowspec.speculation.drafters.checkpoint.config import (
    ERROR,
    NOTE,
    Finding,
    Sizes,
    compare_tensors,
    flatten,
    head_config,
    parameter_shapes,
    renamed,
    settle_findings,
)
from flowspec.speculation.drafters.checkpoint.kind import (
    draft_weights,
    read_draft,
    recognise,
    require,
)
from flowspec.speculation.drafters.eagle.network import EagleNet
from flowspec.weights.load import fill

_LAYER = "layers.0."
_EMBEDDING = "embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_RENAMED = {"fusion_fc.": "fc.", "transformer.": _LAYER}  # as speculators names them
_EXTRA_NORMS = ("embedding_layernorm.", "pre_lm_head_layernorm.", "hidden_states_layernorm.")


@dataclass(frozen=True, slots=True, kw_only=True)
class EaglePlan:
    """The reading of a checkpoint, with all that is wrong; `net` is empty (meta device)."""

    net: EagleNet
    tensors: Mapping[str, Tensor]  # the parameters, under the net's names
    findings: list[Finding]
    about: Sequence[str]


def load_eagle(
    folder: Path | str,
    *,
    target_config: ModelConfig,
    embedding: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
) -> EagleNet:
    """Load an EAGLE-1/2 head for the target of `target_config`.

    `embedding` [V, H] is the target's, used if the checkpoint has none of its own. Raises
    ValueError for another kind of head, for tensors missing or unknown, and for a head that was
    made for another target.
    """
    path = draft_weights(Path(folder))
    tensors = read_draft(path, device=device, dtype=dtype)
    require(recognise(tensors), "eagle", path)
    plan = plan_eagle(read_json(Path(folder) / "config.json"), tensors, target_config)
    settle_findings(plan.findings, path)
    weights = dict(plan.tensors)
    if _EMBEDDING not in weights:
        if embedding is None:
            raise ValueError(f"{path} has no {_EMBEDDING}; give the target's embedding")
        weights[_EMBEDDING] = embedding.to(device, weights["fc.weight"].dtype)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    if len(dtypes) > 1:
        raise ValueError(f"{path} mixes {', '.join(dtypes)}; choose one dtype to load it in")
    return fill(plan.net, weights, path)


def plan_eagle(
    hf: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], target: ModelConfig
) -> EaglePlan:
    """Read config and tensors of an EAGLE-1/2 head against its target, without raising errors.

    `hf` None means that the config could not be read.
    """
    named = renamed(tensors, _RENAMED)
    sizes = Sizes(flatten(hf or {}), named, _LAYER, has_config=hf is not None)
    hidden = sizes.dim("fc.weight") or target.hidden_size
    if sizes.dim("fc.weight") is not None:
        sizes.about.append(f"hidden {hidden}")
    if hidden != target.hidden_size:
        sizes.add(ERROR, f"the head's hidden size is {hidden}, the target's {target.hidden_size}; "
                  "it was made for another target")  # fmt: skip
    config = head_config(sizes, hidden=hidden, num_heads=target.num_heads, target=target)
    # The official code has another name for the switch of the biases on q, k and v.
    config = replace(config, qkv_bias=sizes.settle_flag("qkv_bias", config.qkv_bias))
    bias = "fusion_bias" if "fusion_bias" in sizes.hf else "bias"
    with torch.device("meta"):
        net = EagleNet(config, fc_bias=sizes.settle_flag(bias, "fc.bias" in named))
    _refuse_norms(sizes)
    weights = {name: tensor for name, tensor in named.items() if not name.startswith(_EXTRA_NORMS)}
    if (lm_head := weights.pop(_LM_HEAD, None)) is not None:
        _check_lm_head(sizes, lm_head, target)
    expected = parameter_shapes(net)
    if _EMBEDDING not in weights:
        del expected[_EMBEDDING]
    sizes.findings += compare_tensors(expected, weights)
    return EaglePlan(net=net, tensors=weights, findings=sizes.findings, about=sizes.about)


def _refuse_norms(sizes: Sizes) -> None:
    """Refuse variants with norms around the fusion or before the lm_head."""
    norms = [name for name in sizes.tensors if name.startswith(_EXTRA_NORMS)]
    key = next((key for key in ("layernorms", "add_para_norm") if sizes.hf.get(key)), None)
    if norms or key:
        shown = ", ".join(sorted(norms)) or f"{key} in config.json"
        sizes.add(
            ERROR,
            f"{shown}: a head with norms of its own around the fusion is not "
            "supported; use one that was trained without (layernorms false)",
            "norms",
        )


def _check_lm_head(sizes: Sizes, lm_head: Tensor, target: ModelConfig) -> None:
    """Check the file's copy of lm_head, if any; the format says that the target's is used."""
    needed = [target.vocab_size, target.hidden_size]
    if list(lm_head.shape) != needed:
        sizes.add(ERROR, f"{_LM_HEAD} is {list(lm_head.shape)}, the target's is {needed}",
                  "wrong shape")  # fmt: skip
    else:
        sizes.add(NOTE, f"{_LM_HEAD} is not used: this kind of head has the target's")
