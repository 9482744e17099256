"""`flowspec simulate`: profiles changed in a figure, sweeps on a tiny checkpoint, refusals."""

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from flowspec.bench.records import read_samples
from flowspec.bench.sweeps import find_axis, sweep, values_in, with_values
from flowspec.bench.what_if import emulate, parse_variations, settings_of
from flowspec.cli.bench_plan import models_of
from flowspec.cli.main import app, main
from tests.support.checkpoints import save_checkpoint
from tests.support.traces import check_trace

MODELS = Path(__file__).resolve().parents[2] / "config" / "models"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`target/`, `eagle/` and a prompt."""
    folder = save_checkpoint(tmp_path_factory.mktemp("simulate") / "tiny", num_layers=2)
    (folder / "foxes.jsonl").write_text(json.dumps({"id": "fox", "prompt": "a fox in a box"}))
    return folder


def words(tiny: Path, *flags: str) -> list[str]:
    """The command for the tiny checkpoint, on the stages that it has layers for."""
    command = ["simulate", "--model", str(tiny / "target"), "--draft", str(tiny / "eagle")]
    command += ["--datasets", str(tiny / "foxes.jsonl"), "--jobs", "1", "--max-tokens", "6"]
    return [*command, "--cluster", "agx-5", *flags]


def simulate(tiny: Path, *flags: str) -> Result:
    """Run it."""
    return CliRunner().invoke(app, words(tiny, *flags))


@pytest.mark.parametrize(
    "names",
    [
        ["--model", "{target}", "--emulated-model", "vicuna-13b"],
        ["--target", "{target}", "--model", "vicuna-13b"],
        ["--target={target}", "--emulated-model", "vicuna-13b"],
    ],
)
def test_the_models_by_their_old_names(names, tiny, tmp_path, monkeypatch, caplog):
    """`--model` named the emulated one where `--target` names the one that computes."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flowspec.config._told", set())
    given = [name.format(target=tiny / "target") for name in names]
    options = words(tiny, "--vary", "stages=2", "--strategies", "ar")
    result = CliRunner().invoke(app, [options[0], *given, *options[3:]])
    assert result.exit_code == 0, (result.output, result.exception)
    (sample,) = read_samples(Path("out/simulate"))
    assert sample.model == "vicuna-13b"
    assert not sample.mismatch
    assert ("--target is now called --model" in caplog.text) == ("--target" in names[0])


def test_an_emulated_model_in_the_place_of_the_model(tiny, caplog, monkeypatch, tmp_path):
    """`--model vicuna-7b` alone has its old meaning: nobody has a model of that name."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flowspec.config._told", set())
    assert models_of("vicuna-13b", None) == (None, "vicuna-13b")
    assert "--emulated-model" in caplog.text
    Path("vicuna-13b").mkdir()
    assert models_of("vicuna-13b", None) == ("vicuna-13b", None)
    assert models_of("vicuna-7b", "vicuna-13b") == ("vicuna-7b", "vicuna-13b")
    assert models_of("lmsys/vicuna-7b-v1.3", None) == ("lmsys/vicuna-7b-v1.3", None)


def test_a_sweep_prints_a_line_per_value_and_writes_its_records(tiny, tmp_path, monkeypatch):
    """The records say what was varied; a second run has nothing left to do; a plot takes them."""
    monkeypatch.chdir(tmp_path)
    flags = ["--vary", "stages=2", "--vary", "link_mbps=10,2500", "--strategies", "ar,streaming"]
    result = simulate(tiny, *flags, "--out", "sim")
    assert result.exit_code == 0, (result.output, result.exception)
    samples = read_samples(Path("sim"))
    assert {one.cluster for one in samples} == {"agx-5 link_mbps=10", "agx-5 link_mbps=2500"}
    assert {one.emulated for one in samples} == {True}
    assert not any(one.mismatch for one in samples)
    found = sweep(samples, find_axis("link_mbps"))
    slow, fast = (row.tokens_per_s for row in found.lines["streaming"].values())
    assert slow < fast
    lines = [line.split() for line in result.output.splitlines() if line.startswith(" 2 ")]
    assert [line[1] for line in lines] == ["10", "2500"]
    assert [line[3] for line in lines] == [f"{slow:.2f}", f"{fast:.2f}"]
    before = Path("sim/samples.jsonl").read_text()
    assert simulate(tiny, *flags, "--out", "sim").stdout == result.stdout
    assert Path("sim/samples.jsonl").read_text() == before
    drawn = CliRunner().invoke(app, ["plot", "bandwidth", "sim", "--out", "plot.svg"])
    assert drawn.exit_code == 0, drawn.exception


def test_parameters_vary_for_what_has_a_tree_alone(tiny, tmp_path, monkeypatch):
    """`ar` runs once, and is every depth's baseline."""
    monkeypatch.chdir(tmp_path)
    flags = ["--vary", "num_draft_steps=1,3", "--vary", "stages=2", "--strategies", "ar,serial_pp"]
    assert simulate(tiny, *flags).exit_code == 0
    samples = read_samples(Path("out/simulate"))
    assert sorted((one.strategy, one.parameters.get("num_draft_steps", 0)) for one in samples) == [
        *(("ar", 0), ("serial_pp", 1), ("serial_pp", 3))
    ]
    found = sweep(samples, find_axis("num_draft_steps"))
    assert found.has_baseline
    assert set(found.lines["serial_pp"]) == {1.0, 3.0}


