"""Makes or mends the project's virtual environment; scripts/setup.sh runs it.

    python3 scripts/make_venv.py requirements.txt [requirements_dev.txt]

Nothing is installed yet, so that only the standard library is used. An environment is used as it is
where a stamp says that all of this was installed at this path for this Python. Otherwise it is
tested for what is needed: a python that runs, pip, scripts that start this very python. What lacks
is added, and an environment that cannot be mended is made anew, if it was made by this script.
"""

import errno
import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path

LOCK_LIMIT_S = 2 * 3600  # a first set-up loads gigabytes
UNFINISHED = "flowspec-unfinished"  # in an environment that this script has begun to make
PLAIN = ("pip", "setuptools", "wheel")  # what a new environment may hold
PYTHON_LINE = re.compile(
    rb"#!(?P<plain>/\S*/bin/python[0-9.]*)\n"
    rb"|#!/bin/sh\n'''exec' \"?(?P<quoted>/[^\"\n]*/bin/python[0-9.]*)\"? \"\$0\" \"\$@\"\n' '''\n"
)
MAX_SHEBANG = 120  # longer ones, and ones with a space, need a shell to start python


class SetupError(Exception):
    """What must be done by hand, in one sentence."""


class Environment:
    """The virtual environment in folder `shown`, as the user calls it, for the project `root`."""

    def __init__(self, shown: Path, root: Path, files: Sequence[str]) -> None:
        self.shown, self.root, self.files = shown, root, files
        self.folder = shown.resolve()
        self.python = self.folder / "bin" / "python"
        content = b"".join(read_file(root / name, name) for name in (*files, "pyproject.toml"))
        self.stamp = self.folder / f"flowspec-{sha256(content).hexdigest()[:16]}.ok"

    def is_done(self) -> bool:
        """Whether all of it was installed here, for this path and the Python that it has now."""
        try:
            return self.stamp.read_text() == self._stamp_text()
        except OSError:
            return False

    def mark_done(self) -> None:
        """All is installed."""
        self.stamp.write_text(self._stamp_text())
        (self.folder / UNFINISHED).unlink(missing_ok=True)

    def _stamp_text(self) -> str:
        return f"{self.root}\n{self.folder}\n{self.version()}\n"

    def version(self) -> str:
        """Such as 3.11, of its python; "" where that does not run."""
        return self._output("import sys; print('%d.%d' % sys.version_info[:2])")

    def has_pip(self) -> bool:
        """Whether pip can be imported as a whole; an interrupted unpacking leaves half of it."""
        return self._output("import pip._internal.cli.main; print(1)") == "1"

    def _output(self, code: str) -> str:
        try:
            done = subprocess.run(
                [self.python, "-c", code], capture_output=True, text=True, timeout=120, check=False
            )
        except (OSError, subprocess.TimeoutExpired):
            return ""
        return done.stdout.strip() if done.returncode == 0 else ""

    def make(self) -> None:
        """Leave an environment whose python and pip work and whose scripts start that python."""
        self.check_is_one()
        version = self.version()
        made_for = self._made_for()
        if version and made_for in ("", version):
            moved = self.stale_scripts()
            if moved:
                say(f"{self.shown} comes from another folder: its scripts are mended")
                mend_scripts(moved, self.python)
            if not self.has_pip():
                say(f"{self.shown} has no pip: it is added")
                self._run_venv()
            elif moved:
                self._run_venv("--without-pip")  # `activate` names the folder too
            if self.has_pip():
                return
            why = "pip does not run in it"
        elif version:
            why = f"it was made for Python {made_for}, its python is {version} by now"
        else:
            why = "its python does not run"
        if self._is_empty():
            self._begin()
            return
        if not self._may_remove():
            raise SetupError(
                f"{self.shown} does not work ({why}), and this script did not make it; remove it, "
                "or set FLOWSPEC_VENV to another folder"
            )
        say(f"{self.shown} does not work ({why}): it is made anew")
        self._begin()

    def _begin(self) -> None:
        check_can_make()
        old = self.folder.with_name(f"{self.folder.name}-old")
        if old.exists():
            shutil.rmtree(old)
        if self.folder.exists():
            self.folder.rename(old)  # at once: half a folder would not be known any more
            shutil.rmtree(old)
        self.folder.mkdir(parents=True)
        (self.folder / UNFINISHED).touch()
        self._run_venv()

    def _run_venv(self, *options: str) -> None:
        if not options:
            check_can_make()
        maker = self.python if self.version() else Path(sys.executable)
        run([maker, "-m", "venv", *options, self.folder], "the virtual environment cannot be made")

    def check_is_one(self) -> None:
        """Raises SetupError for what is something else: nothing of it is touched.

        Another set-up may be making or replacing it at the same time. It marks the folder first.
        """
        try:
            is_empty = self._is_empty()
            names = os.listdir(self.folder)  # after the look into it: the mark may come meanwhile
        except FileNotFoundError:
            return
        except NotADirectoryError:
            is_empty, names = False, [self.folder.name]
        if names and not is_empty and not {"pyvenv.cfg", UNFINISHED} & set(names):
            raise SetupError(
                f"{self.shown} is no virtual environment; move it away, or set FLOWSPEC_VENV to "
                "another folder"
            )

    def _is_empty(self) -> bool:
        """Whether there is nothing but folders, as where it was interrupted at once."""
        if not self.folder.is_dir():
            return not self.folder.exists()
        return all(path.is_dir() for path in self.folder.rglob("*"))

    def _made_for(self) -> str:
        """The Python version that its packages are for, such as 3.11; "" where that is not told."""
        try:
            text = (self.folder / "pyvenv.cfg").read_text()
        except OSError:
            return ""
        found = re.search(r"^version(?:_info)? *= *(\d+\.\d+)", text, re.MULTILINE)
        return found[1] if found else ""

    def _may_remove(self) -> bool:
        """Whether this script has made it, or it holds no more than any new one does."""
        if (self.folder / UNFINISHED).exists() or list(self.folder.glob("flowspec-*.ok")):
            return True
        found = self.folder.glob("lib/python*/site-packages/*.dist-info")
        return all(path.name.split("-")[0].lower() in PLAIN for path in found)

    def stale_scripts(self) -> list[Path]:
        """Scripts that start the python of another folder, as after a move or a copy."""
        found = []
        for path in sorted(self.folder.glob("bin/*")):
            if path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    match = PYTHON_LINE.match(file.read(4096))
                starts = match and (match["plain"] or match["quoted"])
                if starts and Path(os.fsdecode(starts)).parent.resolve() != self.python.parent:
                    found.append(path)
        return found

    def install(self) -> None:
        """The packages of the requirement files, and flowspec itself."""
        pip = [self.python, "-m", "pip", "--disable-pip-version-check", "install"]
        progress = "--progress-bar=on" if sys.stderr.isatty() else "--quiet"
        names = " ".join(self.files)
        step(2, f"packages of {names} (some minutes, torch is most of it)")
        wanted = [word for name in self.files for word in ("-r", name)]
        if wanted:
            run([*pip, progress, *wanted], f"pip could not install {names}")
        step(3, "flowspec itself")
        own = ["--quiet", "--no-deps", "--no-build-isolation", "-e", "."]
        run([*pip, *own], "pip could not install flowspec itself")


