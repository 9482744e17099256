"""Asking a benchmark's questions on a cluster of devices that is running already.

Answers are compared with those of the target model, computed here where the plan names it. Without
it they are compared with the cluster's own plain decoding, because one machine may not be able to
hold a model that needs several devices.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from flowspec.bench.answering import Asked, LeftOut, Workbench, now_text, sample_of
from flowspec.bench.experiment import Case, Group, Plan
from flowspec.bench.metrics import Doings, count_rows, measure
from flowspec.bench.prompts import Prompt
from flowspec.bench.records import Sample, TooLong
from flowspec.engine.remote import RemoteEngine
from flowspec.engine.stream import Notice
from flowspec.protocol.control import ClusterStatus
from flowspec.request import (
    ClusterError,
    Failure,
    FailureKind,
    FinishReason,
    Request,
    RequestOutput,
    SamplingParams,
    StageCounts,
)
from flowspec.speculation.strategies import STRATEGIES
from flowspec.tokenizer import PromptError

PLAIN = "ar"
FORGET_S = 60.0  # longest wait for other clients' requests before a measurement begins
AGAIN_S = 0.5  # between two tries


@dataclass(frozen=True, slots=True)
class RemoteAnswer:
    """A whole answer. The times of its statistics count from its submission."""

    output: RequestOutput
    counts: Mapping[int, StageCounts] | None  # what each stage did; None: unknown
    # it waited for devices or for other requests, so its time to the first token is no measurement
    has_waited: bool = False
    has_company: bool = False  # the head served other clients since the answer before


@dataclass(frozen=True, slots=True)
class LongPrompt:
    """A request that was not measured: prompt and answer exceed the context, or see `reason`."""

    num_prompt: int
    reason: str = ""  # the devices' memory cannot hold them, or the conversation is refused
    is_refused: bool = False  # the conversation is refused


class MeasuredCluster:
    """A cluster that is asked one question at a time; the same devices give all answers.

    `say` is called with the reason when an answer waits. Raises ClusterError if the cluster is not
    healthy.
    """

    def __init__(
        self, engine: RemoteEngine, say: Callable[[str], None] = lambda text: None
    ) -> None:
        self.engine, self._say = engine, say
        self.status = engine.cluster_status()
        if not self.status.healthy:
            raise ClusterError(engine.where, f"not healthy: {self.status.why}")
        self._epoch = self.status.epoch  # the newest one that is known to be of these devices
        self._num_requests = _num_requests(self.status)

    @property
    def num_stages(self) -> int:
        """Return the number of devices that hold layers."""
        return len(self.devices)

    @property
    def devices(self) -> list[str]:
        """Return which device holds which layers, in the order of the pipeline."""
        return _devices_of(self.status)

    @property
    def num_kv_tokens(self) -> int:
        """Return the tokens of KV cache that the tightest device holds; 0 if unknown."""
        held = (one.num_kv_tokens for one in self.status.devices if one.num_kv_tokens)
        return min(held, default=0)

    def forget(self) -> None:
        """Reset what the head has learnt of costs and scores.

        Waits while it serves others. Raises ClusterError if it is not idle within FORGET_S.
        """
        end = time.monotonic() + FORGET_S
        while True:
            self._num_requests = _num_requests(self.engine.cluster_status())
            try:
                self.engine.forget()
                return
            except ValueError as error:
                if time.monotonic() > end:
                    raise ClusterError(
                        self.engine.where, f"{error}: it serves others; measure it when it is idle"
                    ) from None
            time.sleep(AGAIN_S)

    def ask(self, request: Request) -> RemoteAnswer | LongPrompt:
        """Return the whole answer, or why there is none.

        Raises ClusterError if the request fails, or if other devices may have computed part of it.
        """
        has_waited = False
        with self.engine.submit(replace(request, exclusive=True)) as stream:
            for event in stream:
                if isinstance(event, Notice):
                    has_waited = True
                    self._say(event.text)
        output = stream.result()
        if output.error is not None:
            return self._refused(output, output.error)
        if output.num_prompt_tokens + request.max_new_tokens > self.status.max_context:
            return LongPrompt(output.num_prompt_tokens)
        if output.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            raise ClusterError(self.engine.where, f"an answer ended early: {output.reason.value}")
        first, last = self.engine.epochs.pop(stream.request, (0, 0))
        if last != self._epoch:  # the cluster was built again since the answer before
            has_waited = True
            self._check_devices(first, last, output.stats.num_resumes)
        counts = stream.stage_stats()
        return RemoteAnswer(output, counts, has_waited, has_company=self._has_company())

    def _has_company(self) -> bool:
        """Whether the head has had requests of others since the last look, besides one of ours."""
        before = self._num_requests
        self._num_requests = _num_requests(self.engine.cluster_status())
        return self._num_requests > before + 1

    def _refused(self, output: RequestOutput, error: Failure) -> LongPrompt:
        if error.kind is FailureKind.BAD_PROMPT:
            return LongPrompt(0, error.cause, is_refused=True)
        if error.kind is FailureKind.REFUSED and (
            output.num_prompt_tokens >= self.status.max_context
        ):
            return LongPrompt(output.num_prompt_tokens)
        if error.kind is FailureKind.TOO_LARGE:
            now = self.engine.cluster_status()
            if _devices_of(now) != self.devices:  # the refusal is about other devices' memory
                raise self._changed(now)
            return LongPrompt(output.num_prompt_tokens, error.cause)
        where = self.engine.where
        raise ClusterError(where, error.cause if error.rank == 0 else str(error))

    def _check_devices(self, first: int, last: int, num_resumes: int) -> None:
        """Raise ClusterError unless the same devices computed all of the answer.

        `first` is the epoch in which the request came, `last` the one in which it ended.
        """
        now = self.engine.cluster_status()
        # a status of another epoch does not say on which devices the answer ended
        is_same = now.epoch == last and _devices_of(now) == self.devices
        # the answer ran in the last epoch, and in one more for each resume
        between = num_resumes and last != self._epoch + 1
        if not is_same or (between and (num_resumes > 1 or first != self._epoch)):
            raise self._changed(now)
        self._epoch = now.epoch

    def _changed(self, now: ClusterStatus) -> ClusterError:
        before, after = self.devices, _devices_of(now)
        if after != before:
            there = "; ".join(after) or f"none that hold all layers ({now.why})"
            change = f"other devices answer now, before: {'; '.join(before)}, now: {there}"
        else:
            change = "the cluster was built anew several times, perhaps of other devices meanwhile"
        return ClusterError(
            self.engine.where,
            f"{change}; what was answered before is kept, and the same command measures the "
            "devices that are there now, whose samples have keys of their own",
        )


def _num_requests(status: ClusterStatus) -> int:
    """Return the number of requests that the head has had, open ones included."""
    num_over = status.requests_done + status.requests_failed
    return num_over + status.requests_active + status.requests_waiting


def _devices_of(status: ClusterStatus) -> list[str]:
    serving = [(one.rank, one.name, one.layers) for one in status.devices if one.rank]
    return [
        f"{name}: layers {layers[0]} to {layers[1] - 1}"
        for _, name, layers in sorted(serving)
        if layers is not None
    ]


class RemoteBench:
    """The only worker of a benchmark on a cluster, which answers one question at a time."""

    def __init__(self, plan: Plan, cluster: MeasuredCluster) -> None:
        self.plan = plan
        self._cluster = cluster
        self._alone = Workbench(plan) if plan.target is not None else None
        own = [case for case in plan.cases if case.strategy == PLAIN]
        plain = STRATEGIES[PLAIN].defaults.model_dump()
        self._plain = own[0] if own else Case(PLAIN, "none", plain)
        self._reference: tuple[Group, list[Asked]] | None = None  # of the last group

    def work(self, group: Group, cases: Sequence[Case]) -> Iterator[Sample | LeftOut]:
        """Yield each turn's sample when it is finished, and what is left out of the group.

        Raises ClusterError if the cluster fails; earlier samples are not lost.
        """
        left = list(cases)
        if self._alone is not None:
            asked, too_long = self._alone.ask(group)
            yield cases, too_long
        elif self._reference is not None and self._reference[0] == replace(group, repeat=0):
            asked = self._reference[1]
        else:
            asked = []
            for found in self._ask_plain(group, asked):
                if isinstance(found, TooLong):
                    yield cases, [found]
                elif self._plain in cases:
                    yield found
            left = [case for case in cases if case != self._plain]
            self._reference = replace(group, repeat=0), asked
        for place, case in enumerate(left):
            for found in self._run(case, group, asked):
                yield (left[place:], [found]) if isinstance(found, TooLong) else found

    def _run(self, case: Case, group: Group, asked: list[Asked]) -> Iterator[Sample | TooLong]:
        """Yield the samples of a case; remove from `asked` what the devices' memory cannot hold."""
        self._cluster.forget()  # what the head learns is this set's alone
        for one in tuple(asked):
            if one not in asked:  # a turn before it is left out
                continue
            started_at = now_text()
            answer = self._answer(case, group, one.messages)
            if isinstance(answer, RemoteAnswer):
                yield self._sample(case, group, one, answer, started_at)
            elif answer.reason:
                yield self._left_out(group, one.question, one.turn, answer)
                asked[:] = [a for a in asked if a.question != one.question or a.turn < one.turn]
            else:  # it has fitted before, in the computation of the reference
                raise ClusterError("head", f"{_name(group, one)} is too long for it")

    def _ask_plain(self, group: Group, asked: list[Asked]) -> Iterator[Sample | TooLong]:
        """Yield the samples of plain decoding; put its answers, the reference, into `asked`."""
        self._cluster.forget()
        for prompt in group.prompts:
            yield from self._ask_one(group, prompt, asked)

    def _ask_one(
        self, group: Group, prompt: Prompt, asked: list[Asked]
    ) -> Iterator[Sample | TooLong]:
        messages: list[Mapping[str, str]] = []
        for turn, text in enumerate(prompt.turns):
            messages.append({"role": "user", "content": text})
            started_at = now_text()
            answer = self._answer(self._plain, group, messages)
            if isinstance(answer, LongPrompt):
                if answer.is_refused and not turn:  # its author must correct the file
                    raise PromptError(f"{prompt.where}: {answer.reason}")
                yield self._left_out(group, prompt.id, turn, answer)
                return
            completion = answer.output
            one = Asked(prompt.id, turn, (), completion.tokens, tuple(messages))
            asked.append(one)
            yield self._sample(self._plain, group, one, answer, started_at)
            messages.append({"role": "assistant", "content": completion.text})

    def _left_out(self, group: Group, question: str, turn: int, why: LongPrompt) -> TooLong:
        turns = next(len(one.turns) for one in group.prompts if one.id == question)
        key, dataset = self.plan.question_keys(group)[question], group.dataset
        return TooLong(key, dataset, question, turn, turns - turn, why.num_prompt, why.reason)

    def _answer(
        self, case: Case, group: Group, messages: Sequence[Mapping[str, str]]
    ) -> RemoteAnswer | LongPrompt:
        return self._cluster.ask(
            Request(
                prompt=list(messages),
                sampling=SamplingParams(temperature=group.temperature, seed=group.seed),
                max_new_tokens=self.plan.max_tokens,
                decoding=case.decoding,
            )
        )

    def _sample(
        self, case: Case, group: Group, one: Asked, answer: RemoteAnswer, started_at: str
    ) -> Sample:
        measured = measure(
            answer.output,
            one.expected,
            num_prompt=answer.output.num_prompt_tokens,
            doings=_doings(answer),
            rows=count_rows(answer.counts),
        )
        turn = one.question, one.turn
        found = sample_of(self.plan, case, group, turn, measured, started_at=started_at)
        return replace(
            found,
            devices=tuple(self._cluster.devices),
            rebuilt=answer.has_waited,
            relearnt=answer.has_company,
        )


def _doings(answer: RemoteAnswer) -> Doings:
    """Return the busy shares of the decode time; idle causes and link bytes are unknown here."""
    stats, counts = answer.output.stats, answer.counts or {}
    decode_s = stats.last_token_at - stats.first_token_at - stats.resume_s
    if decode_s <= 0:
        return Doings()
    return Doings(
        drafter_busy=min(1.0, stats.draft_s / decode_s),
        stage_busy=tuple(min(1.0, one.busy_s / decode_s) for _, one in sorted(counts.items())),
    )


def _name(group: Group, one: Asked) -> str:
    return f"{group.dataset}, question {one.question}, turn {one.turn + 1}"
