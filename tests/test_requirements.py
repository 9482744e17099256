"""The Jetson's pins are everybody's, without packages that would replace NVIDIA's torch."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from scripts.check_jetson import JETPACKS, is_forbidden, read_pins

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


NVIDIA_TORCH = "2.5.0a0+872d972e41.nv24.08"  # JetPack 6's first 2.5; builds before 2.5 look so
CHECK = ROOT / "scripts" / "check_jetson.py"


def pins(name: str) -> dict[str, str]:
    """Return the lines of a requirements file, whole and by name."""
    return {str(pin): pin.name for pin in read_pins(ROOT / name)}


def test_jetson_pins_are_the_others_without_torch() -> None:
    """Only one set of versions is tested, so the two files must not differ."""
    everybody, jetson = pins("requirements.txt"), pins("requirements_jetson.txt")
    assert {line for line, name in everybody.items() if name != "torch"} == set(jetson)
    assert not [name for name in jetson.values() if is_forbidden(name)]


def test_jetson_file_points_pip_nowhere() -> None:
    """An option line (an index, another file) could bring in a torch."""
    lines = (ROOT / "requirements_jetson.txt").read_text().splitlines()
    assert not [line for line in lines if line.strip().startswith("-")]


@pytest.mark.parametrize("name", JETPACKS)
def test_each_jetpack_gets_each_pin_once(name: str) -> None:
    """Markers omit no package on a JetPack's Python and name none twice."""
    jetson = read_pins(ROOT / "requirements_jetson.txt")
    there = [pin.name for pin in jetson if JETPACKS[name].applies(pin)]
    assert sorted(there) == sorted({pin.name for pin in jetson})


@pytest.mark.parametrize(
    ("name", "forbidden"),
    [
        ("torch", True),
        ("nvidia-cublas", True),
        ("triton", True),
        ("torchist", False),
        ("nvidia-ml-py", False),
    ],
)
def test_what_counts_as_torch(name: str, forbidden: bool) -> None:
    """CUDA libraries of another build are as bad as torch itself."""
    assert is_forbidden(name) is forbidden


def test_nvidias_torch_satisfies_the_package() -> None:
    """`pip install .` must accept NVIDIA's pre-release, or it would replace it."""
    text = (ROOT / "pyproject.toml").read_text()
    (torch,) = [Requirement(line) for line in re.findall(r'^ +"(torch[^"]*)"', text, re.MULTILINE)]
    assert torch.specifier.contains(Version(NVIDIA_TORCH), prereleases=True)
    assert not torch.specifier.contains("2.4.1")
    assert not torch.specifier.prereleases  # elsewhere nobody gets a nightly build by it


@pytest.mark.parametrize(
    ("file", "code", "message"),
    [("requirements_jetson.txt", 0, "no torch"), ("requirements.txt", 1, "would install torch")],
)
def test_the_check_by_command(file: str, code: int, message: str) -> None:
    """Every pin has an aarch64 wheel; a file with torch in it is rejected."""
    command = [sys.executable, str(CHECK), "--jetpack", "7.2", "--pins-only"]
    done = subprocess.run(
        [*command, "--file", str(ROOT / file)], capture_output=True, text=True, timeout=250
    )
    if done.returncode == 3:
        pytest.skip("needs a package index that pip reaches")
    assert (done.returncode, message in done.stdout) == (code, True), done.stdout + done.stderr
