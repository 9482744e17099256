"""Requests, sampling parameters, results, statistics and errors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import ceil, exp, log
from typing import Annotated, NewType, TypeAlias, TypeVar

from pydantic import FailFast, Field

StopText: TypeAlias = Annotated[str, Field(max_length=200)]

ACCURACY = 0.01
SHORTEST_S = 1e-6  # shorter times count as 0
LONGEST_S = 1e6
_RATIO = log((1 + ACCURACY) / (1 - ACCURACY))


@dataclass(slots=True)
class Latencies:
    """Counts of times by bin; there are at most about 1,400 bins."""

    bins: dict[int, int] = field(default_factory=dict)
    num_zero: int = 0
    count: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        """Count `count` times of `seconds` each."""
        self.count += count
        if seconds < SHORTEST_S:
            self.num_zero += count
            return
        index = ceil(log(min(seconds, LONGEST_S)) / _RATIO)
        self.bins[index] = self.bins.get(index, 0) + count

    def quantile(self, share: float) -> float:
        """Return the time that a `share` (0 to 1) of all does not exceed; 0 if there are none."""
        assert 0.0 <= share <= 1.0
        seen, wanted = self.num_zero, max(1, ceil(share * self.count - 1e-9))
        if seen >= wanted or not self.count:
            return 0.0
        for index in sorted(self.bins):
            seen += self.bins[index]
            if seen >= wanted:
                break
        # within ACCURACY of every time in the bin
        return exp(index * _RATIO) * (1 - ACCURACY)


NodeId = NewType("NodeId", int)
NO_NODE = NodeId(-1)  # the parent of a request's first token
LONGEST_NAME = 64  # characters of the name of an acceptance rule
LONGEST_CONTEXT = 1 << 24  # tokens of prompt and answer; no model was made for so many


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from the logits; at temperature 0 the filters do nothing.

    Filters apply in this order: temperature, top-k, top-p, min-p (speculation/processors/).
    `acceptance` names the rule that chooses a token (speculation/acceptance/); at temperature 0 it
    is greedy. `max_tokens` and `stop` are for callers who know them from vLLM: a Request takes them
    over as its own `max_new_tokens` and `stop`.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # relative to the most likely token's probability
    seed: int = 0
    acceptance: Annotated[str, Field(max_length=64)] = "gumbel_coupled"
    max_tokens: int | None = None
    stop: Annotated[tuple[StopText, ...], Field(max_length=16), FailFast()] = ()

    def __post_init__(self) -> None:
        if not (0 < len(self.acceptance) <= LONGEST_NAME and self.acceptance.isascii()):
            raise ValueError(
                f"acceptance must be the name of a rule, 1 to {LONGEST_NAME} ASCII characters, not "
                f"{self.acceptance[:LONGEST_NAME]!a}"
            )
        if not 0.0 <= self.temperature <= 100.0:
            raise ValueError(f"temperature must be between 0 and 100, not {self.temperature}")
        if 0.0 < self.temperature < 1e-9:
            raise ValueError(f"temperature {self.temperature} is too small; 0 is greedy")
        if not 0 <= self.top_k < 2**31:
            raise ValueError(f"top_k must be 0 (off) or more, below 2**31, not {self.top_k}")
        if not 0.0 < self.top_p <= 1.0:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0.0 <= self.min_p < 1.0:
            raise ValueError(f"min_p must be at least 0 and below 1, not {self.min_p}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, not {self.seed}")


Parameter: TypeAlias = bool | int | float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decoding:
    """How a request is decoded. It changes the speed and never the text.

    `parameters` are those of the strategy, by name; the others have its defaults. `drafter` names a
    drafter that the engine has loaded; "" is the first one. The parameters `calibrate` and `merge`
    belong to the drafter's tree.
    """

    strategy: str = "streaming"
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    drafter: str = ""


ChatMessage: TypeAlias = Mapping[str, str]  # a message with role and content


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """One generation that is asked for.

    `prompt` is token ids, a text, or the messages of a conversation; an engine makes tokens of the
    latter two. The engine sets `id`. `stop` strings end the text and are left out of it. If
    `decoding` or `eos_token_ids` is None, the engine's own applies. An `exclusive` request runs
    alone.
    """

    prompt: tuple[int, ...] | str | Sequence[ChatMessage]
    id: int = 0
    sampling: SamplingParams = SamplingParams()
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()
    eos_token_ids: tuple[int, ...] | None = None
    decoding: Decoding | None = None
    exclusive: bool = False

    def __post_init__(self) -> None:
        if not self.prompt:
            raise ValueError("the prompt has no tokens; give at least one")
        self._take_limits()
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, not {self.max_new_tokens}")
        if any(not text for text in self.stop):
            raise ValueError("a stop string must not be empty")

    def _take_limits(self) -> None:
        """Move `max_tokens` and `stop` out of the sampling parameters, if they are given."""
        sampling, stop = self.sampling, self.sampling.stop
        if sampling.max_tokens is None and not stop:
            return
        if sampling.max_tokens is not None:
            object.__setattr__(self, "max_new_tokens", sampling.max_tokens)
        if stop:
            object.__setattr__(self, "stop", (stop,) if isinstance(stop, str) else tuple(stop))
        object.__setattr__(self, "sampling", replace(sampling, max_tokens=None, stop=()))

    @property
    def prompt_tokens(self) -> tuple[int, ...]:
        """The prompt's token ids, once an engine has made them."""
        assert isinstance(self.prompt, tuple), "the prompt is not tokens yet"
        return self.prompt  # type: ignore[return-value]


