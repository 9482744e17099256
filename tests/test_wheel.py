"""The wheel holds only the package and its data, and runs every command of the README.

It is built from the tracked files, installed into a separate environment and run in an empty
folder, where neither this clone nor its `config` and `models` can be found.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import textwrap
import venv
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import distribution
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 240
MAX_WHEEL_BYTES = 40e6
README = (ROOT / "README.md").read_text()

# Every command of the README's table, small. PORT, TOKEN: of the head that the test starts.
COMMANDS: dict[str, list[str]] = {
    "run": ["run --stages 1 --strategy ar --max-tokens 3 --trace run.json"],
    "serve": [],  # started beside, with a device
    "join": [],
    "chat": ["chat 127.0.0.1:PORT --token TOKEN --max-tokens 2"],
    "generate": ["generate --head 127.0.0.1:PORT --token TOKEN --max-tokens 2 Hello"],
    "status": ["status 127.0.0.1:PORT --token TOKEN"],
    "plan": ["plan --cluster jetson-5 --model vicuna-7b --tokens 2 --strategies ar"],
    "doctor": ["doctor 127.0.0.1:PORT --token TOKEN"],
    "split": ["split models/demo/target --stages 4 --out split4"],
    "trace": ["trace summary run.json"],
    "verify": ["verify --stages 1 --strategies ar,streaming --limit 1 --max-tokens 3"],
    "bench": [
        "bench --datasets models/demo/prompts.jsonl --limit 1 --max-tokens 3 --jobs 1 "
        "--strategies ar,streaming --temperatures 0"
    ],
    "check-head": [
        f"check-head models/demo/target models/demo/{head} --limit 1 --max-tokens 2"
        for head in ("eagle", "eagle3")
    ],
    "report": ["report out/bench --baseline ar"],
    "plot": ["plot lengths out/bench --out lengths.svg"],
    "simulate": [
        "simulate --vary link_mbps=125,1000 --strategies ar --limit 1 --max-tokens 3 --jobs 1"
    ],
    "reliability": [
        "reliability --drafter draft_model --limit 1 --max-tokens 3 --out reliability.json"
    ],
}
# What makes an example of the README small; the last of two equal options counts.
SMALLER = {
    "run": "--show-config",
    "verify": "--strategies ar,streaming --stages 1 --temperatures 0 --limit 1 --max-tokens 3",
    "bench": "--strategies ar --repeats 1 --stages 1 --limit 1 --max-tokens 3 --out out/real",
}
# Models of the reader's own, and what stands for them here.
THEIRS = {
    "meta-llama/Llama-2-7b-chat-hf": "models/demo/target",
    "path/to/EAGLE-llama2-chat-7B": "models/demo/eagle",
    "8+8+8+8": "2+2+2+2",
    "cuda": "cpu",
}
OTHERS = ("bash", "python3", ".venv/bin/python", ".venv/bin/pip")  # not the package's own

DRIVER = textwrap.dedent(
    """
    import json, os, sys, time
    from flowspec.cli.main import app

    def run(words):
        try:
            app(words)
        except SystemExit as end:
            return end.code
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return f"{type(error).__name__}: {error}"

    outcome = []
    for number, words in enumerate(json.load(open(sys.argv[1]))):
        began = time.monotonic()
        output = os.open(f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        sys.stdin = open(os.devnull)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        kept = os.dup(1), os.dup(2)
        os.dup2(output, 1), os.dup2(output, 2)
        code = run(words)
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os.dup2(kept[0], 1), os.dup2(kept[1], 2)
        took_s = round(time.monotonic() - began, 1)
        outcome.append([words, code, took_s, open(f"{number}.log").read()])
    json.dump(outcome, open(sys.argv[2], "w"))
    """
)


def table_commands() -> set[str]:
    """Return the names of the commands in the README's table."""
    cells = re.findall(r"^\| (`flowspec [^|]*)\|", README, re.MULTILINE)
    return {name for cell in cells for name in re.findall(r"`flowspec ([a-z-]+)", cell)}


def examples() -> Iterator[str]:
    """Return the command lines in the README's blocks of code; of shell code only flowspec's."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    for block in (text for language, text in blocks if not language):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.strip()
            if line.startswith("bash run_pipe.sh"):  # `flowspec run` after a set-up
                yield line.replace("bash run_pipe.sh", "flowspec run")
            elif ".venv/bin/torchrun" in line:
                yield "flowspec " + line.partition("-m flowspec ")[2]
            elif line.startswith("flowspec "):
                yield line
            else:  # what such a command prints, the repository's scripts, a tree of folders
                assert "flowspec " not in line.split("#")[0] or line.startswith(OTHERS), line


def small(example: str) -> list[str]:
    """Return the arguments of an example, with options that make it quick."""
    words = [THEIRS.get(word, word) for word in shlex.split(example, comments=True)[1:]]
    return words if "--help" in words else words + shlex.split(SMALLER.get(words[0], ""))


@dataclass(frozen=True)
class Installed:
    """The wheel, the source distribution, and the environment in which the wheel is installed."""

    wheel: Path
    sdist: Path
    bin: Path
    tracked: frozenset[str]


def tracked_files() -> list[str]:
    """Return the tracked files of the repository."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [name for name in done.stdout.split("\0") if name and (ROOT / name).exists()]


def call(*command: object, **options: object) -> None:
    """Run a command; show its output if it fails."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, **options)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """Build and install without a package index: dependencies are this environment's."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: which files belong to the repository is not known")
    folder = tmp_path_factory.mktemp("wheel")
    source, dist, env = folder / "source", folder / "dist", folder / "env"
    tracked = tracked_files()
    for name in tracked:
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, source / name, follow_symlinks=False)
    for junk in ("out/run.log", "flowspec/data/config/mine.yaml~", "flowspec/data/models/x.pt"):
        (source / junk).parent.mkdir(parents=True, exist_ok=True)
        (source / junk).write_text("junk")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    call(sys.executable, "-c", build, dist, cwd=source)
    call(*pip, "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", dist, source)
    (wheel,), (sdist,) = dist.glob("*.whl"), dist.glob("*.tar.gz")
    venv.create(env, with_pip=False, symlinks=True)
    (packages,) = env.glob("lib/python*/site-packages")
    # pip alone is lent to it: with all else it would see the flowspec of this environment. It is
    # not imported here: where pip is, setuptools leaves distutils alone, and torch's compiler
    # needs both.
    (folder / "lent").mkdir()
    (folder / "lent" / "pip").symlink_to(Path(str(distribution("pip").locate_file("pip"))))
    install = [env / "bin" / "python", "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    variables = os.environ | {"PYTHONPATH": str(folder / "lent"), "PIP_NO_COMPILE": "1"}
    call(*install, wheel, env=variables)
    used = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("\n".join(used) + "\n")
    return Installed(wheel, sdist, env / "bin", frozenset(tracked))


def test_the_wheel_is_the_package_and_nothing_else(installed: Installed) -> None:
    """It holds all tracked files of flowspec/, and no test, output or editor file."""
    with zipfile.ZipFile(installed.wheel) as wheel:
        names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == {name for name in installed.tracked if name.startswith("flowspec/")}
    assert installed.wheel.stat().st_size < MAX_WHEEL_BYTES


def test_the_source_distribution_makes_the_same_wheel(installed: Installed) -> None:
    """It holds the whole package, without tests and other files."""
    with tarfile.open(installed.sdist) as sdist:
        names = {m.name.partition("/")[2] for m in sdist.getmembers() if not m.isdir()}
    assert {name for name in installed.tracked if name.startswith("flowspec/")} <= names
    assert {"pyproject.toml", "README.md", "LICENSE"} <= names
    assert not [name for name in names if name.startswith(("tests/", "out/")) or "~" in name]


def test_every_command_of_the_readme_is_tried() -> None:
    """A new one needs a line above; examples with a user's model use the bundled one here."""
    assert table_commands() == set(COMMANDS)
    tried = {small(example)[0] for example in examples()}
    assert {"run", "split", "verify", "bench"} <= tried


def start_cluster(
    installed: Installed, folder: Path, environment: Mapping[str, str]
) -> tuple[list["subprocess.Popen[str]"], str, str]:
    """Start a head and a device by the line it prints; yield the processes, port and token."""
    serve = "serve --host 127.0.0.1 --port 0 --no-mdns --no-prompt --reserve-mb 50 --settle 0.1"
    command = [str(installed.bin / "flowspec"), *serve.split()]
    options = {"cwd": folder, "env": environment, "text": True}
    with (folder / "serve.log").open("w") as log:
        head = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, **options)  # type: ignore[call-overload]
    assert head.stdout is not None
    line = head.stdout.readline().split()
    assert line[:2] == ["flowspec", "join"], (folder / "serve.log").read_text()
    join = [str(installed.bin / "flowspec"), *line[1:], "--name", "board"]
    with (folder / "join.log").open("w") as log:
        device = subprocess.Popen(join, stdout=log, stderr=log, **options)  # type: ignore[call-overload]
    return [head, device], line[2].rpartition(":")[2], line[4]


