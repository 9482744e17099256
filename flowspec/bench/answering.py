"""Asking a benchmark's questions: the target alone first, then a strategy on a cluster.

A `Workbench` keeps the loaded models of one process. Each group gets a new cluster, so that costs
and scores are learnt from this group only and no figure depends on what ran before.
"""

import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

import torch

from flowspec.bench.experiment import Case, Group, Plan
from flowspec.bench.metrics import Activity, RowCounts, count_rows, measure
from flowspec.bench.prompts import Prompt, first_turn
from flowspec.bench.provenance import versions
from flowspec.bench.records import RunFigures, Sample, TooLong
from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import Emulation
from flowspec.engine.build import HeadParts, build_stage, load_head_parts
from flowspec.engine.engine import Engine
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.engine.simulated import SimulatedEngine, emulated_engine
from flowspec.request import ClusterError, FinishReason, Request, RequestOutput, SamplingParams
from flowspec.runtime.recorder import Recorder
from flowspec.stage.stage import Stage
from flowspec.system import signals
from flowspec.system.files import temporary_folder
from flowspec.tokenizer import PromptError
from flowspec.tracing.bound import least_seconds
from flowspec.tracing.timeline import Timeline, make_timeline, read_records
from flowspec.weights.load import load_whole


@dataclass(frozen=True, slots=True)
class Asked:
    """One turn of a question, and the answer of the target alone."""

    question: str
    turn: int
    prompt: tuple[int, ...]
    expected: tuple[int, ...]
    messages: tuple[Mapping[str, str], ...] = ()  # the conversation so far


LeftOut = tuple[Sequence[Case], Sequence[TooLong]]  # cases, and turns too long for them


@dataclass(frozen=True, slots=True)
class _Run:
    """A turn and a cluster's answer to it."""

    asked: Asked
    request: Request
    completion: RequestOutput
    rows: RowCounts | None
    started_at: str


