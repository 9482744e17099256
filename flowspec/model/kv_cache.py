"""TreeKVCache: keys and values of one request on one device, a committed prefix plus tree rows.

Shapes: P committed rows, T tree rows behind them, n rows being added, S = P + T keys, g key/value
heads, h query heads, d head dimension. Tree rows are named by their index 0..T-1 behind the prefix.
A row attends to the whole prefix, its ancestors in the tree and itself. In a layer with a sliding
window of w (arXiv 2310.06825) it attends only to those at the last w positions, its own included.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from flowspec.model.backend import COMMITTED, CacheFull
from flowspec.model.llama import Attend

STABLE_ROWS = 32  # rows of every forward in batch-invariant mode


@dataclass(slots=True)
class AttentionMetadata:
    """One request's rows in a forward: the slots of their keys, and the keys that each sees."""

    cache: "TreeKVCache"
    start: int  # first slot written
    num_rows: int
    mask: Tensor | None  # [n, S] bool, None when every row sees every key
    paths: Tensor | None = (
        None  # batch-invariant mode: slots of each row's path by position, [n, S]
    )
    # masks of layers whose sliding window hides keys from these rows, by window size
    narrow: dict[int | None, Tensor] = field(default_factory=dict)

    def attend(self, layer: int) -> Attend:
        """Return the attention of local layer `layer`: it stores k and v and applies the mask."""
        mask = self.narrow.get(self.cache.windows[layer], self.mask)

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            end = self.start + self.num_rows
            keys, values = self.cache.keys[layer], self.cache.values[layer]
            keys[:, self.start : end] = k.transpose(0, 1)
            values[:, self.start : end] = v.transpose(0, 1)
            if self.paths is not None:
                return _attend_by_path(q, keys, values, self.paths, mask)
            return _attend(q, keys[:, :end], values[:, :end], mask)

        return run


