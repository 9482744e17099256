"""Answering a benchmark's questions on a cluster of devices that is running already.

The truth is what the target alone computes here, where the plan names it, else what the cluster
itself answers by plain decoding: a model that needs several devices cannot be run alone.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from secrets import token_hex

from flowspec.bench.answering import Asked, LeftOut, Workbench, now_text, sample_of
from flowspec.bench.experiment import Case, Group, Plan
from flowspec.bench.metrics import Doings, RowCounts, measure
from flowspec.bench.prompts import Prompt
from flowspec.bench.records import Sample, TooLong
from flowspec.engine.remote import Answer, LongPrompt, RemoteCluster
from flowspec.protocol.control import Decoding
from flowspec.request import ClusterError, FinishReason, SamplingParams
from flowspec.speculation.strategies import STRATEGIES
from flowspec.tokenizer import PromptError

PLAIN = "ar"


class RemoteBench:
    """A benchmark's only worker: the cluster does one thing at a time."""

    def __init__(self, plan: Plan, cluster: RemoteCluster) -> None:
        self.plan = plan
        self._cluster = cluster
        self._alone = Workbench(plan) if plan.target is not None else None
        own = [case for case in plan.cases if case.strategy == PLAIN]
        self._plain = own[0] if own else Case(PLAIN, "none", asdict(STRATEGIES[PLAIN].defaults))
        self._truth: tuple[Group, list[Asked]] | None = None  # of the last group
        self._session, self._runs = token_hex(8), count(1)
        self._num_answers = 0  # of the run

    def work(self, group: Group, cases: Sequence[Case]) -> Iterator[Sample | LeftOut]:
        """Each turn's sample as it is finished, and what is left out of the group.

        Raises ClusterError where the cluster fails; what came before stays.
        """
        left = list(cases)
        if self._alone is not None:
            asked, too_long = self._alone.ask(group)
            yield cases, too_long
        elif self._truth is not None and self._truth[0] == replace(group, repeat=0):
            asked = self._truth[1]
        else:
            asked = []
            for found in self._ask_plain(group, asked):
                if isinstance(found, TooLong):
                    yield cases, [found]
                elif self._plain in cases:
                    yield found
            left = [case for case in cases if case != self._plain]
            self._truth = replace(group, repeat=0), asked
        for place, case in enumerate(left):
            for found in self._run(case, group, asked):
                yield (left[place:], [found]) if isinstance(found, TooLong) else found

    def _run(self, case: Case, group: Group, asked: list[Asked]) -> Iterator[Sample | TooLong]:
        """What the memory cannot hold under this strategy goes out of `asked`."""
        run = self._new_run()
        for one in tuple(asked):
            if one not in asked:  # a turn before it is left out
                continue
            started_at = now_text()
            answer = self._answer(case, group, run, one.messages)
            if isinstance(answer, Answer):
                yield self._sample(case, group, one, answer, started_at)
            elif answer.reason:
                yield self._left_out(group, one.question, one.turn, answer)
                asked[:] = [a for a in asked if a.question != one.question or a.turn < one.turn]
            else:  # plain decoding, or the target alone, has said that it fits
                raise ClusterError("head", f"{_name(group, one)} is too long for it")

    def _ask_plain(self, group: Group, asked: list[Asked]) -> Iterator[Sample | TooLong]:
        """The cluster's own plain decoding, which becomes the truth in `asked`."""
        run = self._new_run()
        for prompt in group.prompts:
            yield from self._ask_one(group, prompt, run, asked)

    def _ask_one(
        self, group: Group, prompt: Prompt, run: str, asked: list[Asked]
    ) -> Iterator[Sample | TooLong]:
        messages: list[Mapping[str, str]] = []
        for turn, text in enumerate(prompt.turns):
            messages.append({"role": "user", "content": text})
            started_at = now_text()
            answer = self._answer(self._plain, group, run, messages)
            if isinstance(answer, LongPrompt):
                if answer.refused and not turn:  # as where the target is computed here
                    raise PromptError(f"{prompt.where}: {answer.reason}")
                yield self._left_out(group, prompt.id, turn, answer)
                return
            completion = answer.completion
            one = Asked(prompt.id, turn, (), completion.tokens, tuple(messages))
            asked.append(one)
            yield self._sample(self._plain, group, one, answer, started_at)
            messages.append({"role": "assistant", "content": completion.text})

    def _left_out(self, group: Group, question: str, turn: int, why: LongPrompt) -> TooLong:
        turns = next(len(one.turns) for one in group.prompts if one.id == question)
        key, dataset = self.plan.question_keys(group)[question], group.dataset
        return TooLong(key, dataset, question, turn, turns - turn, why.num_prompt, why.reason)

    def _new_run(self) -> str:
        """A label that nobody else has: what the head learns under it is this set's alone."""
        self._num_answers = 0
        return f"{self._session}-{next(self._runs)}"

    def _answer(
        self, case: Case, group: Group, run: str, messages: Sequence[Mapping[str, str]]
    ) -> Answer | LongPrompt:
        decoding = Decoding(strategy=case.strategy, parameters=case.parameters, run=run)
        sampling = SamplingParams(temperature=group.temperature, seed=group.seed)
        answer = self._cluster.ask(
            messages, decoding, sampling, max_new_tokens=self.plan.max_tokens
        )
        if isinstance(answer, Answer):
            reason = answer.completion.reason
            if reason not in (FinishReason.STOP, FinishReason.LENGTH):
                raise ClusterError("head", f"an answer ended early: {reason.value}")
        return answer

    def _sample(
        self, case: Case, group: Group, one: Asked, answer: Answer, started_at: str
    ) -> Sample:
        stages, self._num_answers = answer.figures.stages, self._num_answers + 1
        measured = measure(
            answer.completion,
            one.expected,
            num_prompt=answer.num_prompt,
            doings=_doings(answer),
            rows=RowCounts(stages.rows_pruned, stages.rows_run_by_last) if stages else None,
        )
        turn = one.question, one.turn
        found = sample_of(self.plan, case, group, turn, measured, started_at=started_at)
        return replace(
            found,
            devices=tuple(self._cluster.devices),
            alone=answer.figures.alone,
            rebuilt=answer.rebuilt,
            relearnt=answer.figures.fresh and self._num_answers > 1,
        )


def _doings(answer: Answer) -> Doings:
    """What is known of the decode time; why a stage was idle, and what its links carried, is not.

    Forwards under way at either end count whole where they end, so a share may come out too high.
    """
    stats, stages = answer.completion.stats, answer.figures.stages
    decode_s = stats.last_token_at - stats.first_token_at - stats.resume_s
    if decode_s <= 0:
        return Doings()
    busy_s = stages.busy_s if stages is not None else ()
    return Doings(
        drafter_busy=min(1.0, stats.draft_s / decode_s),
        stage_busy=tuple(min(1.0, one / decode_s) for one in busy_s),
    )


def _name(group: Group, one: Asked) -> str:
    return f"{group.dataset}, question {one.question}, turn {one.turn + 1}"
