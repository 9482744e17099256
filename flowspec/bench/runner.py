"""Running a benchmark's plan: what is not in the file yet, on several processes, as it finishes.

A job is one group of questions under one strategy. Which process runs it changes no figure: every
job has a cluster of its own, and the clock is virtual. What runs on real processes runs alone.
"""

import logging
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing.managers import SyncManager
from multiprocessing.process import BaseProcess
from pathlib import Path
from queue import Empty, Queue
from threading import Event
from typing import Protocol

from flowspec.bench.answering import Asked, LeftOut, Workbench
from flowspec.bench.experiment import Case, Group, Plan
from flowspec.bench.records import Sample, SampleFile, TooLong
from flowspec.request import ClusterError
from flowspec.system import signals
from flowspec.system.files import temporary_folder
from flowspec.system.parent import die_with_parent

PARENT_POLL_S = 1.0
SAMPLES_POLL_S = 0.2  # a sample of another process waits no longer to be written
FROZEN_S = 60.0  # without a sign of life, where one comes every second, a worker is stopped
SIGNAL_S = 0.1  # a signal to the whole group may end a worker before this process knows of it
STOP_S = 10.0  # for workers to end by themselves, when the run ends early
Asking = tuple[list[Asked], list[TooLong]]


@dataclass(slots=True)
class RunProgress:
    """How far a run is; told after every step."""

    total: int  # samples to run
    done: int = 0
    now: str = ""  # what finished last


@dataclass(slots=True)
class RunOutcome:
    """Samples of a plan in its order, those of earlier runs included."""

    samples: list[Sample]
    num_run: int
    too_long: list[TooLong] = field(default_factory=list)


Todo = Sequence[tuple[Group, list[Case]]]
Done = Iterator[Sample | LeftOut]


class Bench(Protocol):
    """Works off one group of questions after the other."""

    def work(self, group: Group, cases: Sequence[Case]) -> Done:
        """The group's samples under each case, and what is left out of it."""


def run_plan(
    plan: Plan,
    file: SampleFile,
    *,
    jobs: int,
    tell: Callable[[RunProgress], None],
    bench: Bench | None = None,
) -> RunOutcome:
    """Run what is missing from `file`; the figures are the same for any number of jobs.

    `bench` does it all where it is given.

    Raises ClusterError where a request or a process fails; what was finished is in the file.
    """
    groups = list(plan.groups())
    todo = [(group, missing) for group in groups if (missing := _missing(plan, group, file))]
    progress = RunProgress(
        sum(len(_expected(plan, case, group, file)) for group, cases in todo for case in cases)
    )
    tell(progress)
    num_run = 0
    with _crew(plan, 1 if plan.real else jobs, bench) as crew:
        for finished in crew.work(todo):
            with signals.undoing():  # no half line is left
                num_run += _keep(finished, file, progress)
            tell(progress)
    keys = [
        key for group in groups for case in plan.cases for key in _expected(plan, case, group, file)
    ]
    return RunOutcome(list(file.select(keys)), num_run, _left_out(plan, groups, file))


def _keep(finished: Sample | LeftOut, file: SampleFile, progress: RunProgress) -> bool:
    """Whether it is a sample that the file did not have."""
    if isinstance(finished, Sample):
        progress.done += 1
        progress.now = f"{finished.dataset}, {finished.strategy}"
        if is_new := finished.key not in file:  # a warm set begins anew
            file.add(finished)
        return is_new
    cases, left_out = finished
    for one in left_out:
        known = file.left_out.get(one.key)
        num_turns = one.num_turns - (known.num_turns if known else 0)
        progress.total -= max(0, num_turns) * len(cases)
        file.leave_out(one)
    return False


def _missing(plan: Plan, group: Group, file: SampleFile) -> list[Case]:
    """Strategies with a turn of the group that is not in the file."""
    return [
        case
        for case in plan.cases
        if any(key not in file for key in _expected(plan, case, group, file))
    ]


def _expected(plan: Plan, case: Case, group: Group, file: SampleFile) -> list[str]:
    """Keys of the group's turns, but for those known to be too long."""
    asked = plan.question_keys(group)
    ends = {
        question: file.left_out[key].turn for question, key in asked.items() if key in file.left_out
    }
    return [
        key
        for (question, turn), key in plan.keys(case, group).items()
        if question not in ends or turn < ends[question]
    ]


