"""PrefixCache: finished requests whose committed rows stay on the stages for a next turn."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from flowspec.head.request_state import RequestState
from flowspec.runtime.failures import Failures


@dataclass(slots=True)
class PrefixCache:
    """Holds at most `max_size` finished requests, oldest first."""

    max_size: int = 0
    requests: dict[int, RequestState] = field(default_factory=dict)
    failures: Failures = field(default_factory=Failures)  # of the head

    def __len__(self) -> int:
        return len(self.requests)

    def __contains__(self, request: object) -> bool:
        return request in self.requests

    def __iter__(self) -> Iterator[RequestState]:
        return iter(self.requests.values())

    @property
    def num_kv_tokens(self) -> int:
        """Tokens that the cached requests take on every stage."""
        return sum(request.num_kv_tokens for request in self)

    def find(self, new: RequestState) -> tuple[RequestState | None, int]:
        """Return the request that shares the longest prefix with `new`, and the prefix's length.

        Only requests of equal decoding count, since `new` goes on with their drafter session.
        """
        best: RequestState | None = None
        longest = 0
        for request in self:
            if request.decoding != new.decoding:
                continue
            with self.failures.of(request.id):
                length = request.num_reusable(new.all_tokens)
                if length > longest:
                    best, longest = request, length
        return best, longest

    def is_next_turn(self, request: RequestState, num_cached_tokens: int) -> bool:
        """Return whether a request that reuses `num_cached_tokens` of `request` is its next turn.

        Otherwise both only begin alike, as all prompts of one chat template do.
        """
        return 2 * num_cached_tokens >= request.num_committed

    def add(self, request: RequestState) -> list[int]:
        """Keep a finished request; return the ids of those evicted for it."""
        self.requests[request.id] = request
        gone = list(self.requests)[: max(0, len(self.requests) - self.max_size)]
        for old in gone:
            del self.requests[old]
        return gone

    def remove(self, request: int) -> RequestState | None:
        """Remove and return a request; None if it was not cached."""
        return self.requests.pop(request, None)

    def clear(self) -> None:
        """Forget all requests: the stages and their rows are lost."""
        self.requests.clear()
