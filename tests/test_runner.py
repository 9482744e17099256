"""A plan on several processes: what comes from them, and when."""

import multiprocessing
from concurrent.futures import Future
from queue import Queue
from typing import Any

import pytest
from samples import sample
from test_plan import make_plan

from flowspec.eval.answering import Asked
from flowspec.eval.plan import Group, make_cases
from flowspec.eval.prompts import Prompt
from flowspec.eval.runner import _ask, _crew, _Pool
from flowspec.request import ClusterError


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
    work = _Pool(workers, 1, samples).work([(group, cases)])
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
