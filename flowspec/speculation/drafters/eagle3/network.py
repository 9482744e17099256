"""EAGLE-3 draft head (arXiv 2503.01840): one layer over (embedding, fused hidden states).

The row of a node v has the embedding of v's token beside the fused target hidden states of v's
parent, or, beyond the last verdict, beside the head's own output for the parent. RoPE position is
the parent's. It has its own lm_head, over its own vocabulary, and its own RoPE. Tensor names are
those of the official checkpoints; EAGLE-3.1's norms (arXiv 2605.09992) are switches. Shapes: n
rows, Hd the head's hidden size, Ht the target's, Vd draft vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from flowspec.model.architecture import ModelConfig
from flowspec.model.llama import MLP, Attend, Attention, RMSNorm, Rope

NUM_HIDDEN_STATES = 3  # low, middle, high


class Eagle3Attention(Attention):
    """Attention over (embedding, hidden state): q, k and v read 2*Hd, o writes Hd."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        for name in ("q_proj", "k_proj", "v_proj"):
            rows = getattr(self, name).out_features
            setattr(self, name, nn.Linear(2 * config.hidden_size, rows, bias=config.qkv_bias))


class Eagle3Layer(nn.Module):
    """The decoder layer; its residual stream is the hidden state, before or after its norm."""

    def __init__(self, config: ModelConfig, *, norm_before_residual: bool) -> None:
        super().__init__()
        self.norm_before_residual = norm_before_residual
        self.self_attn = Eagle3Attention(config)
        self.mlp = MLP(config)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, embedded: Tensor, hidden_states: Tensor, rope: Rope, attend: Attend
    ) -> Tensor:
        """Map embedded and hidden states [..., Hd] to [..., Hd]."""
        normed = self.hidden_norm(hidden_states)
        residual = normed if self.norm_before_residual else hidden_states
        both = torch.cat((self.input_layernorm(embedded), normed), dim=-1)
        x = residual + self.self_attn(both, rope, attend)
        return x + self.mlp(self.post_attention_layernorm(x))


@dataclass(frozen=True, slots=True, kw_only=True)
class Eagle3Layout:
    """The properties that distinguish one EAGLE-3 head from another, besides its sizes."""

    aux_hidden_state_layers: tuple[int, ...]  # output-of-layer ids of the target: low, middle, high
    target_hidden_size: int
    norm_before_residual: bool = False  # the residual stream starts at hidden_norm(hidden state)
    norm_before_fc: bool = False  # one norm over the concatenated hidden states: input_norm
    fc_norm: bool = False  # one norm per hidden state (EAGLE-3.1)
    norm_output: bool = False  # a draft step gives the normed state to the next (EAGLE-3.1)
    fc_bias: bool = False


class Eagle3Net(nn.Module):
    """The whole head; `draft_to_target` [Vd] is the target's id of each draft id, absolute."""

    draft_to_target: Tensor

    def __init__(
        self, config: ModelConfig, layout: Eagle3Layout, *, draft_to_target: Tensor
    ) -> None:
        super().__init__()
        assert len(layout.aux_hidden_state_layers) == NUM_HIDDEN_STATES, layout
        self.config, self.layout = config, layout
        self.aux_hidden_state_layers = layout.aux_hidden_state_layers
        size, eps = config.hidden_size, config.rms_norm_eps
        wide = NUM_HIDDEN_STATES * layout.target_hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.input_norm = RMSNorm(wide, eps) if layout.norm_before_fc else None
        self.fc_norm: nn.ModuleList | None = None
        if layout.fc_norm:
            norms = [RMSNorm(layout.target_hidden_size, eps) for _ in range(NUM_HIDDEN_STATES)]
            self.fc_norm = nn.ModuleList(norms)
        self.fc = nn.Linear(wide, size, bias=layout.fc_bias)
        self.midlayer = Eagle3Layer(config, norm_before_residual=layout.norm_before_residual)
        self.norm = RMSNorm(size, eps)
        self.lm_head = nn.Linear(size, len(draft_to_target), bias=False)
        # A buffer, not a parameter: files hold offsets, and the loader has made ids of them.
        self.register_buffer("draft_to_target", draft_to_target, persistent=False)

    def fuse(self, hidden_states: Tensor) -> Tensor:
        """Fuse the target's hidden states [n, 3*Ht] (low, middle, high side by side) to [n, Hd]."""
        if self.input_norm is not None:
            hidden_states = self.input_norm(hidden_states)
        if self.fc_norm is not None:
            parts = hidden_states.chunk(NUM_HIDDEN_STATES, dim=-1)
            normed = [norm(part) for norm, part in zip(self.fc_norm, parts, strict=True)]
            hidden_states = torch.cat(normed, dim=-1)
        return self.fc(hidden_states)

    def forward(self, tokens: Tensor, hidden_states: Tensor, rope: Rope, attend: Attend) -> Tensor:
        """Map target ids [n] and the parents' hidden states [n, Hd] to states [n, Hd].

        `hidden_states` are fused ones, or the states of an earlier draft step.
        """
        states = self.midlayer(self.embed_tokens(tokens), hidden_states, rope, attend)
        return self.norm(states) if self.layout.norm_output else states

    def logits(self, states: Tensor) -> Tensor:
        """Return logits [n, Vd] of states [n, Hd], over the draft vocabulary."""
        return self.lm_head(states if self.layout.norm_output else self.norm(states))
