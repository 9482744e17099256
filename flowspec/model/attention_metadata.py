"""Runs rows of requests through a stage's model, for stages and for references.

In batch-invariant mode every forward has the same number of rows, and every row attends to its own
path in position order, padded to one length. Kernels then compute the same sums for a row whatever
segment it came in, so that fp16 and bf16 give the same bits in every strategy. It costs time and is
for verification.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flowspec.model.backend import COMMITTED, RequestRows
from flowspec.model.kv_cache import (
    STABLE_ROWS,
    AttentionMetadata,
    JointAttentionMetadata,
    TreeKVCache,
)


class Layers(Protocol):
    """The layers that rows are run through, such as a StageModel."""

    @property
    def device(self) -> torch.device:
        """The device of the weights."""

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        metadata: AttentionMetadata | JointAttentionMetadata,
        *,
        aux_hidden_state_layers: Collection[int] = (),
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """Run one forward, as StageModel.forward does."""


def run_batch(
    model: Layers,
    requests: Sequence[RequestRows[TreeKVCache]],
    x: Tensor,
    *,
    aux_hidden_state_layers: Collection[int] = (),
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Run the rows of several requests in one forward; x [n, ...] has them in the same order.

    In batch-invariant mode the requests run one after the other. Returns as `run_rows`, for all n
    rows.
    """
    if len(requests) == 1:
        (one,) = requests
        return run_rows(
            model,
            one.cache,
            x,
            one.positions,
            parents=one.parents,
            aux_hidden_state_layers=aux_hidden_state_layers,
        )
    if requests[0].cache.stable_context is not None:
        pieces = x.split([len(rows.positions) for rows in requests])
        parts = [
            run_batch(model, [rows], piece, aux_hidden_state_layers=aux_hidden_state_layers)
            for rows, piece in zip(requests, pieces, strict=True)
        ]
        taps = {layer: torch.cat([owned[layer] for _, owned in parts]) for layer in parts[0][1]}
        return torch.cat([hidden for hidden, _ in parts]), taps
    metadata = JointAttentionMetadata(
        [_metadata(rows.cache, len(rows.positions), rows.parents) for rows in requests]
    )
    where = torch.tensor([p for rows in requests for p in rows.positions], device=model.device)
    return model(
        x.to(model.device), where, metadata, aux_hidden_state_layers=aux_hidden_state_layers
    )


def run_rows(
    model: Layers,
    cache: TreeKVCache,
    x: Tensor,
    positions: Sequence[int],
    *,
    parents: Sequence[int] | None,
    aux_hidden_state_layers: Collection[int] = (),
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Run n rows through the model and add them to the cache; x is tokens [n] or hidden [n, H].

    `parents` are tree rows as in TreeKVCache.append_tree, or None for prefix rows. Returns hidden
    [n, H] and the hidden states [n, H] of each owned layer in `aux_hidden_state_layers`.
    """
    device = cache.keys.device  # cheaper than model.device, which searches the parameters
    where = torch.tensor(positions, device=device)
    x = x.to(device)
    if cache.stable_context is None:
        metadata = _metadata(cache, len(positions), parents)
        return model(x, where, metadata, aux_hidden_state_layers=aux_hidden_state_layers)
    outputs: list[Tensor] = []
    taps: dict[int, list[Tensor]] = {}
    for start in range(0, len(positions), STABLE_ROWS):
        n = min(STABLE_ROWS, len(positions) - start)
        piece = x[start : start + n]
        padding = STABLE_ROWS - n
        filler = piece[:1].expand(padding, *piece.shape[1:])
        above = None if parents is None else [*parents[start : start + n], *[COMMITTED] * padding]
        metadata = _metadata(cache, STABLE_ROWS, above)
        rows = torch.cat((where[start : start + n], where[start : start + 1].expand(padding)))
        hidden, owned = model(
            torch.cat((piece, filler)),
            rows,
            metadata,
            aux_hidden_state_layers=aux_hidden_state_layers,
        )
        cache.drop_last(padding)
        outputs.append(hidden[:n])
        for layer, value in owned.items():
            taps.setdefault(layer, []).append(value[:n])
    return torch.cat(outputs), {layer: torch.cat(pieces) for layer, pieces in taps.items()}


def in_fixed_sizes(project: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """Apply `project` to hidden [n, H], STABLE_ROWS rows at a time; returns [n, ...]."""
    pieces = []
    for start in range(0, len(hidden), STABLE_ROWS):
        piece = hidden[start : start + STABLE_ROWS]
        filler = piece[:1].expand(STABLE_ROWS - len(piece), -1)
        pieces.append(project(torch.cat((piece, filler)))[: len(piece)])
    return torch.cat(pieces)


def _metadata(
    cache: TreeKVCache, num_rows: int, parents: Sequence[int] | None
) -> AttentionMetadata:
    return cache.append_prefix(num_rows) if parents is None else cache.append_tree(parents)
