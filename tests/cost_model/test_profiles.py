"""All bundled profiles can be read, and mistakes in a user's profile are named."""

from pathlib import Path

import pytest

from flowspec.cost_model.emulation import load_emulation
from flowspec.cost_model.profiles import (
    BUNDLED,
    profile_names,
    read_cluster,
    read_device,
    read_link,
    read_model,
)

READERS = {
    "devices": read_device,
    "links": read_link,
    "models": read_model,
    "clusters": read_cluster,
}


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind in READERS for name in profile_names(kind)]
)
def test_every_bundled_profile_can_be_read(kind: str, name: str):
    """The package's own profiles must work."""
    assert READERS[kind](name).name == name


@pytest.mark.parametrize("cluster", profile_names("clusters"))
def test_every_bundled_cluster_holds_a_small_model(cluster: str):
    """A 7B model in 4 bits fits everywhere, and every layer has a stage."""
    emulation = load_emulation(cluster, "vicuna-7b-4bit", drafter="eagle")
    assert sum(emulation.layers) == emulation.model.layers


def test_model_sizes_are_those_of_the_checkpoints():
    """The published numbers of weights are 6.7, 8.0 and 70.6 billion."""
    for name, published in (("vicuna-7b", 6.74e9), ("llama-3.1-8b", 8.03e9), ("qwen3-8b", 8.19e9)):
        model = read_model(name)
        total = model.layers * model.layer_weights + 2 * model.lm_head_weights
        assert total == pytest.approx(published, rel=0.001), name


def test_a_name_or_a_path_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """jetson-5, config/clusters/jetson-5.yaml and a user's copy are the same."""
    monkeypatch.chdir(tmp_path)
    bundled = read_cluster("jetson-5")
    assert read_cluster("config/clusters/jetson-5.yaml") == bundled
    own = tmp_path / "jetson-5.yaml"
    own.write_text(
        "source: my desk\nhead: reference-board\nstages: [reference-board]\nlink: 1gbe\n"
    )
    assert read_cluster(str(own)).num_stages == 1


@pytest.mark.parametrize(
    ("text", "error"),
    [
        (
            "rate_mbps: {value: 1, source: x}\nspeed: {value: 1, source: x}",
            "unknown key speed; kno",
        ),
        ("rate_mbps: {value: 1, source: x}", "latency_ms is missing"),
        ("rate_mbps: 1\nlatency_ms: {value: 1, source: x}", "rate_mbps has no source"),
        ("rate: 1\nlatency_ms: {value: 1, source: x}", "unknown key rate; known: .*rate_mbps"),
        ("source: x\nrate_mbps: fast\nlatency_ms: 1", "rate_mbps: Input should be a valid number"),
        ("source: x\nrate_mbps: 0\nlatency_ms: 1", "rate_mbps must be a positive number"),
        ("source: x\nrate_mbps: .nan\nlatency_ms: 1", "rate_mbps must be a positive number"),
        ("rate_mbps: {value: 1, source: ''}\nlatency_ms: 1", "its source must name"),
        ("[1, 2]", "must hold a mapping"),
    ],
)
def test_mistakes_in_a_link_are_named(tmp_path: Path, text: str, error: str):
    """The error names the file and the key in one line."""
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=error) as raised:
        read_link(str(file))
    assert str(file) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_unknown_name_lists_the_known_ones():
    """A typing error is the most common mistake."""
    with pytest.raises(
        ValueError, match="'jetson' is neither a file nor one of the clusters: .*jetson-5"
    ):
        read_cluster("jetson")


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ("links: {7: wifi5}", "links names rank 7, but the last rank is 2"),
        ("layers: [32]", "layers of 1 stages are given, there are 2"),
        ("links: {1: wifi}", "'wifi' is neither a file nor one of the links"),
    ],
)
def test_mistakes_in_a_cluster_are_named(tmp_path: Path, more: str, error: str):
    """Ranks and counts that do not match are named."""
    file = tmp_path / "mine.yaml"
    stages = "[reference-board, reference-board]"
    file.write_text(f"source: x\nhead: reference-board\nstages: {stages}\nlink: 1gbe\n{more}\n")
    with pytest.raises(ValueError, match=error):
        read_cluster(str(file))


def test_paths_in_a_cluster_are_from_its_folder(tmp_path: Path):
    """A folder with a cluster and its boards can be moved and named freely."""
    board = (BUNDLED / "devices" / "orin-nx-16gb.yaml").read_text()
    (tmp_path / "mine.yaml").write_text(board)
    file = tmp_path / "cluster.yaml"
    file.write_text(
        "source: x\nhead: ./mine.yaml\nstages: [./mine.yaml, reference-board]\nlink: 1gbe"
    )
    names = [device.name for device in read_cluster(str(file)).devices]
    assert names == ["mine", "mine", "reference-board"]


def test_a_device_of_ones_own_link(tmp_path: Path):
    """One device uses Wi-Fi, the others are wired."""
    file = tmp_path / "mine.yaml"
    stages = "[reference-board, reference-board]"
    file.write_text(
        f"source: x\nhead: reference-board\nstages: {stages}\nlink: 1gbe\nlinks: {{2: wifi5}}\n"
    )
    assert [link.name for link in read_cluster(str(file)).links] == ["1gbe", "1gbe", "wifi5"]
