"""The messages between head and stages in small, exact runs, as text.

It runs every strategy under the simulator with the integer model, in the SITUATIONS below. This
file depends on the current structure of the code; only the text that it makes is compared.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.message_text import MessageLog
from flowspec.engine.simulated import SimulatedEngine
from flowspec.head.head import Head
from flowspec.head.pipeline import Pipeline as HeadPipeline
from flowspec.head.scheduler import Scheduler
from flowspec.protocol.messages import DATA, AbortRequest, Message, Resume, Submit, Suspend
from flowspec.request import Decoding, Failure, Request, RequestOutput, TokensOut
from flowspec.runtime.core import Send, Step, Work
from flowspec.speculation.strategies import find_strategy
from flowspec.stage.stage import Stage
from flowspec.transport.link_occupancy import Passage
from tests.support.clusters import small
from tests.support.integer_model import IntegerDrafter, integer_stages
from tests.support.tiny import MAX_CONTEXT, VOCAB, request

STRATEGIES = ("ar", "serial_pp", "naive_pp", "pruned_pp", "pipedec", "flowspec", "streaming")
NUM_STAGES = (1, 4)


@dataclass(slots=True)
class Gone:
    """Replaces a lost stage: takes every message and does nothing."""

    rank: int

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Drop the message."""
        del message, now
        return ()

    def poll(self, now: float) -> Step | None:
        """Return no step."""
        del now
        return None


def work_time(rank: int, work: Work) -> float:
    """Return exact sums of powers of two, so that all machines order events alike.

    A row is so expensive that segments of a few rows are best.
    """
    if work.kind == "draft":
        return 1 / 8 + work.rows / 64
    return 1 / 4 + (rank % 2) / 16 + work.rows / 16


class Pipeline:
    """A simulated cluster, its log of messages, and the output to its client."""

    def __init__(
        self, num_stages: int, strategy: str, limits: Mapping[str, int], decode: Mapping[str, Any]
    ) -> None:
        defaults = find_strategy(strategy).defaults
        asked = {
            "segment_size": min(getattr(defaults, "segment_size", 24), 24),  # more than pays
            "calibrate": False,  # it takes logarithms, whose last bits differ between machines
            **decode,
        }
        scheduler = Scheduler(
            pipe=HeadPipeline(num_stages),
            max_context=MAX_CONTEXT,
            chunked_prefill_size=asked.pop("chunked_prefill_size", 64),
            **limits,
        )
        decoding = Decoding(strategy=strategy, parameters=small(strategy, **asked))
        head = Head(scheduler, decoding, {"integer": IntegerDrafter()})
        self.num_stages = num_stages
        self.log = MessageLog()
        self.models: Any = integer_stages(num_stages)
        self.cluster = SimulatedEngine(
            head,
            [self._stage(rank) for rank in range(1, num_stages + 1)],
            work_time=work_time,
            link_time=self._link,
        )
        self.simulator = self.cluster.simulator
        self.asked: list[Request] = []
        self.pieces: dict[int, list[tuple[int, ...]]] = {}
        self.done: dict[int, RequestOutput] = {}

    def submit(self, *requests: Request) -> None:
        """Submit all of them now."""
        for one in requests:
            self.asked.append(one)
            self.pieces[one.id] = []
            self.simulator.submit(Submit(request=one))

    def cancel(self, number: int) -> None:
        """Cancel the request, as its client would."""
        self.simulator.submit(AbortRequest(request=number))

    def lose(self, rank: int) -> None:
        """Lose a stage; the head learns of it at once."""
        self.simulator.replace(Gone(rank))
        self.simulator.deliver(0, Suspend(failure=Failure(cause="gone", rank=rank)))

    def cover(self, rank: int) -> None:
        """Put an empty stage in its place."""
        self.simulator.replace(self._stage(rank, epoch=self.cluster.head.pipe.epoch))
        self.simulator.deliver(0, Resume(num_stages=self.num_stages))

    def step(self) -> bool:
        """Run one event, and take its output for the client."""
        went_on = self.simulator.step()
        while self.simulator.to_client:
            event: Any = self.simulator.to_client.popleft()
            if isinstance(event, TokensOut):
                self.pieces[event.request].append(event.tokens)
            else:
                self.done[event.request] = event
        return went_on

    def run_to(self, number: int, count: int) -> None:
        """Run until request `number` has `count` tokens."""
        while sum(map(len, self.pieces[number])) < count:
            assert self.step(), f"request {number} ended before its token {count}"

    def wait(self, seconds: float) -> None:
        """Let so much virtual time pass."""
        end = self.simulator.now + seconds
        while self.simulator.now < end and self.step():
            pass

    def finish(self) -> None:
        """Run until nothing is left to do; check that every request was answered."""
        while self.step():
            pass
        assert self.done.keys() == {one.id for one in self.asked}

    def text(self) -> str:
        """Return the log, then each request's output and statistics."""
        return self.log.text + "".join(f"{self._summary(one.id)}\n" for one in self.asked)

    def _summary(self, number: int) -> str:
        completion = self.done[number]
        stats = completion.stats
        counts = {
            "tokens": stats.num_tokens,
            "verdicts": stats.num_verdicts,
            "segments": stats.num_segments,
            "rows": stats.num_rows_sent,
            "drafter_forwards": stats.num_draft_forwards,
            "not_drafted": stats.num_not_drafted,
            "prompt_reused": stats.num_prompt_reused,
            "resumes": stats.num_resumes,
        }
        counted = " ".join(f"{word}={count}" for word, count in counts.items())
        pieces = " | ".join(" ".join(map(str, piece)) for piece in self.pieces[number])
        return f"request {number} {completion.reason.value}: {pieces}\n  {counted}"

    def _stage(self, rank: int, *, epoch: int = 0) -> Stage:
        return Stage(rank, self.num_stages, self.models[rank - 1], epoch=epoch)

    def _link(self, source: int, to: int, message: Message) -> Passage:
        self.log.add(source, to, message)
        return Passage(latency_s=1 / 16 if isinstance(message, DATA) else 1 / 32)


