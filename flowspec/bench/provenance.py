"""The origin of figures: hashes of code and models, versions, revision of the source tree."""

import platform
import subprocess
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path

import flowspec
from flowspec import __version__

ROOT = Path(flowspec.__file__).resolve().parent
NOT_TIMED = ("bench", "cli", "tracing")  # parts of the package that no measured run executes
MEASURING = tuple(  # files of these parts that a measured run executes
    f"{name}.py"
    for name in (
        *("bench/answering", "bench/answering_remote", "bench/metrics"),
        *("tracing/bound", "tracing/clocks", "tracing/idle_time", "tracing/timeline"),
    )
)
PACKAGES = ("torch", "transformers", "numpy")
GIT_TIMEOUT_S = 10.0
_CHUNK = 1 << 20


def code_hash() -> str:
    """Return the hash of the sources that a measured run executes, wherever they are installed."""
    total = sha256()
    for path in sorted(ROOT.rglob("*.py")):
        place = path.relative_to(ROOT)
        if place.parts[0] not in NOT_TIMED or place.as_posix() in MEASURING:
            total.update(f"{place}\0".encode())
            total.update(path.read_bytes())
    return total.hexdigest()[:16]


def folder_hash(folder: Path) -> str:
    """Return the hash of the files directly in a folder, names and contents."""
    total = sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        total.update(f"{path.name}\0".encode())
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                total.update(chunk)
    return total.hexdigest()[:16]


def versions() -> dict[str, str]:
    """Return the versions of this package, Python and the computing libraries."""
    own = {"flowspec": __version__, "python": platform.python_version()}
    return own | {name: version(name) for name in PACKAGES}


def revision() -> str:
    """Return the git revision of the source tree, with `+` if files differ; empty without git."""
    if not (ROOT.parent / ".git").exists():
        return ""
    try:
        head = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return ""
    return head + ("+" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(ROOT.parent), *words],
        capture_output=True,
        text=True,
        timeout=GIT_TIMEOUT_S,
        check=True,
    )
    return done.stdout.strip()
