"""Running a benchmark's plan: samples that the file lacks are made by several processes.

A job is one group of questions under one strategy. No figure depends on the process that runs it,
because every job has its own cluster and the clock is virtual. Jobs on real processes run one after
the other.
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
SAMPLES_POLL_S = 0.2  # longest time until a sample of another process is written
FROZEN_S = 60.0  # a worker is killed after so long a silence; a sign comes every second
SIGNAL_S = 0.1  # a signal to the process group may reach a worker first
STOP_S = 10.0  # in which workers must end by themselves if the run ends early
Asking = tuple[list[Asked], list[TooLong]]


@dataclass(slots=True)
class RunProgress:
    """Progress of a run, reported after every step."""

    total: int  # samples to run
    done: int = 0
    now: str = ""  # what finished last


@dataclass(slots=True)
class RunOutcome:
    """The samples of a plan in its order, including those of earlier runs."""

    samples: list[Sample]
    num_run: int
    too_long: list[TooLong] = field(default_factory=list)


Todo = Sequence[tuple[Group, list[Case]]]
Done = Iterator[Sample | LeftOut]


class Bench(Protocol):
    """Something that runs one group of questions after the other."""

    def work(self, group: Group, cases: Sequence[Case]) -> Done:
        """Yield the group's samples under each case, and what is left out of it."""


def run_plan(
    plan: Plan,
    file: SampleFile,
    *,
    jobs: int,
    tell: Callable[[RunProgress], None],
    bench: Bench | None = None,
) -> RunOutcome:
    """Run what `file` lacks; the figures are the same for any number of jobs.

    With `bench`, that runs all groups instead of processes of this machine. Raises ClusterError if
    a request or a process fails; finished samples are in the file.
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
            with signals.undoing():  # a signal leaves no half line
                num_run += _keep(finished, file, progress)
            tell(progress)
    keys = [
        key for group in groups for case in plan.cases for key in _expected(plan, case, group, file)
    ]
    return RunOutcome(list(file.select(keys)), num_run, _left_out(plan, groups, file))


def _keep(finished: Sample | LeftOut, file: SampleFile, progress: RunProgress) -> bool:
    """Write it to the file; return whether it is a sample that the file lacked."""
    if isinstance(finished, Sample):
        progress.done += 1
        progress.now = f"{finished.dataset}, {finished.strategy}"
        if is_new := finished.key not in file:  # a warm set starts again from its first question
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
    """Return the cases with a turn of the group that is not in the file."""
    return [
        case
        for case in plan.cases
        if any(key not in file for key in _expected(plan, case, group, file))
    ]


def _expected(plan: Plan, case: Case, group: Group, file: SampleFile) -> list[str]:
    """Return the keys of the group's turns, without those known to be too long."""
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
    """Return the turns left out of these groups, once for all temperatures and seeds."""
    asked = [key for group in groups for key in plan.question_keys(group).values()]
    found = [file.left_out[key] for key in asked if key in file.left_out]
    return list({(one.dataset, one.question, one.turn): one for one in found}.values())


class _Alone:
    """Runs the groups in this process, one after the other."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    def work(self, todo: Todo) -> Done:
        for group, cases in todo:
            yield from self.bench.work(group, cases)


class _Pool:
    """Runs jobs in several processes: the target's answers, then each strategy."""

    def __init__(
        self,
        pool: ProcessPoolExecutor,
        jobs: int,
        samples: "Queue[Sample]",
        signs: "Signs",
        keepers: Sequence[BaseProcess] = (),
    ) -> None:
        """`keepers` are the processes that hold the queue and the signs of life."""
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
                yield from self._arrived()  # finished samples are kept
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
        """Yield the samples in the queue, among them all of the finished jobs."""
        while True:
            try:
                with _asking(FROZEN_S, self.keepers):
                    sample = self.samples.get_nowait()
            except Empty:
                return
            yield sample


class Signs:
    """Signs of life of worker processes: a count per process id that keeps rising.

    `workers` returns the processes of now; one without a count has not begun yet.
    """

    def __init__(
        self, counts: Mapping[int, int], workers: Callable[[], Iterable[BaseProcess]]
    ) -> None:
        self.counts = counts
        self.workers = workers
        self._seen: dict[int | None, tuple[int, float]] = {}  # count, and seconds since it rose
        self._looked_at: float | None = None

    def look(self, now: float) -> None:
        """Kill a frozen worker and raise ClusterError; this looks about once a second."""
        if self._looked_at is not None and now - self._looked_at < PARENT_POLL_S:
            return
        # this process may have been stopped together with the workers
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
    """Kill the processes if the block, which waits for them, takes longer.

    A time in which this process itself is stopped counts as one second.
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
    """Run a block that asks the queue's process; raise _KeeperLost if that does not answer.

    If the process is killed within an answer, the block raises a plain OSError.
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
    """Start the workers; `folder` gets the socket of the queue's process."""
    context = multiprocessing.get_context("spawn")
    before = multiprocessing.active_children()
    manager = SyncManager(str(folder / "queue"), ctx=context)
    # its queue survives a worker that is killed while it writes; the reader of a pipe would hang
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
            for worker in workers():  # they would finish their sample first
                worker.kill()
            raise
        except (BrokenProcessPool, _KeeperLost):
            time.sleep(SIGNAL_S)
            signals.check()  # a signal has come to all processes
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
    """The state of a worker process."""

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
    """Prepare a worker process; called once in each."""
    global _WORKER
    _end_with(parent, counts)
    # The parent has printed the warnings about the same configs.
    logging.getLogger("flowspec.model").setLevel(logging.ERROR)
    _WORKER = _Worker(Workbench(plan), samples, stopped)


def _end_with(parent: int, counts: MutableMapping[int, int] | None = None) -> None:
    """Let this child process end with its parent; write its signs of life to `counts`."""
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
    """Run a job; its samples are in the queue when this returns."""
    assert _WORKER is not None
    for sample in _WORKER.bench.run(case, group, asked):
        _WORKER.samples.put(sample)
        if _WORKER.stopped.is_set():
            return
