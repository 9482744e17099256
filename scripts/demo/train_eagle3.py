"""Train the EAGLE-3 head on the target's own generations, unrolled over several draft steps.

Shapes: B blocks, T rows, C starts of drafts in a block, H hidden, K unrolled steps.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo import corpus
from demo.fast_eagle import DistilLoss
from demo.fast_eagle3 import FastEagle3, draft_vocabulary
from demo.fast_llama import FastLlama, rope_table
from demo.optim import MuonAdam, Slot
from demo.train_drafters import Batch, Job, Outcome, make_blocks, run, same_sample
from safetensors.torch import load_file, save_file
from torch import Tensor

INTERMEDIATE = 1408
DECAY = 0.9  # weight of each step's loss over that of the step before
LENGTHS = {384: 3, 1152: 1}  # small micro-batches: many steps in little time
STARTS_PER = 8  # rows of a block for one that drafts begin at


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to train, and for how long."""

    layers: tuple[int, ...]  # the features: output-of-layer ids, low to high
    draft_vocab: int
    minutes: float
    checkpoint: Path
    steps: int = 7


def default_layers(num_layers: int) -> tuple[int, int, int]:
    """The outputs of layers 1, L/2-1 and the last.

    The official choice has L-4 for the last; of a model this shallow that would be the middle.
    """
    return (1, num_layers // 2 - 1, num_layers - 1)


def choose_starts(tokens: Tensor, answer: Tensor, count: int, steps: int) -> tuple[Tensor, Tensor]:
    """Rows [B, C] at which drafts begin, and whether step k of each guesses its answer [K, B, C].

    tokens and answer are [B, T+1]; a block that comes again gets other rows.
    """
    length = tokens.shape[1] - 1
    fits = answer[:, 2 : length - steps + 2]  # row i guesses token i+2
    starts = (torch.rand(fits.shape) * fits).topk(count, dim=-1).indices
    document = (tokens == corpus.BOS).cumsum(-1)
    guessed = [starts + 2 + k for k in range(steps)]
    own = document.gather(1, starts)
    counts = [answer.gather(1, i) & (document.gather(1, i) == own) for i in guessed]
    return starts, torch.stack(counts)


def eagle3_loss(head: FastEagle3, target: FastLlama, batch: Batch, steps: int) -> Outcome:
    """Soft labels: cross-entropy to the target's distribution over the draft vocabulary."""
    tokens, answer, features = batch
    size, length = target.shape.hidden_size, features.shape[1]
    low_to_high, final = features.split((3 * size, size), dim=-1)
    starts, counts = choose_starts(tokens, answer, length // STARTS_PER, steps)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    sees = same_sample(tokens[:, :-1]) & causal
    rope = rope_table(target.shape, length)
    first, chains = head.unroll(tokens[:, 1:], low_to_high, rope, sees, starts, steps)
    mask = torch.zeros_like(answer[:, 1:])
    mask[:, :-1] = answer[:, 2:]
    truths = [final[:, 1:][mask[:, :-1]]]
    states = [head.states(first[mask])]
    batch_index = torch.arange(len(starts))[:, None]
    for k, out in enumerate(chains, start=1):
        states.append(head.states(out[counts[k]]))
        truths.append(final[batch_index, starts + 1 + k][counts[k]])
    teacher = target.head.detach()[head.ids]
    loss, kl = torch.zeros(()), []
    for k in range(steps):
        scale = DECAY**k / max(len(states[k]), 1) * torch.ones(1)
        part, each = DistilLoss.apply(states[k][None], truths[k], teacher, head.lm_head, scale)
        loss, kl = loss + part, [*kl, each]
    return loss, torch.cat(kl), states, truths


def make_optimizer(head: FastEagle3) -> MuonAdam:
    """Muon for the layer's matrices, AdamW for lm_head and norms."""
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


def train(
    target: FastLlama, samples: list[corpus.Sample], plan: Plan
) -> tuple[FastEagle3, dict[str, Any]]:
    """The head and its held-out figures; a snapshot of it lies beside the checkpoint."""
    shape = target.shape
    ids, covered = draft_vocabulary(samples, shape.vocab_size, plan.draft_vocab)
    if plan.checkpoint.exists():  # resumed, perhaps with more text: its vocabulary stays
        saved = load_file(plan.checkpoint.with_suffix("") / "model.safetensors")["d2t"]
        ids = torch.arange(len(saved)) + saved
    head = FastEagle3(target, ids, (shape.num_heads, shape.num_heads, shape.head_dim), INTERMEDIATE)

    def loss(batch: Batch) -> Outcome:
        return eagle3_loss(head, target, batch, plan.steps)

    def snapshot() -> None:
        export(head, target, plan, plan.checkpoint.with_suffix(""))

    blocks = make_blocks(samples, 0, plan.layers, LENGTHS)
    job = Job("eagle3", loss, target, head.lm_head, blocks, plan.minutes, plan.checkpoint, ids, 50,
              snapshot)  # fmt: skip
    figures = run(job, make_optimizer(head))
    return head, figures | {"layers": plan.layers, "covered": covered}


def export(head: FastEagle3, target: FastLlama, plan: Plan, folder: Path) -> None:
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
