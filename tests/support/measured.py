"""A head that answers as it is told, for the benchmark on a cluster of devices."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from flowspec.bench.answering_remote import MeasuredCluster, RemoteBench
from flowspec.bench.experiment import Plan, make_cases
from flowspec.bench.prompts import Prompt
from flowspec.bench.records import SampleFile
from flowspec.bench.runner import RunOutcome, run_plan
from flowspec.engine.stream import Notice, Stream
from flowspec.request import (
    DecodeStats,
    Failure,
    FailureKind,
    FinishReason,
    Request,
    RequestOutput,
    StageCounts,
    TokensOut,
)

PROMPTS = (Prompt("1", "qa", ("who?",)), Prompt("2", "qa", ("what?", "and then?")))
COUNTS = {
    1: StageCounts(num_rows_run=14, num_rows_pruned=0, busy_s=0.5),
    2: StageCounts(num_rows_run=13, num_rows_pruned=2, busy_s=0.25),
}


def stats(num_tokens: int = 5, **changes: Any) -> DecodeStats:
    """A token every quarter of a second from 1 s on; the drafter works for a fifth of the time."""
    found = DecodeStats(num_rows_sent=9, num_verdicts=4, draft_s=0.2)
    for number in range(num_tokens):
        found.count_tokens(1, 1.0 + number / 4)
    found.finished_at = found.last_token_at
    return replace(found, **changes)


def device(name: str, rank: int, first: int, last: int, num_kv_tokens: int = 0) -> Any:
    """A device as the head's status describes it; rank 0 holds no layers."""
    layers = (first, last) if rank else None
    return SimpleNamespace(name=name, rank=rank, layers=layers, num_kv_tokens=num_kv_tokens)


ADA_BOB = (device("ada", 1, 0, 4), device("bob", 2, 4, 8))
DEVICES = ("ada: layers 0 to 3", "bob: layers 4 to 7")  # these, as a sample has them


@dataclass(kw_only=True)
class Reply:
    """An answer of the head, and what its status says from then on."""

    stats: DecodeStats = field(default_factory=stats)
    counts: Mapping[int, StageCounts] | None = field(default_factory=lambda: COUNTS)
    tokens: tuple[int, ...] = (1, 2, 3, 4, 5)
    text: str = "so"
    reason: FinishReason = FinishReason.LENGTH
    num_prompt_tokens: int = 9
    error: Failure | None = None
    notices: Sequence[str] = ()
    epochs: tuple[int, int] = (1, 1)  # first and last
    status: Mapping[str, Any] = field(default_factory=dict)  # changes of it


