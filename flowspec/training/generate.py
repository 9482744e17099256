"""Batched generation with the demo target, to make the text that its drafters learn from.

Shapes: N rows, P prompt tokens, S cached positions, h query heads, g key/value heads, d head size.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowspec.bench.records import repeated_share
from flowspec.training import corpus
from flowspec.training.fast_llama import FastLlama, norm, parameters_of, rope_table, rotate

logger = logging.getLogger("train_demo")
ROOM = 60_000  # prompt tokens of a batch, whose attention must fit the memory


class BatchCache:
    """Keys and values [N, g, S, d] of every layer; rows are left-padded."""

    def __init__(self, model: FastLlama, rows: int, capacity: int) -> None:
        s = model.shape
        shape = (s.num_layers, 2, rows, s.num_kv_heads, capacity, s.head_dim)
        self.data = torch.zeros(shape, dtype=torch.bfloat16)
        self.length = 0
        self.rope = rope_table(s, capacity)

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.data = self.data[:, :, rows].contiguous()


@torch.no_grad()
def forward(model: FastLlama, tokens: Tensor, cache: BatchCache, real: Tensor) -> Tensor:
    """Run tokens [N, T] after the cache; return last rows [N, H]. real [N, S+T]: no padding."""
    s, t, start = model.shape, tokens.shape[1], cache.length
    end = start + t
    cos, sin = (table[start:end] for table in cache.rope)
    sees = torch.ones(t, end).tril(start).bool()[None] & real[:, None, :end]
    ratio = s.num_heads // s.num_kv_heads
    bias = torch.where(sees, 0.0, -1e4)[:, None].bfloat16().repeat(1, 1, ratio, 1)
    x = F.embedding(tokens, model.embed)
    for i, layer in enumerate(model.layers):
        qkv, o, gate_up, down, norm1, norm2 = parameters_of(layer)
        rows = F.linear(norm(x, norm1, s.norm_eps), qkv)
        rows = rows.unflatten(-1, (s.num_heads + 2 * s.num_kv_heads, s.head_dim))
        q, k, v = rows.split((s.num_heads, s.num_kv_heads, s.num_kv_heads), dim=-2)
        keys, values = cache.data[i, 0], cache.data[i, 1]
        keys[:, :, start:end] = rotate(k, cos, sin).transpose(1, 2)
        values[:, :, start:end] = v.transpose(1, 2)
        # The query heads of a group are rows over its keys, which is much faster than enable_gqa.
        grouped = rotate(q, cos, sin).unflatten(2, (s.num_kv_heads, -1)).permute(0, 2, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            grouped.flatten(2, 3), keys[:, :, :end], values[:, :, :end], attn_mask=bias
        )
        mixed = mixed.unflatten(2, (-1, t)).flatten(1, 2)
        x = x + F.linear(mixed.transpose(1, 2).flatten(2), o)
        gate, up = F.linear(norm(x, norm2, s.norm_eps), gate_up).chunk(2, dim=-1)
        x = x + F.linear(F.silu(gate) * up, down)
    cache.length = end
    return norm(x[:, -1], model.norm, s.norm_eps)


def choose(logits: Tensor, temperature: Tensor) -> Tensor:
    """Sample [N] from logits [N, V] at temperature [N] by the Gumbel trick; 0 is greedy."""
    warm = temperature > 0
    rows = logits[warm]
    noise = -torch.log(-torch.log(torch.rand_like(rows).clamp_(1e-9, 1 - 1e-7)))
    logits[warm] = rows + noise * temperature[warm, None]
    return logits.argmax(-1)


@torch.no_grad()
def continue_batch(
    model: FastLlama, prompts: Sequence[np.ndarray], temperature: Tensor, max_new: int
) -> list[list[int]]:
    """Return the new tokens of each prompt, up to and including EOS."""
    n, longest = len(prompts), max(len(p) for p in prompts)
    tokens = torch.zeros(n, longest, dtype=torch.int64)
    real = torch.zeros(n, longest + max_new, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, longest - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        real[row, longest - len(prompt) :] = True
    cache = BatchCache(model, n, longest + max_new)
    features = forward(model, tokens, cache, real)
    texts: list[list[int]] = [[] for _ in range(n)]
    alive = torch.arange(n)
    for step in range(max_new):
        chosen = choose((features @ model.head.T).float(), temperature)
        for row, token in zip(alive.tolist(), chosen.tolist(), strict=True):
            if not texts[row] or texts[row][-1] != corpus.EOS:
                texts[row].append(token)
        going = torch.tensor([texts[row][-1] != corpus.EOS for row in alive.tolist()])
        if not bool(going.any()) or step == max_new - 1:
            break
        if float(going.float().mean()) < 0.8:
            rows = going.nonzero()[:, 0]
            cache.keep(rows)
            alive, temperature, real, chosen = (
                alive[rows],
                temperature[rows],
                real[rows],
                chosen[rows],
            )
        features = forward(model, chosen[:, None], cache, real)
    return texts


def self_generate(
    model: FastLlama,
    prompts: Sequence[np.ndarray],
    *,
    answers: int,
    batch: int,
    max_new: int,
    minutes: float,
    seed: int,
) -> list[corpus.Sample]:
    """Generate the target's answers to each prompt: one greedy, the others at T = 1; loops dropped.

    A batch has at most `batch` rows and ROOM tokens. Stops early after `minutes`; batches come in
    random order, so a partial result is a fair sample.
    """
    torch.manual_seed(seed)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    batches: list[list[int]] = [[]]
    for i in order:
        if answers * len(batches[-1]) >= min(batch, ROOM // len(prompts[i])):
            batches.append([])
        batches[-1].append(i)
    random.Random(seed).shuffle(batches)
    samples: list[corpus.Sample] = []
    made, asked, begin = 0, 0, time.monotonic()
    for number, members in enumerate(batches):
        if time.monotonic() - begin > minutes * 60:
            break
        chosen = [prompts[i] for i in members for _ in range(answers)]
        asked += len(chosen)
        temperature = (torch.arange(len(chosen)) % answers > 0).float()
        for prompt, text in zip(
            chosen, continue_batch(model, chosen, temperature, max_new), strict=True
        ):
            made += len(text)
            if repeated_share(text) <= 0.3:
                ids = np.concatenate([prompt, np.array(text, dtype=np.uint16)])
                samples.append((ids, len(prompt)))
        if number % 10 == 0:
            rate = made / (time.monotonic() - begin)
            logger.info("generated %d of %d batches, %d tokens, %.0f tok/s",
                        number + 1, len(batches), made, rate)  # fmt: skip
    logger.info("kept %d of %d samples", len(samples), asked)
    return samples
