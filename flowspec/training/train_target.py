"""Trains the demo target: warm-up, stable, decay over a time budget; long blocks at the end."""

from __future__ import annotations

import json
import logging
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from flowspec.training import corpus
from flowspec.training.fast_llama import FastLlama, HeadLoss, Shape, document_bias, parameters_of
from flowspec.training.optim import MuonAdam, Slot

logger = logging.getLogger("train_demo")
TOKENS_PER_MICRO = 4096
SHORT, LONG = 256, 1536


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """Length of the training, and its phases in shares of the budget."""

    minutes: float
    warmup: float = 0.02
    decay_from: float = 0.50
    long_from: float = 0.80
    long_every: int = 3  # one step in this many uses long blocks in that phase
    micro_per_step: int = 2
    question_share: float = 0.25
    eos_weight: float = 1.5

    def block(self, progress: float, step: int) -> int:
        """Return the block length of a step."""
        long = progress >= self.long_from and step % self.long_every == 0
        return LONG if long else SHORT

    def factor(self, progress: float) -> float:
        """Return the learning-rate factor at `progress` from 0 to 1."""
        if progress < self.warmup:
            return max(0.02, progress / self.warmup)
        if progress < self.decay_from:
            return 1.0
        return max(0.02, (1.0 - progress) / (1.0 - self.decay_from))


def make_optimizer(model: FastLlama) -> MuonAdam:
    """Return Muon for the layers' matrices, AdamW for embedding, head and norms."""
    shape = model.shape
    rows = shape.num_kv_heads * shape.head_dim
    inner = shape.intermediate_size
    slots = [
        Slot(model.embed, 0.01, "adam"),
        Slot(model.head, 0.004, "adam", decay=0.01),
        Slot(model.norm, 0.005, "adam"),
    ]
    for layer in model.layers:
        qkv, o, gate_up, down, norm1, norm2 = parameters_of(layer)
        slots += [
            Slot(qkv, 0.02, "muon", (shape.num_heads * shape.head_dim, rows, rows), 0.1),
            Slot(o, 0.02, "muon", (), 0.1),
            Slot(gate_up, 0.02, "muon", (inner, inner), 0.1),
            Slot(down, 0.02, "muon", (), 0.1),
            Slot(norm1, 0.005, "adam"),
            Slot(norm2, 0.005, "adam"),
        ]
    return MuonAdam(slots)


class TokenBatches:
    """Endless micro-batches of one block length over the mix; its state is (pass, row)."""

    def __init__(self, sets: dict[str, list[corpus.Sample]], block: int) -> None:
        self.sets = corpus.that_fit(sets, block)
        self.number, self.row, self.block = 0, 0, block
        self._packed: tuple[int, Any] | None = None

    def next(self) -> tuple[Tensor, Tensor]:
        """Return tokens and weights [B, T+1] of the next micro-batch."""
        size = TOKENS_PER_MICRO // self.block
        while True:
            if self._packed is None or self._packed[0] != self.number:
                rng = random.Random(1000 * self.block + self.number)
                samples = corpus.one_pass(self.sets, rng)
                self._packed = (self.number, corpus.pack(samples, self.block, 0.5, rng))
            tokens, weights = self._packed[1]
            if self.row + size <= len(tokens):
                break
            self.number, self.row = self.number + 1, 0
        part = slice(self.row, self.row + size)
        self.row += size
        return (
            torch.from_numpy(tokens[part].astype(np.int64)),
            torch.from_numpy(weights[part].astype(np.float32)),
        )


