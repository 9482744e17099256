"""A setting of the numerics is written where it is defined and where it is used, nowhere between.

A copy of the package gets one more: a line in NumericsConfig and a line where a stage is made. The
value that the head is given must then be found on the stages, however they were started.
"""

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import flowspec
from flowspec.config import EngineConfig
from flowspec.transport.secure.token import new_token

pytestmark = pytest.mark.slow

TIMEOUT_S = 120.0  # far more than it takes: this machine may be busy
DEFINED = """\
    batch_invariant: bool = Field(
"""
DEFINITION = """\
    throw_away: str = Field(default="", description="Nothing at all.")
"""
USED = """\
    return Stage(rank, num_stages, model, batch_invariant=numerics.batch_invariant)
"""
USE = """\
    Path(__import__("os").environ["SEEN"], str(rank)).write_text(numerics.throw_away)
"""
# under torchrun every process has the same command: here the head alone has the option
HEAD_ALONE = """\
import os, runpy, sys
if os.environ["RANK"] == "0":
    sys.argv += ["--throw-away", "hello"]
runpy.run_module("flowspec", run_name="__main__", alter_sys=True)
"""


def insert(file: Path, before: str, text: str) -> None:
    """Put `text` before the only place where `before` stands."""
    old = file.read_text()
    assert old.count(before) == 1, f"{file}: {before!r} stands there {old.count(before)} times"
    file.write_text(old.replace(before, text + before))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the changed copy lies."""
    folder = tmp_path_factory.mktemp("package")
    own = Path(flowspec.__file__).parent
    ignored = shutil.ignore_patterns("__pycache__", "data")
    shutil.copytree(own, folder / "flowspec", ignore=ignored)
    (folder / "flowspec" / "data").symlink_to(own / "data")
    insert(folder / "flowspec" / "config.py", DEFINED, DEFINITION)
    insert(folder / "flowspec" / "engine" / "build.py", USED, USE)
    return folder


class Commands:
    """Processes of the changed package; what stages have seen is in `seen`."""

    def __init__(self, package: Path, folder: Path, token: str) -> None:
        self.folder, self.seen = folder, folder / "seen"
        self.seen.mkdir()
        more = {"PYTHONPATH": str(package), "SEEN": str(self.seen), "FLOWSPEC_TOKEN": token}
        self.environment = {**os.environ, **more, "XDG_CACHE_HOME": str(folder / "cache")}
        self.running: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, *words: str) -> subprocess.Popen[bytes]:
        """`python *words`, its output in a file."""
        with (self.folder / f"{name}.log").open("wb") as log:
            self.running.append(
                subprocess.Popen(
                    [sys.executable, *words],
                    cwd=self.folder,
                    env=self.environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                )
            )
        return self.running[-1]

    def log(self, name: str) -> str:
        """What a process has said."""
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, name: str, pattern: str) -> str:
        """Until the log of a process holds the pattern; its first group."""
        end = time.monotonic() + TIMEOUT_S
        while (found := re.search(pattern, self.log(name))) is None:
            assert time.monotonic() < end, self.log(name)
            time.sleep(0.05)
        return found[1]


@pytest.fixture
def commands(package: Path, tmp_path: Path) -> Iterator[Commands]:
    """Whatever still runs at the end is killed."""
    found = Commands(package, tmp_path, str(new_token()))
    yield found
    for process in found.running:
        process.kill()
        process.wait(timeout=10)


def started_by_the_head(commands: Commands, config: EngineConfig) -> None:
    """`flowspec run`."""
    words = ["-m", "flowspec", "run", "--model", config.model, "--draft", config.draft]
    words += ["--max-tokens", "4", "--prompt", "fox", "--throw-away", "hello"]
    code = commands.start("run", *words).wait(TIMEOUT_S)
    assert code == 0, commands.log("run")


def started_by_torchrun(commands: Commands, config: EngineConfig) -> None:
    """`torchrun -m flowspec run`, on whose other ranks nobody has given the option."""
    (commands.folder / "head_alone.py").write_text(HEAD_ALONE)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", "head_alone.py"]
    words += ["run", "--transport", "gloo", "--model", config.model, "--draft", config.draft]
    code = commands.start("run", *words, "--max-tokens", "4").wait(TIMEOUT_S)
    assert code == 0, commands.log("run")


def joined(commands: Commands, config: EngineConfig) -> None:
    """`flowspec serve` and `flowspec join`; the device is given nothing."""
    target = str(Path(config.draft).parent / "target")
    words = ["-m", "flowspec", "serve", target, "--draft", config.draft, "--layers", "1+1"]
    words += ["--host", "127.0.0.1", "--port", "0", "--settle", "0.1", "--no-mdns"]
    commands.start("head", *words, "--throw-away", "hello", "--reserve-mb", "50")
    port = commands.wait_for("head", r"flowspec join 127\.0\.0\.1:(\d+) --token")
    for name in ("ada", "bob"):
        commands.start(name, "-m", "flowspec", "join", f"127.0.0.1:{port}", "--name", name)
    commands.wait_for("head", r"(serving: layers)")


@pytest.mark.parametrize("start", [started_by_the_head, started_by_torchrun, joined])
def test_a_new_setting_reaches_every_stage(
    start: object, commands: Commands, config: EngineConfig
) -> None:
    """With its option, which nobody has written either."""
    assert callable(start)
    start(commands, config)
    seen = {file.name: file.read_text() for file in commands.seen.iterdir()}
    assert seen == {"1": "hello", "2": "hello"}
