"""What a user asks for and what comes back: parameters, requests, completions, statistics."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from math import ceil, exp, log
from typing import Annotated, NewType, TypeAlias, TypeVar

from pydantic import FailFast, Field

StopText: TypeAlias = Annotated[str, Field(max_length=200)]

ACCURACY = 0.01
SHORTEST_S = 1e-6  # what is shorter counts as 0
LONGEST_S = 1e6
_RATIO = log((1 + ACCURACY) / (1 - ACCURACY))


@dataclass(slots=True)
class Latencies:
    """How many times fell into each bin; at most about 1,400 bins."""

    bins: dict[int, int] = field(default_factory=dict)
    num_zero: int = 0
    count: int = 0

    def add(self, seconds: float, count: int = 1) -> None:
        """Something took `seconds`, `count` times."""
        self.count += count
        if seconds < SHORTEST_S:
            self.num_zero += count
            return
        index = ceil(log(min(seconds, LONGEST_S)) / _RATIO)
        self.bins[index] = self.bins.get(index, 0) + count

    def quantile(self, share: float) -> float:
        """The time that at least `share` (0 to 1) of all do not exceed; 0 where there are none."""
        assert 0.0 <= share <= 1.0
        seen, wanted = self.num_zero, max(1, ceil(share * self.count - 1e-9))
        if seen >= wanted or not self.count:
            return 0.0
        for index in sorted(self.bins):
            seen += self.bins[index]
            if seen >= wanted:
                break
        # of a bin's times none is further than ACCURACY from here
        return exp(index * _RATIO) * (1 - ACCURACY)


NodeId = NewType("NodeId", int)
NO_NODE = NodeId(-1)  # the parent of a request's first token
LONGEST_NAME = 64  # characters of the name of an acceptance rule
LONGEST_CONTEXT = 1 << 24  # tokens of a prompt and its answer; no model was made for so many


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the next token is chosen from the logits; at temperature 0 the filters do nothing.

    Filters apply in this order: temperature, top-k, top-p, min-p (speculation/processors/).
    `acceptance` names the rule by which a token is chosen (speculation/acceptance/); at temperature
    0 it is greedy. `max_tokens` and `stop` are for callers who know them from vLLM: a Request takes
    them for its own `max_new_tokens` and `stop`.
    """

    temperature: float = 0.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0  # of the most likely token's probability
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

    `parameters` are those of the strategy, by name; the others have its defaults. `drafter` names
    a drafter that the engine has loaded; "" is the first one. `calibrate` and `merge` of the
    parameters belong to the drafter's tree.
    """

    strategy: str = "streaming"
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    drafter: str = ""


ChatMessage: TypeAlias = Mapping[str, str]  # of a conversation: role and content


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What is asked: one generation.

    `prompt` is token ids, a text, or the messages of a conversation; an engine makes tokens of the
    latter two. The engine sets `id`. `stop` strings end the text and are left out of it. None of
    `decoding` and `eos_token_ids` means the engine's own. An `exclusive` request runs alone.
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
        """Take `max_tokens` and `stop` out of the sampling parameters, where they are given."""
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
    """Counts of one request as the head saw them; times in seconds of the driver's clock."""

    num_tokens: int = 0
    num_verdicts: int = 0
    num_segments: int = 0
    num_rows_sent: int = 0
    num_draft_forwards: int = 0
    draft_s: float = 0.0  # that these took, but for those of the prompt
    num_prompt_reused: int = 0  # prompt tokens that an earlier turn had computed already
    run_length: int = 0  # tokens found in the tree since the last one that was not
    runs: list[int] = field(default_factory=list)  # finished runs, each ended by a miss
    num_not_drafted: int = 0  # tokens after the first that the tree did not hold
    num_not_in_flight: int = 0  # that it held, but that were not sent yet
    num_nodes_alive: int = 0  # summed over verdicts, as each one came
    inter_token: Latencies = field(default_factory=Latencies)  # tokens that come together: 0 apart
    submitted_at: float = 0.0
    first_token_at: float = 0.0
    last_token_at: float = 0.0
    finished_at: float = 0.0
    num_resumes: int = 0  # times the prefix was computed again because a stage was lost
    resume_s: float = 0.0  # from a loss to the next token; before the first one it is no outage
    num_prefills: int = 0  # verdicts on a whole prefix: the prompt's, and one per resume

    @property
    def mean_accepted_length(self) -> float:
        """Tokens per verdict (tau): the accepted drafts and the one the target adds.

        The first token comes from the prompt and counts for no verdict, as does the first after a
        resume. Strategies that ask for a verdict more often than once a round have a smaller tau
        at the same acceptance.
        """
        num_decoded = self.num_tokens - max(1, self.num_prefills)
        return num_decoded / self.num_verdicts if self.num_verdicts else 0.0

    def count_verdict(self, num_drafted: int, *, missed: bool, unsent: bool = False) -> None:
        """A verdict found `num_drafted` new tokens in the tree; `missed`: and then one outside.

        `unsent`: the last of those found was not in flight.
        """
        self.num_verdicts += 1
        self.run_length += num_drafted
        self.num_not_in_flight += unsent
        if missed:
            self.num_not_drafted += 1
            self.runs.append(self.run_length)
            self.run_length = 0

    def count_tokens(self, count: int, now: float) -> None:
        """`count` tokens came together; the first of all comes after the prompt, not a token."""
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
        """From the request's coming; waiting for its turn counts."""
        return max(0.0, self.first_token_at - self.submitted_at)

    @property
    def mu(self) -> tuple[float, float]:
        """Shares of the tokens after the first that were in no branch in flight when their verdict
        came: not drafted, and drafted but not sent.
        """
        after_first = max(1, self.num_tokens - 1)
        return self.num_not_drafted / after_first, self.num_not_in_flight / after_first

    @property
    def mean_nodes_alive(self) -> float:
        """Size of the tree when a verdict came."""
        return self.num_nodes_alive / self.num_verdicts if self.num_verdicts else 0.0

    @property
    def tokens_per_s(self) -> float:
        """Decode speed: tokens after the first over the time since the first, less outages.

        0 below two tokens: a request may be over before its first one.
        """
        if self.num_tokens < 2:
            return 0.0
        elapsed = self.finished_at - self.first_token_at - self.resume_s
        return (self.num_tokens - 1) / elapsed if elapsed > 0 else 0.0

    def acceptance_by_depth(self) -> list[float]:
        """alpha_d, d = 1, 2, ...: of the runs that reached depth d-1, the share reaching d.

        A run is the tokens found in the tree between two misses, whatever the verdicts between.
        The run that the end of the text cut off counts as far as it went.
        """
        last = self.run_length
        alphas = []
        for depth in range(1, max([*self.runs, last]) + 1):
            reached = sum(run >= depth - 1 for run in self.runs) + (last >= depth)
            alphas.append((sum(run >= depth for run in self.runs) + (last >= depth)) / reached)
        return alphas


