"""A plan on several processes: what comes from them, and when."""

import multiprocessing
import os
import signal
import time
from concurrent.futures import Future
from queue import Queue
from typing import Any

import pytest

from flowspec.bench import runner
from flowspec.bench.answering import Asked
from flowspec.bench.experiment import Group, make_cases
from flowspec.bench.prompts import Prompt
from flowspec.bench.runner import Signs, _ask, _crew, _Pool
from flowspec.request import ClusterError
from flowspec.system import signals
from tests.cli.test_plan import make_plan
from tests.support.samples import sample


class Workers:
    """Answer at once; strategies put one sample at a time and are never finished by themselves."""

    def __init__(self, samples: Queue) -> None:
        self.samples = samples
        self.running: list[Future] = []

    def submit(self, function: Any, *args: Any) -> Future:
        """As an executor's."""
        future: Future = Future()
        if function is _ask:
            future.set_result(([Asked("1", 0, (1,), (2,))], []))
        else:
            self.samples.put(sample(question="1"))
            self.running.append(future)
        return future


def test_a_turn_comes_before_its_set_is_finished():
    """Not with the rest of it; what came last is not lost either."""
    samples: Queue = Queue()
    workers = Workers(samples)
    cases = list(make_cases(("streaming",), ("eagle",), {}, {}))
    group = Group("qa", (Prompt("1", "qa", ("who?", "why?")),), 0.0, 1)
    work = _Pool(workers, 1, samples, Signs({}, list)).work([(group, cases)])
    assert next(work) == (cases, [])
    assert next(work).question == "1"
    (running,) = workers.running
    assert not running.done()
    samples.put(sample(question="2"))
    running.set_result(None)
    assert [one.question for one in work] == ["2"]


def lose_the_queue() -> None:
    """Kill its process while the crew is there, then ask for what has arrived."""
    before = multiprocessing.active_children()
    with _crew(make_plan(), 2) as crew:
        (queue_s,) = [one for one in multiprocessing.active_children() if one not in before]
        queue_s.kill()
        queue_s.join(10)
        list(crew._arrived())


def test_the_end_of_the_queue_s_process_is_told():
    """It is nobody's turn that fails then: without care the run would end in silence."""
    with pytest.raises(ClusterError, match="a worker process ended"):
        lose_the_queue()


def freeze_the_queue(*, at_the_end: bool) -> None:
    """Stop its process while the crew is there; ask for what has arrived, or end the crew."""
    with _crew(make_plan(), 2) as crew:
        os.kill(crew.keepers[0].pid, signal.SIGSTOP)
        if not at_the_end:
            list(crew._arrived())


@pytest.mark.slow
def test_a_frozen_queue_ends_the_run(monkeypatch):
    """Its process is killed; the end is told as any lost worker is."""
    monkeypatch.setattr(runner, "FROZEN_S", 2.0)
    with pytest.raises(ClusterError, match="was silent for 2 s and was killed"):
        freeze_the_queue(at_the_end=False)


@pytest.mark.slow
def test_a_queue_that_freezes_at_the_end_holds_nobody(monkeypatch):
    """All is done by then: nothing is told."""
    monkeypatch.setattr(runner, "STOP_S", 2.0)
    before = multiprocessing.active_children()
    freeze_the_queue(at_the_end=True)
    assert multiprocessing.active_children() == before


def work_until(number: int) -> None:
    """A signal comes while both workers are in the middle of a sample."""
    with signals.installed(), _crew(make_plan(), 2) as crew:
        for _ in range(2):
            crew.pool.submit(time.sleep, 100)
        os.kill(os.getpid(), number)
        while True:
            signals.check()
            time.sleep(0.01)


@pytest.mark.slow
def test_a_signal_does_not_wait_for_samples(monkeypatch):
    """The workers are killed, since they look at nothing before their sample is done."""
    monkeypatch.setattr(runner, "STOP_S", 40.0)
    before = multiprocessing.active_children()
    start = time.monotonic()
    with pytest.raises(signals.EndedBySignal):
        work_until(signal.SIGTERM)
    assert time.monotonic() - start < 20
    assert multiprocessing.active_children() == before


def test_what_is_finished_when_a_signal_comes_is_kept():
    """It is in the queue by then."""
    samples: Queue = Queue()
    cases = list(make_cases(("streaming",), ("eagle",), {}, {}))
    group = Group("qa", (Prompt("1", "qa", ("who?",)),), 0.0, 1)
    with signals.installed(), signals.undoing():
        work = _Pool(Workers(samples), 1, samples, Signs({}, list)).work([(group, cases)])
        assert next(work) == (cases, [])
        samples.put(sample(question="2"))
        os.kill(os.getpid(), signal.SIGTERM)
        while not signals.received():
            time.sleep(0.01)
        assert {next(work).question, next(work).question} == {"1", "2"}
        with pytest.raises(signals.EndedBySignal):
            next(work)
        signals._state.received = 0


@pytest.fixture
def worker():
    """A process that does nothing."""
    child = multiprocessing.get_context("spawn").Process(target=time.sleep, args=(100,))
    child.start()
    yield child
    child.kill()
    child.join(10)


@pytest.mark.parametrize("began", [True, False])
def test_a_worker_that_shows_no_life_is_ended(worker, began):
    """Named with its process id, after a minute of silence and not before; begun or not."""
    signs = Signs({worker.pid: 1} if began else {}, lambda: [worker])
    for second in range(int(runner.FROZEN_S)):
        signs.look(100.0 + second)
    assert worker.is_alive()
    with pytest.raises(ClusterError, match=f"worker process {worker.pid} has shown no sign of li"):
        signs.look(100.0 + runner.FROZEN_S)
    worker.join(10)
    assert worker.exitcode == -signal.SIGKILL


def test_a_worker_that_lives_or_was_stopped_with_all_others_goes_on(worker):
    """A count that rises now and then is life; so may be none while this process did not look."""
    counts = {worker.pid: 0}
    signs = Signs(counts, lambda: [worker])
    for second in range(400):
        counts[worker.pid] = second // 50
        signs.look(100.0 + second)
    signs.look(9000.0)
    assert worker.is_alive()


def freeze_a_worker() -> None:
    """Stop it while the crew is there, and go on looking for signs of life."""
    deadline = time.monotonic() + 60
    with _crew(make_plan(), 2) as crew:
        crew.pool.submit(time.sleep, 0)
        while not (pids := list(crew.signs.counts.keys())):
            assert time.monotonic() < deadline, "no worker began"
            time.sleep(0.1)
        os.kill(pids[0], signal.SIGSTOP)
        while time.monotonic() < deadline:
            crew.signs.look(time.monotonic())
            time.sleep(0.1)


@pytest.mark.slow
def test_a_frozen_worker_of_a_crew_is_ended(monkeypatch):
    """The run ends with a sentence, and does not wait for it."""
    monkeypatch.setattr(runner, "FROZEN_S", 4.0)
    with pytest.raises(ClusterError, match="no sign of life for 4 s"):
        freeze_a_worker()
