"""Real faults on real processes: kill, stop and freeze stages in every phase.

tests/stress/fault_campaign.py uses it; the text must stay right. A `Subject` is a cluster under
test: it serves requests and names the processes that may be hurt. The phases:

    idle      no request is open
    prefill   a long prompt is in the pipe
    decode    some tokens have come
    load      a stage that replaces a killed one dies while it loads

The faults are SIGKILL, SIGSTOP for ever (the process hangs), and SIGSTOP with a later SIGCONT.
"""

import os
import signal
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import psutil

from flowspec.config import EngineConfig
from flowspec.engine.build import load_head_parts
from flowspec.engine.engine import Engine
from flowspec.engine.local import LocalEngine
from flowspec.engine.reference import LocalTarget
from flowspec.request import Request, RequestOutput, SamplingParams
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.load import load_whole
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from tests.support.checkpoints import save_checkpoint

ROOT = Path(__file__).resolve().parents[2]


PHASES = ("idle", "prefill", "decode", "load")
KINDS = ("kill", "stop", "pause")
PAUSE_S = 0.3
GONE_WITHIN_S = 20.0
TIMEOUT_S = 3.0  # limit on a stage's silence
MAX_ANSWER_S = 180.0  # far beyond several restarts on a busy machine


@dataclass(frozen=True, slots=True)
class Subject:
    """A running cluster under test."""

    cluster: Engine
    victims: Callable[[], Mapping[str, int]]  # current process ids by name
    alone: LocalTarget
    prompt: tuple[int, ...]
    num_recoveries: Callable[[], int]


@dataclass(slots=True)
class Report:
    """The faults caused, and the failures."""

    faults: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    answers: int = 0
    recovered_s: list[float] = field(default_factory=list)  # resume_s of the requests hit
    orphans: int = 0


@contextmanager
def local_subject(folder: Path, *, num_stages: int = 2) -> Iterator[Subject]:
    """Yield a tiny model over local stage processes that are restarted."""
    checkpoint = save_checkpoint(folder / "tiny", num_layers=2)
    split = folder / "split"
    plan = plan_split(open_checkpoint(checkpoint / "target"), layers=(1,) * num_stages, dtype=None)
    run_split(plan, split, model_id="tiny")
    config = EngineConfig(
        model=str(split),
        draft=str(checkpoint / "eagle"),
        stages=num_stages,
        timeout_s=TIMEOUT_S,
        max_restarts=1_000_000,
    )
    parts = load_head_parts(config, split)
    with LocalEngine(config, parts) as cluster:
        yield Subject(
            cluster,
            victims=lambda: {f"stage {r}": child.pid for r, child in cluster.children.items()},
            alone=LocalTarget(load_whole(split), parts.max_context),
            prompt=tuple(parts.tokenizer.encode("the quick brown fox")),
            num_recoveries=lambda: len(cluster.restarts),
        )


