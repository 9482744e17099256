"""Muon for matrices and AdamW for the rest, over bf16 parameters with fp32 master copies."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn


def orthogonalise(grads: Tensor, steps: int = 5) -> Tensor:
    """Run Muon's Newton-Schulz iteration on matrices [n, rows, columns], rows <= columns."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = grads.bfloat16()
    x = x / (x.float().norm(dim=(-2, -1), keepdim=True) + 1e-7).bfloat16()
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


@dataclass
class Slot:
    """Optimizer state of one parameter; `split` cuts fused matrices before orthogonalising."""

    param: nn.Parameter
    lr: float
    kind: str
    split: tuple[int, ...] = ()
    decay: float = 0.0
    master: Tensor = field(init=False)
    first: Tensor = field(init=False)
    second: Tensor | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.master = self.param.detach().float().clone()
        self.first = torch.zeros_like(self.master)
        if self.kind == "adam":
            self.second = torch.zeros_like(self.master)


class MuonAdam:
    """Steps every slot; each slot's own learning rate is multiplied by a schedule factor."""

    def __init__(self, slots: Sequence[Slot], momentum: float = 0.95) -> None:
        self.slots = list(slots)
        self.momentum = momentum
        self.steps = 0

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Update once from the accumulated gradients, and clear them."""
        self.steps += 1
        stacks: dict[tuple[int, int], list[tuple[Slot, slice, bool, Tensor]]] = defaultdict(list)
        for slot in self.slots:
            grad = slot.param.grad
            assert grad is not None, "a parameter took no part in the loss"
            if slot.kind == "adam":
                self._adam(slot, grad.float(), factor)
                continue
            momentum = self.momentum if self.steps > 300 else 0.85 + 0.1 * self.steps / 300
            slot.first.lerp_(grad.float(), 1 - momentum)
            nesterov = grad.float().lerp_(slot.first, momentum)
            start = 0
            for rows in slot.split or (grad.shape[0],):
                part = nesterov[start : start + rows]
                tall = part.shape[0] > part.shape[1]
                part = part.mT if tall else part
                key = (part.shape[0], part.shape[1])
                stacks[key].append((slot, slice(start, start + rows), tall, part))
                start += rows
        for members in stacks.values():
            self._muon(members, factor)
        for slot in self.slots:
            slot.param.copy_(slot.master)
            slot.param.grad = None

    def _muon(self, members: list[tuple[Slot, slice, bool, Tensor]], factor: float) -> None:
        updates = orthogonalise(torch.stack([part for *_, part in members]))
        for (slot, rows, tall, _), update in zip(members, updates, strict=True):
            update = update.mT if tall else update
            scale = max(1.0, update.shape[0] / update.shape[1]) ** 0.5
            target = slot.master[rows]
            target.mul_(1 - factor * slot.lr * slot.decay)
            target.add_(update.float(), alpha=-factor * slot.lr * scale)

    def _adam(self, slot: Slot, grad: Tensor, factor: float) -> None:
        assert slot.second is not None
        slot.first.lerp_(grad, 0.1)
        slot.second.lerp_(grad.square(), 0.05)
        bias1, bias2 = 1 - 0.9**self.steps, 1 - 0.95**self.steps
        denominator = (slot.second / bias2).sqrt_().add_(1e-10)
        slot.master.mul_(1 - factor * slot.lr * slot.decay)
        slot.master.addcdiv_(slot.first, denominator, value=-factor * slot.lr / bias1)

    def state(self) -> dict[str, object]:
        """Return everything needed to continue after a stop."""
        slots = [(s.master, s.first, s.second) for s in self.slots]
        return {"steps": self.steps, "slots": slots}

    @torch.no_grad()
    def load(self, state: dict[str, object]) -> None:
        """Restore a saved state."""
        self.steps = int(state["steps"])  # type: ignore[call-overload]
        for slot, (master, first, second) in zip(self.slots, state["slots"], strict=True):  # type: ignore[call-overload]
            slot.master, slot.first, slot.second = master, first, second
            slot.param.copy_(master)
