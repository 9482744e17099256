"""A running cluster, seen by whoever wants text from it: real processes or simulated."""

from collections.abc import Iterator
from typing import Protocol

from flowspec.config import DecodeConfig
from flowspec.request import Completion, Request
from flowspec.strategies import StrategySpec
from flowspec.wire import Status, Tokens


class Cluster(Protocol):
    """Serves one request at a time."""

    def configure(self, spec: StrategySpec, config: DecodeConfig) -> None:
        """Use another strategy for the requests to come; nothing may be running."""

    def stream(self, request: Request) -> Iterator[Tokens | Completion]:
        """Tokens as they are accepted, the Completion last.

        Raises ClusterError (with the tokens accepted so far) where a process or link failed.
        """

    def cancel(self, request: int) -> None:
        """End a request that is being streamed; its Completion says `cancelled`."""

    def statuses(self) -> dict[int, Status]:
        """The newest status of each stage."""

    def close(self) -> None:
        """End every process."""


def generate(cluster: Cluster, request: Request) -> Completion:
    """The whole answer."""
    for event in cluster.stream(request):
        if isinstance(event, Completion):
            return event
    raise AssertionError("a stream ends with its Completion")
