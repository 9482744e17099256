"""Trains the EAGLE head and the small draft model on the target's own generations.

Shapes: N blocks, B blocks of a micro-batch, T rows, C starts of drafts in a block, H hidden, K
unrolled steps, R rows in the loss.
"""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from flowspec.training import corpus
from flowspec.training.fast_eagle import DistilLoss, FastEagle
from flowspec.training.fast_eagle3 import FastEagle3
from flowspec.training.fast_llama import FastLlama, document_bias, rope_table
from flowspec.training.optim import MuonAdam, Slot
from flowspec.training.train_target import make_optimizer, save_atomic

logger = logging.getLogger("train_demo")
# tokens [B, T+1], answers [B, T+1], hidden states [B, T, H] or [B, T, (n+1)*H] with n layers
Batch = tuple[Tensor, Tensor, Tensor]
# loss, KL [K], and for each of the K steps outputs [R, H] and true hidden states [R, H]
Outcome = tuple[Tensor, Tensor, Sequence[Tensor], Sequence[Tensor]]
LENGTHS = {384: 5, 1152: 2}  # rows of a block (short and long): blocks of a micro-batch
STARTS = 64  # rows of a block that drafts begin at
DECAY = 0.9  # weight of each step's loss relative to that of the step before
CACHED_ROWS = 1_000_000  # rows whose hidden states are kept for the next pass
REPORTED = 4  # held-out micro-batches of each length
SAVE_EVERY_S = 330.0


@dataclass
class Blocks:
    """Packed samples of one length with the target's hidden states; some are kept in bf16."""

    length: int
    tokens: NDArray[np.uint16]
    answer: NDArray[np.bool_]
    per_batch: int
    layers: tuple[int, ...] = ()  # layers whose outputs come before the final hidden states
    features: dict[int, Tensor] = field(default_factory=dict)

    def batch(self, target: FastLlama, start: int) -> Batch:
        """Return the micro-batch that starts at block `start`."""
        part = slice(start, start + self.per_batch)
        tokens = torch.from_numpy(self.tokens[part].astype(np.int64))
        features = self.features.get(start)
        if features is None:
            inputs = tokens[:, :-1]
            with torch.no_grad():
                features = target.features(inputs, document_bias(inputs), self.layers)
            if len(self.features) * inputs.numel() < CACHED_ROWS:
                self.features[start] = features
        return tokens, torch.from_numpy(self.answer[part]), features


def make_blocks(
    samples: list[corpus.Sample],
    seed: int,
    layers: tuple[int, ...] = (),
    lengths: dict[int, int] = LENGTHS,
) -> list[Blocks]:
    """Pack short samples into short blocks, long ones into long blocks; full micro-batches only."""
    short, long = lengths
    rng = random.Random(seed)
    result = []
    for length, chosen in (
        (short, [s for s in samples if len(s[0]) <= short + 1]),
        (long, [s for s in samples if len(s[0]) > short + 1]),
    ):
        rng.shuffle(chosen)
        tokens, weights = corpus.pack(chosen, length, 0.5, rng)
        whole = len(tokens) // lengths[length] * lengths[length]
        result.append(
            Blocks(length, tokens[:whole], weights[:whole] > 0.9, lengths[length], layers)
        )
    return result


def endless(blocks: list[Blocks], skip: int) -> Iterator[tuple[Blocks, int]]:
    """Yield micro-batches endlessly, in a new order each pass."""
    places = [(b, i) for b in blocks for i in range(0, len(b.tokens), b.per_batch)]
    number = 0
    while True:
        random.Random(number).shuffle(places)
        for place in places:
            skip -= 1
            if skip < 0:
                yield place
        number += 1


def chosen_rows(mask: Tensor) -> tuple[Tensor, int]:
    """Return indices of true entries, padded by repeats to a multiple of 512, and their count."""
    rows = mask.reshape(-1).nonzero()[:, 0]
    count = len(rows)
    return torch.cat((rows, rows[: -count % 512])), count


def same_sample(tokens: Tensor) -> Tensor:
    """Return [B, T, T], true where two positions belong to one sample."""
    document = (tokens == corpus.BOS).cumsum(-1)
    return document[:, :, None] == document[:, None, :]


