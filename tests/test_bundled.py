"""Bundled files are found by name from any folder, and a user's own files come first."""

import shutil
from pathlib import Path

import pytest

from flowspec.bench.experiment import read_table
from flowspec.bench.prompts import load_prompts
from flowspec.cli.common import draft_folder, is_bundled
from flowspec.config import EngineConfig, read_engine_config
from flowspec.cost_model.profiles import profile_names, read_cluster, read_device
from flowspec.system.bundled import DATA, DEMO, find_bundled

CLUSTER = "source: my desk\nhead: {0}\nstages: [{0}]\nlink: 1gbe\n"


@pytest.fixture(autouse=True)
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Change to an empty working folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_bundled_names_work_in_an_empty_folder() -> None:
    """The README, the docs and the defaults use these names."""
    assert find_bundled("models/demo/target") == DEMO / "target"
    assert read_engine_config(Path("config/demo.yaml")).model == EngineConfig().model
    assert read_table(Path("config/eval.yaml"), "main")["streaming"]["segment_size"] == 80
    assert len(load_prompts(Path("models/demo/prompts.jsonl"))) == 4
    assert read_cluster("config/clusters/jetson-5.yaml") == read_cluster("jetson-5")


@pytest.mark.parametrize("name", ["nowhere", "config", "models/../x", "/config/x", "config/x"])
def test_other_names_are_paths(name: str) -> None:
    """No other place or name is searched."""
    found = find_bundled(name)
    assert found == (DATA / "config" if name == "config" else Path(name))


def test_a_file_in_the_working_folder_comes_first(empty: Path) -> None:
    """This holds for the package's names and for new ones, which the lists show."""
    own = read_device("reference-board")
    for kind in ("clusters", "devices"):
        (empty / "config" / kind).mkdir(parents=True)
    (empty / "config/clusters/jetson-5.yaml").write_text(CLUSTER.format("reference-board"))
    (empty / "config/clusters/mine.yaml").write_text(CLUSTER.format("my-board"))
    board = (DATA / "config/devices/reference-board.yaml").read_text()
    (empty / "config/devices/my-board.yaml").write_text(board)
    assert read_cluster("jetson-5").num_stages == 1
    assert read_cluster("config/clusters/jetson-5.yaml").num_stages == 1
    assert read_cluster("jetson-9").num_stages == 8
    assert read_cluster("mine").devices[0].name == "my-board"
    assert read_cluster("mine").devices[0].memory_gb == own.memory_gb
    assert {"mine", "jetson-9"} <= set(profile_names("clusters"))
    (empty / "config/demo.yaml").write_text("stages: 7\n")
    assert read_engine_config(Path("config/demo.yaml")).stages == 7


def test_a_model_of_ones_own_under_the_bundled_name_needs_its_own_head(empty: Path) -> None:
    """The bundled head does not fit another model; an unchanged copy keeps its head."""
    shutil.copytree(DEMO / "target", empty / "models/demo/target")
    assert is_bundled("models/demo/target")
    assert draft_folder(EngineConfig()) == str(DEMO / "eagle")
    weights = bytearray((empty / "models/demo/target/model.safetensors").read_bytes())
    weights[-1] ^= 1
    (empty / "models/demo/target/model.safetensors").write_bytes(weights)
    assert not is_bundled("models/demo/target")
    with pytest.raises(ValueError, match="needs --draft"):
        draft_folder(EngineConfig())
