"""PrefixCache: finished requests whose committed rows stay on the stages for a next turn."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from flowspec.head.request_state import RequestState
from flowspec.runtime.failures import Failures


@dataclass(slots=True)
class PrefixCache:
    """At most `max_size` finished requests, oldest first."""

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
        """What their caches take on every stage."""
        return sum(request.num_kv_tokens for request in self)

    def find(self, new: RequestState) -> tuple[RequestState | None, int]:
        """The request with the longest beginning in common with `new`, and its length.

        Only one of equal decoding has a drafter session that `new` can go on with.
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
        """Whether a request that reuses `num_cached_tokens` of `request` is its next turn.

        Otherwise they only begin alike, as all prompts of one chat template do.
        """
        return 2 * num_cached_tokens >= request.num_committed

    def add(self, request: RequestState) -> list[int]:
        """Keep a finished request; returns the ids of those given up for it."""
        self.requests[request.id] = request
        gone = list(self.requests)[: max(0, len(self.requests) - self.max_size)]
        for old in gone:
            del self.requests[old]
        return gone

    def remove(self, request: int) -> RequestState | None:
        """Give one up; None: it was not kept."""
        return self.requests.pop(request, None)

    def clear(self) -> None:
        """The stages are lost, and all rows with them."""
        self.requests.clear()
