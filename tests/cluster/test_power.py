"""Power sensors as the kernel shows them: right sums, and nothing where there is nothing."""

from pathlib import Path

import pynvml
import pytest

from flowspec.cluster.device.power import Nvml, Rapl, find_power_meter


def chip(root: Path, number: int, name: str, rails: dict[int, tuple[str, int, int]]) -> None:
    """A hwmon chip with rails of (label, mV, mA) by channel."""
    folder = root / f"hwmon{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    for channel, (label, millivolts, milliamperes) in rails.items():
        (folder / f"in{channel}_label").write_text(f"{label}\n")
        (folder / f"in{channel}_input").write_text(f"{millivolts}\n")
        (folder / f"curr{channel}_input").write_text(f"{milliamperes}\n")


def package(root: Path, name: str, energy_uj: int) -> Path:
    """A RAPL package."""
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (folder / "max_energy_range_uj").write_text("1000000\n")
    return folder


def test_the_whole_modules_rail_is_taken_alone(tmp_path: Path):
    """Its parts are in it already."""
    rails = {
        1: ("VDD_IN", 5000, 1200),
        2: ("VDD_CPU_GPU_CV", 5000, 400),
        3: ("VDD_SOC", 5000, 300),
    }
    chip(tmp_path, 0, "nvme", {})
    chip(tmp_path, 3, "ina3221", rails)
    meter = find_power_meter(tmp_path, tmp_path / "none")
    assert (meter.name, meter.scope) == ("INA3221", "module")
    assert meter.read_w() == 6.0


def test_without_a_rail_for_all_they_are_added(tmp_path: Path):
    """Boards with two monitors have no single input rail."""
    chip(tmp_path, 0, "ina3221", {1: ("VDD_GPU_SOC", 20000, 500), 2: ("VDD_CPU_CV", 20000, 250)})
    chip(tmp_path, 1, "ina3221", {1: ("VIN_SYS_X", 20000, 100)})
    assert find_power_meter(tmp_path, tmp_path / "none").read_w() == 17.0


def test_a_rail_that_cannot_be_read_is_left_out(tmp_path: Path):
    """A sensor that goes away must not end a run."""
    chip(tmp_path, 0, "ina3221", {1: ("A", 5000, 1000), 2: ("B", 5000, 1000)})
    meter = find_power_meter(tmp_path, tmp_path / "none")
    (tmp_path / "hwmon0/curr2_input").write_text("")
    assert meter.read_w() == 5.0
    (tmp_path / "hwmon0/in1_input").unlink()
    assert meter.read_w() is None


def test_rapl_is_energy_over_time_and_wraps(tmp_path: Path):
    """The mean since the reading before; counters start anew at their end."""
    one = package(tmp_path, "intel-rapl:0", 400_000)
    package(tmp_path, "intel-rapl:0:0", 5)  # a part of the package
    assert find_power_meter(tmp_path / "none", tmp_path).name == "RAPL"
    now = [10.0]
    meter = Rapl([one], clock=lambda: now[0])
    assert meter.read_w() is None
    now[0] = 12.0
    (one / "energy_uj").write_text("900000")
    assert meter.read_w() == 0.25
    now[0] = 13.0
    (one / "energy_uj").write_text("100000")
    assert meter.read_w() == pytest.approx(0.2)
    (one / "energy_uj").unlink()
    assert meter.read_w() is None


def test_no_sensor_is_no_error(tmp_path: Path):
    """A Raspberry Pi 4 has none."""
    assert find_power_meter(tmp_path, tmp_path) is None


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """A driver with two cards; milliwatts of each by handle."""
    milliwatts = {"first": 61_500, "second": 38_250}
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetCount", lambda: len(milliwatts))
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", lambda k: list(milliwatts)[k])

    def usage(handle: str) -> int:
        if milliwatts[handle] < 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return milliwatts[handle]

    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", usage)
    return milliwatts


def test_cards_are_added(tmp_path: Path, two_cards: dict[str, int]):
    """The board's own sensor goes first, then the cards, then the sockets."""
    package(tmp_path, "intel-rapl:0", 0)
    meter = find_power_meter(tmp_path / "none", tmp_path)
    assert isinstance(meter, Nvml)
    assert (meter.read_w(), meter.scope) == (99.75, "gpus")
    two_cards["second"] = -1  # it stops telling
    assert meter.read_w() is None


def test_cards_without_a_sensor_are_passed_over(tmp_path: Path, two_cards: dict[str, int]):
    """As consumer cards of some laptops; the sockets are read then."""
    two_cards["first"] = -1
    package(tmp_path, "intel-rapl:0", 0)
    meter = find_power_meter(tmp_path / "none", tmp_path)
    assert meter is not None
    assert meter.name == "RAPL"


def test_without_a_driver_there_are_no_cards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """nvidia-ml-py is installed everywhere, the driver's library is not."""

    def init() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", init)
    assert find_power_meter(tmp_path / "none", tmp_path / "none") is None