def micro_step(model: FastLlama, tokens: Tensor, weights: Tensor, plan: TargetPlan) -> float:
    """Accumulate gradients of one micro-batch; return the mean loss per answer token in nats."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:].reshape(-1)
    w = weights[:, 1:].reshape(-1).clone()
    w[targets == corpus.EOS] *= plan.eos_weight
    # Question tokens rarely enter the loss; rows that are not chosen need no head product.
    keep = (w >= 0.9) | ((w > 0) & (torch.rand(len(w)) < plan.question_share))
    rows = keep.nonzero()[:, 0]
    # Few distinct sizes avoid fragmenting the C heap; padding rows have weight 0.
    rows = torch.nn.functional.pad(rows, (0, -len(rows) % 1024))
    padding = torch.arange(len(rows)) >= int(keep.sum())
    row_weights = w[rows].masked_fill(padding, 0.0)
    x = model.features(inputs, document_bias(inputs)).reshape(-1, model.shape.hidden_size)
    scale = 1.0 / (TOKENS_PER_MICRO * 0.6 * plan.micro_per_step)
    loss, losses = HeadLoss.apply(x[rows], model.head, targets[rows], row_weights * scale)
    loss.backward()
    answers = row_weights >= 0.9
    return float(losses[answers].mean())


@torch.no_grad()
def held_out(
    model: FastLlama, sets: dict[str, list[corpus.Sample]], block: int
) -> dict[str, float]:
    """Return the loss per answer token of each held-out set."""
    result = {}
    size = TOKENS_PER_MICRO // block
    for name, samples in sets.items():
        rows, weights = corpus.pack(samples, block, 0.0, random.Random(0))
        total, count = 0.0, 0.0
        for i in range(0, min(len(rows), 3 * size), size):
            tokens = torch.zeros(size, block + 1, dtype=torch.int64)
            w = torch.zeros(size, block + 1)
            part = rows[i : i + size]
            tokens[: len(part)] = torch.from_numpy(part.astype(np.int64))
            w[: len(part)] = torch.from_numpy(weights[i : i + size].astype(np.float32))
            inputs = tokens[:, :-1]
            x = model.features(inputs, document_bias(inputs))
            keep = w[:, 1:] > 0
            if not bool(keep.any()):
                continue
            logits = (x[keep] @ model.head.T).float()
            nll = torch.nn.functional.cross_entropy(logits, tokens[:, 1:][keep], reduction="sum")
            total, count = total + float(nll), count + float(keep.sum())
        if count:
            result[name] = round(total / count, 3)
    return result


def export(model: FastLlama, tokenizer_dir: Path, folder: Path) -> None:
    """Write the Hugging Face folder of the model with its tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    config = json.dumps(model.hf_config(), indent=1) + "\n"
    (folder / "config.json").write_text(config)
    generation = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "do_sample": False}
    (folder / "generation_config.json").write_text(json.dumps(generation) + "\n")
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((tokenizer_dir / name).read_bytes())
    save_file(model.hf_tensors(), folder / "model.safetensors", metadata={"format": "pt"})


def save_atomic(state: dict[str, Any], path: Path) -> None:
    """Write a checkpoint so that a crash leaves the old one intact."""
    temporary = path.with_suffix(".tmp")
    torch.save(state, temporary)
    os.replace(temporary, path)


def timed_steps(plan: TargetPlan, elapsed: float) -> Iterator[tuple[float, float]]:
    """Yield (seconds trained so far, share of the budget) until the budget is spent."""
    begin = time.monotonic() - elapsed
    while (spent := time.monotonic() - begin) < plan.minutes * 60:
        yield spent, spent / (plan.minutes * 60)


def train(
    train_sets: dict[str, list[corpus.Sample]],
    val_sets: dict[str, list[corpus.Sample]],
    *,
    shape: Shape,
    plan: TargetPlan,
    checkpoint: Path,
    save_every_s: float = 240.0,
) -> FastLlama:
    """Train or resume until the plan's minutes are spent."""
    model = FastLlama(shape)
    optimizer = make_optimizer(model)
    streams = {block: TokenBatches(train_sets, block) for block in (SHORT, LONG)}
    elapsed, seen = 0.0, 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        optimizer.load(state["optimizer"])
        for block, where in state["streams"].items():
            streams[block].number, streams[block].row = where
        elapsed, seen = state["elapsed"], state["seen"]
        logger.info("resumed at %.1f min, %.2f M tokens", elapsed / 60, seen / 1e6)
    saved, recent, tick, tick_seen = time.monotonic(), [], time.monotonic(), seen

    def save(spent: float) -> None:
        where = {block: (s.number, s.row) for block, s in streams.items()}
        done = {"shape": model.describe(), "elapsed": spent, "seen": seen, "streams": where}
        save_atomic(done | {"optimizer": optimizer.state()}, checkpoint)
        logger.info("held out: %s", held_out(model, val_sets, LONG))

    for spent, progress in timed_steps(plan, elapsed):
        block = plan.block(progress, optimizer.steps)
        for _ in range(plan.micro_per_step):
            recent.append(micro_step(model, *streams[block].next(), plan))
            seen += TOKENS_PER_MICRO // block * block
        optimizer.step(plan.factor(progress))
        if optimizer.steps % 50 == 0:
            rate = (seen - tick_seen) / (time.monotonic() - tick)
            mean = sum(recent) / len(recent)
            logger.info("%5.1f min %6.2f M tokens pass %d loss %.3f %.0f tok/s",
                        spent / 60, seen / 1e6, streams[SHORT].number, mean, rate)  # fmt: skip
            recent, tick, tick_seen = [], time.monotonic(), seen
        if time.monotonic() - saved > save_every_s:
            save(spent)
            saved = time.monotonic()
    save(plan.minutes * 60)
    return model


def load_sets(
    tokenizer: Tokenizer, folder: Path, split: str, max_tokens: int
) -> dict[str, list[corpus.Sample]]:
    """Return the tokenised samples of the mix."""
    return corpus.encode_sets(tokenizer, corpus.load_pairs(folder, split), max_tokens)