def _left_out(plan: Plan, groups: Sequence[Group], file: SampleFile) -> list[TooLong]:
    """Of these groups, a turn once for all temperatures and seeds."""
    asked = [key for group in groups for key in plan.question_keys(group).values()]
    found = [file.left_out[key] for key in asked if key in file.left_out]
    return list({(one.dataset, one.question, one.turn): one for one in found}.values())


class _Alone:
    """Works in this process, one thing after the other."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def work(self, todo: Todo) -> Done:
        for group, cases in todo:
            yield from self.bench.work(group, cases)


class _Pool:
    """Works in several processes: the target's answers, then the strategies that need them."""

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        jobs: int,
        samples: "Queue[Sample]",
        signs: "Signs",
        keepers: Sequence[BaseProcess] = (),
    ) -> None:
        """`keepers`: the process that keeps the queue and the signs, where one does."""
        self.pool = pool
        self.samples = samples
        self.signs = signs
        self.keepers = keepers
        self.most_waiting = 4 * jobs  # few enough to stop soon when asked to

    def work(self, todo: Todo) -> Done:
        waiting: dict[Future[Asking | None], tuple[Group, list[Case]]] = {}
        left = list(reversed(todo))
        while waiting or left:
            if signals.received():
                yield from self._arrived()  # what is finished is kept
            signals.check()
            while left and len(waiting) < self.most_waiting:
                group, cases = left.pop()
                with signals.blocked():  # the first one starts the workers
                    waiting[self.pool.submit(_ask, group)] = group, cases
            finished, _ = wait(waiting, SAMPLES_POLL_S, FIRST_COMPLETED)
            yield from self._arrived()
            with _asking(FROZEN_S, self.keepers):
                self.signs.look(time.monotonic())
            for future in finished:
                group, cases = waiting.pop(future)
                asking = future.result()
                if asking is None:
                    continue
                asked, too_long = asking
                yield cases, too_long
                for case in cases if asked else ():
                    waiting[self.pool.submit(_run, case, group, asked)] = group, [case]

    def _arrived(self) -> Iterator[Sample]:
        """All samples of what is finished are among them: a process waits until each is taken."""
        while True:
            try:
                with _asking(FROZEN_S, self.keepers):
                    sample = self.samples.get_nowait()
            except Empty:
                return
            yield sample


class Signs:
    """Signs of life of worker processes: a count each, by process id, that goes on rising.

    `workers` are the processes there are now; one without a count has yet to begin.
    """

    def __init__(
        self, counts: Mapping[int, int], workers: Callable[[], Iterable[BaseProcess]]
    ) -> None:
        self.counts = counts
        self.workers = workers
        self._seen: dict[int | None, tuple[int, float]] = {}  # and seconds since it rose
        self._looked_at: float | None = None

    def look(self, now: float) -> None:
        """Kill a worker that is frozen and raise ClusterError; looks about once a second."""
        if self._looked_at is not None and now - self._looked_at < PARENT_POLL_S:
            return
        # this process may have been stopped for long, and the workers with it
        passed = min(now - (self._looked_at or now), 2 * PARENT_POLL_S)
        self._looked_at = now
        counts = dict(self.counts.items())
        for worker in self.workers():
            pid, count = worker.pid, counts.get(worker.pid or 0, 0)
            before, silent = self._seen.get(pid, (-1, 0.0))
            self._seen[pid] = count, 0.0 if count != before else silent + passed
            if self._seen[pid][1] >= FROZEN_S:
                worker.kill()
                raise ClusterError(
                    "bench",
                    f"worker process {pid} has shown no sign of life for {FROZEN_S:.0f} s; was it "
                    "stopped, or is the machine out of memory? The same command goes on from here",
                )


@contextmanager
def _limit(seconds: float, *processes: BaseProcess) -> Iterator[None]:
    """Kill the processes where what is inside, which waits for them, takes longer.

    However long this process is stopped meanwhile, that counts as a second.
    """
    done = threading.Event()

    def watch() -> None:
        for _ in range(round(seconds / PARENT_POLL_S)):
            if done.wait(PARENT_POLL_S):
                return
        for process in processes:
            process.kill()

    threading.Thread(target=watch, daemon=True, name="limit").start()
    try:
        yield
    finally:
        done.set()


class _KeeperLost(Exception):
    """The process that keeps the queue has ended."""