@dataclass(kw_only=True)
class ScriptedHead:
    """A remote engine whose head gives `replies` in turn, or else the same answer every time.

    `fails_at` is the number of the question at which the head is gone. `wrong` names the strategy
    whose text differs. The others are questions that the head does not take.
    """

    replies: Sequence[Reply] = ()
    answered: Reply = field(default_factory=Reply)
    fails_at: int = 0
    wrong: str = ""
    too_long: Sequence[str] = ()
    too_large: Sequence[tuple[str, str]] = ()  # strategy and question
    refused: Sequence[str] = ()  # by the chat template
    busy: int = 0  # tries to forget that find other requests open
    num_others: int = 0  # requests of other clients between two of the benchmark's
    where: str = "head at here:7000"
    asked: list[Request] = field(default_factory=list)
    done: list[str] = field(default_factory=list)  # strategies, and forget
    epochs: dict[int, tuple[int, int]] = field(default_factory=dict)
    now: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._numbers, self._replies = count(1), iter(self.replies)
        status = {"healthy": True, "why": "", "epoch": 1, "max_context": 100, "devices": ADA_BOB}
        counts = dict.fromkeys(("done", "failed", "active", "waiting"), 0)
        self.now = {**status, **{f"requests_{k}": v for k, v in counts.items()}, **self.now}

    @property
    def by_strategy(self) -> list[str]:
        """The strategies of the questions, in order."""
        return [one for one in self.done if one != "forget"]

    def words(self, number: int) -> tuple[str, ...]:
        """The conversation of question `number`, from 0."""
        return tuple(turn["content"] for turn in self.asked[number].prompt)  # type: ignore[index]

    def cluster_status(self) -> Any:
        """Return the status as it is now."""
        return SimpleNamespace(**self.now)

    def forget(self) -> None:
        """Forget, or refuse while others are served."""
        if self.busy:
            self.busy -= 1
            raise ValueError("1 request is open")
        self.done.append("forget")

    def submit(self, request: Request) -> Stream:
        """Answer at once."""
        assert request.decoding is not None
        assert request.exclusive
        self.asked.append(request)
        self.done.append(request.decoding.strategy)
        number = next(self._numbers)
        reply = self._reply(request)
        counts = reply.counts
        stream = Stream(
            number,
            abort=lambda request: None,
            ask_counts=lambda request: stream.put_counts(counts),
        )
        self.epochs[number] = reply.epochs
        self.now["requests_done"] += 1 + self.num_others
        self.now |= reply.status
        for text in reply.notices:
            stream.put(Notice(text=text))
        if reply.tokens:
            stream.put(TokensOut(request=number, tokens=reply.tokens, text=reply.text))
        output = RequestOutput(
            request=number,
            tokens=reply.tokens,
            text=reply.text,
            reason=reply.reason if reply.error is None else FinishReason.ERROR,
            stats=reply.stats,
            error=reply.error,
            num_prompt_tokens=reply.num_prompt_tokens,
        )
        stream.put(output)
        return stream

    def _reply(self, request: Request) -> Reply:
        if (found := next(self._replies, None)) is not None:
            return found
        assert request.decoding is not None
        last = request.prompt[-1]["content"]  # type: ignore[index, call-overload]
        strategy = request.decoding.strategy
        if len(self.asked) == self.fails_at:
            return no_answer("connection lost", FailureKind.FAILED, rank=0)
        if last in self.too_long:
            return no_answer("the prompt has 4000 tokens", FailureKind.REFUSED, num_prompt=4000)
        if last in self.refused:
            return no_answer("the template says no", FailureKind.BAD_PROMPT, num_prompt=0)
        if (strategy, last) in self.too_large:
            return no_answer("it needs 90 rows", FailureKind.TOO_LARGE)
        tokens = (1, 2, 3, 4, 6 if strategy == self.wrong else 5)
        return replace(self.answered, tokens=tokens, text=f"answer to {last}")


def no_answer(
    cause: str, kind: FailureKind, *, rank: int | None = None, num_prompt: int = 9
) -> Reply:
    """A request that ends with an error and no tokens."""
    failure = Failure(cause=cause, kind=kind, rank=rank)
    return Reply(tokens=(), text="", error=failure, num_prompt_tokens=num_prompt)


def measured(head: ScriptedHead, say: Callable[[str], None] = lambda text: None) -> MeasuredCluster:
    """The head's cluster as the benchmark sees it."""
    return MeasuredCluster(head, say)  # type: ignore[arg-type]


def make_plan(*strategies: str, **changes: Any) -> Plan:
    """A plan for a cluster of two devices."""
    values: dict[str, Any] = {
        "cluster": "here:7000",
        "model": "big",
        "table": "main",
        "stages": 2,
        "cases": make_cases(strategies, ("eagle",), {}, {}),
        "datasets": {"qa": PROMPTS},
        "temperatures": (0.0,),
        "seeds": (1,),
        "max_tokens": 8,
        "target": None,
        "real": True,
        "warm": True,
        "remote": {"devices": ["ada", "bob"], "dtype": "float16"},
        "sources": {"code": "c", "target": "t", "eagle": "e"},
    }
    return Plan(**{**values, **changes})


def run(plan: Plan, head: ScriptedHead, out: Path) -> RunOutcome:
    """Run what is missing in `out`."""
    bench = RemoteBench(plan, measured(head))
    with SampleFile(out) as file:
        return run_plan(plan, file, jobs=1, tell=lambda now: None, bench=bench)
