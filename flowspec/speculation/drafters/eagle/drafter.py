"""EAGLE-1/2 drafter (arXiv 2401.15077, 2406.16858): last hidden state and lm_head of the target."""

import torch
from torch import Tensor

from flowspec.model.llama import Attend, Rope
from flowspec.model.stage_model import FINAL_NORM
from flowspec.speculation.drafters.eagle.network import EagleNet
from flowspec.speculation.drafters.hidden_states import HiddenStateDrafter


class EagleDrafter(HiddenStateDrafter):
    """An EAGLE head with the target's lm_head [V, H]."""

    name = "eagle"
    aux_hidden_state_layers: tuple[int, ...] = (FINAL_NORM,)

    def __init__(self, net: EagleNet, lm_head: Tensor) -> None:
        super().__init__(net.config, device=lm_head.device, dtype=lm_head.dtype)
        self.net = net
        self.lm_head = lm_head

    def rows(self, tokens: Tensor, hidden_states: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Map tokens [n] and hidden states [n, H] to guessed hidden states [n, H]."""
        return self.net(tokens, hidden_states, rope, attend)

    def logits(self, states: Tensor) -> Tensor:
        """Return the target's logits [n, V] of guessed hidden states [n, H]."""
        return torch.nn.functional.linear(states, self.lm_head)
