"""Initialises an EAGLE-3 head from a trained EAGLE-1 head of the same target.

An EAGLE-1 head mixes the newest token and the hidden state before its layer: x0 = A e + B f + b. In
an EAGLE-3 layer, only attention sees the token. So the new head has the old one's attention heads,
over the normed token and hidden state, and as many again that attend to their own row and add the
missing part of x0 to the residual stream; from there on it computes the same as the old one. `fc`
takes the last layer's output as the target's last norm would scale it. Least squares make up for
what the norms remove. The low and the middle hidden state begin with weight 0.

Shapes: B blocks, T rows, n rows of all blocks, H hidden, h query heads, d head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from flowspec.training.fast_eagle import FastEagle, Heads
from flowspec.training.fast_eagle3 import EPS, FastEagle3
from flowspec.training.fast_llama import FastLlama, document_bias, rope_table
from flowspec.training.train_drafters import same_sample

OWN_SCORE = 30.0  # a row's attention score for itself; other rows have 0, give or take 4


def doubled(heads: Heads) -> Heads:
    """Return the heads of an EAGLE-3 head that starts as an EAGLE-1 head of `heads`."""
    return 2 * heads[0], 2 * heads[1], heads[2]


@torch.no_grad()
def begin_as(head: FastEagle3, old: FastEagle, target: FastLlama, blocks: Tensor) -> None:
    """Fill `head` from the old head, so that it drafts the same.

    It must have `doubled` heads and the target's last layer as its highest hidden state. blocks [B,
    T+1] are tokens of samples, used to fit what the norms remove.
    """
    h, g, d = old.heads
    fc, bias, qkv, o, gate_up, down, norm2 = (weight.float() for weight in old.weights)
    size = len(fc)
    assert (head.heads, h * d, g * d) == (doubled(old.heads), size, size), (head.heads, old.heads)
    inputs = blocks[:, :-1]
    last = (target.shape.num_layers - 1,)
    raw, final = target.features(inputs, document_bias(inputs), last).split(size, dim=-1)
    embedded = F.embedding(blocks[:, 1:], target.embed)
    scale = target.norm.float() / raw.float().square().mean(-1).sqrt().mean()
    guessed = guess(old, blocks, final, target)
    # Rows of a first draft step, over true hidden states, and of a second, over the head's own.
    e = torch.cat((embedded, embedded[:, 1:]), dim=1).float().flatten(0, 1)
    f = torch.cat((final, guessed[:, :-1]), dim=1).float().flatten(0, 1)
    feature = torch.cat((raw * scale, guessed[:, :-1]), dim=1).flatten(0, 1)
    x0 = F.linear(torch.cat((e, f), dim=-1), fc, bias)
    both = torch.cat((unit(e), unit(feature)), dim=-1)
    q, k, v = (F.linear(fit(both, x0).T, part).T for part in qkv.split((h * d, g * d, g * d)))
    own = torch.cat((torch.zeros(d, size), spread(unit(feature), d)), dim=1)
    own = (own * (OWN_SCORE / d**0.5) ** 0.5).repeat(h, 1)
    head.fc.copy_(torch.cat((torch.zeros(size, 2 * size), scale.diag()), dim=1))
    head.norm.fill_(float(feature.square().mean(-1).sqrt().mean()))
    head.lm_head.copy_(target.head[head.ids])
    new = list(head.layer)
    new[0].copy_(torch.cat((q, own, k, own, v, fit(both, x0 - feature))))
    new[1].copy_(torch.cat((o, torch.eye(size)), dim=1))
    new[2].copy_(gate_up)
    new[3].copy_(down)
    new[4].fill_(1.0)
    new[5].fill_(1.0)
    new[6].copy_(norm2)


def guess(old: FastEagle, blocks: Tensor, final: Tensor, target: FastLlama) -> Tensor:
    """Return the old head's hidden states [B, T, H] after its first step over the target's."""
    length = final.shape[1]
    sees = same_sample(blocks[:, :-1]) & torch.ones(length, length, dtype=torch.bool).tril()
    nowhere = torch.zeros(len(blocks), 1, dtype=torch.long)
    rope = rope_table(target.shape, length)
    return old.unroll(blocks[:, 1:], final, rope, sees, nowhere, 1)[0]


def unit(rows: Tensor) -> Tensor:
    """Divide rows [n, H] by their root mean squares, as an RMSNorm of weight 1 does."""
    return rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + EPS)


def fit(inputs: Tensor, outputs: Tensor) -> Tensor:
    """Return the matrix [H, k] that best maps inputs [n, k] to outputs [n, H] (least squares)."""
    gram = inputs.T @ inputs
    ridge = 1e-4 * gram.diagonal().mean() * torch.eye(len(gram))
    return torch.linalg.solve(gram + ridge, inputs.T @ outputs).T


def spread(rows: Tensor, d: int) -> Tensor:
    """Return the matrix [d, H] that maps rows [n, H] to d uncorrelated numbers of mean square 1.

    So a row's product with itself is d, and with another row near 0. The strongest direction is
    left out, because all rows share it.
    """
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    chosen = slice(-d - 1, -1)
    return (vectors[:, chosen] / values[chosen].sqrt()).T
