"""LocalEngine: the head in this process and one process per stage, with a transport between."""

import contextlib
import logging
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import Emulation, read_emulation
from flowspec.engine.build import HeadParts, build_head
from flowspec.engine.cores import segments_at_once
from flowspec.engine.engine import StageStatus
from flowspec.engine.head_engine import HeadEngine, failure_of_loss
from flowspec.engine.stage_process import StageConfig
from flowspec.engine.status import StageTotals, stage_status
from flowspec.head.head import Head
from flowspec.protocol.codec import WireError
from flowspec.protocol.messages import Failed, Ping, Ready, Resume, Stop, Suspend
from flowspec.request import ClusterError, rank_name
from flowspec.runtime.event_loop import EventLoop
from flowspec.runtime.recorder import OFF, open_trace, trace_path
from flowspec.runtime.watchdog import Watchdog, WatchdogAction
from flowspec.system import signals
from flowspec.system.open_files import check_open_files
from flowspec.transport.base import LOST, LostPeer, Transport
from flowspec.transport.by_name import local_transport, rank_device
from flowspec.transport.emulated import EmulatedTransport


class StageProcess(Protocol):
    """The subset of subprocess.Popen that the head uses."""

    @property
    def pid(self) -> object:
        """The process id, for errors."""

    def poll(self) -> int | None:
        """Return the exit code; None while the process runs."""

    def terminate(self) -> None:
        """Ask the process to end."""

    def kill(self) -> None:
        """Kill the process."""

    def wait(self, timeout: float | None = None) -> int:
        """Wait until the process has ended; return its exit code."""


ROUNDS = 8  # the quickest one counts
ANSWER_TIMEOUT_S = 0.2


def ping_clocks(driver: EventLoop, head: Head, ranks: Iterable[int]) -> None:
    """Exchange a few pings with each stage, one at a time; do nothing without a trace."""
    if driver.trace is OFF:
        return
    for rank in ranks:
        for _ in range(ROUNDS):
            sent_at, ping = time.monotonic(), Ping(rank=0)
            driver.transport.send(rank, ping)
            driver.trace.sent(sent_at, rank, ping)
            while head.heard_at.get(rank, 0.0) < sent_at:
                if time.monotonic() > sent_at + ANSWER_TIMEOUT_S:
                    return  # the stage hangs or computes, and the known clocks must do
                driver.turn(ANSWER_TIMEOUT_S / 4)


logger = logging.getLogger(__name__)

START_TIMEOUT_S = 120.0  # and the time to read the weights from a slow disk
SLOW_DISK_BYTES_PER_S = 50e6
POLL_S = 0.2
LOOK_EVERY_S = 0.05  # between looks at the stage processes: each look is a system call per stage
STOP_TIMEOUT_S = 2.0
EXIT_TIMEOUT_S = 0.5  # from a broken connection to the end of its process
LOG_TAIL_LINES = 8
OWN_FILES, FILES_PER_STAGE = 32, 4  # open files of the head: 20 and 2 were seen


def check_files_for(num_stages: int) -> None:
    """Raise OSError if the head of so many stages cannot open the files it needs."""
    check_open_files(OWN_FILES + FILES_PER_STAGE * num_stages)


