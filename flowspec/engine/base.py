"""A running cluster, seen by whoever wants text from it: real processes or simulated."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from flowspec.config import DecodeConfig
from flowspec.protocol.messages import Status, Tokens
from flowspec.request import Completion, Request
from flowspec.speculation.strategies import StrategySpec


class Cluster(Protocol):
    """Serves requests, several at once where asked."""

    def configure(self, spec: StrategySpec, config: DecodeConfig) -> None:
        """Use another strategy for the requests to come; nothing may be running."""

    def serve(self, requests: Sequence[Request]) -> Iterator[Tokens | Completion]:
        """All of them at once: tokens as they are accepted, each one's Completion last.

        A caller that turns away early cancels what is left. Raises ClusterError (with the tokens
        accepted so far) where a process or link failed.
        """

    def cancel(self, request: int) -> None:
        """End a request that is being served; its Completion says `cancelled`."""

    def statuses(self) -> dict[int, Status]:
        """The newest status of each stage."""

    def close(self) -> None:
        """End every process."""


def generate(cluster: Cluster, request: Request) -> Completion:
    """The whole answer."""
    return generate_all(cluster, [request])[0]


def generate_all(cluster: Cluster, requests: Sequence[Request]) -> list[Completion]:
    """The whole answers of requests served at once, in their order."""
    done = {e.request: e for e in cluster.serve(requests) if isinstance(e, Completion)}
    return [done[request.id] for request in requests]
