"""Reads the sizes of a draft head from its tensors, and finds contradictions in its config.

A finding is one of three. With an `error` the head cannot run. In a `contradiction` the config and
the tensors differ, and the tensors are believed. A `note` is information for the user.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowspec.model.architecture import (
    ModelConfig,
    unknown_keys,
    unsupported_features,
    warn_once,
)
from flowspec.model.config_fields import positive_number, without_empty
from flowspec.model.rope import RopeScaling, read_rope

ERROR, CONTRADICTION, NOTE = "error", "contradiction", "note"
ROPE = "RoPE"  # the group of notes that a loader passes on too
# Keys that loaders of heads read, or that trainers write beside what a head computes.
_HEAD_KEYS = """
add_para_norm auto_map aux_hidden_state_layer_ids bias draft_vocab_size eagle_config
eagle_aux_hidden_state_layer_ids embed_requires_grad fc_norm fusion_bias has_no_defaults_at_init
input_norm layernorms norm_before_fc norm_before_residual norm_output qkv_bias speculators_config
speculators_model_type speculators_version target_hidden_size target_model_type target_vocab_size
transformer_layer_architecture transformer_layer_config use_aux_hidden_state
"""
# Files that keep keys of a head one level below; the layer's own sizes take precedence.
_PARTS = ("eagle_config", "", "transformer_layer_config")


def flatten(hf: Mapping[str, Any]) -> dict[str, Any]:
    """Return all keys of a head's config on one level; null and empty values count as absent."""
    flat: dict[str, Any] = {}
    for name in _PARTS:
        part = hf.get(name) if name else hf
        flat.update(without_empty(part) if isinstance(part, Mapping) else {})
    return flat