class Workbench:
    """Runs groups of questions in one process; models are loaded at first use and kept."""

    def __init__(self, plan: Plan) -> None:
        torch.set_num_threads(1)  # more threads would not speed up such small forwards
        assert plan.target is not None, "the plan names no model to compute with"
        self.plan, self._folder = plan, plan.target
        self._dtype = plan.remote["dtype"] if plan.remote is not None else "float32"
        self._base = EngineConfig(
            model=str(self._folder),
            stages=plan.stages,
            context=plan.context,
            max_num_seqs=1,
            kept_prefixes=1,
        )
        self._parts: dict[str, HeadParts] = {}
        self._stages: list[Stage] = []
        self._alone: LocalTarget | None = None
        self._asked: tuple[Group, list[Asked], list[TooLong]] | None = None  # the last ones

    def ask(self, group: Group) -> tuple[list[Asked], list[TooLong]]:
        """Return the turns of the group with the target's own answers, and those left out.

        The prompt of a second turn holds the answer to the first.
        """
        first = replace(group, repeat=0)
        if self._asked is not None and self._asked[0] == first:
            return self._asked[1:]
        asked: list[Asked] = []
        too_long: list[TooLong] = []
        for prompt in group.prompts:
            found = list(self._ask_one(group, prompt))
            asked += (one for one in found if isinstance(one, Asked))
            too_long += (one for one in found if isinstance(one, TooLong))
        self._asked = first, asked, too_long
        return asked, too_long

    def _ask_one(self, group: Group, prompt: Prompt) -> Iterator[Asked | TooLong]:
        parts, alone = self._head_parts("none"), self._target()
        key = self.plan.question_keys(group)[prompt.id]
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(prompt.turns):
            messages.append({"role": "user", "content": text})
            left_out = len(prompt.turns) - turn
            try:
                ids = parts.prompt_of(messages) if turn else first_turn(parts.prompt_of, prompt)
            except PromptError as error:
                if not turn:  # the author of the question must correct it
                    raise
                yield TooLong(key, group.dataset, prompt.id, turn, left_out, 0, str(error))
                return
            if len(ids) + self.plan.max_tokens > parts.max_context:
                yield TooLong(key, group.dataset, prompt.id, turn, left_out, len(ids))
                return
            tokens, _, answer = alone.generate(self._request(1, ids, group), parts.new_text)
            yield Asked(prompt.id, turn, ids, tuple(tokens), tuple(messages))
            messages.append({"role": "assistant", "content": answer})

    def work(self, group: Group, cases: Sequence[Case]) -> Iterator[Sample | LeftOut]:
        """Yield what is left out of the group, then the samples of each case."""
        asked, too_long = self.ask(group)
        yield cases, too_long
        for case in cases if asked else ():
            yield from self.run(case, group, asked)

    def run(self, case: Case, group: Group, asked: Sequence[Asked]) -> Iterator[Sample]:
        """Yield a sample per turn when it is finished, on real processes when these have ended.

        Raises ClusterError if a request fails.
        """
        if self.plan.real:
            yield from self._run_real(case, group, asked)
            return
        emulation = self.plan.emulations[case.drafter_name]
        cluster = self._emulated(case, emulation)
        for number, one in enumerate(asked, start=1):
            done, timeline = self._recorded(cluster, emulation, number, one, group)
            stats = done.completion.stats
            least_s = least_seconds(
                timeline, stats.first_token_at, stats.last_token_at, emulation.transfer_s
            )
            yield self._sample(case, group, done, Activity(timeline), least_s)

    def trace(self, case: Case, group: Group) -> Timeline:
        """Return what every emulated device did during the group's first turn.

        Raises ValueError if that turn is too long, ClusterError if it fails.
        """
        asked, _ = self.ask(group)
        if not asked:
            raise ValueError(f"question {group.prompts[0].id} is longer than the context")
        emulation = self.plan.emulations[case.drafter_name]
        cluster = self._emulated(case, emulation)
        return self._recorded(cluster, emulation, 1, asked[0], group)[1]

    def _recorded(
        self,
        cluster: SimulatedEngine,
        emulation: Emulation,
        number: int,
        one: Asked,
        group: Group,
    ) -> tuple[_Run, Timeline]:
        recorders = {
            rank: Recorder(rank, clock="virtual", size_of=emulation.message_bytes)
            for rank in cluster.simulator.traces
        }
        cluster.simulator.traces.update(recorders)
        done = self._answer(cluster, number, one, group)
        for recorder in recorders.values():
            recorder.close()
        return done, make_timeline(recorder.records for recorder in recorders.values())

    def _run_real(self, case: Case, group: Group, asked: Sequence[Asked]) -> Iterator[Sample]:
        """Run on processes of this machine, whose records are complete when they have ended.

        If a turn fails or is interrupted, the samples of the turns before it are yielded first.
        """
        done: list[_Run] = []
        failure: BaseException | None = None
        with temporary_folder("flowspec-bench-") as folder:
            try:
                with self._local(case, folder) as cluster:
                    for number, one in enumerate(asked, start=1):
                        done.append(self._answer(cluster, number, one, group))
            except (ClusterError, KeyboardInterrupt, signals.EndedBySignal) as error:
                failure = error
            if done:
                files = sorted(folder.glob("rank-*.jsonl"))
                activity = Activity(make_timeline(read_records(file) for file in files))
                for run in done:
                    yield self._sample(case, group, run, activity, 0.0)
        if failure is not None:
            raise failure

    def _answer(self, engine: Engine, number: int, one: Asked, group: Group) -> _Run:
        started_at, request = now_text(), self._request(number, one.prompt, group)
        stream = engine.submit(request)
        completion = stream.result()
        if completion.reason not in (FinishReason.STOP, FinishReason.LENGTH):
            where = f"{group.dataset}, question {one.question}, turn {one.turn}"
            raise ClusterError(where, str(completion.error or completion.reason.value))
        return _Run(one, request, completion, count_rows(stream.stage_stats()), started_at)

    def _request(self, number: int, prompt: tuple[int, ...], group: Group) -> Request:
        return Request(
            id=number,
            prompt=prompt,
            sampling=SamplingParams(temperature=group.temperature, seed=group.seed),
            max_new_tokens=self.plan.max_tokens,
            eos_token_ids=self._head_parts("none").eos_token_ids,
        )

    def _sample(
        self, case: Case, group: Group, run: _Run, activity: Activity, least_s: float
    ) -> Sample:
        """Make a sample; `least_s` is the lower bound of its decode time, 0 if unknown."""
        stats = run.completion.stats
        measured = measure(
            run.completion,
            run.asked.expected,
            num_prompt=len(run.request.prompt_tokens),
            doings=activity.during(stats.first_token_at, stats.last_token_at),
            rows=run.rows,
        )
        bound = (measured.tokens - 1) / least_s if least_s > 0 else None
        turn = (run.asked.question, run.asked.turn)
        found = sample_of(self.plan, case, group, turn, measured, started_at=run.started_at)
        share = measured.decode_tokens_per_s / bound if bound else None
        return replace(found, bound_tokens_per_s=bound, bound_share=share)

    def _emulated(self, case: Case, emulation: Emulation) -> SimulatedEngine:
        if not self._stages:
            self._stages = [
                build_stage(self._folder, rank)[0] for rank in range(1, self.plan.stages + 1)
            ]
        parts = self._head_parts(case.drafter_name)
        return emulated_engine(case.config(self._base), parts, self._stages, emulation)

    @contextmanager
    def _local(self, case: Case, folder: Path) -> Iterator[LocalEngine]:
        config = case.config(self._base.changed(draft=self.plan.drafts.get(case.drafter_name, "")))
        with LocalEngine(config, self._head_parts(case.drafter_name), folder) as cluster:
            yield cluster

    def _head_parts(self, drafter: str) -> HeadParts:
        if drafter not in self._parts:
            strategy = "ar" if drafter == "none" else "streaming"
            draft = self.plan.drafts.get(drafter, "")
            config = self._base.changed(drafter=drafter, strategy=strategy, draft=draft)
            self._parts[drafter] = load_head_parts(config, self._folder)
        return self._parts[drafter]

    def _target(self) -> LocalTarget:
        if self._alone is None:
            whole = load_whole(self._folder, device="cpu", dtype=self._dtype)
            self._alone = LocalTarget(whole, self._head_parts("none").max_context)
        return self._alone


def now_text() -> str:
    """Return the time now in the form that samples have."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def sample_of(
    plan: Plan,
    case: Case,
    group: Group,
    turn: tuple[str, int],
    measured: RunFigures,
    *,
    started_at: str,
) -> Sample:
    """Make the sample of a question's turn from its figures."""
    (question, number), hashes = turn, plan.hashes(case)
    return Sample(
        **{field.name: getattr(measured, field.name) for field in fields(RunFigures)},
        key=plan.keys(case, group)[turn],
        cluster=plan.cluster,
        model=plan.model,
        drafter=case.drafter,
        strategy=case.strategy,
        dataset=group.dataset,
        question=question,
        turn=number,
        temperature=group.temperature,
        seed=group.seed,
        stages=plan.stages,
        table=plan.table,
        parameters=case.parameters,
        max_tokens=plan.max_tokens,
        warm=plan.warm,
        emulated=not plan.real,
        bound_tokens_per_s=None,
        bound_share=None,
        versions=versions(),
        revision=plan.sources.get("revision", ""),
        host=platform.node(),
        started_at=started_at,
        code=hashes["code"],
        target=hashes["target"],
        draft=hashes["draft"],
        emulation=hashes["emulation"],
        repeat=group.repeat,
    )
