"""The sizes of a draft head, from its tensors, and where its config contradicts them.

A finding is one of three: `error`, with which the head cannot run; `contradiction`, where the
config says one thing and the tensors another, and the tensors are believed; `note`, what a reader
should know.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowspec.model.config import ModelConfig

ERROR, CONTRADICTION, NOTE = "error", "contradiction", "note"
# Read by the loaders of heads, and unknown to the config of a whole model.
_HEAD_WORDS = ("draft_vocab", "aux_hidden_state", "eagle_config", "norm_before", "norm_output",
               "fc_norm", "target_hidden", "speculators", "transformer_layer_config")  # fmt: skip
_HEAD_KEYS = ("bias", "qkv_bias")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found in a checkpoint; `what` is its group, for a table."""

    severity: str
    what: str
    detail: str


@dataclass(slots=True)
class Sizes:
    """Reads sizes off the tensors of one layer, and collects what does not fit."""

    hf: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    layer: str  # prefix of the layer's tensors, with its dot
    findings: list[Finding]

    def dim(self, name: str, axis: int = 0) -> int | None:
        """Size of a matrix along `axis`; None where it is missing or no matrix."""
        tensor = self.tensors.get(name)
        return None if tensor is None or tensor.dim() != 2 else tensor.shape[axis]

    def has(self, name: str) -> bool:
        """Whether the layer has this tensor."""
        return self.layer + name in self.tensors

    def number(self, key: str) -> int | None:
        """A whole number of the config; what else is there is an error."""
        value = self.hf.get(key)
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0):
            return value
        self.add(ERROR, f"{key} is {value!r}, needed: a whole number above 0")
        return None

    def add(self, severity: str, detail: str, what: str = "config.json") -> None:
        """One more finding."""
        self.findings.append(Finding(severity, what, detail))

    def settle(self, key: str, measured: int | None, default: int) -> int:
        """The measured size, else the config's, else `default`; says where the two differ."""
        stated = self.number(key)
        if measured is not None and stated is not None and measured != stated:
            self.add(CONTRADICTION, f"{key} is {stated}, the tensors say {measured}")
        return measured or stated or default

    def settle_flag(self, key: str, measured: bool) -> bool:
        """Whether the tensors have it; says where the config differs."""
        stated = self.hf.get(key)
        if stated is not None and bool(stated) != measured:
            found = "has" if measured else "has not"
            self.add(CONTRADICTION, f"{key} is {stated!r}, but the checkpoint {found} such tensors")
        return measured


def head_config(sizes: Sizes, *, hidden: int, num_heads: int, target: ModelConfig) -> ModelConfig:
    """The head's config: sizes from tensors, RoPE and norm from its own config alone.

    `num_heads` is for a config that names none. Nothing is raised: `sizes` collects what is wrong.
    """
    heads = sizes.number("num_attention_heads") or num_heads
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
    plain = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": target.vocab_size,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 1,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": sizes.number("max_position_embeddings")
        or target.max_position_embeddings,
        # One switch in the Llama config for all four, decided apart below.
        "attention_bias": False,
        "mlp_bias": sizes.settle_flag("mlp_bias", sizes.has("mlp.gate_proj.bias")),
        "layer_types": None,
        "bos_token_id": target.bos_token_id,
        "eos_token_id": list(target.eos_token_ids),
    }
    config = _read(sizes, plain)
    if config.rope_theta != target.rope_theta or config.rope_scaling != target.rope_scaling:
        sizes.add(NOTE, f"RoPE: the head's own is used (base {config.rope_theta:g}), not the "
                  f"target's (base {target.rope_theta:g})")  # fmt: skip
    bias = sizes.settle_flag("attention_bias", sizes.has("self_attn.q_proj.bias"))
    return replace(config, qkv_bias=bias, output_bias=sizes.has("self_attn.o_proj.bias"))


def _kv_heads(sizes: Sizes, heads: int, head_dim: int) -> int:
    """Key/value heads from k_proj's rows; a number that fits where those do not."""
    k_rows = sizes.dim(f"{sizes.layer}self_attn.k_proj.weight")
    if k_rows is not None and k_rows % head_dim:
        sizes.add(ERROR, f"k_proj has {k_rows} rows, no multiple of head_dim {head_dim}")
    kv_heads = sizes.settle("num_key_value_heads", k_rows and k_rows // head_dim, heads)
    if heads % kv_heads:
        sizes.add(ERROR, f"{heads} query heads are no multiple of {kv_heads} key/value heads")
        return heads
    return kv_heads


def _read(sizes: Sizes, plain: Mapping[str, Any]) -> ModelConfig:
    """What the config says beside the sizes; what is not supported is an error, then left out."""
    rest = {
        key: value
        for key, value in sizes.hf.items()
        if key not in _HEAD_KEYS and not any(word in key for word in _HEAD_WORDS)
    }
    try:
        return ModelConfig.from_hf({**rest, **plain})
    except ValueError as error:
        sizes.add(ERROR, str(error).removeprefix("config.json: "))
    return ModelConfig.from_hf(plain)


def compare_tensors(
    expected: Mapping[str, tuple[int, ...]], found: Mapping[str, Tensor]
) -> list[Finding]:
    """Every tensor that is missing, unexpected or of the wrong shape."""
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
    """The tensors that a net is filled with."""
    return {name: tuple(tensor.shape) for name, tensor in net.named_parameters()}


def refuse_errors(findings: list[Finding], path: Path) -> None:
    """Raises ValueError with the first errors, if there are any."""
    errors = [f"{f.what}: {f.detail}" for f in findings if f.severity == ERROR]
    if errors:
        more = f" and {len(errors) - 4} more" if len(errors) > 4 else ""
        raise ValueError(
            f"{path} does not fit: {'; '.join(errors[:4])}{more}; `flowspec check-head` lists all"
        )