class FailureKind(str, Enum):
    """What kind of thing went wrong, for whoever has to react to it."""

    REFUSED = "refused"  # by what was asked; another request may be served
    BAD_PROMPT = "bad_prompt"  # the chat template or the tokenizer does not take the prompt
    TOO_LARGE = "too_large"  # the stages' memory can never hold it
    FAILED = "failed"  # the head or a device failed


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request ended with an error, and where: `rank` 0 is the head, k is stage k.

    `device` is the name of the device that holds the stage, where it has one.
    """

    cause: str
    kind: FailureKind = FailureKind.FAILED
    rank: int | None = None  # None: no process failed, the request itself is at fault
    device: str = ""

    @property
    def place(self) -> str:
        """How a person calls the process that failed; empty where none did."""
        if self.rank is None:
            return ""
        name = rank_name(self.rank)
        return f"{name} on {self.device}" if self.device else name

    def __str__(self) -> str:
        return f"{self.place}: {self.cause}" if self.rank is not None else self.cause

    def exception(self) -> "ValueError | ClusterError":
        """The exception that it stands for: the request's own fault, or a process's."""
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
    """What a generation gave. `text` ends before a stop string; `tokens` excludes nothing."""

    request: int
    tokens: tuple[int, ...] = ()
    text: str = ""
    reason: FinishReason
    stats: DecodeStats = field(default_factory=DecodeStats)
    error: Failure | None = None
    num_prompt_tokens: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCounts:
    """What one stage did for one request that is over; times in seconds."""

    num_rows_run: int = 0  # prompt rows included
    num_rows_pruned: int = 0  # dropped before this stage ran them
    busy_s: float = 0.0  # forwards in which rows of the draft tree took part, by their share


E = TypeVar("E", bound="ClusterError")


class ClusterError(RuntimeError):
    """A device or link failed: names the process and the cause.

    `rank` is the stage (0: the head; None: no process of the pipeline). `tokens` keeps what was
    generated, by request.
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
        """A failure of one process of the pipeline: 0 is the head, k stage k."""
        return cls(rank_name(rank), cause, rank=rank)


class RefusedError(ClusterError):
    """The head will never take this one: another token, another version."""


def cause_of(error: Exception) -> str:
    """For another process to tell: a ValueError is a sentence, others need their kind beside it."""
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
    """Raises ValueError where a token id has no row in the model's embedding.

    `text_of` gives a token's text for the message, "" where it is not known.
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
    """How a person calls rank `rank`."""
    return {-1: "client", 0: "head"}.get(rank, f"stage {rank}")
