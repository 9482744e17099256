"""A signal may come at every import and in every phase of every command.

The command prints one line, exits with 128 + n, and leaves no process and no folder. Instead of
starting a process for each import, the test forks one and sends it the signal.
"""

import contextlib
import getpass
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flowspec.transport.secure.token import new_token
from tests.support.spawned import SIGNAL_AT, spawn

pytestmark = pytest.mark.slow

END_S = 120.0  # far more than it takes: this machine may be busy
GONE_S = 30.0
SOON_S = 20.0  # from the signal to the end: less than any wait for a process that does not answer
EVERY = 60  # imports: of about three thousand
AT_IMPORTS = f"""
import _signal, os, signal, sys, time

class Forks:
    # Every so many imports a copy of this process gets a signal, and ends.
    seen = 0
    def find_spec(self, name, path=None, target=None):
        taken = _signal.getsignal(_signal.SIGINT) is not _signal.default_int_handler
        state = getattr(sys.modules.get("flowspec.system.signals"), "_state", None)
        if taken and not (state and state.num_holds):
            Forks.seen += 1
            if Forks.seen % {EVERY} == 1:
                self.send((signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[Forks.seen % 3])
    def send(self, number):
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            with open("codes", "a") as file:
                print(number - code + 128, file=file)
        else:
            try:
                os.kill(os.getpid(), number)
                time.sleep(60)
            finally:
                os._exit(1)

sys.meta_path.insert(0, Forks())
"""
# Each ends by itself, after it has imported all that it needs. One process runs them all.
ENDING = (
    "--version, chat localhost:1 --token x, generate --head localhost:1 x --token x, "
    "status localhost:1 --token x, plan --cluster none, report none, plot time none --out a.png, "
    "trace summary none, run --strategy none, serve --settle -1, join localhost:1 --token x, "
    "doctor --device none, split none --stages 2, verify --driver none, bench --strategies none, "
    "check-head none none, reliability none.pdf, simulate, stage --help, run --transport none"
)
IN_TURN = """
import sys
from flowspec.__main__ import main
for words in sys.stdin.read().split(", "):
    sys.argv = ["flowspec", *words.split()]
    try:
        main()
    except SystemExit:
        pass
"""


def test_a_signal_during_any_import_ends_the_command(tmp_path: Path) -> None:
    """No import loses it, nor does a destructor."""
    (tmp_path / "sitecustomize.py").write_text(AT_IMPORTS)
    done = subprocess.run(
        [sys.executable, "-c", IN_TURN],
        input=ENDING,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=2 * END_S,
    )
    assert done.returncode == 0, done.stderr
    codes = (tmp_path / "codes").read_text().split()
    assert len(codes) > 30
    assert set(codes) == {"0"}, codes
    assert len(re.findall("^error: ended by SIG(INT|TERM|HUP)$", done.stderr, re.M)) == len(codes)
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


QUESTIONS = '{"question_id": 1, "turns": ["one"]}\n{"question_id": 2, "turns": ["two"]}\n'
RUN = "run --model TARGET --draft EAGLE --stages 1 --max-new-tokens 4"
VERIFY = "verify TARGET --strategies ar --stages 1 --limit 2"
BENCH = "bench --model TARGET --datasets asked.jsonl --strategies ar --max-tokens 4"
EMULATED = f"{BENCH} --stages 2 --jobs 1"
WHAT_IF = "simulate --vary stages=2 --model TARGET --strategies ar --datasets asked.jsonl --jobs 1"
HEAD = "127.0.0.1:1"
PHASES = [  # and the function at whose first call the signal comes
    (RUN, "flowspec.cli.run:load_head_parts"),
    (RUN, "flowspec.weights.split:HashedWriter.write"),
    (RUN, "flowspec.engine.local:LocalEngine._spawn"),
    (RUN, "flowspec.cli.ui.show:_Screen.add"),
    (RUN, "flowspec.engine.local:LocalEngine._await_ready"),
    (RUN, "flowspec.engine.head_engine:HeadEngine.deliver"),  # in the head's own thread
    (RUN, "flowspec.engine.head_engine:HeadEngine.stop_thread"),
    (RUN, "flowspec.engine.local:LocalEngine.close"),
    (f"{RUN} --no-check", "flowspec.cli.run:show_summary"),
    (f"{RUN} --trace t.json", "flowspec.engine.local:LocalEngine._spawn"),
    ("split TARGET --stages 2", "flowspec.weights.split:_write_journal"),
    (VERIFY, "flowspec.engine.reference:LocalTarget.generate"),
    (f"{VERIFY} --driver zmq", "flowspec.engine.local:LocalEngine._spawn"),
    (EMULATED, "flowspec.bench.records:SampleFile.add"),
    (f"{BENCH} --stages 2 --jobs 2", "flowspec.bench.runner:_Pool.work"),
    (f"{BENCH} --stages 1 --real", "flowspec.engine.local:LocalEngine._await_ready"),
    (WHAT_IF, "flowspec.bench.records:SampleFile.add"),
    ("serve TARGET --strategy ar --drafter none", "flowspec.cli.serve:_planner"),
    (f"join {HEAD} --device cpu", "flowspec.cluster.device.agent:DeviceAgent._pause"),
    (f"chat {HEAD}", "flowspec.transport.control_sockets:ControlClient.connect"),
    (f"generate --head {HEAD} x", "flowspec.transport.control_sockets:ControlClient.connect"),
    (f"status {HEAD}", "flowspec.transport.control_sockets:ControlClient.connect"),
    ("plan --cluster home-5", "flowspec.cli.plan:read_cluster"),
    ("doctor --device cpu", "flowspec.cli.doctor:report_device"),
    ("check-head SPLIT-1 EAGLE", "flowspec.cli.check_head:inspect_head"),
    ("report asked.jsonl", "flowspec.cli.report:read_records"),
    ("plot speedup asked.jsonl --out x.png", "flowspec.cli.plot:read_records"),
]