def prompt(number: int, length: int) -> tuple[int, ...]:
    """Return a prompt that differs for every number."""
    return tuple((5 * number + 11 * place + place * place) % VOCAB for place in range(length))


def ask(number: int, length: int, *, new: int = 16) -> Request:
    """Return request `number` with its own prompt."""
    return request(number, prompt=prompt(number, length), max_new_tokens=new)


def _alone(pipeline: Pipeline) -> None:
    pipeline.submit(ask(1, 11, new=24))
    pipeline.finish()


def _together(pipeline: Pipeline) -> None:
    ends = replace(ask(3, 13), eos_token_ids=tuple(range(0, VOCAB, 9)))
    pipeline.submit(ask(1, 11), ask(2, 7, new=12), ends)
    pipeline.finish()


def _lost(pipeline: Pipeline) -> None:
    """Lose the second stage, or the only one, before the third request begins."""
    rank = min(2, pipeline.num_stages)
    pipeline.submit(ask(1, 11), ask(2, 7), ask(3, 5, new=6))
    pipeline.run_to(1, 5)
    pipeline.lose(rank)
    pipeline.wait(2.0)
    pipeline.cover(rank)
    pipeline.finish()


def _cancelled(pipeline: Pipeline) -> None:
    """Cancel a running request and a waiting one; add another."""
    pipeline.submit(ask(1, 11), ask(2, 7), ask(3, 9), ask(4, 5, new=8))
    pipeline.run_to(1, 4)
    pipeline.cancel(1)
    pipeline.cancel(3)
    pipeline.finish()


def _chunked(pipeline: Pipeline) -> None:
    """Let the second prompt share the first one's last chunk."""
    pipeline.submit(ask(1, 23), ask(2, 9))
    pipeline.finish()


def _kept(pipeline: Pipeline) -> None:
    """Continue a conversation, then send a prompt that only begins the same way."""
    first = ask(1, 11)
    pipeline.submit(first)
    pipeline.finish()
    said = (*first.prompt, *pipeline.done[1].tokens, 7, 3)
    pipeline.submit(replace(ask(2, 1), prompt=said))
    pipeline.finish()
    pipeline.submit(replace(ask(3, 1), prompt=(*first.prompt[:6], 1, 2)))
    pipeline.finish()


@dataclass(frozen=True, slots=True)
class Situation:
    """A course of events, and the pipeline's parameters for it."""

    play: Callable[[Pipeline], None]
    limits: Mapping[str, int] = field(default_factory=dict)
    decode: Mapping[str, Any] = field(default_factory=dict)


SITUATIONS: Mapping[str, Situation] = {
    "alone": Situation(_alone),
    "together": Situation(_together),
    "lost": Situation(_lost, limits={"max_num_seqs": 2}),
    "cancelled": Situation(_cancelled, limits={"max_num_seqs": 2}),
    "chunked": Situation(_chunked, decode={"chunked_prefill_size": 5}),
    "kept": Situation(_kept, limits={"max_cached": 2}),
}
CASES = tuple(
    f"{strategy}-{situation}-{count}"
    for strategy in STRATEGIES
    for situation in SITUATIONS
    for count in NUM_STAGES
)


def run_case(name: str) -> Pipeline:
    """Run a case of CASES to its end."""
    strategy, situation, count = name.split("-")
    chosen = SITUATIONS[situation]
    pipeline = Pipeline(int(count), strategy, chosen.limits, chosen.decode)
    chosen.play(pipeline)
    return pipeline
