"""Loads EAGLE-3 draft heads (arXiv 2503.01840): official, SpecForge and speculators files.

They differ in names (`midlayer.` or `layers.0.`), in where the config keeps the layer's sizes, and
in the meaning of a hidden-state layer's id. SpecForge and SGLang count layers by their outputs,
speculators and vLLM by their inputs; this module always means the output. Newer files of
speculators say more (norms, hidden-state layers) than older ones, in the same form.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowspec.model.architecture import ModelConfig, read_json
from flowspec.speculation.drafters.checkpoint.config import (
    CONTRADICTION,
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
from flowspec.speculation.drafters.eagle3.network import NUM_HIDDEN_STATES, Eagle3Layout, Eagle3Net
from flowspec.weights.load import fill

logger = logging.getLogger(__name__)

_LAYER = "midlayer."
_EMBEDDING = "embed_tokens.weight"
_RENAMED = {"layers.0.": _LAYER, "draft_id_to_target_id": "d2t"}
_LAYER_ID_KEYS = ("eagle_aux_hidden_state_layer_ids", "aux_hidden_state_layer_ids")
_TRAINING = "verifier_"  # tensors of the target that some trainers leave in the file
# A speculators config leaves out the defaults of a Llama config.
_SPECULATORS_HEADS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Plan:
    """The reading of a checkpoint, with all that is wrong; `net` is empty (meta device)."""

    net: Eagle3Net
    tensors: Mapping[str, Tensor]  # the parameters, under the net's names
    origin: str
    findings: list[Finding]
    about: Sequence[str]


def load_eagle3(
    folder: Path | str,
    *,
    target_config: ModelConfig,
    embedding: Tensor | None = None,
    device: torch.device | str = "cpu",
    dtype: str | None = None,
) -> Eagle3Net:
    """Load an EAGLE-3 head for the target of `target_config`.

    `embedding` [V, H] is the target's, used if the checkpoint has none of its own. Raises
    ValueError for another kind of head, for tensors missing, unknown or of a wrong shape, and for a
    config that leaves open what the head computes.
    """
    path = draft_weights(Path(folder))
    tensors = read_draft(path, device=device, dtype=dtype)
    require(recognise(tensors), "eagle3", path)
    plan = plan_eagle3(read_json(Path(folder) / "config.json"), tensors, target_config)
    settle_findings(plan.findings, path)
    weights = dict(plan.tensors)
    if _EMBEDDING not in weights:
        if embedding is None:
            raise ValueError(f"{path} has no {_EMBEDDING}; give the target's embedding")
        weights[_EMBEDDING] = embedding.to(device, weights["fc.weight"].dtype)
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in weights.values()})
    if len(dtypes) > 1:
        raise ValueError(f"{path} mixes {', '.join(dtypes)}; choose one dtype to load it in")
    logger.info("%s: %s EAGLE-3 head over the outputs of layers %s", path, plan.origin,
                plan.net.aux_hidden_state_layers)  # fmt: skip
    net = fill(plan.net, weights, path)
    net.draft_to_target = net.draft_to_target.to(device)
    return net


def plan_eagle3(
    hf: Mapping[str, Any] | None, tensors: Mapping[str, Tensor], target: ModelConfig
) -> Eagle3Plan:
    """Read config and tensors of an EAGLE-3 head against its target, without raising errors.

    `hf` None means that the config could not be read.
    """
    named = renamed(tensors, _RENAMED)
    raw = hf or {}
    speculators = "speculators_model_type" in raw or "transformer_layer_config" in raw
    sizes = Sizes(flatten(raw), named, _LAYER, has_config=hf is not None)
    origin = _origin(raw, speculators)
    measured = sizes.dim("fc.weight") or sizes.number("hidden_size")
    hidden = measured or target.hidden_size
    sizes.about += [f"{origin} form"] if sizes.has_config else []
    sizes.about += [f"hidden {hidden}"] if measured else []
    heads = _SPECULATORS_HEADS if speculators else target.num_heads
    config = head_config(sizes, hidden=hidden, num_heads=heads, target=target)
    _check_kind(sizes)
    _check_target_size(sizes, target)
    layout = Eagle3Layout(
        aux_hidden_state_layers=_aux_hidden_state_layers(
            sizes, target.num_layers, counts_inputs=speculators
        ),
        target_hidden_size=target.hidden_size,
        norm_before_residual=_residual_flag(sizes, required=speculators),
        norm_before_fc=_input_norm(sizes),
        fc_norm=sizes.settle_flag(
            "fc_norm", "fc_norm.0.weight" in named, needed="fc_norm.0.weight"
        ),
        norm_output=_output_flag(sizes, speculators=speculators),
        fc_bias="fc.bias" in named,
    )
    ids = _draft_vocabulary(sizes, target.vocab_size)
    with torch.device("meta"):
        net = Eagle3Net(config, layout, draft_to_target=ids)
    expected = parameter_shapes(net)
    if _EMBEDDING not in named and hidden == target.hidden_size:
        del expected[_EMBEDDING]  # the target's is used
    parameters = {name: t for name, t in named.items() if name not in ("d2t", "t2d")}
    for name in [name for name in parameters if name.startswith(_TRAINING)]:
        del parameters[name]
        sizes.add(NOTE, f"{name} is not used: it is the target's, for training alone")
    sizes.findings += compare_tensors(expected, parameters)
    return Eagle3Plan(
        net=net, tensors=parameters, findings=sizes.findings, origin=origin, about=sizes.about
    )


def _origin(hf: Mapping[str, Any], speculators: bool) -> str:
    if speculators:
        return "speculators"
    named = hf.get("architectures") or []
    return "SpecForge" if "LlamaForCausalLMEagle3" in named else "official"


def _check_kind(sizes: Sizes) -> None:
    named = sizes.hf.get("speculators_model_type")
    if named not in (None, "eagle3"):
        sizes.add(CONTRADICTION, f"speculators_model_type is {named!r}, the tensors are those of "
                  "an EAGLE-3 head")  # fmt: skip


def _input_norm(sizes: Sizes) -> bool:
    """Return whether one norm covers all three hidden states; files have two names for it."""
    stored = "input_norm.weight" in sizes.tensors
    for key in ("norm_before_fc", "input_norm"):
        sizes.settle_flag(key, stored, needed="input_norm.weight")
    return stored


def _check_target_size(sizes: Sizes, target: ModelConfig) -> None:
    wide = sizes.dim("fc.weight", 1)
    if wide is not None and wide != NUM_HIDDEN_STATES * target.hidden_size:
        needed = NUM_HIDDEN_STATES * target.hidden_size
        sizes.add(ERROR, f"fc.weight reads {wide} values, three hidden states of this target have "
                  f"{needed}; it was made for another target")  # fmt: skip
    stated = sizes.number("target_hidden_size")
    if stated not in (None, target.hidden_size):
        sizes.add(CONTRADICTION, f"target_hidden_size is {stated}, the target's hidden size is "
                  f"{target.hidden_size}")  # fmt: skip


def _aux_hidden_state_layers(
    sizes: Sizes, num_layers: int, *, counts_inputs: bool
) -> tuple[int, ...]:
    """Return output-of-layer ids; the official ones if the config names none or invalid ones."""
    official = (1, num_layers // 2 - 1, num_layers - 4)
    key = next((key for key in _LAYER_ID_KEYS if key in sizes.hf), None)
    ids: Any = None if key is None else sizes.hf[key]
    if ids is None:
        ids = [i + counts_inputs for i in official]
    elif not isinstance(ids, list) or any(type(i) is not int for i in ids):
        sizes.add(ERROR, f"{key} is {ids!r}, needed: a list of layer ids")
        return official
    layers = tuple(i - counts_inputs for i in ids)
    if len(layers) != NUM_HIDDEN_STATES or len(set(layers)) != len(layers):
        sizes.add(
            ERROR, f"hidden-state layers {ids} are {len(set(layers))}, needed: {NUM_HIDDEN_STATES}"
        )
        return official
    if not all(0 <= layer < num_layers for layer in layers):
        first = int(counts_inputs)
        sizes.add(ERROR, f"hidden-state layers {ids} do not all lie in {first} to "
                  f"{num_layers - 1 + first}; the target has {num_layers} layers")  # fmt: skip
        return official
    if key:
        _note_convention(sizes, layers, ids, official, counts_inputs)
    if sizes.has_config:
        default = "" if key else " (the usual ones: the config names none)"
        sizes.about.append(
            f"hidden states are the outputs of layers {', '.join(map(str, layers))}{default}"
        )
    return layers


def _note_convention(
    sizes: Sizes, layers: tuple[int, ...], ids: list[int], official: tuple[int, ...], inputs: bool
) -> None:
    """Note the convention of the ids; converted files may keep those of the other convention."""
    other = tuple(i + (1 if inputs else -1) for i in layers)
    counted = "input" if inputs else "output"
    sizes.add(NOTE, f"hidden-state layers {ids} count layers by {counted}: the outputs of {layers}")
    if other == official and layers != official:
        sizes.add(CONTRADICTION, f"hidden-state layers {ids} would be the usual ones if counted "
                  f"the other way, not by {counted}; a conversion may have kept them: "
                  "compare tau with both")  # fmt: skip


def _residual_flag(sizes: Sizes, *, required: bool) -> bool:
    stated = sizes.hf.get("norm_before_residual")
    if stated is None and required:
        sizes.add(ERROR, "norm_before_residual is missing; it decides what the head computes, and "
                  "no tensor shows it: take it from the training command")  # fmt: skip
    return bool(stated)


def _output_flag(sizes: Sizes, *, speculators: bool) -> bool:
    stated = bool(sizes.hf.get("norm_output"))
    if stated and not speculators:
        sizes.add(NOTE, "norm_output: the normed state is handed on to the next draft step; some "
                  "trainers mean another thing by it, so compare acceptance by depth")  # fmt: skip
    return stated


def _draft_vocabulary(sizes: Sizes, vocab: int) -> Tensor:
    """Return the target's id of each draft id [Vd]; the identity if the checkpoint names none."""
    measured = sizes.dim("lm_head.weight")
    size = sizes.settle("draft_vocab_size", measured, vocab)
    if measured is not None:
        sizes.about.append(f"{size} of {vocab} tokens")
    known = sizes.tensors.get("t2d")
    if known is not None and known.shape != (vocab,):
        sizes.add(ERROR, f"t2d is {list(known.shape)}, needed [{vocab}]", "wrong shape")
        known = None
    offsets = sizes.tensors.get("d2t")
    plain = torch.arange(size)
    if offsets is None:
        if size != vocab:
            sizes.add(ERROR, f"d2t [{size}]: lm_head knows {size} of {vocab} tokens, and nothing "
                      "says which", "missing tensor")  # fmt: skip
        return plain
    if offsets.shape != (size,):
        sizes.add(ERROR, f"d2t is {list(offsets.shape)}, needed [{size}]", "wrong shape")
        return plain
    ids = plain + offsets.to("cpu", torch.int64)
    outside = int(((ids < 0) | (ids >= vocab)).sum())
    if outside:
        sizes.add(ERROR, f"d2t leads {outside} of {size} draft tokens outside the target's "
                  f"vocabulary of {vocab}", "d2t")  # fmt: skip
        return plain
    if len(ids.unique()) != size:
        twice = size - len(ids.unique())
        sizes.add(ERROR, f"d2t leads {twice} draft tokens to a token another has", "d2t")
    if known is not None and not torch.equal(ids.sort().values, known.cpu().nonzero()[:, 0]):
        sizes.add(ERROR, f"d2t and t2d disagree: {size} draft tokens, {int(known.sum())} marked in "
                  f"t2d, {int(known.cpu().bool()[ids].sum())} in both", "d2t")  # fmt: skip
    return ids