class FinishReason(str, Enum):
    """Why a generation ended."""

    STOP = "stop"  # EOS or a stop string
    LENGTH = "length"  # max_new_tokens or the context is full
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(slots=True, kw_only=True)
class DecodeStats:
    """Counts of one request as the head saw them; times in seconds of the event loop's clock."""

    num_tokens: int = 0
    num_verdicts: int = 0
    num_segments: int = 0
    num_rows_sent: int = 0
    num_draft_forwards: int = 0
    draft_s: float = 0.0  # time of these, without those of the prompt
    num_prompt_reused: int = 0  # prompt tokens whose rows came from an earlier turn
    run_length: int = 0  # tokens found in the tree since the last miss
    runs: list[int] = field(default_factory=list)  # finished runs, each ended by a miss
    num_not_drafted: int = 0  # tokens after the first that the tree did not hold
    num_not_in_flight: int = 0  # tokens that it held, but that were not sent yet
    num_nodes_alive: int = 0  # summed over verdicts, at the arrival of each
    inter_token: Latencies = field(default_factory=Latencies)  # tokens that come together: 0 apart
    submitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    finished_at: float = 0.0
    num_resumes: int = 0  # times the prefix was computed again after the loss of a stage
    resume_s: float = 0.0  # from a loss to the next token; before the first one it is no outage
    num_prefills: int = 0  # verdicts on a whole prefix: the prompt's, and one per resume

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per verdict (tau): the accepted drafts and the one that the target adds.

        The first token comes from the prompt and counts for no verdict, as does the first after a
        resume. Strategies that ask for more than one verdict per round have a smaller tau at the
        same acceptance.
        """
        num_decoded = self.num_tokens - max(1, self.num_prefills)
        return num_decoded / self.num_verdicts if self.num_verdicts else 0.0

    def count_verdict(self, num_drafted: int, *, missed: bool, unsent: bool = False) -> None:
        """Count a verdict that found `num_drafted` new tokens in the tree.

        `missed`: one more token was outside the tree. `unsent`: the last of those found was not in
        flight.
        """
        self.num_verdicts += 1
        self.run_length += num_drafted
        self.num_not_in_flight += unsent
        if missed:
            self.num_not_drafted += 1
            self.runs.append(self.run_length)
            self.run_length = 0

    def count_tokens(self, count: int, now: float) -> None:
        """Count tokens that came together; the first of all follows the prompt, not a token."""
        if not count:
            return
        if self.num_tokens:
            self.inter_token.add(now - self.last_token_at)
        else:
            self.first_token_at = now
        self.inter_token.add(0.0, count - 1)
        self.last_token_at = now
        self.num_tokens += count

    @property
    def time_to_first_token_s(self) -> float:
        """Seconds from the request's submission; waiting for its turn counts."""
        return max(0.0, self.first_token_at - self.submitted_at)

    @property
    def mu(self) -> tuple[float, float]:
        """Shares of the tokens after the first that were in no in-flight branch at their verdict.

        The two shares are: not drafted, and drafted but not sent.
        """
        after_first = max(1, self.num_tokens - 1)
        return self.num_not_drafted / after_first, self.num_not_in_flight / after_first

    @property
    def mean_nodes_alive(self) -> float:
        """Mean size of the tree at the arrival of a verdict."""
        return self.num_nodes_alive / self.num_verdicts if self.num_verdicts else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: tokens after the first over the time since the first, without outages.

        It is 0 below two tokens, since a request may end before its first one.
        """
        if self.num_tokens < 2:
            return 0.0
        elapsed = self.finished_at - self.first_token_at - self.resume_s
        return (self.num_tokens - 1) / elapsed if elapsed > 0 else 0.0

    def acceptance_by_depth(self) -> list[float]:
        """alpha_d, d = 1, 2, ...: the share of the runs that reached depth d-1 that reach d.

        A run is the tokens found in the tree between two misses, whatever the verdicts between. The
        run that the end of the text cuts off counts as far as it went.
        """
        last = self.run_length
        alphas = []
        for depth in range(1, max([*self.runs, last]) + 1):
            reached = sum(run >= depth - 1 for run in self.runs) + (last >= depth)
            alphas.append((sum(run >= depth for run in self.runs) + (last >= depth)) / reached)
        return alphas


class FailureKind(str, Enum):
    """The kind of a failure, which decides how to react to it."""

    REFUSED = "refused"  # the request was wrong; another one may be served
    BAD_PROMPT = "bad_prompt"  # the chat template or the tokenizer does not take the prompt
    TOO_LARGE = "too_large"  # it exceeds the stages' memory
    FAILED = "failed"  # the head or a device failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request ended with an error, and where: `rank` 0 is the head, k is stage k.

    `device` is the name of the device that holds the stage, if it has one.
    """

    cause: str
    kind: FailureKind = FailureKind.FAILED
    rank: int | None = None  # None: no process failed, the request itself is at fault
    device: str = ""

    @property
    def place(self) -> str:
        """The name of the process that failed, for users; empty if none did."""
        if self.rank is None:
            return ""
        name = rank_name(self.rank)
        return f"{name} on {self.device}" if self.device else name

    def __str__(self) -> str:
        return f"{self.place}: {self.cause}" if self.rank is not None else self.cause

    def exception(self) -> "ValueError | ClusterError":
        """Return a ValueError if the request is at fault, otherwise a ClusterError."""
        if self.rank is None:
            return ValueError(self.cause)
        return ClusterError(self.place, self.cause, rank=self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class TokensOut:
    """Newly accepted tokens of a request, and the text that is now certain."""

    request: int
    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestOutput:
    """The result of a generation. `text` ends before a stop string; `tokens` excludes nothing."""

    request: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    reason: FinishReason
    stats: DecodeStats = field(default_factory=DecodeStats)
    error: Failure | None = None
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCounts:
    """The work of one stage for one finished request; times in seconds."""

    num_rows_run: int = 0  # prompt rows included
    num_rows_pruned: int = 0  # rows that were dead before this stage ran them
    busy_s: float = 0.0  # share of the forwards with rows of the draft tree


E = TypeVar("E", bound="ClusterError")


class ClusterError(RuntimeError):
    """A device or link failed; it names the process and the cause.

    `rank` is the stage (0: the head; None: no process of the pipeline). `tokens` keeps the
    generated tokens, by request.
    """

    def __init__(
        self,
        where: str,
        cause: str,
        tokens: Mapping[int, tuple[int, ...]] | None = None,
        *,
        rank: int | None = None,
    ) -> None:
        super().__init__(f"{where}: {cause}")
        self.where, self.cause, self.tokens = where, cause, dict(tokens or {})
        self.rank = rank

    @classmethod
    def of_rank(cls: type[E], rank: int, cause: str) -> E:
        """Return the failure of one process of the pipeline: 0 is the head, k stage k."""
        return cls(rank_name(rank), cause, rank=rank)


class RefusedError(ClusterError):
    """The head will never accept this client or device: its token or version differs."""


def cause_of(error: Exception) -> str:
    """Return the cause for another process: a ValueError's text; others with their type's name."""
    text, kind = str(error), type(error).__name__
    if not text:
        return kind
    return text if type(error) is ValueError else f"{kind}: {text}"


def check_token_ids(
    ids: Sequence[int],
    vocab_size: int,
    *,
    of: str = "the prompt",
    text_of: Callable[[int], str] = lambda token: "",
) -> None:
    """Raise ValueError if a token id has no row in the model's embedding.

    `text_of` gives a token's text for the message, "" if it is not known.
    """
    if not ids or (min(ids) >= 0 and max(ids) < vocab_size):
        return
    token = next(one for one in ids if not 0 <= one < vocab_size)
    name = f"{text!r} (id {token})" if (text := text_of(token)) else f"id {token}"
    raise ValueError(
        f"{of} has the token {name}, the model's vocabulary has {vocab_size} tokens, ids 0 to "
        f"{vocab_size - 1}; leave that token out, or use the tokenizer that belongs to the model"
    )


def rank_name(rank: int) -> str:
    """Return the name of rank `rank`, for users."""
    return {-1: "client", 0: "head"}.get(rank, f"stage {rank}")