class Striker:
    """Hurts random processes of a subject; remembers every process it ever saw."""

    def __init__(self, subject: Subject, random: Random, report: Report) -> None:
        self.subject, self.random, self.report = subject, random, report
        self.seen: set[int] = set()
        self._timers: list[threading.Timer] = []

    def strike(self, kind: str, phase: str) -> None:
        """Cause a fault now; in phase `load`, also hurt the replacement."""
        victims = self.subject.victims()
        self.seen.update(victims.values())
        name = self.random.choice(sorted(victims))
        with suppress(ProcessLookupError):
            os.kill(victims[name], signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
            self.report.faults[f"{phase}: {kind}"] += 1
        if kind == "pause":
            self._later(PAUSE_S, lambda: self._signal(victims[name], signal.SIGCONT))
        if phase == "load":
            self._later(0.05, lambda: self._strike_next(name, victims[name]))

    def close(self) -> None:
        """Cause no more faults."""
        for timer in self._timers:
            timer.join()
        self.seen.update(self.subject.victims().values())

    def _strike_next(self, name: str, before: int) -> None:
        end = time.monotonic() + 10.0
        while time.monotonic() < end:
            if (pid := self.subject.victims().get(name, before)) != before:
                time.sleep(self.random.uniform(0.0, 1.0))
                self.seen.add(pid)
                self._signal(pid, signal.SIGKILL)
                self.report.faults["load: kill, again"] += 1
                return
            time.sleep(0.01)

    def _signal(self, pid: int, number: int) -> None:
        with suppress(ProcessLookupError):
            os.kill(pid, number)

    def _later(self, delay_s: float, act: Callable[[], None]) -> None:
        self._timers = [timer for timer in self._timers if timer.is_alive()]
        self._timers.append(threading.Timer(delay_s, act))
        self._timers[-1].start()


def run_round(subject: Subject, striker: Striker, first: int, kind: str, phase: str) -> None:
    """Send two requests, cause one fault in the phase, and check both answers."""
    random, report = striker.random, striker.report
    asked = {
        number: Request(
            prompt=(subject.prompt * 12)[
                : random.choice((5, 150) if phase != "prefill" else (200,))
            ],
            sampling=SamplingParams(temperature=float(number % 2), seed=number),
            max_new_tokens=random.choice((20, 60)),
        )
        for number in (first, first + 1)
    }
    at = random.randint(0, 15)
    if phase == "idle":
        striker.strike(kind, phase)
    if phase == "prefill":
        striker._later(random.uniform(0.0, 0.05), lambda: striker.strike(kind, phase))
    end = time.monotonic() + MAX_ANSWER_S
    streams = {number: subject.cluster.submit(one) for number, one in asked.items()}
    count = 0
    while any(stream.output is None for stream in streams.values()):
        if time.monotonic() > end:
            report.wrong.append(f"{phase}, {kind}: no end after {MAX_ANSWER_S:.0f} s")
            return
        events = [event for stream in streams.values() if (event := stream.poll()) is not None]
        if count <= at < count + len(events) and phase in ("decode", "load"):
            striker.strike(kind, phase)
        count += len(events)
        if not events:
            time.sleep(0.002)
    done = {number: stream.result() for number, stream in streams.items()}
    check_answers(subject, asked, done, report, f"{phase}, {kind}")


def check_answers(
    subject: Subject,
    asked: Mapping[int, Request],
    done: Mapping[int, RequestOutput],
    report: Report,
    where: str,
) -> None:
    """Check that every request is answered with the target's own tokens."""
    for number, one in asked.items():
        if number not in done:
            report.wrong.append(f"{where}: request {number} has no answer")
            continue
        answer = done[number]
        report.answers += 1
        if answer.stats.resume_s:
            report.recovered_s.append(answer.stats.resume_s)
        if answer.error or list(answer.tokens) != subject.alone.generate(one)[0]:
            report.wrong.append(f"{where}: request {number}: {answer.error or 'another text'}")


def count_left(pids: set[int]) -> int:
    """Count the processes that still exist after a while."""
    end = time.monotonic() + GONE_WITHIN_S
    left = pids
    while left and time.monotonic() < end:
        left = {pid for pid in left if _is_running(pid)}
        time.sleep(0.05)
    return len(left)


def _is_running(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def campaign(count: int, seed: int, folder: Path) -> Report:
    """Cause at least `count` faults on a local cluster."""
    random, report = Random(seed), Report()
    with local_subject(folder) as subject:
        striker = Striker(subject, random, report)
        number = 1
        while report.faults.total() < count and not report.wrong:
            phase = PHASES[number // 2 % len(PHASES)]
            kind = "kill" if phase == "load" else random.choice(KINDS)
            run_round(subject, striker, number, kind, phase)
            number += 2
        striker.close()
        recoveries = subject.num_recoveries()
    report.orphans = count_left(striker.seen)
    if report.orphans:
        report.wrong.append(f"{report.orphans} processes are left")
    report.faults["(restarts)"] = recoveries
    return report


def run_real(count: int, seed: int = 0) -> int:
    """Run the campaign and print its totals; return the number of failures."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = campaign(count, seed, Path(folder))
    for line in report.wrong:
        print(line)
    restarts = report.faults.pop("(restarts)")
    took_s, wrong = time.monotonic() - started, len(report.wrong)
    print(
        f"{report.faults.total()} faults in {took_s:.0f} s, {restarts} restarts, {report.answers} "
        f"answers checked, {report.orphans} orphans: {wrong} went wrong"
    )
    print("faults: " + ", ".join(f"{name} {n}" for name, n in sorted(report.faults.items())))
    if times := sorted(report.recovered_s):
        median, longest = times[len(times) // 2], times[-1]
        print(f"outage of the requests hit: median {median:.1f} s, longest {longest:.1f} s")
    return len(report.wrong)