def read_file(path: Path, shown: str) -> bytes:
    """What a file of the project holds. Raises SetupError, which calls it `shown`."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SetupError(
            f"{shown}: {error.strerror}; the set-up needs it: name a file that can be read, "
            f"from {path.parent} on"
        ) from None


def check_can_make() -> None:
    """Raises SetupError where this Python comes without what makes virtual environments."""
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as error:
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"{sys.executable} (Python {version}) has no module {error.name}, which virtual "
            "environments need; on Debian, Ubuntu and Raspberry Pi OS run `sudo apt install "
            f"python{version}-venv` (or python3-venv), then this again"
        ) from None


def mend_scripts(paths: Sequence[Path], python: Path) -> None:
    """Let scripts start this python."""
    name = os.fsencode(python)
    line = b"#!" + name + b"\n"
    if b" " in name or len(line) > MAX_SHEBANG:
        line = b"#!/bin/sh\n'''exec' \"" + name + b'" "$0" "$@"\n\' \'\'\'\n'
    for path in paths:
        text = path.read_bytes()
        match = PYTHON_LINE.match(text)
        if match:
            mended = path.with_name(f".{path.name}.mended")
            mended.write_bytes(line + text[match.end() :])
            shutil.copymode(path, mended)
            mended.replace(path)


_lock_handle = -1


def run(command: Sequence[object], failed: str) -> None:
    """Run a command, its output on stderr. Raises SetupError where it fails."""
    # The lock is the command's too: where this script is killed, nobody else starts beside it.
    held = (_lock_handle,) if _lock_handle >= 0 else ()
    words = [str(word) for word in command]
    done = subprocess.run(words, stdout=sys.stderr, pass_fds=held, check=False)
    if done.returncode:
        raise SetupError(
            f"{failed} (exit code {done.returncode}, see above); the same command tries again"
        )


@contextmanager
def locked(path: Path, shown: Path) -> Iterator[None]:
    """One set-up at a time. Raises SetupError where another one goes on for too long."""
    global _lock_handle
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise SetupError(describe(error)) from None
    try:
        end, told = time.monotonic() + LOCK_LIMIT_S, False
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not told:
                    say(f"another set-up is making {shown}: waiting for it")
                told = True
                if time.monotonic() > end:
                    raise SetupError(
                        f"another set-up has been making {shown} for {LOCK_LIMIT_S // 3600} hours; "
                        f"end it (`fuser {path}` names it), then run this again"
                    ) from None
                time.sleep(0.2)
        _lock_handle = handle
        yield
    finally:
        _lock_handle = -1
        os.close(handle)


def describe(error: OSError) -> str:
    """What the system refused, of which file, and what to do."""
    what = f"{error.filename}: {error.strerror}" if error.filename else str(error.strerror)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{what}; free some of the disk, or set FLOWSPEC_VENV to a folder on another one"
    return f"{what}; set FLOWSPEC_VENV to a folder that you may write to"


_began = time.monotonic()


def say(text: str) -> None:
    """On stderr: stdout is for the path of the python."""
    print(f"setup: {text}", file=sys.stderr, flush=True)


def step(number: int, text: str) -> None:
    """One of three."""
    elapsed_s = time.monotonic() - _began
    print(f"setup {number}/3, {elapsed_s:.0f} s: {text}", file=sys.stderr, flush=True)


def main(files: Sequence[str]) -> None:
    """Make the environment unless it is there, and print its python."""
    shown = Path(os.environ.get("FLOWSPEC_VENV") or ".venv")
    environment = Environment(shown, Path.cwd(), files)
    if not environment.is_done():
        folder = environment.folder
        environment.check_is_one()  # beside something else, no lock is left behind
        with locked(folder.with_name(f"{folder.name}.lock"), shown):
            if not environment.is_done():  # another set-up may have done it meanwhile
                step(1, f"virtual environment {shown}")
                environment.make()
                environment.install()
                environment.mark_done()
                say(f"done after {time.monotonic() - _began:.0f} s")
    print(shown / "bin" / "python")


def _end(number: int, _: object) -> None:
    sys.exit(128 + number)  # what runs is killed on the way


if __name__ == "__main__":
    for end in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(end, _end)
    try:
        main(sys.argv[1:])
    except (SetupError, OSError) as error:
        text = describe(error) if isinstance(error, OSError) else error
        print(f"error: {text}", file=sys.stderr)
        sys.exit(2)
    except SystemExit as ended:
        if isinstance(ended.code, int) and ended.code > 128:
            print("\nerror: set-up was interrupted; the same command goes on", file=sys.stderr)
        raise
