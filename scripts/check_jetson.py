"""Proof that requirements_jetson.txt installs on a Jetson from wheels alone and leaves torch alone.

    python scripts/check_jetson.py [--jetpack 6.2|7.2] [--pins-only]

Lets pip's resolver work for aarch64 with each JetPack's Python and glibc; nothing is installed.
pip reads markers (python_version < "3.11") by the Python it runs on, so they are read here, for the
pins and for what every resolved package asks for, until nothing is missing. --pins-only looks at
the pins alone (faster). Exit code 1: a pin without a wheel, or torch or a CUDA library among what
would be installed; 3: no package index can be reached.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "requirements_jetson.txt"
FORBIDDEN = ("torch", "torchvision", "torchaudio", "triton", "bitsandbytes", "nvidia")
HARMLESS = ("nvidia-ml-py",)  # Python alone: it calls the driver's own library where there is one
PIP_TIMEOUT_S = 600
MAX_ROUNDS = 8


@dataclass(frozen=True, slots=True)
class JetPack:
    """What pip must know of a JetPack."""

    python: str
    glibc_minor: int

    @property
    def platforms(self) -> list[str]:
        """Wheel platforms its glibc can load."""
        old = ["manylinux2014_aarch64", "linux_aarch64"]
        return [*(f"manylinux_2_{n}_aarch64" for n in range(self.glibc_minor, 16, -1)), *old]

    def applies(self, requirement: Requirement, extras: Sequence[str] = ()) -> bool:
        """Whether the requirement's marker is true there."""
        environment = {
            "python_version": self.python,
            "python_full_version": f"{self.python}.12",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "platform_machine": "aarch64",
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
        }
        marker = requirement.marker
        return marker is None or any(
            marker.evaluate({**environment, "extra": extra}) for extra in ("", *extras)
        )


JETPACKS = {"6.2": JetPack("3.10", 35), "7.2": JetPack("3.12", 39)}


def read_pins(path: Path) -> list[Requirement]:
    """The requirements in a file, comments left out."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return [Requirement(line) for line in lines if line]


def is_forbidden(name: str) -> bool:
    """Whether a package is torch, or brings CUDA libraries of its own."""
    if name in HARMLESS:
        return False
    return any(name == bad or name.startswith(f"{bad}-") for bad in FORBIDDEN)


def resolve(jetpack: JetPack, pins: Sequence[Requirement], *, pins_only: bool) -> dict[str, Any]:
    """What pip would install, by name. Raises ValueError with pip's words where it cannot."""
    wanted = {str(_bare(pin)) for pin in pins if jetpack.applies(pin)}
    for _ in range(MAX_ROUNDS):
        report = _pip(jetpack, sorted(wanted), ["--no-deps"] if pins_only else [])
        found = {canonicalize_name(one["metadata"]["name"]): one for one in report["install"]}
        missing = set() if pins_only else _missing(jetpack, found)
        if not missing:
            return found
        wanted |= missing
    raise ValueError(f"still missing after {MAX_ROUNDS} rounds: {sorted(missing)}")


def _missing(jetpack: JetPack, found: dict[str, Any]) -> set[str]:
    """What the resolved packages ask for there, which pip left out for the Python it runs on."""
    missing = set()
    for one in found.values():
        for text in one["metadata"].get("requires_dist", []):
            requirement = Requirement(text)
            asked = jetpack.applies(requirement, one.get("requested_extras", []))
            if asked and canonicalize_name(requirement.name) not in found:
                missing.add(str(_bare(requirement)))
    return missing


def _bare(requirement: Requirement) -> Requirement:
    bare = Requirement(str(requirement))
    bare.marker = None
    return bare


def _pip(jetpack: JetPack, wanted: Sequence[str], options: Sequence[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="flowspec-jetson-") as folder:
        report = Path(folder) / "report.json"
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed"]
        command += ["--quiet", "--only-binary=:all:", "--implementation", "cp"]
        command += ["--python-version", jetpack.python, "--target", str(Path(folder) / "target")]
        command += [part for name in jetpack.platforms for part in ("--platform", name)]
        command += ["--report", str(report), *options, *wanted]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PIP_TIMEOUT_S)
        if done.returncode:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            raise ValueError("\n".join(errors or [done.stderr])[-1500:])
        content: dict[str, Any] = json.loads(report.read_text())
        return content


def index_reachable() -> bool:
    """Whether pip finds any package at all here."""
    try:
        _pip(JETPACKS["7.2"], ["typing_extensions"], ["--no-deps"])
    except (ValueError, subprocess.TimeoutExpired):
        return False
    return True


def check(name: str, pins: Sequence[Requirement], *, pins_only: bool) -> bool:
    """One JetPack, told on stdout; whether all is well."""
    jetpack = JETPACKS[name]
    where = f"JetPack {name} (Python {jetpack.python}, aarch64)"
    try:
        found = resolve(jetpack, pins, pins_only=pins_only)
    except ValueError as error:
        print(f"{where}: FAILED, no set of wheels\n{error}")
        return False
    bad = sorted(one for one in found if is_forbidden(one))
    listed = ", ".join(f"{key} {one['metadata']['version']}" for key, one in sorted(found.items()))
    verdict = f"FAILED, would install {', '.join(bad)}" if bad else "no torch, all from wheels"
    print(f"{where}: {len(found)} packages, {verdict}\n  {listed}")
    return not bad


def main() -> int:
    """Check as asked."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--jetpack", choices=tuple(JETPACKS), help="[both]")
    parser.add_argument("--pins-only", action="store_true", help="not what the pins pull in")
    parser.add_argument("--file", type=Path, default=FILE, help="[requirements_jetson.txt]")
    options = parser.parse_args()
    if not index_reachable():
        print("error: pip reaches no package index from here", file=sys.stderr)
        return 3
    names = [options.jetpack] if options.jetpack else list(JETPACKS)
    pins = read_pins(options.file)
    results = {name: check(name, pins, pins_only=options.pins_only) for name in names}
    return int(not all(results.values()))


if __name__ == "__main__":
    sys.exit(main())
