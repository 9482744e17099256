"""EAGLE-1/2 draft head (arXiv 2401.15077): one decoder layer over (token embedding, feature).

Tensor names are those of the public checkpoints. Row of a node v: the embedding of v's token beside
the feature of v's parent; its output approximates v's own feature, and the target's lm_head turns
that into a guess of v's children. RoPE position is the parent's.
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
        """x [..., H] -> [..., H]."""
        x = x + self.self_attn(x, rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


class EagleNet(nn.Module):
    """The whole head; the target's lm_head is applied to its output by the caller."""

    def __init__(self, config: ModelConfig, *, fc_bias: bool) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.fc = Linear(2 * config.hidden_size, config.hidden_size, bias=fc_bias)
        self.layers = nn.ModuleList([EagleLayer(config)])

    def forward(self, tokens: Tensor, features: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """tokens [...], features [..., H] of the parents -> guessed features [..., H]."""
        x = self.fc(torch.cat((self.embed_tokens(tokens), features), dim=-1))
        return self.layers[0](x, rope, attend)