TWICE = [  # phases in which processes and folders are there
    (f"{RUN} --trace t.json", "flowspec.engine.local:LocalEngine._await_ready"),
    (f"{BENCH} --stages 1 --real", "flowspec.engine.local:LocalEngine._await_ready"),
    (f"{BENCH} --stages 2 --jobs 2", "flowspec.bench.runner:_Pool._arrived"),
]
IN_STAGE = """
import ctypes, os, sys

class Look:
    # Which signal is to come when the parent is gone, told when torch is about to be imported.
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            number = ctypes.c_int()
            ctypes.CDLL(None).prctl(2, ctypes.byref(number))
            os._exit(number.value)

sys.meta_path.insert(0, Look())
sys.argv = "flowspec stage stage_1.json".split()
from flowspec.__main__ import main
main()
"""


def left_by(mark: str) -> list[psutil.Process]:
    """Return the processes with this variable in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("FLOWSPEC_TEST_MARK") == mark:
                found.append(process)
    return [one for one in found if one.pid != os.getpid() and one.is_running()]


@pytest.mark.parametrize("turn", range(len(PHASES)), ids=lambda n: f"{PHASES[n][0]} {PHASES[n][1]}")
def test_a_signal_in_any_phase_ends_the_command(
    turn: int, checkpoint: Path, whole_split: Path, tmp_path: Path
) -> None:
    """Unfinished work is undone: no process, no folder, no incomplete file is left."""
    words, place = PHASES[turn]
    number = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)[turn % 3]
    for name in ("target", "eagle", "split-1"):
        words = words.replace(name.upper(), str(checkpoint / name))
    work, temporary, log = tmp_path / "work", tmp_path / "temporary", tmp_path / "log"
    work.mkdir()
    temporary.mkdir()
    (work / "asked.jsonl").write_text(QUESTIONS)
    environment = {"TMPDIR": str(temporary), "FLOWSPEC_TEST_MARK": str(tmp_path)}
    environment |= {"FLOWSPEC_TOKEN": new_token(), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    interrupt = (place, int(number))
    process = spawn(words.split(), log, work, environment, interrupt=interrupt, daemon=False)
    try:
        process.join(END_S)
        ended_at = time.monotonic()
        assert process.exitcode == 128 + number, log.read_text()
        end = time.monotonic() + GONE_S
        while left := left_by(str(tmp_path)):
            assert time.monotonic() < end, [one.cmdline() for one in left]
            time.sleep(0.05)
    finally:
        process.kill()
        for one in left_by(str(tmp_path)):
            one.kill()
    lines = log.read_text().splitlines()
    (sent_at,) = [float(line.split()[-1]) for line in lines if line.startswith(SIGNAL_AT)]
    assert ended_at - sent_at < SOON_S
    assert lines[-1] == f"error: ended by {number.name}"
    assert not [line for line in lines if "Traceback" in line or "Exception ignored" in line]
    assert len([line for line in lines if line.startswith("error:")]) == 1
    assert {path.name for path in temporary.iterdir()} <= {f"torchinductor_{getpass.getuser()}"}
    assert not list(work.rglob("*.partial"))
    if "SampleFile" in place:  # the first sample was written as a whole, and the user knows
        assert lines[-2].startswith("1 samples are in out/")


@pytest.mark.parametrize("turn", range(len(TWICE)), ids=lambda n: TWICE[n][0])
def test_a_second_signal_leaves_no_process_and_no_folder(
    turn: int, checkpoint: Path, tmp_path: Path
) -> None:
    """It waits for nothing, and removes what the first signal had not undone yet."""
    words, place = TWICE[turn]
    for name in ("target", "eagle"):
        words = words.replace(name.upper(), str(checkpoint / name))
    work, temporary, log = tmp_path / "work", tmp_path / "temporary", tmp_path / "log"
    work.mkdir()
    temporary.mkdir()
    (work / "asked.jsonl").write_text(QUESTIONS)
    environment = {"TMPDIR": str(temporary), "FLOWSPEC_TEST_MARK": str(tmp_path)}
    environment |= {"XDG_CACHE_HOME": str(tmp_path / "cache")}
    interrupt = (place, int(signal.SIGINT))
    process = spawn(
        words.split(), log, work, environment, interrupt=interrupt, daemon=False, times=2
    )
    try:
        process.join(END_S)
        ended_at = time.monotonic()
        assert process.exitcode == 130, log.read_text()
        assert {path.name for path in temporary.iterdir()} <= {f"torchinductor_{getpass.getuser()}"}
        end = time.monotonic() + GONE_S
        while left := left_by(str(tmp_path)):
            assert time.monotonic() < end, [one.cmdline() for one in left]
            time.sleep(0.05)
    finally:
        process.kill()
        for one in left_by(str(tmp_path)):
            one.kill()
    lines = log.read_text().splitlines()
    (sent_at,) = [float(line.split()[-1]) for line in lines if line.startswith(SIGNAL_AT)]
    assert ended_at - sent_at < SOON_S
    assert lines[-1] == "error: ended by SIGINT", lines


@pytest.mark.skipif(
    sys.platform != "linux", reason="needs Linux, which tells a process of its parent's end"
)
def test_a_stage_ends_with_its_head_before_it_imports_torch() -> None:
    """The import takes seconds, in which the stage must not stay."""
    child = subprocess.Popen([sys.executable, "-c", IN_STAGE], stdin=subprocess.PIPE)
    try:
        assert child.wait(END_S) == signal.SIGKILL
    finally:
        child.kill()
        child.communicate()
