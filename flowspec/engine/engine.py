"""Engine: the interface through which the CLI, `LLM`, the benchmark and servers run requests.

Five engines have it: a head with local stage processes, a cluster of joined devices, a client of a
head elsewhere, a simulated pipeline, and the target model alone.
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
    num_requests: int = 0  # caches held now, cached requests included
    kv_tokens_used: int = 0
    peak_memory_bytes: int = 0  # 0: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningProgress:
    """The running requests taken together. Times are in seconds of the engine's clock."""

    num_decoded: int = 0  # tokens after the first one of each request
    num_verdicts: int = 0
    first_token_at: float = 0.0  # the earliest; 0: none has come


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStatus:
    """The present status of an engine; `why` explains why it is not healthy."""

    healthy: bool = True
    why: str = ""
    model: str = ""
    num_stages: int = 0
    max_context: int = 0  # tokens of prompt and answer together
    strategy: str = ""  # default strategy
    drafters: tuple[str, ...] = ()  # loaded drafters
    num_running: int = 0
    num_waiting: int = 0
    num_finished: int = 0
    num_failed: int = 0
    progress: RunningProgress = RunningProgress()
    stages: Mapping[int, StageStatus] = field(default_factory=dict)  # by rank


class Engine(Protocol):
    """Answers requests, several at once. Every method may be called from any thread."""

    def submit(self, request: Request) -> Stream:
        """Begin a request while others run.

        Raises ValueError for errors in the request that are known at once, and ClusterError if the
        engine is closed or has failed. Other errors come in the output's `error`.
        """

    def status(self) -> EngineStatus:
        """Return the present status. Raises ClusterError if the engine cannot be asked."""

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for the open ones; return whether all have ended."""

    def forget(self) -> None:
        """Forget learnt costs and acceptance, for a measurement.

        Raises ValueError if requests are open.
        """

    def close(self) -> None:
        """End all processes of the engine and all open requests. It is safe to call twice."""


def generate(engine: Engine, request: Request) -> RequestOutput:
    """Return the whole answer to one request."""
    return engine.submit(request).result()


def generate_all(engine: Engine, requests: Sequence[Request]) -> list[RequestOutput]:
    """Return the whole answers to requests that run at once, in their order."""
    streams = [engine.submit(request) for request in requests]
    return [stream.result() for stream in streams]
