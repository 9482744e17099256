"""StageModel: the consecutive layers of one stage in torch, with the embedding or head it owns.

It is the stage backend named `torch` (flowspec/model/backend.py).

Parameter names are those of the HF checkpoint and layer indices are global, so that a stage's state
dict is a plain subset of the model's.
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowspec.model.architecture import ModelConfig
from flowspec.model.attention_metadata import in_fixed_sizes, run_batch
from flowspec.model.backend import RequestRows
from flowspec.model.kv_cache import (
    STABLE_ROWS,
    AttentionMetadata,
    JointAttentionMetadata,
    TreeKVCache,
)
from flowspec.model.linear import NONE, Linear, Quantization, quantize
from flowspec.model.llama import Block, Embedding, RMSNorm, rope_angles, rope_frequencies

FINAL_NORM = -1  # as a hidden-state layer: the output of the model's last norm


class StageModel(nn.Module):
    """Layers first_layer <= i < last_layer; shapes: n rows, H hidden, V vocabulary.

    `quantization` chooses how each linear layer stores its weight.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        first_layer: int,
        last_layer: int,
        with_embedding: bool,
        with_head: bool,
        quantization: Quantization = NONE,
    ) -> None:
        super().__init__()
        self.config = config
        self.first_layer, self.last_layer = first_layer, last_layer
        body: Any = nn.Module()  # named as in the checkpoint; some parts are missing here
        if with_embedding:
            body.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        blocks = {str(i): Block(config) for i in range(first_layer, last_layer)}
        body.layers = nn.ModuleDict(blocks)
        self.model: Any = body
        self.lm_head: nn.Linear | None = None
        if with_head:
            body.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
            if with_embedding and config.tie_word_embeddings:
                self.lm_head.weight = body.embed_tokens.weight
        quantize(self, quantization, tied_head=config.tie_word_embeddings)
        self._frequencies: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden states that leave, and of all weights that are not quantized."""
        if self.lm_head is not None:
            return self.model.norm.weight.dtype
        return self.model.layers[str(self.first_layer)].input_layernorm.weight.dtype

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters and buffers; two names of one tensor count once."""
        return sum(tensor.nbytes for tensor in (*self.parameters(), *self.buffers()))

    @property
    def kv_bytes_per_row(self) -> int:
        """Bytes that one row of a request takes in its cache here."""
        config, layers = self.config, self.last_layer - self.first_layer
        return 2 * layers * config.num_kv_heads * config.head_dim * self.dtype.itemsize

    def new_cache(self, capacity: int, *, stable_context: int | None = None) -> TreeKVCache:
        """Return an empty cache for one request of at most `capacity` rows, tree rows included.

        With `stable_context` it also has the padding of batch-invariant mode.
        """
        cache = TreeKVCache(
            num_layers=self.last_layer - self.first_layer,
            num_kv_heads=self.config.num_kv_heads,
            head_dim=self.config.head_dim,
            capacity=capacity + (0 if stable_context is None else STABLE_ROWS),
            dtype=self.dtype,
            device=self.device,
            stable_context=stable_context,
        )
        if self.config.windows:
            cache.windows = self.config.windows[self.first_layer : self.last_layer]
        return cache

    def owned_hidden_states(self, layers: Collection[int]) -> tuple[int, ...]:
        """Return those of `layers` (layer ids, or FINAL_NORM) whose outputs this stage can give."""
        return tuple(
            layer
            for layer in layers
            if self.first_layer <= layer < self.last_layer
            or (layer == FINAL_NORM and self.lm_head is not None)
        )

    @torch.inference_mode()
    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata | JointAttentionMetadata,
        *,
        aux_hidden_state_layers: Collection[int] = (),
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """Run n rows: x is tokens [n] if the stage has the embedding, else hidden [n, H].

        Returns the hidden states [n, H] (after the last norm if the stage has it) and the outputs
        [n, H] of the layers in `aux_hidden_state_layers` that it owns.
        """
        if x.dtype == torch.int64:
            x = self.model.embed_tokens(x)
        if self._frequencies is None or self._frequencies.device != x.device:
            self._frequencies = rope_frequencies(self.config).to(x.device)
        rope = rope_angles(self._frequencies, positions, x.dtype)
        owned: dict[int, Tensor] = {}
        blocks = self.model.layers
        for index in range(self.first_layer, self.last_layer):
            x = blocks[str(index)](x, rope, metadata.attend(index - self.first_layer))
            if index in aux_hidden_state_layers:
                owned[index] = x
        if self.lm_head is not None:
            x = self.model.norm(x)
            if FINAL_NORM in aux_hidden_state_layers:
                owned[FINAL_NORM] = x
        return x, owned

    def run(
        self,
        requests: Sequence[RequestRows[TreeKVCache]],
        x: Tensor,
        *,
        aux_hidden_state_layers: Collection[int] = (),
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """Run the rows of several requests in one forward, as StageBackend.run does."""
        return run_batch(self, requests, x, aux_hidden_state_layers=aux_hidden_state_layers)

    @torch.inference_mode()
    def logits(self, hidden: Tensor, *, batch_invariant: bool = False) -> Tensor:
        """Return logits [n, V] in fp32 of hidden [n, H] after the last norm."""
        if batch_invariant:
            return in_fixed_sizes(self.logits, hidden)
        assert self.lm_head is not None, "only the last stage has the lm_head"
        return self.lm_head(hidden).float()
