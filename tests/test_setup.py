"""scripts/setup.sh on a small project: interrupted, moved, without ensurepip, twice at once."""

import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
LIMIT_S = 120
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
BASE = str(Path(sys.base_prefix) / "bin" / f"python{VERSION}")

# A build backend that needs nothing, so that pip installs the project without a package index.
BACKEND = """
import pathlib, zipfile
INFO = "flowspec-0.1.0.dist-info"

def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    name = "flowspec-0.1.0-py3-none-any.whl"
    files = {
        "flowspec.pth": str(pathlib.Path.cwd()),
        f"{INFO}/METADATA": "Metadata-Version: 2.1\\nName: flowspec\\nVersion: 0.1.0\\n",
        f"{INFO}/WHEEL": "Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: true\\n"
                         "Tag: py3-none-any\\n",
        f"{INFO}/entry_points.txt": "[console_scripts]\\nflowspec = flowspec:main\\n",
    }
    files[f"{INFO}/RECORD"] = "".join(f"{file},,\\n" for file in [*files, f"{INFO}/RECORD"])
    with zipfile.ZipFile(pathlib.Path(wheel_directory) / name, "w") as wheel:
        for file, text in files.items():
            wheel.writestr(file, text)
    return name
"""
PROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
PACKAGE = "def main():\n    print(__file__)\n"


def new_project(folder: Path) -> Path:
    """Make the set-up's own files, and a package of one function."""
    (folder / "scripts").mkdir(parents=True)
    for name in ("setup.sh", "make_venv.py"):
        shutil.copy(ROOT / "scripts" / name, folder / "scripts")
    (folder / "flowspec").mkdir()
    (folder / "flowspec" / "__init__.py").write_text(PACKAGE)
    (folder / "backend.py").write_text(BACKEND)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "requirements.txt").write_text("# nothing\n")
    return folder


