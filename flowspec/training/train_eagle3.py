"""Trains the EAGLE-3 head on the target's own generations, unrolled over several draft steps.

The shapes are those of train_drafters.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowspec.training import corpus
from flowspec.training.eagle3_from_eagle import begin_as, doubled
from flowspec.training.fast_eagle import FastEagle
from flowspec.training.fast_eagle3 import FastEagle3, draft_vocabulary, vocabulary
from flowspec.training.fast_llama import FastLlama
from flowspec.training.optim import MuonAdam, Slot
from flowspec.training.train_drafters import (
    Batch,
    Blocks,
    HeadPlan,
    Job,
    Outcome,
    distil,
    make_blocks,
    run,
    unrolled,
)

logger = logging.getLogger("train_demo")
INTERMEDIATE = 1408  # as in the EAGLE-1 head
FITTED = 64  # short blocks used to fit a head's first weights
LENGTHS = {384: 3, 1152: 1}  # small micro-batches: many steps in little time


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3TrainingPlan(HeadPlan):
    """How to train the EAGLE-3 head, and for how long."""

    layers: tuple[int, ...]  # layers whose outputs the head reads, low to high
    draft_vocab: int
    steps: int = 7
    eagle: Path | None = None  # folder of an EAGLE-1 head to start as, if there is no `init`


def default_layers(num_layers: int) -> tuple[int, int, int]:
    """Return layers 1, L/2-1 and the last.

    The official choice uses L-4 for the last; in a model this shallow, that would be the middle.
    """
    return (1, num_layers // 2 - 1, num_layers - 1)


def eagle3_loss(head: FastEagle3, target: FastLlama, batch: Batch, steps: int) -> Outcome:
    """Return the KL to the target's distribution over the draft vocabulary."""
    outputs, truths = unrolled(head, target, batch, steps)
    states = [head.states(out) for out in outputs]
    loss, kl = distil(states, truths, head.lm_head, target.head.detach()[head.ids])
    return loss, kl, states, truths


def make_optimizer(head: FastEagle3) -> MuonAdam:
    """Return Muon for the layer's matrices, AdamW for lm_head and norms."""
    qkv, o, gate_up, down, *norms = list(head.layer)
    h, g, d = head.heads
    inner = down.shape[1]
    return MuonAdam([
        Slot(head.fc, 0.02, "muon"),
        Slot(qkv, 0.02, "muon", (h * d, g * d, g * d)), Slot(o, 0.02, "muon"),
        Slot(gate_up, 0.02, "muon", (inner, inner)), Slot(down, 0.02, "muon"),
        Slot(head.lm_head, 0.001, "adam"),
        *(Slot(weight, 0.002, "adam") for weight in (*norms, head.norm)),
    ])  # fmt: skip


def exported(target: FastLlama, tensors: dict[str, Tensor]) -> FastEagle3:
    """Rebuild an exported head; it keeps its vocabulary for any new training text."""
    size = target.shape.head_dim
    num_heads = len(tensors["midlayer.self_attn.q_proj.weight"]) // size
    head = FastEagle3(target, vocabulary(tensors), (num_heads, num_heads, size), INTERMEDIATE)
    head.load(tensors)
    return head


def new_head(target: FastLlama, ids: Tensor, plan: Eagle3TrainingPlan, short: Blocks) -> FastEagle3:
    """Make a head that starts as the plan's EAGLE-1 head or, without it, the target's lm_head."""
    heads = (target.shape.num_heads, target.shape.num_heads, target.shape.head_dim)
    logger.info("eagle3 starts as %s", plan.eagle or "the target's lm_head on its last feature")
    if plan.eagle is None:
        return FastEagle3(target, ids, heads, INTERMEDIATE)
    old = FastEagle(target.embed.detach(), heads, INTERMEDIATE)
    old.load(load_file(plan.eagle / "model.safetensors"))
    head = FastEagle3(target, ids, doubled(heads), INTERMEDIATE)
    begin_as(head, old, target, torch.from_numpy(short.tokens[:FITTED].astype(np.int64)))
    return head


def train(
    target: FastLlama,
    samples: list[corpus.Sample],
    held_out: list[corpus.Sample],
    plan: Eagle3TrainingPlan,
) -> tuple[FastEagle3, dict[str, Any]]:
    """Train the head; return it and its held-out figures. A snapshot lies beside the checkpoint."""
    blocks, tests = (make_blocks(x, 0, plan.layers, LENGTHS) for x in (samples, held_out))
    before = plan.checkpoint.with_suffix("") if plan.checkpoint.exists() else plan.init
    if before:
        head = exported(target, load_file(before / "model.safetensors"))
    else:
        ids = draft_vocabulary(samples, target.shape.vocab_size, plan.draft_vocab)
        head = new_head(target, ids, plan, blocks[0])
    covered = np.isin(np.concatenate([x[start:] for x, start in samples]), head.ids).mean()

    def loss(batch: Batch) -> Outcome:
        return eagle3_loss(head, target, batch, plan.steps)

    def snapshot() -> None:
        export(head, target, plan, plan.checkpoint.with_suffix(""))

    job = Job("eagle3", loss, target, head.lm_head, blocks, tests, plan.minutes, plan.checkpoint,
              head.ids, plan.rate, snapshot=snapshot)  # fmt: skip
    figures = run(job, make_optimizer(head))
    return head, figures | {"layers": plan.layers, "covered": float(covered)}


def export(head: FastEagle3, target: FastLlama, plan: Eagle3TrainingPlan, folder: Path) -> None:
    """Write the head in the official EAGLE-3 layout; the embedding is the target's."""
    folder.mkdir(parents=True, exist_ok=True)
    h, g, d = head.heads
    config = target.hf_config() | {
        "architectures": ["LlamaForCausalLMEagle3"], "num_hidden_layers": 1,
        "num_attention_heads": h, "num_key_value_heads": g, "head_dim": d,
        "intermediate_size": INTERMEDIATE, "draft_vocab_size": len(head.ids),
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": list(plan.layers)},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    tensors = head.tensors(target.shape.vocab_size)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
