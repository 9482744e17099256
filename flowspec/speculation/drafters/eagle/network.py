"""EAGLE-1/2 draft head (arXiv 2401.15077): one decoder layer over (embedding, hidden state).

Tensor names are those of the public checkpoints. The row of a node v has the embedding of v's token
beside the hidden state of v's parent. Its output approximates v's own hidden state, and the
target's lm_head turns that into a guess of v's children. RoPE position is the parent's.
"""

import torch
from torch import Tensor, nn

from flowspec.model.architecture import ModelConfig
from flowspec.model.llama import MLP, Attend, Attention, Embedding, Linear, RMSNorm, Rope


class EagleLayer(nn.Module):
    """A decoder layer without an input norm: attention sees the raw output of `fc`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Map x [..., H] to [..., H]."""
        x = x + self.self_attn(x, rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class EagleNet(nn.Module):
    """The whole head; the caller applies the target's lm_head to its output."""

    def __init__(self, config: ModelConfig, *, fc_bias: bool) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.fc = Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([EagleLayer(config)])

    def forward(self, tokens: Tensor, hidden_states: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Map tokens [...] and the parents' hidden states [..., H] to guessed ones [..., H]."""
        x = self.fc(torch.cat((self.embed_tokens(tokens), hidden_states), dim=-1))
        return self.layers[0](x, rope, attend)