def start(project: Path, **variables: str) -> "subprocess.Popen[str]":
    """Start the set-up in its own process group, as a terminal would."""
    dropped = ("FLOWSPEC_VENV", "PYTHONPATH", "VIRTUAL_ENV")
    environment = {k: v for k, v in os.environ.items() if k not in dropped}
    return subprocess.Popen(
        ["bash", str(project / "scripts" / "setup.sh"), "requirements.txt"],
        env={**environment, "PYTHON": BASE, "PIP_NO_INDEX": "1", **variables},
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def set_up(project: Path, **variables: str) -> tuple[int, str, str]:
    """Run the whole set-up; return exit code, stdout, stderr."""
    process = start(project, **variables)
    out, err = process.communicate(timeout=LIMIT_S)
    return process.returncode, out, err


def check_works(project: Path, done: tuple[int, str, str]) -> None:
    """Check that its python is printed, and that the command runs this project's code by it."""
    assert done[:2] == (0, ".venv/bin/python\n"), done[2]
    command = project / ".venv" / "bin" / "flowspec"
    assert command.read_text().splitlines()[0] == f"#!{project.resolve()}/.venv/bin/python"
    said = subprocess.run([command], capture_output=True, text=True, check=True, cwd="/")
    assert said.stdout.strip() == str(project.resolve() / "flowspec" / "__init__.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a project whose first set-up was ended by Ctrl-C in its first step.

    Then the system's Python moved, as in an upgrade, and the second set-up starts again.
    """
    project = new_project(tmp_path_factory.mktemp("setup") / "made")
    first = start(project)
    assert first.stderr is not None
    assert "setup 1/3" in first.stderr.readline()
    while not (project / ".venv" / "bin" / "python").exists():
        assert first.poll() is None
    os.killpg(first.pid, signal.SIGINT)
    assert first.wait(LIMIT_S) == 130
    assert "set-up was interrupted" in first.stderr.read()
    first.communicate()
    for name in ("python", "python3"):
        link = project / ".venv" / "bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to("/nowhere/python3")
    done = set_up(project)
    check_works(project, done)
    assert "its python does not run): it is made anew" in done[2]
    assert not (project / ".venv-old").exists()
    return project


def copy_of(made: Path, folder: Path) -> Path:
    """Copy the project with its environment to another folder."""
    shutil.copytree(made, folder, symlinks=True)
    return folder


@pytest.mark.parametrize("venv", ["/proc/x", "FILE", ""])
def test_what_is_in_the_way_is_named_and_nothing_is_left(tmp_path: Path, venv: str) -> None:
    """The obstacle is a folder that cannot be made, a file, or a missing requirements file."""
    project, file = new_project(tmp_path / "p"), tmp_path / "file"
    file.touch()
    said = {
        "/proc/x": "error: /proc/x.lock: No such file or directory; set FLOWSPEC_VENV to a folder "
        "that you may write to\n",
        "FILE": f"error: {file} is no virtual environment; move it away, or set FLOWSPEC_VENV to "
        "another folder\n",
        "": "error: requirements.txt: No such file or directory; the set-up needs it: name a file "
        f"that can be read, from {project.resolve()} on\n",
    }[venv]
    if not venv:
        (project / "requirements.txt").unlink()
    variables = {"FLOWSPEC_VENV": venv.replace("FILE", str(file))} if venv else {}
    assert set_up(project, **variables) == (2, "", said)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_finished_set_up_is_not_repeated(made: Path) -> None:
    """Nothing is printed or written."""
    before = (made / ".venv" / "bin" / "flowspec").stat().st_mtime_ns
    assert set_up(made) == (0, ".venv/bin/python\n", "")
    assert (made / ".venv" / "bin" / "flowspec").stat().st_mtime_ns == before


def test_a_moved_project_is_mended_without_its_old_folder(made: Path, tmp_path: Path) -> None:
    """Its commands must not start another folder's code; no package is installed again.

    The first path does not fit the first line of a script, so a shell starts python there.
    """
    long = copy_of(made, tmp_path / "with a space" / ("long" * 40))
    kept = long / ".venv" / "lib" / "kept"
    kept.touch()
    done = set_up(long)
    assert done[0] == 0, done[2]
    for name in ("flowspec", "pip"):
        script = long / ".venv" / "bin" / name
        assert script.read_text().startswith("#!/bin/sh\n"), script
        subprocess.run([script, "--version"], capture_output=True, check=True, cwd="/")
    project = long.rename(tmp_path / "moved")
    done = set_up(project)
    check_works(project, done)
    assert "comes from another folder: its scripts are mended" in done[2]
    assert (project / ".venv" / "lib" / "kept").exists()
    for script in (project / ".venv" / "bin").glob("[ap]*"):  # pip, activate
        if not script.is_symlink():
            assert str(made) not in script.read_text(), script
            assert "with a space" not in script.read_text(), script
    assert set_up(project)[2] == ""


def test_two_set_ups_at_once_on_an_environment_without_pip(made: Path, tmp_path: Path) -> None:
    """The environment was made without ensurepip: one set-up repairs it, the other one waits."""
    project = copy_of(made, tmp_path / "two")
    for path in (project / ".venv").glob("flowspec-*.ok"):
        path.unlink()
    for path in (project / ".venv").glob("lib/python*/site-packages/pip*"):
        shutil.rmtree(path)
    both = [start(project), start(project)]
    ends = [(p, *p.communicate(timeout=LIMIT_S)) for p in both]
    said = sorted((err for _, _, err in ends), key=len)
    for process, out, err in ends:
        check_works(project, (process.returncode, out, err))
    assert said[0] == "setup: another set-up is making .venv: waiting for it\n"
    assert "has no pip: it is added" in said[1]
    assert "waiting" not in said[1]


@pytest.fixture
def without_ensurepip(tmp_path: Path) -> str:
    """Make a Python like Debian's before `apt install python3-venv`."""
    hidden = tmp_path / "hidden"
    hidden.mkdir()
    (hidden / "sitecustomize.py").write_text(
        textwrap.dedent(
            """
            import sys
            class Hide:
                def find_spec(self, name, path=None, target=None):
                    if name == "ensurepip":
                        raise ModuleNotFoundError(f"No module named {name!r}", name=name)
            sys.meta_path.insert(0, Hide())
            """
        )
    )
    python = tmp_path / "python3"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={hidden} exec {BASE} "$@"\n')
    python.chmod(0o755)
    return str(python)


@pytest.mark.parametrize("half_made", [False, True])
def test_the_missing_system_package_is_named(
    tmp_path: Path, without_ensurepip: str, half_made: bool
) -> None:
    """It is named each time, even if an earlier set-up left an environment without pip."""
    project = new_project(tmp_path / "bare")
    if half_made:
        made = [without_ensurepip, "-m", "venv", "--without-pip", str(project / ".venv")]
        subprocess.run(made, check=True)
    for _ in range(2):
        code, out, err = set_up(project, PYTHON=without_ensurepip)
        assert (code, out) == (2, "")
        assert "has no module ensurepip" in err
        assert f"`sudo apt install python{VERSION}-venv` (or python3-venv)" in err
        assert "Traceback" not in err
    assert half_made or not (project / ".venv").exists()


@pytest.mark.parametrize("kind", ["documents", "dead and somebody's"])
def test_what_the_set_up_did_not_make_is_not_removed(tmp_path: Path, kind: str) -> None:
    """FLOWSPEC_VENV may name any folder, and a .venv made by hand may hold the user's torch."""
    project, folder = new_project(tmp_path / "p"), tmp_path / "theirs"
    (folder / "lib" / "python3.1" / "site-packages" / "torch-2.0.dist-info").mkdir(parents=True)
    kept = folder / "thesis.tex"
    kept.write_text("years of work")
    if kind != "documents":
        (folder / "pyvenv.cfg").write_text("version = 3.1.0\n")
    code, out, err = set_up(project, FLOWSPEC_VENV=str(folder))
    assert (code, out) == (2, "")
    assert "is no virtual environment" in err if kind == "documents" else "did not make it" in err
    assert "FLOWSPEC_VENV" in err
    assert kept.exists()