@contextmanager
def _asking(seconds: float, keepers: Sequence[BaseProcess]) -> Iterator[None]:
    """What is inside asks the queue's process. Raises _KeeperLost where it ends or does not answer.

    One that is killed within an answer gives a plain OSError.
    """
    try:
        with _limit(seconds, *keepers):
            yield
    except (EOFError, OSError):
        raise _KeeperLost from None


@contextmanager
def _crew(plan: Plan, jobs: int, bench: Bench | None = None) -> Iterator[_Alone | _Pool]:
    if bench is not None or jobs == 1:
        yield _Alone(bench or Workbench(plan))
        return
    before = multiprocessing.active_children()

    def kill() -> None:
        for process in multiprocessing.active_children():
            if process not in before:
                process.kill()

    with (
        temporary_folder("flowspec-bench-") as folder,
        signals.undoing(kill),
        _pool(plan, jobs, folder) as pool,
    ):
        yield pool


@contextmanager
def _pool(plan: Plan, jobs: int, folder: Path) -> Iterator[_Pool]:
    """`folder`: for the socket of the queue's process."""
    context = multiprocessing.get_context("spawn")
    before = multiprocessing.active_children()
    manager = SyncManager(str(folder / "queue"), ctx=context)
    # its queue outlives a worker that is killed while it writes; a pipe's reader would hang
    with signals.blocked():
        manager.start(_end_with, (os.getpid(),))
    keepers = [one for one in multiprocessing.active_children() if one not in before]
    others = [*before, *keepers]

    def workers() -> list[BaseProcess]:
        return [one for one in multiprocessing.active_children() if one not in others]

    try:
        with _limit(FROZEN_S, *keepers):
            samples, stopped, counts = manager.Queue(), manager.Event(), manager.dict()
        pool = ProcessPoolExecutor(
            jobs,
            mp_context=context,
            initializer=_begin,
            initargs=(plan, os.getpid(), samples, stopped, counts),
        )
        try:
            yield _Pool(pool, jobs, samples, Signs(counts, workers), keepers)
        except signals.EndedBySignal:
            for worker in workers():  # they would go on to the end of their sample
                worker.kill()
            raise
        except (BrokenProcessPool, _KeeperLost):
            time.sleep(SIGNAL_S)
            signals.check()  # it came to all of them
            raise ClusterError(
                "bench",
                f"a worker process ended, or was silent for {FROZEN_S:.0f} s and was killed; is "
                "the machine out of memory? The same command goes on from here",
            ) from None
        finally:
            with suppress(_KeeperLost), _asking(STOP_S, keepers):
                stopped.set()
            with _limit(STOP_S, *workers()):
                pool.shutdown(wait=True, cancel_futures=True)
    finally:
        with _limit(STOP_S, *keepers):
            manager.shutdown()


@dataclass(frozen=True, slots=True)
class _Worker:
    """What a worker process keeps."""

    bench: Workbench
    samples: "Queue[Sample]"
    stopped: Event


_WORKER: _Worker | None = None


def _begin(
    plan: Plan,
    parent: int,
    samples: "Queue[Sample]",
    stopped: Event,
    counts: MutableMapping[int, int],
) -> None:
    """In a worker process, once."""
    global _WORKER
    _end_with(parent, counts)
    # The parent has read the same configs, and each worker would warn of them again.
    logging.getLogger("flowspec.model").setLevel(logging.ERROR)
    _WORKER = _Worker(Workbench(plan), samples, stopped)


def _end_with(parent: int, counts: MutableMapping[int, int] | None = None) -> None:
    """In a process of its own: not before its parent, and not after it. Signs of life: `counts`."""
    die_with_parent()

    def watch() -> None:
        count = 0
        while os.getppid() == parent:
            if counts is not None:
                with suppress(EOFError, OSError):  # the run is over
                    counts[os.getpid()] = count = count + 1
            time.sleep(PARENT_POLL_S)
        os._exit(1)

    threading.Thread(target=watch, daemon=True, name="parent-watch").start()


def _ask(group: Group) -> Asking:
    assert _WORKER is not None
    return _WORKER.bench.ask(group)


def _run(case: Case, group: Group, asked: Sequence[Asked]) -> None:
    """Its samples are in the queue when this returns."""
    assert _WORKER is not None
    for sample in _WORKER.bench.run(case, group, asked):
        _WORKER.samples.put(sample)
        if _WORKER.stopped.is_set():
            return