def renamed(tensors: Mapping[str, Tensor], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the tensors with each of these prefixes of a name replaced."""
    found = {}
    for name, tensor in tensors.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        found[prefixes.get(old, "") + name.removeprefix(old)] = tensor
    return found


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found in a checkpoint; `what` is its group, for a table."""

    severity: str
    what: str
    detail: str


@dataclass(slots=True)
class Sizes:
    """Reads sizes from the tensors of one layer, and collects what does not fit.

    `has_config` is false if the config could not be read; then `hf` is empty and its silence means
    nothing. `about` is for the user: values that were read, and the format's defaults for keys that
    a readable config leaves out.
    """

    hf: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    layer: str  # prefix of the layer's tensors, with its dot
    has_config: bool = True
    findings: list[Finding] = field(default_factory=list)
    about: list[str] = field(default_factory=list)

    def dim(self, name: str, axis: int = 0) -> int | None:
        """Return the size of a matrix along `axis`; None if it is missing or no matrix."""
        tensor = self.tensors.get(name)
        return None if tensor is None or tensor.dim() != 2 else tensor.shape[axis]

    def has(self, name: str) -> bool:
        """Return whether the layer has this tensor."""
        return self.layer + name in self.tensors

    def number(self, key: str) -> int | None:
        """Return a whole number of the config; any other value is an error."""
        value = self.hf.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        self.add(ERROR, f"{key} is {value!r}, needed: a whole number above 0")
        return None

    def add(self, severity: str, detail: str, what: str = "config.json") -> None:
        """Add one finding."""
        self.findings.append(Finding(severity, what, detail))

    def settle(self, key: str, measured: int | None, default: int) -> int:
        """Return the measured size, else the config's, else `default`; note a difference."""
        stated = self.number(key)
        if measured is not None and stated is not None and measured != stated:
            self.add(CONTRADICTION, f"{key} is {stated}, the tensors say {measured}")
        return measured or stated or default

    def settle_flag(self, key: str, measured: bool, *, needed: str = "") -> bool:
        """Return whether the tensors have it; note a difference from the config.

        `needed` names a tensor without which the head would not compute what the config asks for.
        If the config asks for it and the tensor is missing, that is an error.
        """
        stated = self.hf.get(key)
        if stated is None or bool(stated) == measured:
            return measured
        if stated and needed:
            self.add(ERROR, f"{key} is {stated!r}, but {needed} is not in the checkpoint; fetch it "
                     f"again, or set {key} to false if it was trained without")  # fmt: skip
            return measured
        found = "has" if measured else "has not"
        self.add(CONTRADICTION, f"{key} is {stated!r}, but the checkpoint {found} such tensors")
        return measured


def head_config(sizes: Sizes, *, hidden: int, num_heads: int, target: ModelConfig) -> ModelConfig:
    """Return the head's config: sizes from tensors, RoPE and norm from its own config alone.

    `num_heads` is for a config that names none. Nothing is raised: `sizes` collects the errors.
    """
    stated_heads = sizes.number("num_attention_heads")
    heads = stated_heads or num_heads
    q_rows = sizes.dim(f"{sizes.layer}self_attn.q_proj.weight")
    head_dim = sizes.number("head_dim") or max((q_rows or hidden) // heads, 2)
    if q_rows is not None and q_rows != heads * head_dim:
        sizes.add(ERROR, f"q_proj has {q_rows} rows, which are no {heads} heads (num_attention_"
                  f"heads) of {head_dim} (head_dim)")  # fmt: skip
    kv_heads = _kv_heads(sizes, heads, head_dim)
    inner = sizes.settle(
        "intermediate_size", sizes.dim(f"{sizes.layer}mlp.gate_proj.weight"), target.hidden_size
    )
    sizes.settle("hidden_size", hidden, hidden)
    if (layers := sizes.number("num_hidden_layers")) not in (None, 1):
        sizes.add(CONTRADICTION, f"num_hidden_layers is {layers}, a head of this kind has 1")
    vocab = sizes.settle("vocab_size", sizes.dim("embed_tokens.weight"), target.vocab_size)
    if vocab != target.vocab_size:
        sizes.add(ERROR, f"its vocabulary has {vocab} tokens, the target's {target.vocab_size}; it "
                  "was made for another target")  # fmt: skip
    config = ModelConfig.from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "vocab_size": target.vocab_size,
            "hidden_size": hidden,
            "intermediate_size": inner,
            "num_hidden_layers": 1,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "head_dim": head_dim,
            "mlp_bias": sizes.settle_flag("mlp_bias", sizes.has("mlp.gate_proj.bias")),
            "bos_token_id": target.bos_token_id,
            "eos_token_id": list(target.eos_token_ids),
        }
    )
    if stated_heads or sizes.has_config:
        default = "" if stated_heads else " (the format's number: the config names none)"
        sizes.about.append(
            f"{heads} query{default} and {kv_heads} key/value heads of {config.head_dim}"
        )
    _refuse(sizes)
    positions = sizes.number("max_position_embeddings")
    theta, scaling = _rope(sizes, target, positions or 2048)
    bias = sizes.settle_flag("attention_bias", sizes.has("self_attn.q_proj.bias"))
    return replace(
        config,
        rms_norm_eps=_norm_eps(sizes),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias=bias,
        output_bias=sizes.has("self_attn.o_proj.bias"),
        qk_norm=sizes.has("self_attn.q_norm.weight") or sizes.has("self_attn.k_norm.weight"),
        max_position_embeddings=positions or target.max_position_embeddings,
    )


def _refuse(sizes: Sizes) -> None:
    """Refuse keys that change a head's computation and are not supported.

    The list is shorter than that of whole models. `auto_map` names the code that the author reads
    the file with; the tensors show what it is.
    """
    own = {key: value for key, value in sizes.hf.items() if key not in _HEAD_KEYS.split()}
    for sentence in unsupported_features(own):
        sizes.add(ERROR, sentence)
    types = sizes.hf.get("layer_types")
    first = types[0] if isinstance(types, list) else "full_attention"
    # Whole models without layer types do this in the layers from max_window_layers on.
    slides = sizes.hf.get("use_sliding_window") is True and sizes.hf.get("max_window_layers") == 0
    if first != "full_attention" or (types is None and slides):
        what = "layer_types" if types else "use_sliding_window"
        sizes.add(ERROR, f"{what}: the head's layer has attention of the kind {first!r} over "
                  f"sliding_window {sizes.hf.get('sliding_window')}; no drafter here has a window: "
                  "use a head with full attention")  # fmt: skip
    if sizes.hf.get("use_aux_hidden_state") is False:
        sizes.add(ERROR, "use_aux_hidden_state is false: the head reads the last hidden state "
                  "alone; use one that reads three layers")  # fmt: skip
    if unknown := unknown_keys(own):
        sizes.add(NOTE, f"nothing is known of {', '.join(unknown)}; the head runs as if they were "
                  "not there")  # fmt: skip


