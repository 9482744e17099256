"""EAGLE-1 head in a form that trains fast, unrolled over several draft steps.

Row i holds token i+1 and the hidden state of token i; its output predicts the hidden state of token
i+1. Step 1 covers all rows, with the target's hidden states. Later steps continue from only some
rows, the starts: their hidden state is the head's own output of the step before, and they see the
true rows up to their start and the drafted rows since, as in real drafting (HASS, arXiv 2408.15766;
EAGLE-3's training-time test, arXiv 2503.01840). Chains from neighbouring rows teach nearly the
same, so a few per block leave time for more text.

Shapes: B blocks, T rows, C starts a block, H hidden, h query heads, g key/value heads, d head size,
V vocabulary, K unrolled steps, R rows in the loss.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowspec.training.fast_llama import norm, rotate

Heads = tuple[int, int, int]
Rope = tuple[Tensor, Tensor]
Step = Callable[..., tuple[Tensor, Tensor, Tensor]]


def draft_attention(q: Tensor, keys: list[Tensor], values: list[Tensor], bias: Tensor) -> Tensor:
    """Attend from rows of step k to step 1's rows (bias [B, 1, T, S]) and one row per later step.

    q [B, T, h, d]; keys[0] and values[0] [B, S, g, d] are step 1's, the others one row per query.
    """
    b, t, h, d = q.shape
    s, g = keys[0].shape[1:3]
    r = h // g
    q = q * d**-0.5
    rows = q.view(b, t, g, r, d).permute(0, 2, 3, 1, 4).reshape(b * g, r * t, d)
    columns = keys[0].permute(0, 2, 3, 1).reshape(b * g, d, s)
    scores = torch.bmm(rows, columns).view(b, h, t, s).float() + bias
    grouped = q.view(b, t, g, r, d)
    # [B, h, T, 1] each: the drafted ancestors, one per step, and the row itself
    own = [
        (grouped * k[:, :, :, None]).float().sum(-1).flatten(2).permute(0, 2, 1)[..., None]
        for k in keys[1:]
    ]
    weights = torch.cat((scores, *own), dim=-1).softmax(-1).bfloat16()
    trunk = weights[..., :s].reshape(b * g, r * t, s)
    base = values[0].permute(0, 2, 1, 3).reshape(b * g, s, d)
    mixed = torch.bmm(trunk, base).view(b, g, r, t, d).permute(0, 3, 1, 2, 4)
    for i, v in enumerate(values[1:]):
        mixed = mixed + weights[..., s + i].permute(0, 2, 1).view(b, t, g, r, 1) * v[:, :, :, None]
    return mixed.reshape(b, t, h * d)


def draft_step(
    embedded: Tensor, feature: Tensor, w: list[Tensor], rope: Rope,
    drafted: tuple[list[Tensor], list[Tensor]], bias: Tensor, heads: Heads,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a step over n rows a block; return outputs [B, n, H] and keys, values [B, n, g, d]."""
    h, g, d = heads
    fc, fc_bias, qkv, o, gate_up, down, norm2 = w
    x = F.linear(torch.cat((embedded, feature), dim=-1), fc, fc_bias)
    rows = F.linear(x, qkv).unflatten(-1, (h + 2 * g, d))
    q, k, v = rows.split((h, g, g), dim=-2)
    q, k = rotate(q, *rope), rotate(k, *rope)
    keys, values = drafted
    x = x + F.linear(draft_attention(q, [*keys, k], [*values, v], bias), o)
    gate, up = F.linear(norm(x, norm2, 1e-5), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down), k, v


def unroll(
    layer: tuple[Step, list[Tensor], Heads], embedded: Tensor, features: Tensor, rope: Rope,
    sees: Tensor, starts: Tensor, steps: int,
) -> tuple[Tensor, list[Tensor]]:  # fmt: skip
    """Return outputs [B, T, H] of step 1, and [B, C, H] of each later step.

    embedded and features [B, T, H] are the input of step 1; sees [B, T, T] says which rows see
    which; starts [B, C] are rows with at least `steps` rows below them.
    """
    step, weights, heads = layer
    masks = torch.where(sees, 0.0, -1e4).bfloat16()
    nothing: tuple[list[Tensor], list[Tensor]] = ([], [])
    first, key, value = step(embedded, features, weights, rope, nothing, masks[:, None], heads)
    keys, values, chains = [key], [value], []
    batch = torch.arange(len(starts))[:, None]
    feature, bias = first[batch, starts], masks[batch, starts][:, None]
    for k in range(1, steps):
        token = embedded[batch, starts + k]
        where = (rope[0][starts + k], rope[1][starts + k])
        feature, key, value = step(token, feature, weights, where, (keys, values), bias, heads)
        keys, values = [*keys, key], [*values, value]
        chains.append(feature)
    return first, chains


