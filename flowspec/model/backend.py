"""The seam between a stage and its backend, which computes the layers and holds the KV caches.

A stage decides which rows run and which of them die; a backend runs them and holds their keys and
values. The first row of the table (flowspec/stage/backends.py) is `StageModel` with `TreeKVCache`.
A backend may compute in another thread, process or device: between the calls a stage asks only for
counts, which follow from the calls themselves. Shapes: n rows, H hidden size, V vocabulary.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from flowspec.model.architecture import ModelConfig

COMMITTED = -1  # as a parent: the last committed row


class CacheFull(ValueError):
    """Rows that exceed the capacity of the cache."""


class StageCache(Protocol):
    """Keys and values of one request: committed rows, followed by the rows of its tree.

    Tree rows are named by their index 0..T-1 behind the committed ones. A row sees the committed
    rows, its ancestors in the tree and itself.
    """

    @property
    def prefix_length(self) -> int:
        """Number of committed rows."""

    @property
    def num_tree_rows(self) -> int:
        """Number of tree rows."""

    @property
    def extent(self) -> tuple[int, int]:
        """Number of committed rows and of tree rows, for `cut_back`."""

    def check_room(self, num_rows: int) -> None:
        """Raise CacheFull if `num_rows` more rows do not fit."""

    def cut_back(self, extent: tuple[int, int]) -> None:
        """Forget the rows added since the cache had this `extent`: their forward has failed."""

    def reroot(self, path: Sequence[int], keep: Sequence[int]) -> None:
        """Commit the tree rows `path` (root first), keep `keep` (ascending), forget all others."""

    def resized(
        self, capacity: int, *, prefix_length: int, stable_context: int | None = None
    ) -> "StageCache":
        """Return a new cache that begins with the first `prefix_length` committed rows of this one.

        The other arguments are those of `StageBackend.new_cache`. This cache stays as it is.
        """

    def free(self) -> None:
        """Free the memory; the cache is not used again."""


Cache = TypeVar("Cache", bound=StageCache)


@dataclass(frozen=True, slots=True)
class RequestRows(Generic[Cache]):
    """The places of n rows of one request.

    `parents` are tree rows (also of these rows, parents first) or COMMITTED. None means that the
    rows are a chain behind the committed ones and are committed at once.
    """

    cache: Cache
    positions: Sequence[int]
    parents: Sequence[int] | None


class StageBackend(Protocol[Cache]):
    """Computes the layers of one stage."""

    config: ModelConfig  # of the whole model

    @property
    def device(self) -> torch.device:
        """The device whose memory holds the caches."""

    @property
    def weight_bytes(self) -> int:
        """Bytes that the weights take, those mapped from a file included."""

    @property
    def kv_bytes_per_row(self) -> int:
        """Bytes that one row of a request takes in its cache."""

    def owned_hidden_states(self, layers: Collection[int]) -> tuple[int, ...]:
        """Return those of `layers` whose outputs `run` can give; -1 means after the last norm."""

    def new_cache(self, capacity: int, *, stable_context: int | None = None) -> Cache:
        """Return an empty cache for one request of at most `capacity` rows, tree rows included.

        With `stable_context` every row gives the same bits whatever rows run beside it, and no path
        is longer than that. Raises ValueError if the backend cannot promise it.
        """

    def run(
        self,
        requests: Sequence[RequestRows[Cache]],
        x: Tensor,
        *,
        aux_hidden_state_layers: Collection[int] = (),
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """Run the rows of several requests through the layers and add them to their caches.

        x has the rows of all requests, one request behind the other: tokens [n] on the first stage,
        hidden states [n, H] elsewhere. Returns the hidden states [n, H] (after the last norm on the
        last stage) and the outputs [n, H] of each layer in `aux_hidden_state_layers`. If it raises,
        some rows may have been added; the caller cuts the caches back.
        """

    def logits(self, hidden: Tensor, *, batch_invariant: bool = False) -> Tensor:
        """Return logits [n, V] in fp32 of the last stage's hidden states [n, H].

        With `batch_invariant` a row's bits do not depend on the rows beside it.
        """
