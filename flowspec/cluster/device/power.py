"""Power sensors behind one interface: INA3221 (Jetson boards), RAPL (PCs), NVML (NVIDIA cards).

What they measure differs, so a reading always comes with its scope: `module` is a Jetson module
without its carrier board, `packages` the CPU sockets, `gpus` the cards. None of it is wall power.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pynvml

HWMON, POWERCAP = Path("/sys/class/hwmon"), Path("/sys/class/powercap")
# The whole module's input, by what boards call it; without one all rails are added.
_WHOLE_MODULE = ("VDD_IN", "VIN_SYS_5V0", "POM_5V_IN")
_MIN_RAPL_S = 0.01


class PowerMeter(Protocol):
    """One kind of sensor."""

    name: str
    scope: str  # module, packages or gpus

    def read_w(self) -> float | None:
        """Watts now, or since the last reading; None where there is no reading."""


@dataclass(slots=True)
class Ina3221:
    """Rails of INA3221 monitors: volts from in*_input (mV), amperes from curr*_input (mA)."""

    rails: Sequence[tuple[str, Path, Path]]  # label, voltage file, current file
    name: str = "INA3221"
    scope: str = "module"

    def read_w(self) -> float | None:
        """See PowerMeter."""
        total_w, any_read = 0.0, False
        for _, voltage, current in self.rails:
            millivolts, milliamperes = _number(voltage), _number(current)
            if millivolts is not None and milliamperes is not None:
                total_w += millivolts * milliamperes / 1e6
                any_read = True
        return total_w if any_read else None


class Rapl:
    """Energy counters of CPU packages; a reading is the mean since the one before."""

    name, scope = "RAPL", "packages"

    def __init__(
        self, packages: Sequence[Path], clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._packages, self._clock = packages, clock
        self._before: tuple[float, dict[Path, float]] | None = None

    def read_w(self) -> float | None:
        """See PowerMeter; None the first time, and where the kernel lets root alone read."""
        joules: dict[Path, float] = {}
        for package in self._packages:
            energy = _number(package / "energy_uj")
            if energy is None:
                return None
            joules[package] = energy / 1e6
        now = self._clock()
        before, self._before = self._before, (now, joules)
        if before is None or now - before[0] < _MIN_RAPL_S:
            self._before = before or self._before
            return None
        used = sum(self._since(package, before[1][package], end) for package, end in joules.items())
        return used / (now - before[0])

    def _since(self, package: Path, start: float, end: float) -> float:
        if end >= start:
            return end - start
        return end - start + (_number(package / "max_energy_range_uj") or 0.0) / 1e6  # it wrapped


@dataclass(slots=True)
class Nvml:
    """All NVIDIA cards of a PC. Jetson boards up to JetPack 6 have no NVML."""

    handles: Sequence[Any]
    name: str = "NVML"
    scope: str = "gpus"

    def read_w(self) -> float | None:
        """See PowerMeter."""
        try:
            return sum(pynvml.nvmlDeviceGetPowerUsage(one) for one in self.handles) / 1e3
        except pynvml.NVMLError:
            return None


def find_power_meter(hwmon: Path = HWMON, powercap: Path = POWERCAP) -> PowerMeter | None:
    """The sensor that covers most of this device, None where there is none to be read."""
    rails = _ina3221_rails(hwmon)
    if rails:
        return Ina3221(rails)
    if (cards := _nvml()) is not None:
        return cards
    packages = [
        path
        for path in sorted(powercap.glob("intel-rapl:*"))
        if path.name.count(":") == 1 and _number(path / "energy_uj") is not None
    ]
    return Rapl(packages) if packages else None


def _ina3221_rails(hwmon: Path) -> list[tuple[str, Path, Path]]:
    rails = []
    for chip in sorted(hwmon.glob("hwmon*")):
        if _text(chip / "name") != "ina3221":
            continue
        for channel in (1, 2, 3):
            label = _text(chip / f"in{channel}_label")
            voltage, current = chip / f"in{channel}_input", chip / f"curr{channel}_input"
            if label and voltage.exists() and current.exists():
                rails.append((label, voltage, current))
    whole = [rail for rail in rails if rail[0] in _WHOLE_MODULE]
    return whole or [rail for rail in rails if not rail[0].startswith("sum")]


def _nvml() -> Nvml | None:
    try:
        pynvml.nvmlInit()
        count = pynvml.nvmlDeviceGetCount()
        meter = Nvml([pynvml.nvmlDeviceGetHandleByIndex(k) for k in range(count)])
    except pynvml.NVMLError:  # most often: no driver, so no library of its own
        return None
    return meter if count and meter.read_w() is not None else None


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


def _number(path: Path) -> float | None:
    try:
        return float(_text(path))
    except ValueError:
        return None
