"""Engine: whatever answers requests, seen by its clients: the CLI, `LLM`, the benchmark, a server.

Five engines have this interface: a head with local stage processes, a cluster of joined devices, a
client of a head elsewhere, a simulated pipeline, and the target model alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from flowspec.engine.stream import Stream
from flowspec.request import Request, RequestOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class StageStatus:
    """Totals of one stage since it started; times in seconds, memory in bytes."""

    busy_s: float = 0.0
    num_segments: int = 0
    num_rows_run: int = 0
    num_rows_pruned: int = 0
    num_requests: int = 0  # caches held now, those kept for a next turn included
    kv_tokens_used: int = 0
    peak_memory_bytes: int = 0  # 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningProgress:
    """The requests that run now, taken together. Times in seconds of the engine's clock."""

    num_decoded: int = 0  # tokens after each one's first
    num_verdicts: int = 0
    first_token_at: float = 0.0  # the earliest; 0: none has come


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """An engine now. `why` says why it is not healthy."""

    healthy: bool = True
    why: str = ""
    model: str = ""
    num_stages: int = 0
    max_context: int = 0  # tokens of prompt and answer together
    strategy: str = ""  # of requests that name none
    drafters: tuple[str, ...] = ()  # that are loaded
    num_running: int = 0
    num_waiting: int = 0
    num_finished: int = 0
    num_failed: int = 0
    progress: RunningProgress = RunningProgress()
    stages: Mapping[int, StageStatus] = field(default_factory=dict)  # by rank


class Engine(Protocol):
    """Answers requests, several at once. Every method may be called from any thread."""

    def submit(self, request: Request) -> Stream:
        """Begin with a request while others run.

        Raises ValueError for what is wrong with it and known at once, ClusterError where the
        engine is closed or has failed. Everything else comes in the output's `error`.
        """

    def status(self) -> EngineStatus:
        """The engine now. Raises ClusterError where it cannot be asked."""

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for the open ones; whether all of them have ended."""

    def forget(self) -> None:
        """Forget what was learnt of costs and acceptance, for a measurement.

        Raises ValueError where requests are open.
        """

    def close(self) -> None:
        """End every process that the engine has started; open requests end. Safe to call twice."""


def generate(engine: Engine, request: Request) -> RequestOutput:
    """The whole answer to one request."""
    return engine.submit(request).result()


def generate_all(engine: Engine, requests: Sequence[Request]) -> list[RequestOutput]:
    """The whole answers to requests that run at once, in their order."""
    streams = [engine.submit(request) for request in requests]
    return [stream.result() for stream in streams]
