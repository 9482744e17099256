"""The Llama decoder block, shared by every supported family, the drafters and training.

Shapes: `...` is [n] for the rows of a segment or [B, T] for a training batch; H hidden size, h
query heads, g key/value heads, d head dimension. `ModelConfig` has what differs between families
(biases, norms of queries and keys, explicit head_dim, RoPE scaling). The caller's `attend` decides
which rows see which.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowspec.model.architecture import ModelConfig
from flowspec.model.linear import Linear

# attend(q [..., h, d], k [..., g, d], v [..., g, d]) -> [..., h, d]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
Rope = tuple[Tensor, Tensor]


class Embedding(nn.Embedding):
    """nn.Embedding that skips initialisation on the meta device, for modules filled from disk."""

    def reset_parameters(self) -> None:
        """Make random weights, except on the meta device."""
        if not self.weight.is_meta:
            super().reset_parameters()


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467), in fp32 as the checkpoints were trained."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x [..., H] over its last dimension."""
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Return inverse frequencies [d/2] in fp32, scaled as the config asks for."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
    frequencies = 1.0 / (config.rope_theta**exponent)
    if config.rope_scaling is None:
        return frequencies
    return config.rope_scaling.scale(frequencies, config.rope_theta)


def rope_angles(frequencies: Tensor, positions: Tensor, dtype: torch.dtype) -> Rope:
    """Return (cos, sin), each [..., 1, d], for positions [...]; the 1 broadcasts over heads."""
    angles = positions.float().unsqueeze(-1) * frequencies
    angles = torch.cat((angles, angles), dim=-1).unsqueeze(-2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def apply_rope(x: Tensor, rope: Rope) -> Tensor:
    """Rotate x [..., heads, d] by its positions (arXiv 2104.09864, half-split layout of HF)."""
    cos, sin = rope
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


class Attention(nn.Module):
    """Grouped-query attention; the caller's `attend` decides which rows see which."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        hidden, heads = config.hidden_size, config.num_heads * config.head_dim
        groups = config.num_kv_heads * config.head_dim
        self.q_proj = Linear(hidden, heads, bias=config.qkv_bias)
        self.k_proj = Linear(hidden, groups, bias=config.qkv_bias)
        self.v_proj = Linear(hidden, groups, bias=config.qkv_bias)
        self.o_proj = Linear(heads, hidden, bias=config.output_bias)
        self.q_norm: RMSNorm | None = None
        self.k_norm: RMSNorm | None = None
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        scaling = config.rope_scaling
        self.score_factor = 1.0 if scaling is None else scaling.attention_factor**2

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Map x [..., H] to [..., H]."""
        split = (-1, self.head_dim)
        q = self.q_proj(x).unflatten(-1, split)
        k = self.k_proj(x).unflatten(-1, split)
        v = self.v_proj(x).unflatten(-1, split)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = apply_rope(q, rope), apply_rope(k, rope)
        if self.score_factor != 1.0:  # of queries and of keys, applied here at once
            q = q * self.score_factor
        return self.o_proj(attend(q, k, v).flatten(-2))


class MLP(nn.Module):
    """SwiGLU feed-forward (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., H] to [..., H]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """One pre-norm decoder layer; parameter names are those of HF's `model.layers.i`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Map x [..., H] to [..., H]."""
        x = x + self.self_attn(self.input_layernorm(x), rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))
