"""EAGLE-3 drafter (arXiv 2503.01840): three of the target's layers fused, own lm_head."""

from torch import Tensor

from flowspec.model.llama import Attend, Rope
from flowspec.speculation.drafters.eagle3.network import Eagle3Net
from flowspec.speculation.drafters.hidden_states import FeatureDrafter


class Eagle3Drafter(FeatureDrafter):
    """An EAGLE-3 head, with its own vocabulary and RoPE."""

    name = "eagle3"

    def __init__(self, net: Eagle3Net) -> None:
        weight = net.fc.weight
        super().__init__(net.config, device=weight.device, dtype=weight.dtype)
        self.net = net
        self.aux_hidden_state_layers = tuple(net.aux_hidden_state_layers)
        self.target_ids = net.draft_to_target.cpu()

    def fuse(self, features: Tensor) -> Tensor:
        """See FeatureDrafter."""
        return self.net.fuse(features)

    def rows(self, tokens: Tensor, features: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """See FeatureDrafter."""
        return self.net(tokens, features, rope, attend)

    def logits(self, states: Tensor) -> Tensor:
        """See IncrementalDrafter."""
        return self.net.logits(states)
