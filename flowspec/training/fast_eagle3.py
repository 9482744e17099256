"""EAGLE-3 head (arXiv 2503.01840) in a form that trains fast, unrolled over draft steps.

It is unrolled as the EAGLE-1 head is. The hidden states of step 1 are three of the target's through
`fc`; those of later steps are the output of the step before, before the last norm. The head's
lm_head covers only the draft vocabulary.

Shapes: B blocks, T rows, C starts a block, H hidden, D draft vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flowspec.training import corpus
from flowspec.training.fast_eagle import Heads, Rope, draft_attention, load_layer, unroll
from flowspec.training.fast_llama import FastLlama, norm, rotate

EPS = 1e-5


def draft_step(
    embedded: Tensor, feature: Tensor, w: list[Tensor], rope: Rope,
    drafted: tuple[list[Tensor], list[Tensor]], bias: Tensor, heads: Heads,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Run a step over n rows a block; return outputs [B, n, H] and keys, values [B, n, g, d]."""
    h, g, d = heads
    qkv, o, gate_up, down, hidden_norm, input_norm, norm2 = w
    both = torch.cat((norm(embedded, input_norm, EPS), norm(feature, hidden_norm, EPS)), dim=-1)
    rows = F.linear(both, qkv).unflatten(-1, (h + 2 * g, d))
    q, k, v = rows.split((h, g, g), dim=-2)
    q, k = rotate(q, *rope), rotate(k, *rope)
    keys, values = drafted
    x = feature + F.linear(draft_attention(q, [*keys, k], [*values, v], bias), o)
    gate, up = F.linear(norm(x, norm2, EPS), gate_up).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down), k, v


def draft_vocabulary(samples: Sequence[corpus.Sample], vocab_size: int, size: int) -> Tensor:
    """Return the `size` most frequent tokens of the answers, ascending [D]."""
    answers = np.concatenate([ids[start:] for ids, start in samples])
    counts = np.bincount(answers, minlength=vocab_size)
    return torch.from_numpy(np.sort(np.argsort(-counts, kind="stable")[:size]))


def vocabulary(tensors: dict[str, Tensor]) -> Tensor:
    """Return the draft vocabulary's tokens [D] of an exported head."""
    return torch.arange(len(tensors["d2t"])) + tensors["d2t"]


class FastEagle3(nn.Module):
    """The head for `target` with bf16 parameters; `ids` [D] are the draft vocabulary's tokens."""

    embed: Tensor  # [V, H], a buffer

    def __init__(
        self, target: FastLlama, ids: Tensor, heads: Heads, intermediate: int, seed: int = 1
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.heads, self.ids = heads, ids
        size = target.shape.hidden_size
        h, g, d = heads

        def matrix(rows: int, columns: int, scale: float) -> nn.Parameter:
            return nn.Parameter((torch.randn(rows, columns) * scale).bfloat16())

        def ones() -> nn.Parameter:
            return nn.Parameter(torch.ones(size, dtype=torch.bfloat16))

        self.register_buffer("embed", target.embed.detach())
        # The head starts as the target's last norm and lm_head on the highest hidden state.
        start = torch.cat((torch.zeros(size, 2 * size), torch.eye(size)), dim=1)
        self.fc = nn.Parameter(start.bfloat16())
        self.norm = nn.Parameter(target.norm.detach().clone())
        self.lm_head = nn.Parameter(target.head.detach()[ids].clone())
        self.layer = nn.ParameterList([
            matrix((h + 2 * g) * d, 2 * size, (2 * size) ** -0.5),
            matrix(size, h * d, 0.0),
            matrix(2 * intermediate, size, size**-0.5),
            matrix(size, intermediate, 0.0),
            ones(), ones(), ones(),
        ])  # fmt: skip
        self.step = torch.compile(draft_step, dynamic=False)

    def unroll(
        self, tokens: Tensor, features: Tensor, rope: Rope, sees: Tensor, starts: Tensor, steps: int
    ) -> tuple[Tensor, list[Tensor]]:
        """Run `unroll` with this head; tokens [B, T] are one ahead of features [B, T, 3*H]."""
        embedded, fused = F.embedding(tokens, self.embed), F.linear(features, self.fc)
        layer = (self.step, list(self.layer), self.heads)
        return unroll(layer, embedded, fused, rope, sees, starts, steps)

    def states(self, outputs: Tensor) -> Tensor:
        """Return the input of lm_head for the outputs [..., H]."""
        return norm(outputs, self.norm, EPS)

    def tensors(self, vocab_size: int) -> dict[str, Tensor]:
        """Return the tensors under official EAGLE-3 checkpoints' names, without the embedding."""
        h, g, d = self.heads
        qkv, o, gate_up, down, hidden_norm, input_norm, norm2 = list(self.layer)
        attention, mlp = "midlayer.self_attn.", "midlayer.mlp."
        named = {"fc.weight": self.fc, "norm.weight": self.norm, "lm_head.weight": self.lm_head}
        for name, part in zip("qkv", qkv.split((h * d, g * d, g * d)), strict=True):
            named[f"{attention}{name}_proj.weight"] = part
        named[attention + "o_proj.weight"] = o
        for name, part in zip(("gate", "up"), gate_up.chunk(2), strict=True):
            named[f"{mlp}{name}_proj.weight"] = part
        named[mlp + "down_proj.weight"] = down
        named["midlayer.hidden_norm.weight"] = hidden_norm
        named["midlayer.input_layernorm.weight"] = input_norm
        named["midlayer.post_attention_layernorm.weight"] = norm2
        known = torch.zeros(vocab_size, dtype=torch.bool)
        known[self.ids] = True
        offsets = self.ids - torch.arange(len(self.ids))
        floats = {name: t.detach().clone().contiguous() for name, t in named.items()}
        return {**floats, "d2t": offsets, "t2d": known}

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Load an exported head of this draft vocabulary; the inverse of `tensors`."""
        qkv, o, gate_up, down, hidden_norm, input_norm, norm2 = list(self.layer)
        assert torch.equal(vocabulary(tensors), self.ids), "another draft vocabulary"
        self.fc.copy_(tensors["fc.weight"])
        self.norm.copy_(tensors["norm.weight"])
        self.lm_head.copy_(tensors["lm_head.weight"])
        hidden_norm.copy_(tensors["midlayer.hidden_norm.weight"])
        input_norm.copy_(tensors["midlayer.input_layernorm.weight"])
        load_layer((qkv, o, gate_up, down, norm2), tensors, "midlayer.")