def run_all(
    installed: Installed,
    folder: Path,
    environment: Mapping[str, str],
    commands: Sequence[Sequence[str]],
) -> list[tuple[list[str], object, float, str]]:
    """Run commands in one process, in turn; return arguments, exit code, seconds, output."""
    asked, told = folder.parent / "asked.json", folder.parent / "told.json"
    asked.write_text(json.dumps([list(words) for words in commands]))
    (folder.parent / "driver.py").write_text(DRIVER)
    script = [installed.bin / "python", folder.parent / "driver.py", asked, told]
    call(*script, cwd=folder, env=environment)
    return [tuple(one) for one in json.loads(told.read_text())]


def test_every_command_runs_from_an_empty_folder(installed: Installed, tmp_path: Path) -> None:
    """The wheel brings profiles, default model, prompts and parameters."""
    folder = tmp_path / "empty"
    folder.mkdir()
    dropped = ("PYTHONPATH", "FLOWSPEC_TOKEN", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    environment |= {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    processes, port, token = start_cluster(installed, folder, environment)
    try:
        table = [shlex.split(line) for lines in COMMANDS.values() for line in lines]
        filled = [[w.replace("PORT", port).replace("TOKEN", token) for w in ws] for ws in table]
        clients = [words for words in filled if f"127.0.0.1:{port}" in words]
        here = [words for words in filled if words not in clients]
        # the cluster's last: it starts meanwhile
        asked = [*here, *(small(example) for example in examples()), *clients]
        done = run_all(installed, folder, environment, asked)
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait(LIMIT_S)
    said = {shlex.join(words): (code, output) for words, code, _, output in done}
    assert not {line: told for line, told in said.items() if told[0] not in (0, None)}
    by_name = {words[0]: output for words, _, _, output in done}
    assert str(ROOT) not in "".join(output for *_, output in done)
    assert "board" in by_name["status"]
    assert "identical to the target alone: yes" in said[shlex.join(here[0])][1]