def test_a_trace_of_one_emulated_sample(tiny, tmp_path, monkeypatch):
    """For Perfetto, `flowspec trace summary` and `flowspec plot timeline`."""
    monkeypatch.chdir(tmp_path)
    result = simulate(tiny, "--vary", "stages=2", "--trace", "trace.json")
    assert result.exit_code == 0, (result.output, result.exception)
    data = check_trace(Path("trace.json"))
    assert {process["clock"] for process in data["otherData"]["processes"]} == {"virtual"}
    assert not Path("out/simulate").exists()


def test_what_is_varied_changes_that_figure_alone():
    """Links, head, number of stages and bits of the model's weights."""
    plain = emulate("jetson-5", "vicuna-7b", {}, drafter="eagle")
    assert plain.cluster.name == "jetson-5"
    slow = emulate("jetson-5", "vicuna-7b", {"link_mbps": 125.0, "latency_ms": 2.0}, drafter="none")
    assert slow.cluster.name == "jetson-5 link_mbps=125 latency_ms=2"
    assert {(link.rate_mbps, link.latency_ms) for link in slow.cluster.links} == {(125.0, 2.0)}
    fast = emulate("jetson-5", "vicuna-7b", {"drafter_speed": 2.0}, drafter="eagle")
    assert fast.draft_s(10, 100) == pytest.approx(plain.draft_s(10, 100) / 2)
    assert fast.forward_s(1, 10, 100) == plain.forward_s(1, 10, 100)
    small = emulate("jetson-5", "vicuna-7b", {"weight_bits": 4.5, "stages": 2.0}, drafter="eagle")
    assert (small.model.name, small.cluster.num_stages) == ("vicuna-7b weight_bits=4.5", 2)
    assert small.model.layer_bytes == plain.model.layer_bytes * 4.5 / 16


@pytest.mark.parametrize("model", sorted(path.stem for path in MODELS.glob("*-4bit.yaml")))
def test_a_sweep_and_the_4_bit_profiles_emulate_the_same(model):
    """A model's weights take as many bytes and seconds, whichever way 4 bits were asked for."""
    swept = emulate("agx-5", model.removesuffix("-4bit"), {"weight_bits": 4.5}, drafter="eagle")
    named = emulate("agx-5", model, {}, drafter="eagle")
    assert swept.model.layer_bytes == named.model.layer_bytes
    assert swept.layers == named.layers
    assert swept.forward_s(1, 10, 100) == named.forward_s(1, 10, 100)


def test_variations_are_all_combinations_and_names_say_them():
    """The last one varies fastest; what a name says is read back."""
    found = parse_variations(["stages=2,4", "draft_topk=3,5"])
    assert found == [
        {"stages": stages, "draft_topk": draft_topk}
        for stages in (2.0, 4.0)
        for draft_topk in (3.0, 5.0)
    ]
    assert settings_of(found[1]) == {"draft_topk": "5"}
    assert values_in(with_values("wifi-5", {"latency_ms": 0.25})) == {"latency_ms": 0.25}


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ([], ["--vary", "link_mbps"]),
        (["--vary", "moon=1"], ["moon", "num_draft_steps"]),
        (["--vary", "stages"], ["name=value"]),
        (["--vary", "stages=two"], ["stages=two", "numbers"]),
        (["--vary", "t\u043epk=2"], [r"t\u043epk", "num_draft_steps"]),
        (["--vary", "stages=0"], ["from 1 to"]),
        (["--vary", "link_mbps=nan,1"], ["link_mbps", "nan"]),
        (["--vary", "weight_bits=4"], ["4.5", "scales", "16"]),
        (["--vary", "draft_topk=2", "--vary", "draft_topk=3"], ["draft_topk", "twice"]),
        (["--vary", "draft_topk=0,2"], ["--vary", "draft_topk"]),
        (["--vary", "stages=2,3", "--cluster", "mixed-5"], ["several kinds"]),
        (["--vary", "stages=2,4", "--trace", "t.json"], ["--trace", "one value"]),
        (["--vary", "stages=2", "--trace", "nowhere/t.json"], ["nowhere"]),
        (["--vary", "stages=2", "--strategies", "warp"], ["warp", "streaming"]),
    ],
)
def test_wrong_flags_end_with_one_line(tiny, tmp_path, monkeypatch, capsys, flags, names):
    """Before anything runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    monkeypatch.setattr(sys, "argv", ["flowspec", *words(tiny, *flags)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert len(error.strip().splitlines()) == 1
    for name in names:
        assert name in error, error
    assert not Path("out/simulate").exists()