class JointAttentionMetadata:
    """Attention metadata of several requests whose rows run in one forward, one after the other."""

    def __init__(self, parts: Sequence[AttentionMetadata]) -> None:
        self.parts = parts
        self._sizes = [part.num_rows for part in parts]

    def attend(self, layer: int) -> Attend:
        """Return the attention of local layer `layer`: each request attends to its own keys."""
        runs = [part.attend(layer) for part in self.parts]

        def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            pieces = zip(*(t.split(self._sizes) for t in (q, k, v)), strict=True)
            return torch.cat([one(*piece) for one, piece in zip(runs, pieces, strict=True)])

        return run


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Attend q [n, h, d] to k, v [g, S, d]; query heads of a group share keys without a copy."""
    n, heads, d = q.shape
    groups = k.shape[0]
    share = heads // groups
    q = q.view(n, groups, share, d).permute(1, 0, 2, 3).reshape(1, groups, n * share, d)
    if mask is not None and share > 1:
        mask = mask.repeat_interleave(share, dim=0)
    out = F.scaled_dot_product_attention(q, k.unsqueeze(0), v.unsqueeze(0), attn_mask=mask)
    return out.view(groups, n, share, d).permute(1, 0, 2, 3).reshape(n, heads, d)


def _attend_by_path(q: Tensor, k: Tensor, v: Tensor, paths: Tensor, mask: Tensor | None) -> Tensor:
    """Attend each row to its own path in position order, padded to one length.

    So the sums are always the same. It costs a gathered copy of the context per row; only
    batch-invariant mode pays it.
    """
    n, heads, d = q.shape
    groups = k.shape[0]
    assert mask is not None
    keys, values = k[:, paths].transpose(0, 1), v[:, paths].transpose(0, 1)  # [n, g, S, d]
    scores = q.view(n, groups, heads // groups, d) @ keys.transpose(-1, -2) / d**0.5
    scores = scores.float().masked_fill(~mask[:, None, None, :], float("-inf"))
    return (scores.softmax(-1).to(v.dtype) @ values).reshape(n, heads, d)


class TreeKVCache:
    """Preallocated keys and values [L, g, capacity, d]; rows are committed and dropped in place."""

    def __init__(
        self,
        *,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        stable_context: int | None = None,
    ) -> None:
        shape = (num_layers, num_kv_heads, capacity, head_dim)
        # Zeroed, not empty: a masked slot still meets the softmax, and 0 * NaN would be NaN.
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.capacity = capacity
        self.stable_context = stable_context  # batch-invariant mode: every path is padded to this
        # sliding window of each layer, None if it sees all; the model that owns the cache sets them
        self.windows: Sequence[int | None] = (None,) * num_layers
        self.prefix_length = 0
        self.num_tree_rows = 0
        # ancestors[i, j]: tree row j is an ancestor of tree row i, or i itself
        self._ancestors = np.zeros((64, 64), dtype=bool)

    def append_prefix(self, num_rows: int) -> AttentionMetadata:
        """Append a chain of true rows to the prefix; there must be no tree rows.

        Raises CacheFull if they do not fit.
        """
        assert self.num_tree_rows == 0, "prefix rows must come before tree rows"
        start = self.prefix_length
        self.check_room(num_rows)
        self.prefix_length += num_rows
        if self.stable_context is not None:
            paths = np.arange(self.stable_context)[None, :].repeat(num_rows, 0)
            lengths = start + 1 + np.arange(num_rows)
            return self._by_path(start, paths, lengths)
        return self._by_slot(start, np.tri(num_rows, start + num_rows, start, dtype=bool))

    def append_tree(self, parents: Sequence[int]) -> AttentionMetadata:
        """Append tree rows, parents first; a parent is a tree row (also one of these) or COMMITTED.

        Raises CacheFull if they do not fit.
        """
        n, first = len(parents), self.num_tree_rows
        self.check_room(n)
        self._grow(first + n)
        for row, parent in enumerate(parents, start=first):
            assert COMMITTED <= parent < row, f"tree row {row} before its parent {parent}"
            if parent == COMMITTED:
                self._ancestors[row, : first + n] = False
            else:
                self._ancestors[row] = self._ancestors[parent]
            self._ancestors[row, row] = True
        self.num_tree_rows += n
        start = self.prefix_length + first
        tail = self._ancestors[first : first + n, : first + n]
        if self.stable_context is not None:
            return self._by_path(start, *self._tree_paths(tail))
        mask = np.ones((n, start + n), dtype=bool)
        mask[:, self.prefix_length :] = tail
        return self._by_slot(start, mask)

    def reroot(self, path: Sequence[int], keep: Sequence[int]) -> None:
        """Commit the tree rows `path` (root first), keep `keep` (ascending), forget all others.

        Only rows behind the prefix move, and of those only the ones that are not in place.
        """
        order = [*path, *keep]
        still = 0
        while still < len(order) and order[still] == still:
            still += 1
        if still < len(order):
            index = self.prefix_length + torch.tensor(order[still:], device=self.keys.device)
            start, end = self.prefix_length + still, self.prefix_length + len(order)
            self.keys[:, :, start:end] = self.keys.index_select(2, index)
            self.values[:, :, start:end] = self.values.index_select(2, index)
        kept = np.asarray(keep, dtype=np.intp)
        self._ancestors[: len(kept), : len(kept)] = self._ancestors[np.ix_(kept, kept)]
        self._ancestors[: len(kept), len(kept) :] = False
        self.prefix_length += len(path)
        self.num_tree_rows = len(kept)

    def resized(
        self, capacity: int, *, prefix_length: int, stable_context: int | None = None
    ) -> "TreeKVCache":
        """Return another cache that begins with `prefix_length` committed rows of this one.

        With `stable_context` it also has the padding of batch-invariant mode. Both caches exist
        until the caller releases this one.
        """
        assert prefix_length <= min(self.prefix_length, capacity), "rows that are not there"
        num_layers, num_kv_heads, _, head_dim = self.keys.shape
        other = TreeKVCache(
            num_layers=num_layers,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            capacity=capacity + (0 if stable_context is None else STABLE_ROWS),
            dtype=self.keys.dtype,
            device=self.keys.device,
            stable_context=stable_context,
        )
        other.keys[:, :, :prefix_length] = self.keys[:, :, :prefix_length]
        other.values[:, :, :prefix_length] = self.values[:, :, :prefix_length]
        other.prefix_length = prefix_length
        other.windows = self.windows
        return other

    def with_ancestors(self, rows: Sequence[int]) -> list[int]:
        """Return the tree rows `rows` and all their ancestors in the tree, ascending."""
        marked = self._ancestors[list(rows), : self.num_tree_rows].any(axis=0)
        return np.flatnonzero(marked).tolist()

    def drop_last(self, num_rows: int) -> None:
        """Forget the newest rows (padding of batch-invariant mode)."""
        from_tree = min(num_rows, self.num_tree_rows)
        self.num_tree_rows -= from_tree
        self.prefix_length -= num_rows - from_tree

    def free(self) -> None:
        """Do nothing: the tensors go with the last reference to this cache."""

    @property
    def extent(self) -> tuple[int, int]:
        """Number of committed rows and of tree rows, for `cut_back`."""
        return self.prefix_length, self.num_tree_rows

    def cut_back(self, extent: tuple[int, int]) -> None:
        """Forget the rows added since the cache had this `extent`; none may be committed since."""
        assert extent[0] <= self.prefix_length, "committed rows are gone"
        assert extent[1] <= self.num_tree_rows, "tree rows are gone"
        self.prefix_length, self.num_tree_rows = extent

    def check_room(self, num_rows: int) -> None:
        """Raise CacheFull if `num_rows` more rows do not fit."""
        needed = self.prefix_length + self.num_tree_rows + num_rows
        if needed > self.capacity:
            raise CacheFull(f"the KV cache holds {self.capacity} rows, {needed} are needed")

    def _grow(self, rows: int) -> None:
        size = len(self._ancestors)
        if rows > size:
            wider = np.zeros((max(rows, 2 * size),) * 2, dtype=bool)
            wider[:size, :size] = self._ancestors
            self._ancestors = wider

    def _tree_paths(self, tail: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return path slots [n, context] and path lengths [n] of rows with ancestors `tail`."""
        assert self.stable_context is not None
        paths = np.zeros((len(tail), self.stable_context), dtype=np.int64)
        paths[:, : self.prefix_length] = np.arange(self.prefix_length)
        lengths = np.zeros(len(tail), dtype=np.int64)
        for row, ancestors in enumerate(tail):
            slots = self.prefix_length + np.flatnonzero(ancestors)
            lengths[row] = self.prefix_length + len(slots)
            paths[row, self.prefix_length : lengths[row]] = slots
        return paths, lengths

    def _by_slot(self, start: int, mask: np.ndarray) -> AttentionMetadata:
        """Return metadata of rows that see all slots up to their own end through `mask` [n, S]."""
        metadata = AttentionMetadata(
            self, start, len(mask), None if mask.all() else self._on_device(mask)
        )
        if any(self.windows):
            tree = self._ancestors[: self.num_tree_rows, : self.num_tree_rows]
            of_tree = self.prefix_length - 1 + tree.sum(axis=1)
            positions = np.concatenate((np.arange(self.prefix_length), of_tree))
            self._narrow(metadata, mask, rows=positions[start:], keys=positions)
        return metadata

    def _by_path(self, start: int, paths: np.ndarray, lengths: np.ndarray) -> AttentionMetadata:
        """Return metadata of rows that see the first `lengths` [n] of `paths` [n, context]."""
        positions = np.arange(paths.shape[1])
        mask = positions[None, :] < lengths[:, None]
        paths = np.where(mask, paths, 0)
        metadata = AttentionMetadata(
            self, start, len(paths), self._on_device(mask), self._on_device(paths)
        )
        self._narrow(metadata, mask, rows=lengths - 1, keys=positions)
        return metadata

    def _narrow(
        self, metadata: AttentionMetadata, mask: np.ndarray, *, rows: np.ndarray, keys: np.ndarray
    ) -> None:
        """Add the masks of sliding windows to `metadata`; rows [n] and keys [S] are positions."""
        for size in set(self.windows) - {None}:
            assert size is not None
            hidden = keys[None, :] <= rows[:, None] - size
            if hidden.any():
                metadata.narrow[size] = self._on_device(mask & ~hidden)

    def _on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self.keys.device, non_blocking=True)