def load_layer(layer: tuple[Tensor, ...], tensors: dict[str, Tensor], prefix: str) -> None:
    """Fill (qkv, o, gate_up, down, norm after attention) from tensors under public names."""
    qkv, o, gate_up, down, norm2 = layer
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    qkv.copy_(torch.cat([tensors[f"{attention}{n}_proj.weight"] for n in "qkv"]))
    o.copy_(tensors[attention + "o_proj.weight"])
    gate_up.copy_(torch.cat([tensors[f"{mlp}{n}_proj.weight"] for n in ("gate", "up")]))
    down.copy_(tensors[mlp + "down_proj.weight"])
    norm2.copy_(tensors[prefix + "post_attention_layernorm.weight"])


def _distil_rows(student: Tensor, teacher: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy [R] of student [R, V] to softmax(teacher), and its gradient."""
    s, t = student.float(), teacher.float()
    s, t = s - s.logsumexp(-1, keepdim=True), t - t.logsumexp(-1, keepdim=True)
    p = t.exp()
    # Minus the teacher's entropy: the KL divergence, zero for a perfect head.
    return (p * (t - s)).sum(-1), ((s.exp() - p) * scale).bfloat16()


distil_rows = torch.compile(_distil_rows, dynamic=True)


class DistilLoss(torch.autograd.Function):
    """Weighted KL to the target's distribution per step; the forward pass makes the gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        steps: Tensor,
        true: Tensor,
        teacher_head: Tensor,
        student_head: Tensor,
        scales: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Map steps [K, R, h], true [R, H], heads [V, h], [V, H], scales [K] to (loss, KL [K])."""
        grads, kl = torch.empty_like(steps), torch.zeros(len(steps))
        learn = student_head.requires_grad
        dhead = torch.zeros_like(student_head) if learn else None
        for i in range(0, true.shape[0], 512):
            part = slice(i, i + 512)
            teacher = true[part] @ teacher_head.T
            for k in range(len(steps)):
                logits = steps[k, part] @ student_head.T
                loss, grad = distil_rows(logits, teacher, scales[k])
                grads[k, part] = grad @ student_head
                kl[k] += loss.sum()
                if dhead is not None:
                    dhead += grad.T @ steps[k, part]
        ctx.save_for_backward(grads, dhead)
        ctx.mark_non_differentiable(kl)
        return (kl * scales).sum(), kl / max(len(true), 1)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor) -> tuple[Tensor | None, ...]:
        """Return the prepared gradient; the loss is the root, so the outer gradient is 1."""
        grads, dhead = ctx.saved_tensors
        return grads, None, None, dhead, None


class FastEagle(nn.Module):
    """The head with bf16 parameters; the embedding is the target's, frozen."""

    embed: Tensor  # [V, H], a buffer

    def __init__(self, embed: Tensor, heads: Heads, intermediate: int, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads, size = heads, embed.shape[1]
        h, g, d = heads

        def matrix(rows: int, columns: int, scale: float) -> nn.Parameter:
            return nn.Parameter((torch.randn(rows, columns) * scale).bfloat16())

        self.register_buffer("embed", embed)
        fc = torch.cat((torch.zeros(size, size), torch.eye(size)), dim=1)
        self.weights = nn.ParameterList([
            nn.Parameter(fc.bfloat16()),
            nn.Parameter(torch.zeros(size, dtype=torch.bfloat16)),
            matrix((h + 2 * g) * d, size, size**-0.5),
            matrix(size, h * d, 0.0),
            matrix(2 * intermediate, size, size**-0.5),
            matrix(size, intermediate, 0.0),
            nn.Parameter(torch.ones(size, dtype=torch.bfloat16)),
        ])  # fmt: skip
        self.step = torch.compile(draft_step, dynamic=False)

    def unroll(
        self, tokens: Tensor, features: Tensor, rope: Rope, sees: Tensor, starts: Tensor, steps: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Run `unroll` with this head; tokens [B, T] are one ahead of features [B, T, H]."""
        embedded = F.embedding(tokens, self.embed)
        layer = (self.step, list(self.weights), self.heads)
        return unroll(layer, embedded, features, rope, sees, starts, steps)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors under the names of the public EAGLE-1 checkpoints."""
        h, g, d = self.heads
        fc, bias, qkv, o, gate_up, down, norm2 = list(self.weights)
        attention, mlp = "layers.0.self_attn.", "layers.0.mlp."
        named = {"embed_tokens.weight": self.embed, "fc.weight": fc, "fc.bias": bias}
        for name, part in zip("qkv", qkv.split((h * d, g * d, g * d)), strict=True):
            named[f"{attention}{name}_proj.weight"] = part
        named[attention + "o_proj.weight"] = o
        for name, part in zip(("gate", "up"), gate_up.chunk(2), strict=True):
            named[f"{mlp}{name}_proj.weight"] = part
        named[mlp + "down_proj.weight"] = down
        named["layers.0.post_attention_layernorm.weight"] = norm2
        return {name: t.detach().clone().contiguous() for name, t in named.items()}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load an exported head; the inverse of `tensors`.

        Raises KeyError if a tensor is missing.
        """
        fc, bias, qkv, o, gate_up, down, norm2 = list(self.weights)
        fc.copy_(tensors["fc.weight"])
        bias.copy_(tensors["fc.bias"])
        load_layer((qkv, o, gate_up, down, norm2), tensors, "layers.0.")