def _rope(sizes: Sizes, target: ModelConfig, positions: int) -> tuple[float, RopeScaling | None]:
    """Return the head's own RoPE, or a plain one, which is not shown, if it cannot be read."""
    plain = 10000.0, None
    if not sizes.has_config:
        return plain
    try:
        theta, scaling = read_rope(
            sizes.hf, max_positions=positions, warn=lambda text: sizes.add(NOTE, text, ROPE)
        )
    except ValueError as error:
        sizes.add(ERROR, str(error).removeprefix("config.json: "))
        return plain
    sizes.about.append(f"RoPE base {theta:g}{_where_base(sizes.hf)}")
    if (theta, scaling) != (target.rope_theta, target.rope_scaling):
        sizes.add(NOTE, f"RoPE: the head's own is used (base {theta:g}), not the target's (base "
                  f"{target.rope_theta:g})")  # fmt: skip
    return theta, scaling


def _where_base(hf: Mapping[str, Any]) -> str:
    """Return a note on the source of the base; empty if the config names a base."""
    parts = [hf.get("rope_scaling"), hf.get("rope_parameters")]
    named = any(isinstance(part, Mapping) and "rope_theta" in part for part in (hf, *parts))
    return "" if named else " (the default: the config names none)"


def _norm_eps(sizes: Sizes) -> float:
    try:
        return positive_number(sizes.hf, "rms_norm_eps", 1e-6)
    except ValueError as error:
        sizes.add(ERROR, str(error).removeprefix("config.json: "))
        return 1e-6


def _kv_heads(sizes: Sizes, heads: int, head_dim: int) -> int:
    """Return the key/value heads from k_proj's rows, or a number that fits if those do not."""
    k_rows = sizes.dim(f"{sizes.layer}self_attn.k_proj.weight")
    if k_rows is not None and k_rows % head_dim:
        sizes.add(ERROR, f"k_proj has {k_rows} rows, no multiple of head_dim {head_dim}")
    kv_heads = sizes.settle("num_key_value_heads", k_rows and k_rows // head_dim, heads)
    if heads % kv_heads:
        sizes.add(ERROR, f"{heads} query heads are no multiple of {kv_heads} key/value heads")
        return heads
    return kv_heads


def compare_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]
) -> list[Finding]:
    """Report every tensor that is missing, unexpected or of the wrong shape."""
    findings = [
        Finding(ERROR, "missing tensor", f"{name} {list(expected[name])}")
        for name in sorted(expected.keys() - found.keys())
    ]
    findings += [
        Finding(ERROR, "unexpected tensor", f"{name} {list(found[name].shape)}")
        for name in sorted(found.keys() - expected.keys())
    ]
    for name in sorted(expected.keys() & found.keys()):
        if tuple(found[name].shape) != expected[name]:
            shapes = f"{name} is {list(found[name].shape)}, needed {list(expected[name])}"
            findings.append(Finding(ERROR, "wrong shape", shapes))
    return findings


def parameter_shapes(net: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the tensors that a net is filled with, by name."""
    return {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}


def settle_findings(findings: list[Finding], path: Path) -> None:
    """Raise ValueError with the first errors, if there are any; warn of RoPE notes."""
    errors = [f"{f.what}: {f.detail}" for f in findings if f.severity == ERROR]
    if errors:
        more = f" and {len(errors) - 4} more" if len(errors) > 4 else ""
        raise ValueError(
            f"{path} does not fit: {'; '.join(errors[:4])}{more}; `flowspec check-head` lists all"
        )
    for finding in findings:
        if finding.what == ROPE:
            warn_once(f"{path.parent / 'config.json'}: {finding.detail}")
