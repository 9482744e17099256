"""A Llama written for training speed on a CPU with bf16 matrix units.

Weights are bf16 parameters with an fp32 master copy in the optimizer (no autocast copies). q/k/v
and gate/up are one matrix each, attention is two batched products and a fused softmax, and the loss
computes its gradient in the forward pass. It exports to and imports from the Hugging Face layout.

Shapes: B blocks, T tokens, H hidden, h query heads, g key/value heads, d head size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a small Llama."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 8
    num_heads: int = 4
    num_kv_heads: int = 2
    max_positions: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Return the size of one head."""
        return self.hidden_size // self.num_heads


def rope_table(shape: Shape, length: int) -> tuple[Tensor, Tensor]:
    """Return cos and sin [T, 1, d] for positions 0 to T-1, half-split layout of Hugging Face."""
    exponent = torch.arange(0, shape.head_dim, 2).float() / shape.head_dim
    angles = torch.arange(length).float()[:, None] / shape.rope_theta**exponent
    angles = torch.cat((angles, angles), dim=-1)[:, None]
    return angles.cos().bfloat16(), angles.sin().bfloat16()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE to x [..., T, heads, d]."""
    low, high = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-high, low), dim=-1) * sin


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Apply RMSNorm to x [..., H] in fp32."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attend: q [B, T, h, d], k and v [B, S, g, d], bias [B, 1, T, S] -> [B, T, h*d]."""
    # The query heads of a group are rows of one product over the group's keys.
    b, t, h, d = q.shape
    s, g = k.shape[1], k.shape[2]
    r = h // g
    rows = (q * d**-0.5).view(b, t, g, r, d).permute(0, 2, 3, 1, 4).reshape(b * g, r * t, d)
    keys = k.permute(0, 2, 3, 1).reshape(b * g, d, s)
    values = v.permute(0, 2, 1, 3).reshape(b * g, s, d)
    scores = torch.bmm(rows, keys).view(b, h, t, s).float() + bias
    weights = scores.softmax(dim=-1).bfloat16().view(b * g, r * t, s)
    return (
        torch.bmm(weights, values).view(b, g, r, t, d).permute(0, 3, 1, 2, 4).reshape(b, t, h * d)
    )


def block_forward(
    x: Tensor,
    w: Sequence[Tensor],
    cos: Tensor,
    sin: Tensor,
    bias: Tensor,
    heads: tuple[int, int, int],
) -> Tensor:
    """Run one decoder layer; w = (qkv, o, gate_up, down, norm1, norm2), x [B, T, H]."""
    h, g, d = heads
    qkv, o, gate_up, down, norm1, norm2 = w
    rows = F.linear(norm(x, norm1, 1e-5), qkv).unflatten(-1, (h + 2 * g, d))
    q, k, v = rows.split((h, g, g), dim=-2)
    x = x + F.linear(attention(rotate(q, cos, sin), rotate(k, cos, sin), v, bias), o)
    gate, up = F.linear(norm(x, norm2, 1e-5), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down)


