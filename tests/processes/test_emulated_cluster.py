"""Real processes run at the speed of an emulated cluster."""

from pathlib import Path

import pytest

from flowspec.config import EngineConfig
from flowspec.cost_model.emulation import read_emulation
from flowspec.engine.build import HeadParts, build_stage
from flowspec.engine.engine import generate
from flowspec.engine.local import LocalEngine
from flowspec.engine.simulated import emulated_engine
from flowspec.request import Decoding, Request

pytestmark = pytest.mark.slow

DEVICE = """source: a test
memory_gb: 4
bandwidth_gb_s: 1
fp16_tflops: 1
int4_bandwidth_share: 1
layer_overhead_ms: 12
host_overhead_ms: 1
"""
SIZES = """layers: 1
  hidden_size: 64
  intermediate_size: 64
  num_heads: 2
  num_kv_heads: 2
  head_dim: 32
  vocab_size: 100
"""


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Name a cluster of two slow devices and a tiny model."""
    folder: Path = tmp_path_factory.mktemp("profiles")
    device, link, cluster, model = (folder / f"{n}.yaml" for n in ("device", "link", "c", "m"))
    device.write_text(DEVICE)
    link.write_text("source: a test\nrate_mbps: 1\nlatency_ms: 5\n")
    stages = f"stages: ['{device}', '{device}']"
    cluster.write_text(f"source: a test\nhead: '{device}'\n{stages}\nlink: '{link}'\n")
    whole = SIZES.replace("layers: 1", "layers: 2").replace("\n  ", "\n")
    more = "weight_bits: 16\ndraft_vocab_size: 100\n"
    model.write_text(f"source: a test\n{whole}{more}draft_model:\n  source: a test\n  {SIZES}")
    return f"{cluster}:{model}"


def ask(parts: HeadParts, strategy: str) -> Request:
    """Ask for nine tokens."""
    prompt = tuple(parts.tokenizer.encode("the lazy dog"))
    return Request(prompt=prompt, max_new_tokens=9, decoding=Decoding(strategy=strategy))


def test_processes_are_no_faster_than_the_cluster_they_emulate(
    config: EngineConfig, parts: HeadParts, names: str
):
    """The text is that of the virtual clock, and the time is never less than there."""
    emulation = read_emulation(names, drafter=config.drafter)
    config = config.changed(emulate=names)
    stages = [build_stage(parts.folder, rank)[0] for rank in (1, 2)]
    simulated = emulated_engine(config, parts, stages, emulation)
    with LocalEngine(config, parts) as cluster:
        for strategy in ("ar", "streaming"):
            virtual = generate(simulated, ask(parts, strategy))
            stream = cluster.submit(ask(parts, strategy))
            real = stream.result()
            assert real.tokens == virtual.tokens
            assert set(stream.stage_stats()) == {1, 2}
            if strategy == "ar":  # one course of events: what is late is late for all that follows
                took = real.stats.finished_at - real.stats.first_token_at
                modelled = virtual.stats.finished_at - virtual.stats.first_token_at
                assert took >= 0.999 * modelled
        stages = cluster.status().stages
    assert set(stages) == {1, 2}
    assert all(stage.busy_s >= 0.012 * stage.num_segments > 0 for stage in stages.values())


def test_a_cluster_of_another_size_is_refused(config: EngineConfig, parts: HeadParts):
    """Before any process is started."""
    with pytest.raises(ValueError, match="split into 2 stages, cluster jetson-5 has 4; split it"):
        LocalEngine(config.changed(emulate="jetson-5:vicuna-7b"), parts)


@pytest.mark.parametrize("text", ["jetson-5", ":vicuna-7b", "jetson-5:"])
def test_what_to_emulate_is_a_cluster_and_a_model(text: str):
    """One of the two alone is a mistake."""
    with pytest.raises(ValueError, match="emulate takes CLUSTER:MODEL, such as"):
        read_emulation(text, drafter="eagle")