class LocalEngine(HeadEngine):
    """Runs stage processes inside `with`; leaving it ends every process.

    With `trace_folder` every process records its work there (runtime/recorder.py). With
    `config.emulate` all keep the pace of an emulated cluster. A stage that dies or hangs is
    restarted, up to `config.max_restarts` times in all, and requests go on from their accepted
    tokens. A traced run does not restart, since its records would have a hole.
    """

    shares_cores = True  # head and stages run on this machine's processor

    def __init__(
        self, config: EngineConfig, parts: HeadParts, trace_folder: Path | None = None
    ) -> None:
        self.config = config
        self.trace_folder = trace_folder
        self.num_stages = len(parts.manifest.layers)
        self.emulation = _emulation(config, self.num_stages)
        head = build_head(config, parts)
        if self.emulation is not None:
            head.pipe.link_row_ms = self.emulation.link_row_ms
        elif self.shares_cores and config.local.device == "cpu":
            threads = config.local.threads
            head.pipe.max_in_flight = segments_at_once(self.num_stages, threads=threads)
        self.children: dict[int, StageProcess] = {}
        self.num_kv_tokens: dict[int, int] = {}  # capacity of each stage
        self.restarts: list[str] = []  # the reason of each restart
        self._totals = StageTotals()
        self._looked_at = 0.0
        can_restart = config.transport == "zmq" and trace_folder is None
        self.max_restarts = config.max_restarts if can_restart else 0
        head.resumes = self.max_restarts > 0
        check_files_for(self.num_stages)
        self.folder = ""
        self._hold = signals.Hold(self._kill)  # until `close` has ended the processes
        # mkdtemp makes it for this user alone: access to the folder is access to the cluster
        self.folder = tempfile.mkdtemp(prefix="flowspec-")
        try:
            self.transport = self._make_transport()
        except BaseException:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._hold.release()
            raise
        trace = open_trace(self._trace_file(0), 0)
        loop = EventLoop(head, self.transport, self.num_stages, trace, pace=self.emulation)
        super().__init__(head, parts, loop, name="head")
        self._watchdog = Watchdog(config.timeout_s)

    def __enter__(self) -> "LocalEngine":
        try:
            for rank in range(1, self.num_stages + 1):
                self.children[rank] = self._spawn(rank)
            self._await_ready(set(self.children))
            ping_clocks(self.loop, self.head, self.children)
            self.start_thread()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self.stop_thread("the engine was closed")
                with contextlib.suppress(ClusterError):  # of a stage that is gone
                    ping_clocks(self.loop, self.head, self.children)
        finally:
            self.close()
        if error is None:
            signals.check()

    def stages_status(self) -> dict[int, StageStatus]:
        """Return the totals of each stage, its work before a restart included."""
        totals = self._totals.of(dict(self.head.statuses))
        return {rank: stage_status(status) for rank, status in totals.items()}

    def turn(self, timeout_s: float) -> None:
        """One turn; while requests are open, a look at the processes and at whether all moves."""
        if self.head.outage is not None and not self.is_busy:
            self.do_commands(timeout_s)  # a transport that has lost a stage waits for nothing
            return
        self.loop.turn(timeout_s)
        if not self.is_busy:
            return
        if time.monotonic() - self._looked_at > LOOK_EVERY_S:
            self._check_children()
            self._check_progress()
            self._looked_at = time.monotonic()
        if (outage := self.head.outage) is not None:
            raise ClusterError(outage.place or "head", outage.cause, rank=outage.rank)

    def lose(self, error: ClusterError | WireError) -> None:
        """Restart lost stages if that is allowed. A corrupt frame ends all requests."""
        if isinstance(error, WireError):
            self.abandon(failure_of_loss(error))
        else:
            self._recover(self._explain(error))

    def _recover(self, error: ClusterError) -> None:
        """Restart lost stages and let requests go on, or end them if no restart is left.

        A loss while no request is open is noted; the next request finds the stage lost.
        """
        while True:
            self.stages_status()  # the last totals of the lost stages
            self.inject(Suspend(failure=failure_of_loss(error), blames=True))
            self.deliver()
            if not self.head.scheduler.waiting or self.is_stopping:
                return
            if len(self.restarts) >= self.max_restarts:
                self.abandon(failure_of_loss(error))
                return
            self.restarts.append(str(error))
            logger.warning("%s; restarting it, answers go on", str(error).splitlines()[0])
            lost = self._lost_ranks(error)
            self._totals.lose(lost)
            try:
                for rank in lost:
                    self.children[rank].kill()
                    self.children[rank].wait(timeout=STOP_TIMEOUT_S)
                    self.children[rank] = self._spawn(rank)
                self._await_ready(lost)
                break
            except ClusterError as again:
                error = self._explain(again)
        known = [count for count in self.num_kv_tokens.values() if count]
        resume = Resume(num_stages=self.num_stages, num_kv_tokens=min(known, default=0))
        self.inject(resume)
        self.loop.last_progress = time.monotonic()

    def _lost_ranks(self, error: ClusterError) -> set[int]:
        """Return the stages that have ended, at once or soon, and the one that the error names."""
        named = {error.rank} & set(self.children) if error.rank else set()
        _await_exit([self.children[rank] for rank in named], EXIT_TIMEOUT_S)
        return named | {rank for rank, child in self.children.items() if child.poll() is not None}

    def close(self) -> None:
        """End every process: by message, then by SIGTERM, then by SIGKILL. Safe to call twice."""
        self.stop_thread("the engine was closed")
        try:
            running = [rank for rank, child in self.children.items() if child.poll() is None]
            for rank in running:
                with contextlib.suppress(ClusterError):  # some may be gone; go on to the others
                    self.transport.send(rank, Stop())
            _await_exit(self.children.values(), STOP_TIMEOUT_S if running else 0.0)
        finally:
            for child in self.children.values():
                child.terminate()
            _await_exit(self.children.values(), 1.0)
            for child in self.children.values():
                child.kill()
                child.wait(timeout=STOP_TIMEOUT_S)
            self.transport.close()
            shutil.rmtree(self.folder, ignore_errors=True)
            self.loop.trace.close()
            self._hold.release()

    def _kill(self) -> None:
        """Kill all stages when a second signal ends this process."""
        for child in list(self.children.values()):
            child.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make_transport(self) -> Transport:
        device = rank_device(self.config.transport, self.config.local.device, 0)
        kind, stages = self.config.transport, self.num_stages
        inner = local_transport(kind, 0, num_stages=stages, folder=self.folder, device=device)
        if self.emulation is None:
            return inner
        return EmulatedTransport(inner, 0, self.emulation.link)

    def _spawn(self, rank: int) -> StageProcess:
        command = [sys.executable, "-m", "flowspec", "stage", str(self._write_config(rank))]
        with self._log_path(rank).open("wb") as log:
            # A session of its own: Ctrl-C reaches the head alone, which then ends the stages. The
            # pipe on stdin tells a stage when the head has died.
            return subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, start_new_session=True
            )

    def _write_config(self, rank: int) -> Path:
        """Write a stage's configuration file; only this user may read its folder."""
        config = self.config
        device = rank_device(config.transport, config.local.device, rank)
        stage = StageConfig(
            split_folder=self.parts.folder.resolve(),
            socket_folder=self.folder,
            rank=rank,
            num_stages=self.num_stages,
            numerics=config.numerics,
            local=config.local.changed(device=device),
            transport=config.transport,
            emulate=config.emulate,
            emulate_slowdown=config.emulate_slowdown,
            trace_file=self._trace_file(rank),
            epoch=self.head.pipe.epoch,
        )
        file = Path(self.folder) / f"stage_{rank}.json"
        file.write_text(stage.model_dump_json())
        return file

    def _await_ready(self, ranks: set[int]) -> None:
        """Wait until each of these stages has loaded the right model."""
        ready: set[int] = set()
        size = sum(file.bytes for file in self.parts.manifest.files.values())
        timeout_s = START_TIMEOUT_S + size / SLOW_DISK_BYTES_PER_S
        end = time.monotonic() + timeout_s
        while not ready >= ranks and not self.is_stopping:
            signals.check()
            self.do_commands()  # requests come and are aborted while a stage is restarted
            self.deliver()
            for message in self._receive():
                match message:
                    case Ready() if why := self._refusal(message):
                        raise ClusterError(rank_name(message.stage), why)
                    case Ready():
                        ready.add(message.stage)
                        self.num_kv_tokens[message.stage] = message.num_kv_tokens
                        self.head.scheduler.limit_kv_tokens(message.num_kv_tokens)
                    case Failed() if message.epoch == self.head.pipe.epoch:
                        raise ClusterError.of_rank(message.stage, message.text)
            self._check_children()
            if time.monotonic() > end:
                late = min(ranks - ready)
                cause = f"not ready after {timeout_s:.0f} s{self._log(late)}"
                raise ClusterError.of_rank(late, cause)

    def _refusal(self, ready: Ready) -> str:
        """Return why a stage that is ready cannot be part of this run; empty if it can."""
        if ready.model != self.parts.manifest.model_hash:
            return "has loaded another split"
        return self.config.numerics.refusal(ready.numerics)

    def _check_children(self) -> None:
        for rank, child in self.children.items():
            code = child.poll()
            if code is None:
                continue
            self._hear_last_words()
            how = f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
            cause = f"process {child.pid} ended by {how}{self._log(rank)}"
            raise ClusterError.of_rank(rank, cause)

    def _receive(self) -> Iterable[object]:
        try:
            return self.transport.receive(POLL_S)
        except LostPeer as error:
            raise self._explain(error) from error

    def _explain(self, error: ClusterError) -> ClusterError:
        """Add how the process ended, if only its broken connection is known."""
        lost = [child for rank, child in self.children.items() if rank == error.rank]
        if lost and error.cause.startswith(LOST):
            _await_exit(lost, EXIT_TIMEOUT_S)
            try:
                self._check_children()
            except ClusterError as known:
                return known
        return error

    def _hear_last_words(self) -> None:
        """Read the messages in which failing stages say why they end."""
        with contextlib.suppress(LostPeer):  # its loss is known already
            for message in self.transport.receive(POLL_S):
                if isinstance(message, Failed) and message.epoch == self.head.pipe.epoch:
                    raise ClusterError.of_rank(message.stage, message.text)

    def _check_progress(self) -> None:
        """Ask all stages after half the timeout without an answer; a silent one hangs."""
        now, moved_at, limit = time.monotonic(), self.loop.last_progress, self.config.timeout_s
        step, silent = self._watchdog.step(
            now, moved_at=moved_at, ranks=self.children, heard_at=self.head.heard_at
        )
        who = ", ".join(f"{rank_name(r)} (process {self.children[r].pid})" for r in silent)
        match step:
            case WatchdogAction.ASK:
                for rank in self.children:
                    self.transport.send(rank, Ping(rank=0))
                    self.loop.trace.sent(now, rank, Ping(rank=0))
            case WatchdogAction.WARN:
                end = "it is restarted" if len(self.restarts) < self.max_restarts else "giving up"
                seconds = now - moved_at
                logger.warning(
                    "no answer from %s for %.0f s; %s after %.0f s", who, seconds, end, limit
                )
            case WatchdogAction.GIVE_UP if silent:
                pid = self.children[silent[0]].pid
                cause = f"process {pid} gave no answer for {limit / 2:.1f} s: it hangs"
                raise ClusterError.of_rank(silent[0], cause)
            case WatchdogAction.GIVE_UP:
                seconds = now - moved_at
                cause = f"nothing has moved for {seconds:.0f} s; all stages answer"
                raise ClusterError.of_rank(0, cause)

    def _trace_file(self, rank: int) -> Path | None:
        return trace_path(self.trace_folder, rank) if self.trace_folder else None

    def _log_path(self, rank: int) -> Path:
        return Path(self.folder) / f"stage_{rank}.log"

    def _log(self, rank: int) -> str:
        """Return the end of a stage's own output, to follow an error."""
        try:
            lines = self._log_path(rank).read_text(errors="replace").splitlines()
        except OSError:
            return ""
        return "".join(f"\n  {line}" for line in lines[-LOG_TAIL_LINES:])


def _emulation(config: EngineConfig, num_stages: int) -> Emulation | None:
    if not config.emulate:
        return None
    emulation = read_emulation(
        config.emulate, drafter=config.drafter, slowdown=config.emulate_slowdown
    )
    emulation.check_stages(num_stages)
    return emulation


def _await_exit(children: Iterable[StageProcess], timeout_s: float) -> None:
    end = time.monotonic() + timeout_s
    while any(child.poll() is None for child in children) and time.monotonic() < end:
        time.sleep(0.02)
