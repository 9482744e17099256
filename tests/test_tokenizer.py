"""Tokenizers from folders in every form, with the pins of this Python and of Python 3.10."""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from flowspec.cli.common import BUNDLED
from flowspec.tokenizer import load_tokenizer
from tests.support.tokenizer_checks import CHECKS

ROOT = Path(__file__).resolve().parent.parent
OLDEST = "3.10"
# what a tokenizer needs of requirements.txt; jinja2 comes with torch, which is left out here
NEEDED = ("transformers", "tokenizers", "sentencepiece", "protobuf", "huggingface_hub", "numpy")
INSTALL_S = 240


@pytest.mark.parametrize("name", CHECKS)
def test_with_the_pins_of_this_python(name: str, tmp_path: Path) -> None:
    """Run one check of tests/support/tokenizer_checks.py."""
    CHECKS[name](tmp_path)


def test_a_long_text_is_no_matter_for_the_tokenizer(capfd: pytest.CaptureFixture[str]) -> None:
    """The context decides how much fits; the library would warn of indexing errors."""
    tokenizer = load_tokenizer(BUNDLED / "target")
    assert len(tokenizer.encode("one two three four " * 2000)) > 4096
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_with_the_pins_of_python_3_10(pytestconfig: pytest.Config) -> None:
    """The same checks run in a separate environment, by this Python if there is no 3.10."""
    pins = pins_of(OLDEST)
    python = find_python(OLDEST) or sys.executable
    inside = environment_of(python, [*pins, "jinja2"], pytestconfig)
    done = subprocess.run(
        [str(inside), "-m", "tests.support.tokenizer_checks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    expected = f"{len(CHECKS)} checks passed, Python {OLDEST if python != sys.executable else ''}"
    assert done.stdout.startswith(expected), done.stdout
    assert f"transformers {pins[0].removeprefix('transformers==')}, " in done.stdout


def environment_of(python: str, packages: list[str], config: pytest.Config) -> Path:
    """Return the interpreter of an environment with these packages, kept in pytest's cache.

    Skips the test when the packages cannot be fetched.
    """
    name = hashlib.sha256(" ".join([python, *packages]).encode()).hexdigest()[:16]
    folder = config.cache.mkdir(f"pins-{name}")  # type: ignore[union-attr]
    inside, whole = folder / "venv" / "bin" / "python", folder / "whole"
    if whole.exists():
        return inside
    make = [python, "-m", "venv", "--clear", "--without-pip", str(folder / "venv")]
    subprocess.run(make, check=True, timeout=60)
    pip = [sys.executable, "-m", "pip", "--python", str(inside), "--disable-pip-version-check"]
    installed = subprocess.run(
        [*pip, "install", "--quiet", "--no-compile", "--only-binary", ":all:", *packages],
        capture_output=True,
        text=True,
        timeout=INSTALL_S,
    )
    if installed.returncode:
        reason = (installed.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        pytest.skip(f"{', '.join(packages)} cannot be fetched here: {reason}")
    whole.touch()
    return inside


def pins_of(python: str) -> list[str]:
    """Return `NEEDED` as requirements.txt pins them for this Python, in the same order."""
    found: dict[str, str] = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if not (requirement := line.partition("#")[0].strip()):
            continue
        pin = Requirement(requirement)
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            found[pin.name] = f"{pin.name}{pin.specifier}"
    return [found[name] for name in NEEDED]


def find_python(version: str) -> str | None:
    """Return an interpreter of this version, on the path or in pyenv's folders."""

    def candidates() -> Iterator[str]:
        if found := shutil.which(f"python{version}"):
            yield found
        for folder in sorted((Path.home() / ".pyenv" / "versions").glob(f"{version}.*")):
            yield str(folder / "bin" / f"python{version}")

    for python in candidates():
        tried = subprocess.run([python, "-c", "import venv"], capture_output=True, timeout=30)
        if tried.returncode == 0:
            return python
    return None
