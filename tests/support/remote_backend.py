"""A stage backend that computes elsewhere: a thread holds the model and the caches.

What crosses is numbers and copies of tensors, as it would between processes. On the stage's side a
cache is a number and its counts of rows, so that nothing but a forward waits for an answer.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from queue import Queue
from threading import Thread
from typing import Any

import torch
from torch import Tensor

from flowspec.model.backend import CacheFull, RequestRows
from flowspec.model.stage_model import StageModel

ANSWER_TIMEOUT_S = 60.0


class RemoteError(RuntimeError):
    """A forward has failed over there."""


class Worker:
    """The other side: commands come in order, and some have an answer."""

    def __init__(self, model: StageModel) -> None:
        self.model = model
        self.caches: dict[int, Any] = {}
        self.inbox: Queue[tuple[str, tuple[Any, ...], Queue[Any] | None]] = Queue()
        # whether a forward of so many requests fails, once its rows are in the caches
        self.fails: Callable[[int], bool] = lambda num_requests: False
        Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        torch.set_num_threads(1)
        while True:
            name, values, answer = self.inbox.get()
            if name == "end":
                return
            try:
                found = getattr(self, f"_{name}")(*values)
            except Exception as error:
                found = RemoteError(f"{type(error).__name__}: {error}")
            if answer is not None:
                answer.put(found)

    def _new(self, number: int, capacity: int, stable_context: int | None) -> None:
        self.caches[number] = self.model.new_cache(capacity, stable_context=stable_context)

    def _resize(self, number: int, other: int, capacity: int, prefix: int, stable: Any) -> None:
        self.caches[other] = self.caches[number].resized(
            capacity, prefix_length=prefix, stable_context=stable
        )

    def _cut_back(self, number: int, extent: tuple[int, int]) -> None:
        self.caches[number].cut_back(extent)

    def _reroot(self, number: int, path: Sequence[int], keep: Sequence[int]) -> None:
        self.caches[number].reroot(path, keep)

    def _free(self, number: int) -> None:
        self.caches.pop(number).free()

    def _run(
        self, rows: Sequence[tuple[int, Any, Any]], x: Tensor, aux_hidden_state_layers: Any
    ) -> Any:
        requests = [RequestRows(self.caches[number], where, above) for number, where, above in rows]
        found = self.model.run(requests, x, aux_hidden_state_layers=aux_hidden_state_layers)
        if self.fails(len(requests)):
            raise MemoryError("no memory for the next layer")
        return found

    def _count(self) -> int:
        return len(self.caches)

    def _logits(self, hidden: Tensor, batch_invariant: bool) -> Tensor:
        return self.model.logits(hidden, batch_invariant=batch_invariant)


class RemoteCache:
    """The stage's side of a cache."""

    def __init__(self, worker: Worker, number: int, capacity: int) -> None:
        self._worker, self._number, self._capacity = worker, number, capacity
        self.prefix_length = 0
        self.num_tree_rows = 0

    @property
    def extent(self) -> tuple[int, int]:
        """See StageCache."""
        return self.prefix_length, self.num_tree_rows

    def check_room(self, num_rows: int) -> None:
        """See StageCache."""
        needed = self.prefix_length + self.num_tree_rows + num_rows
        if needed > self._capacity:
            raise CacheFull(f"the KV cache holds {self._capacity} rows, {needed} are needed")

    def add(self, num_rows: int, *, to_tree: bool) -> None:
        """These rows are being computed."""
        if to_tree:
            self.num_tree_rows += num_rows
        else:
            self.prefix_length += num_rows

    def cut_back(self, extent: tuple[int, int]) -> None:
        """See StageCache."""
        self.prefix_length, self.num_tree_rows = extent
        self._tell("cut_back", extent)

    def reroot(self, path: Sequence[int], keep: Sequence[int]) -> None:
        """See StageCache."""
        self.prefix_length += len(path)
        self.num_tree_rows = len(keep)
        self._tell("reroot", list(path), list(keep))

    def resized(
        self, capacity: int, *, prefix_length: int, stable_context: int | None = None
    ) -> "RemoteCache":
        """See StageCache."""
        other = RemoteCache(self._worker, new_number(), capacity)
        other.prefix_length = prefix_length
        self._tell("resize", other._number, capacity, prefix_length, stable_context)
        return other

    def free(self) -> None:
        """See StageCache."""
        self._tell("free")

    def _tell(self, name: str, *values: Any) -> None:
        self._worker.inbox.put((name, (self._number, *values), None))


_numbers = iter(range(1, 2**31))


def new_number() -> int:
    """One that no cache has."""
    return next(_numbers)


class RemoteBackend:
    """A StageBackend whose model is in a Worker."""

    def __init__(self, model: StageModel) -> None:
        self.worker = Worker(model)
        self.config, self.device = model.config, model.device
        self.kv_bytes_per_row, self.weight_bytes = model.kv_bytes_per_row, model.weight_bytes
        self._ends = (model.first_layer, model.last_layer, model.lm_head is not None)

    def owned_hidden_states(self, layers: Collection[int]) -> tuple[int, ...]:
        """See StageBackend."""
        first, last, with_norm = self._ends
        return tuple(n for n in layers if first <= n < last or (n == -1 and with_norm))

    def new_cache(self, capacity: int, *, stable_context: int | None = None) -> RemoteCache:
        """See StageBackend."""
        cache = RemoteCache(self.worker, new_number(), capacity)
        self.worker.inbox.put(("new", (cache._number, capacity, stable_context), None))
        return cache

    def run(
        self,
        requests: Sequence[RequestRows[RemoteCache]],
        x: Tensor,
        *,
        aux_hidden_state_layers: Collection[int] = (),
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """See StageBackend."""
        rows = []
        for one in requests:
            above = None if one.parents is None else list(one.parents)
            one.cache.add(len(one.positions), to_tree=above is not None)
            rows.append((one.cache._number, list(one.positions), above))
        hidden, taps = self._ask("run", rows, x.clone(), set(aux_hidden_state_layers))
        return hidden.clone(), {layer: own.clone() for layer, own in taps.items()}

    def logits(self, hidden: Tensor, *, batch_invariant: bool = False) -> Tensor:
        """See StageBackend."""
        found: Tensor = self._ask("logits", hidden.clone(), batch_invariant)
        return found.clone()

    def num_caches(self) -> int:
        """That are held over there, once all commands so far are done."""
        return int(self._ask("count"))

    def end(self) -> None:
        """The thread is not needed any more."""
        self.worker.inbox.put(("end", (), None))

    def _ask(self, name: str, *values: Any) -> Any:
        answer: Queue[Any] = Queue()
        self.worker.inbox.put((name, values, answer))
        found = answer.get(timeout=ANSWER_TIMEOUT_S)
        if isinstance(found, Exception):
            raise found
        return found
