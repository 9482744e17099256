"""Running rows of requests through a stage's model: the one way in, for stages and for references.

In batch-invariant mode every forward has the same number of rows and every row attends to its own
path in position order, padded to one length. Kernels then do the same sums for a row whatever
the segment it came in, so that fp16 and bf16 give the same bits in every strategy. It costs time
and is for verification.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from flowspec.model.backend import COMMITTED, RequestRows
from flowspec.model.kv_cache import STABLE_ROWS, JointAttentionMetadata, TreeKVCache, Window


class Layers(Protocol):
    """The layers that rows are run through: a StageModel."""

    @property
    def device(self) -> torch.device:
        """Where the weights are."""

    def __call__(
        self,
        x: Tensor,
        positions: Tensor,
        window: Window | JointAttentionMetadata,
        *,
        features: Collection[int] = (),
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """One forward, as StageModel.forward."""


def run_batch(
    model: Layers,
    requests: Sequence[RequestRows[TreeKVCache]],
    x: Tensor,
    *,
    features: Collection[int] = (),
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Run the rows of several requests in one forward; x [n, ...] has them in the same order.

    In batch-invariant mode one request after the other. Returns as `run_rows`, for all n rows.
    """
    if len(requests) == 1:
        (one,) = requests
        return run_rows(model, one.cache, x, one.positions, parents=one.parents, features=features)
    if requests[0].cache.stable_context is not None:
        pieces = x.split([len(rows.positions) for rows in requests])
        parts = [
            run_batch(model, [rows], piece, features=features)
            for rows, piece in zip(requests, pieces, strict=True)
        ]
        taps = {layer: torch.cat([owned[layer] for _, owned in parts]) for layer in parts[0][1]}
        return torch.cat([hidden for hidden, _ in parts]), taps
    window = JointAttentionMetadata(
        [_window(rows.cache, len(rows.positions), rows.parents) for rows in requests]
    )
    where = torch.tensor([p for rows in requests for p in rows.positions], device=model.device)
    return model(x.to(model.device), where, window, features=features)


def run_rows(
    model: Layers,
    cache: TreeKVCache,
    x: Tensor,
    positions: Sequence[int],
    *,
    parents: Sequence[int] | None,
    features: Collection[int] = (),
) -> tuple[Tensor, Mapping[int, Tensor]]:
    """Run n rows; x is tokens [n] or hidden [n, H]; adds them to the cache.

    `parents` are tree rows as in TreeKVCache.append_tree; None: prefix rows. Returns hidden [n, H]
    and the owned feature layers' hidden states [n, H] each.
    """
    device = cache.keys.device  # the model's, which would look through its parameters for it
    where = torch.tensor(positions, device=device)
    x = x.to(device)
    if cache.stable_context is None:
        window = _window(cache, len(positions), parents)
        return model(x, where, window, features=features)
    outputs: list[Tensor] = []
    taps: dict[int, list[Tensor]] = {}
    for start in range(0, len(positions), STABLE_ROWS):
        n = min(STABLE_ROWS, len(positions) - start)
        piece = x[start : start + n]
        padding = STABLE_ROWS - n
        filler = piece[:1].expand(padding, *piece.shape[1:])
        above = None if parents is None else [*parents[start : start + n], *[COMMITTED] * padding]
        window = _window(cache, STABLE_ROWS, above)
        rows = torch.cat((where[start : start + n], where[start : start + 1].expand(padding)))
        hidden, owned = model(torch.cat((piece, filler)), rows, window, features=features)
        cache.drop_last(padding)
        outputs.append(hidden[:n])
        for layer, value in owned.items():
            taps.setdefault(layer, []).append(value[:n])
    return torch.cat(outputs), {layer: torch.cat(pieces) for layer, pieces in taps.items()}


def in_fixed_sizes(project: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`project` of hidden [n, H], called with STABLE_ROWS rows each time; returns [n, ...]."""
    pieces = []
    for start in range(0, len(hidden), STABLE_ROWS):
        piece = hidden[start : start + STABLE_ROWS]
        filler = piece[:1].expand(STABLE_ROWS - len(piece), -1)
        pieces.append(project(torch.cat((piece, filler)))[: len(piece)])
    return torch.cat(pieces)


def _window(cache: TreeKVCache, num_rows: int, parents: Sequence[int] | None) -> Window:
    return cache.append_prefix(num_rows) if parents is None else cache.append_tree(parents)