def _loss_rows(logits: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weighted cross-entropy [K] and its gradient [K, V] for logits [K, V]."""
    wide = logits.float()
    log_z = wide.logsumexp(-1)
    loss = log_z - wide.gather(1, targets[:, None])[:, 0]
    p = (wide - log_z[:, None]).exp()
    hit = torch.arange(wide.shape[1])[None] == targets[:, None]
    return loss, ((p - hit.float()) * weights[:, None]).bfloat16()


loss_rows = torch.compile(_loss_rows, dynamic=True)


class HeadLoss(torch.autograd.Function):
    """sum(weights * cross-entropy) over rows; the forward pass makes the gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, head: Tensor, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Map x [K, H], head [V, H], targets and weights [K] to (weighted sum, row loss [K])."""
        dx, dhead = torch.empty_like(x), torch.zeros_like(head)
        losses = torch.empty(x.shape[0])
        for i in range(0, x.shape[0], 1024):
            part = slice(i, i + 1024)
            losses[part], grad = loss_rows(x[part] @ head.T, targets[part], weights[part])
            dx[part] = grad @ head
            dhead += grad.T @ x[part]
        ctx.save_for_backward(dx, dhead)
        ctx.mark_non_differentiable(losses)
        return (losses * weights).sum(), losses

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradient that the forward pass prepared."""
        dx, dhead = ctx.saved_tensors
        return dx * grads[0].to(dx.dtype), dhead * grads[0].to(dx.dtype), None, None


def parameters_of(layer: nn.Module) -> list[nn.Parameter]:
    """Return the weights of one entry of `FastLlama.layers`."""
    assert isinstance(layer, nn.ParameterList)
    return list(layer)


class FastLlama(nn.Module):
    """A Llama: bf16 `embed`, `head`, `norm` and layers (qkv, o, gate_up, down, norm1, norm2)."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        torch.manual_seed(seed)
        size, inner, d = shape.hidden_size, shape.intermediate_size, shape.head_dim
        h, g = shape.num_heads, shape.num_kv_heads

        def matrix(rows: int, columns: int, scale: float) -> nn.Parameter:
            return nn.Parameter((torch.randn(rows, columns) * scale).bfloat16())

        self.embed = matrix(shape.vocab_size, size, 0.2)
        self.head = matrix(shape.vocab_size, size, 0.02)
        self.norm = nn.Parameter(torch.ones(size, dtype=torch.bfloat16))
        self.layers = nn.ModuleList()
        for _ in range(shape.num_layers):
            # Output projections start at zero, so that every layer starts as the identity.
            weights = [
                matrix((h + 2 * g) * d, size, size**-0.5),
                matrix(size, h * d, 0.0),
                matrix(2 * inner, size, size**-0.5),
                matrix(size, inner, 0.0),
                nn.Parameter(torch.ones(size, dtype=torch.bfloat16)),
                nn.Parameter(torch.ones(size, dtype=torch.bfloat16)),
            ]
            self.layers.append(nn.ParameterList(weights))
        self.block = torch.compile(block_forward, dynamic=False)
        self.tables: dict[int, tuple[Tensor, Tensor]] = {}

    def features(self, tokens: Tensor, bias: Tensor, layers: Sequence[int] = ()) -> Tensor:
        """Map tokens [B, T], bias [B, 1, T, T] to hidden states after the final norm [B, T, H].

        The outputs of `layers` come before them, side by side: [B, T, (n+1)*H].
        """
        length = tokens.shape[1]
        if length not in self.tables:
            self.tables[length] = rope_table(self.shape, length)
        cos, sin = self.tables[length]
        heads = (self.shape.num_heads, self.shape.num_kv_heads, self.shape.head_dim)
        x = F.embedding(tokens, self.embed)
        outputs = []
        for layer in self.layers:
            x = self.block(x, parameters_of(layer), cos, sin, bias, heads)
            outputs.append(x)
        final = norm(x, self.norm, self.shape.norm_eps)
        return torch.cat([*(outputs[i] for i in layers), final], dim=-1)

    def hf_config(self) -> dict[str, Any]:
        """Return config.json of the Hugging Face layout."""
        s = self.shape
        return {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
            "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
            "hidden_act": "silu", "hidden_size": s.hidden_size, "head_dim": s.head_dim,
            "initializer_range": 0.02, "intermediate_size": s.intermediate_size,
            "max_position_embeddings": s.max_positions, "mlp_bias": False,
            "num_attention_heads": s.num_heads, "num_hidden_layers": s.num_layers,
            "num_key_value_heads": s.num_kv_heads, "rms_norm_eps": s.norm_eps, "rope_scaling": None,
            "rope_theta": s.rope_theta, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
            "use_cache": True, "vocab_size": s.vocab_size,
        }  # fmt: skip

    def hf_tensors(self) -> dict[str, Tensor]:
        """Return the tensors under their Hugging Face names."""
        s = self.shape
        rows = [s.num_heads * s.head_dim, *[s.num_kv_heads * s.head_dim] * 2]
        tensors: dict[str, Tensor] = {
            "model.embed_tokens.weight": self.embed, "lm_head.weight": self.head,
            "model.norm.weight": self.norm,
        }  # fmt: skip
        for i, layer in enumerate(self.layers):
            prefix = f"model.layers.{i}."
            qkv, o, gate_up, down, norm1, norm2 = parameters_of(layer)
            for name, part in zip("qkv", qkv.split(rows), strict=True):
                tensors[f"{prefix}self_attn.{name}_proj.weight"] = part
            tensors[prefix + "self_attn.o_proj.weight"] = o
            for name, part in zip(("gate", "up"), gate_up.chunk(2), strict=True):
                tensors[f"{prefix}mlp.{name}_proj.weight"] = part
            tensors[prefix + "mlp.down_proj.weight"] = down
            tensors[prefix + "input_layernorm.weight"] = norm1
            tensors[prefix + "post_attention_layernorm.weight"] = norm2
        return {name: t.detach().clone().contiguous() for name, t in tensors.items()}

    def describe(self) -> dict[str, Any]:
        """Return the shape as plain data, for checkpoints."""
        return asdict(self.shape)


def document_bias(tokens: Tensor, bos: int = 1) -> Tensor:
    """Return an additive mask [B, 1, T, T]: causal, and only within a token's own sample."""
    document = (tokens == bos).cumsum(-1)
    length = tokens.shape[1]
    sees = (document[:, :, None] == document[:, None, :]) & torch.ones(length, length).tril().bool()
    return torch.where(sees, 0.0, -1e4)[:, None].bfloat16()


def load_hf_tensors(model: FastLlama, tensors: dict[str, Tensor]) -> None:
    """Fill `model` from tensors under Hugging Face names; the inverse of `hf_tensors`."""
    with torch.no_grad():
        model.embed.copy_(tensors["model.embed_tokens.weight"])
        model.head.copy_(tensors["lm_head.weight"])
        model.norm.copy_(tensors["model.norm.weight"])
        for i, layer in enumerate(model.layers):
            prefix = f"model.layers.{i}."
            attention, mlp = prefix + "self_attn.", prefix + "mlp."
            qkv, o, gate_up, down, norm1, norm2 = parameters_of(layer)
            qkv.copy_(torch.cat([tensors[f"{attention}{n}_proj.weight"] for n in "qkv"]))
            o.copy_(tensors[attention + "o_proj.weight"])
            gate_up.copy_(torch.cat([tensors[f"{mlp}{n}_proj.weight"] for n in ("gate", "up")]))
            down.copy_(tensors[mlp + "down_proj.weight"])
            norm1.copy_(tensors[prefix + "input_layernorm.weight"])
            norm2.copy_(tensors[prefix + "post_attention_layernorm.weight"])