def choose_starts(tokens: Tensor, answer: Tensor, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Return start rows [B, C] of drafts, and whether each step's row is in an answer [K, B, C].

    tokens and answer are [B, T+1]; a block that comes again gets other rows.
    """
    length = tokens.shape[1] - 1
    fits = answer[:, 2 : length - steps + 2]  # row i predicts token i+2
    starts = (torch.rand(fits.shape) * fits).topk(count, dim=-1).indices
    document = (tokens == corpus.BOS).cumsum(-1)
    guessed = [starts + 2 + k for k in range(steps)]
    own = document.gather(1, starts)
    counts = [answer.gather(1, i) & (document.gather(1, i) == own) for i in guessed]
    return starts, torch.stack(counts)


def unrolled(
    head: FastEagle | FastEagle3, target: FastLlama, batch: Batch, steps: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Return each step's outputs [R, H] on answers, and the true hidden states [R, H]."""
    tokens, answer, features = batch
    size, length = target.shape.hidden_size, features.shape[1]
    final = features[..., -size:]
    inputs = features[..., :-size] if features.shape[-1] > size else final
    starts, counts = choose_starts(tokens, answer, min(STARTS, length // 6), steps)
    sees = same_sample(tokens[:, :-1]) & torch.ones(length, length, dtype=torch.bool).tril()
    rope = rope_table(target.shape, length)
    first, chains = head.unroll(tokens[:, 1:], inputs, rope, sees, starts, steps)
    # Row i predicts hidden state i+1 and so token i+2; the last row has no truth in this block.
    mask = torch.zeros_like(answer[:, 1:])
    mask[:, :-1] = answer[:, 2:]
    truths, outputs = [final[:, 1:][mask[:, :-1]]], [first[mask]]
    batch_index = torch.arange(len(starts))[:, None]
    for k, out in enumerate(chains, start=1):
        outputs.append(out[counts[k]])
        truths.append(final[batch_index, starts + 1 + k][counts[k]])
    return outputs, truths


def distil(
    states: list[Tensor], truths: list[Tensor], student: Tensor, teacher: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the sum over the steps of DECAY^k times the mean KL, and the mean KL [K].

    States and truths are [R, H] for each step; `student` and `teacher` [D, H] map them to logits.
    """
    loss = torch.zeros(())
    kl: list[Tensor] = []
    for k, (state, true) in enumerate(zip(states, truths, strict=True)):
        scale = DECAY**k / max(len(state), 1) * torch.ones(1)
        part, each = DistilLoss.apply(state[None], true, teacher, student, scale)
        loss, kl = loss + part, [*kl, each]
    return loss, torch.cat(kl)


def eagle_loss(head: FastEagle, target: FastLlama, batch: Batch, steps: int) -> Outcome:
    """Return the KL to the target's distribution plus a tenth of SmoothL1 on the hidden states."""
    outputs, truths = unrolled(head, target, batch, steps)
    loss, kl = distil(outputs, truths, target.head.detach(), target.head.detach())
    for k, (out, true) in enumerate(zip(outputs, truths, strict=True)):
        loss = loss + 0.1 * DECAY**k * F.smooth_l1_loss(out.float(), true.float())
    return loss, kl, outputs, truths


def draft_loss(draft: FastLlama, target: FastLlama, batch: Batch) -> Outcome:
    """Return the loss of one micro-batch, in one step; outputs have the draft model's size."""
    tokens, answer, features = batch
    inputs = tokens[:, :-1]
    x = draft.features(inputs, document_bias(inputs))
    rows, _ = chosen_rows(answer[:, 1:])
    flat = x.reshape(-1, x.shape[-1])[rows][None]
    true = features.reshape(-1, features.shape[-1])[rows]
    scales = torch.full((1,), 1 / 4096.0)
    loss, kl = DistilLoss.apply(flat, true, target.head.detach(), draft.head, scales)
    return loss, kl, list(flat), [true]


def eagle_optimizer(head: FastEagle) -> MuonAdam:
    """Return Muon for the matrices, AdamW for bias and norm."""
    fc, bias, qkv, o, gate_up, down, norm2 = list(head.weights)
    h, g, d = head.heads
    inner = down.shape[1]
    return MuonAdam([
        Slot(fc, 0.02, "muon"), Slot(bias, 0.002, "adam"),
        Slot(qkv, 0.02, "muon", (h * d, g * d, g * d)), Slot(o, 0.02, "muon"),
        Slot(gate_up, 0.02, "muon", (inner, inner)), Slot(down, 0.02, "muon"),
        Slot(norm2, 0.002, "adam"),
    ])  # fmt: skip


Loss = Callable[[Batch], Outcome]


@torch.no_grad()
def agreement(
    outputs: Sequence[Tensor],
    truths: Sequence[Tensor],
    student_head: Tensor,
    teacher_head: Tensor,
    ids: Tensor,
) -> list[float]:
    """Return the share of rows where drafter and target prefer the same token, for every step.

    `ids` [D] are the target's ids of the student's tokens.
    """
    shares = []
    for x, true in zip(outputs, truths, strict=True):
        hits = ids[(x @ student_head.T).argmax(-1)] == (true @ teacher_head.T).argmax(-1)
        shares.append(round(float(hits.float().mean()), 3))
    return shares


@dataclass(frozen=True, slots=True)
class Job:
    """One drafter's training."""

    name: str
    loss_of: Loss
    target: FastLlama
    student_head: Tensor
    blocks: list[Blocks]
    held_out: list[Blocks]
    minutes: float
    checkpoint: Path
    ids: Tensor | None = None  # target's ids of the student's tokens, if those are fewer
    rate: float = 1.0  # factor on the learning rate
    log_every: int = 100
    snapshot: Callable[[], None] = lambda: None  # called after each checkpoint


def run(job: Job, optimizer: MuonAdam) -> dict[str, Any]:
    """Train or resume until the minutes are spent; return the held-out figures."""
    elapsed, number, rows_seen = 0.0, 0, 0
    if job.checkpoint.exists():
        state = torch.load(job.checkpoint, weights_only=True)
        optimizer.load(state["optimizer"])
        elapsed, number, rows_seen = state["elapsed"], state["number"], state["rows"]
        logger.info("%s: resumed at %.1f min", job.name, elapsed / 60)
    begin, saved = time.monotonic() - elapsed, time.monotonic()
    recent: list[Tensor] = []
    budget = job.minutes * 60

    def save(spent: float) -> dict[str, Any]:
        state = {"elapsed": spent, "number": number, "rows": rows_seen}
        save_atomic(state | {"optimizer": optimizer.state()}, job.checkpoint)
        job.snapshot()
        return report(job)

    for block, start in endless(job.blocks, number):
        spent = time.monotonic() - begin
        if spent >= budget:
            break
        loss, kl, _, truths = job.loss_of(block.batch(job.target, start))
        loss.backward()
        number, rows_seen = number + 1, rows_seen + len(truths[0])
        recent.append(kl)
        # Warm-up over 20 steps, then the full rate for a third of the time, then down to 2 %.
        factor = min(1.0, number / 20, max(0.02, 1.5 * (1 - spent / budget)))
        optimizer.step(job.rate * factor)
        if number % job.log_every == 0:
            kl_text = [round(x, 3) for x in torch.stack(recent).mean(0).tolist()]
            logger.info("%s %5.1f min step %d %.2f M rows KL %s", job.name, spent / 60, number,
                        rows_seen / 1e6, kl_text)  # fmt: skip
            recent = []
        if time.monotonic() - saved > SAVE_EVERY_S:
            save(spent)
            saved = time.monotonic()
    return save(budget) | {"rows": rows_seen, "steps": number}


@torch.no_grad()
def report(job: Job, most: int = REPORTED) -> dict[str, Any]:
    """Return the mean KL and agreement on up to `most` held-out micro-batches of each length."""
    result: dict[str, Any] = {}
    ids = torch.arange(len(job.student_head)) if job.ids is None else job.ids
    with torch.random.fork_rng():
        torch.manual_seed(0)  # drafts begin at the same rows every time
        for block in job.held_out:
            kls, shares = [], []
            for start in range(0, len(block.tokens), block.per_batch)[:most]:
                _, kl, outputs, truths = job.loss_of(block.batch(job.target, start))
                kls.append(kl)
                shares.append(agreement(outputs, truths, job.student_head, job.target.head, ids))
            if kls:
                kl, hits = torch.stack(kls).mean(0), torch.tensor(shares).mean(0)
                result[str(block.length)] = {
                    "kl": [round(x, 3) for x in kl.tolist()],
                    "top1": [round(x, 3) for x in hits.tolist()],
                }
    logger.info("%s held out: %s", job.name, result)
    return result


def export_eagle(head: FastEagle, target: FastLlama, folder: Path) -> None:
    """Write the head in the public EAGLE-1 layout."""
    folder.mkdir(parents=True, exist_ok=True)
    h, g, d = head.heads
    config = target.hf_config() | {
        "num_hidden_layers": 1, "num_attention_heads": h, "num_key_value_heads": g, "head_dim": d,
        "intermediate_size": list(head.weights)[5].shape[1], "bias": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    save_file(head.tensors(), folder / "model.safetensors", metadata={"format": "pt"})


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadPlan:
    """How to train a head, and for how long."""

    minutes: float
    checkpoint: Path
    steps: int = 5
    init: Path | None = None  # folder of an exported head to start from
    rate: float = 1.0  # factor on the learning rate


def train_eagle(
    target: FastLlama, blocks: list[Blocks], held_out: list[Blocks], plan: HeadPlan
) -> tuple[FastEagle, dict[str, Any]]:
    """Train the head; return it and its held-out figures. A snapshot lies beside the checkpoint."""
    s = target.shape
    head = FastEagle(target.embed.detach(), (s.num_heads, s.num_heads, s.head_dim), 1408)
    if plan.init:
        head.load(load_file(plan.init / "model.safetensors"))

    def loss(batch: Batch) -> Outcome:
        return eagle_loss(head, target, batch, plan.steps)

    def snapshot() -> None:
        export_eagle(head, target, plan.checkpoint.with_suffix(""))

    job = Job("eagle", loss, target, target.head, blocks, held_out, plan.minutes, plan.checkpoint,
              rate=plan.rate, snapshot=snapshot)  # fmt: skip
    return head, run(job, eagle_optimizer(head))


def train_draft(
    target: FastLlama, blocks: list[Blocks], held_out: list[Blocks], *,
    shape: Any, minutes: float, checkpoint: Path,
) -> tuple[FastLlama, dict[str, Any]]:  # fmt: skip
    """Train the small draft model, distilled from the target."""
    draft = FastLlama(shape, seed=2)

    def loss(batch: Batch) -> Outcome:
        return draft_loss(draft, target, batch)

    job = Job("draft", loss, target, draft.head, blocks, held_out, minutes, checkpoint)
    return draft, run(job, make_optimizer(draft))
