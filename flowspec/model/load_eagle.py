"""Loading public EAGLE-1/2 draft heads (arXiv 2401.15077, 2406.16858)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowspec.model.config import ModelConfig, read_json
from flowspec.model.draft_config import (
    ERROR,
    Finding,
    Sizes,
    compare_tensors,
    head_config,
    parameter_shapes,
    refuse_errors,
)
from flowspec.model.draft_kind import draft_weights, read_draft, recognise, require
from flowspec.model.eagle_net import EagleNet
from flowspec.model.load import fill

_LAYER = "layers.0."
_EMBEDDING = "embed_tokens.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class EaglePlan:
    """What a checkpoint is, and all that is wrong with it; `net` is empty (meta device)."""

    net: EagleNet
    findings: list[Finding]


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
    path = draft_weights(Path(folder))
    tensors = read_draft(path, device=device, dtype=dtype)
    require(recognise(tensors), "eagle", path)
    plan = plan_eagle(read_json(Path(folder) / "config.json"), tensors, target_config)
    refuse_errors(plan.findings, path)
    if _EMBEDDING not in tensors:
        if embedding is None:
            raise ValueError(f"{path} has no {_EMBEDDING}; give the target's embedding")
        tensors[_EMBEDDING] = embedding.to(device, tensors["fc.weight"].dtype)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    if len(dtypes) > 1:
        raise ValueError(f"{path} mixes {', '.join(dtypes)}; choose one dtype to load it in")
    return fill(plan.net, tensors, path)


def plan_eagle(
    hf: Mapping[str, Any], tensors: Mapping[str, Tensor], target: ModelConfig
) -> EaglePlan:
    """Reads config and tensors of an EAGLE-1/2 head against its target; raises nothing."""
    sizes = Sizes(hf, tensors, _LAYER, [])
    hidden = sizes.dim("fc.weight") or target.hidden_size
    if hidden != target.hidden_size:
        sizes.add(ERROR, f"the head's hidden size is {hidden}, the target's {target.hidden_size}; "
                  "it was made for another target")  # fmt: skip
    config = head_config(sizes, hidden=hidden, num_heads=target.num_heads, target=target)
    # The official code has a switch of another name for the biases on q, k and v.
    config = replace(config, qkv_bias=sizes.settle_flag("qkv_bias", config.qkv_bias))
    with torch.device("meta"):
        net = EagleNet(config, fc_bias=sizes.settle_flag("bias", "fc.bias" in tensors))
    expected = parameter_shapes(net)
    if _EMBEDDING not in tensors:
        del expected[_EMBEDDING]
    sizes.findings += compare_tensors(expected, tensors)
    return EaglePlan(net=net, findings=sizes.findings)
