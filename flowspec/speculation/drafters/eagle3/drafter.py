"""EAGLE-3 drafter (arXiv 2503.01840): hidden states of three target layers, its own lm_head."""

from torch import Tensor

from flowspec.model.llama import Attend, Rope
from flowspec.speculation.drafters.eagle3.network import Eagle3Net
from flowspec.speculation.drafters.hidden_states import HiddenStateDrafter


class Eagle3Drafter(HiddenStateDrafter):
    """An EAGLE-3 head, with its own vocabulary and RoPE."""

    name = "eagle3"

    def __init__(self, net: Eagle3Net) -> None:
        weight = net.fc.weight
        super().__init__(net.config, device=weight.device, dtype=weight.dtype)
        self.net = net
        self.aux_hidden_state_layers = tuple(net.aux_hidden_state_layers)
        self.target_ids = net.draft_to_target.cpu()

    def fuse(self, hidden_states: Tensor) -> Tensor:
        """Map true hidden states [n, 3*Ht] to the head's input [n, H]."""
        return self.net.fuse(hidden_states)

    def rows(self, tokens: Tensor, hidden_states: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Map tokens [n] and hidden states [n, H] to guessed hidden states [n, H]."""
        return self.net(tokens, hidden_states, rope, attend)

    def logits(self, states: Tensor) -> Tensor:
        """Return logits [n, Vd] of guessed hidden states [n, H]."""
        return self.net.logits(states)
