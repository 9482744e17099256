"""The splitter handles any number of stages, any form of checkpoint, and interruptions."""

import runpy
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from flowspec.cli.split import split as split_command
from flowspec.weights.checkpoint import LM_HEAD, open_checkpoint
from flowspec.weights.load import load_head_part, load_stage, load_whole
from flowspec.weights.manifest import read_manifest
from flowspec.weights.split import JOURNAL_NAME, run_split
from flowspec.weights.split_plan import even_layers, parse_layers, plan_split
from tests.support import families

ROOT = Path(__file__).resolve().parents[2]
LAYERS = families.NUM_LAYERS


def split(folder: Path, out: Path, *, layers=(2, 2), dtype=None, on_bytes=lambda _: None):
    """Open, plan and split in one call."""
    plan = plan_split(open_checkpoint(folder), layers=layers, dtype=dtype)
    return run_split(plan, out, model_id="tiny", on_bytes=on_bytes)


def weights_of(out: Path, num_stages: int) -> dict[str, torch.Tensor]:
    """Return all tensors of all stages."""
    found: dict[str, torch.Tensor] = {}
    for stage in range(1, num_stages + 1):
        found.update(load_file(out / f"stage_{stage}" / "model.safetensors"))
    return found


@pytest.fixture
def checkpoint(tmp_path):
    """Return an untied fp32 checkpoint in one file."""
    families.save(tmp_path / "hf")
    return tmp_path / "hf"


@given(st.integers(1, 200), st.data())
def test_even_layers_leave_no_layer_out_and_differ_by_one(num_layers, data):
    num_stages = data.draw(st.integers(1, num_layers))
    layers = even_layers(num_layers, num_stages)
    assert (len(layers), sum(layers)) == (num_stages, num_layers)
    assert max(layers) - min(layers) <= 1
    assert parse_layers("+".join(map(str, layers))) == layers


@pytest.mark.parametrize("num_stages", [0, 5])
def test_more_stages_than_layers_are_refused(num_stages):
    with pytest.raises(ValueError, match="1 to 4"):
        even_layers(4, num_stages)


@pytest.mark.parametrize("text", ["", "8+", "8,8", "-8+8", "eight", "8+0", "9" * 5000])
def test_layer_counts_that_are_no_numbers_are_refused(text):
    with pytest.raises(ValueError, match=r"8\+8\+8\+8"):
        parse_layers(text)


@pytest.mark.parametrize("layers", [(2, 1), (4, 1), (4, 0), (5, -1), ()])
def test_layer_counts_that_do_not_add_up_are_refused(checkpoint, layers):
    with pytest.raises(ValueError, match="the model has 4 layers"):
        plan_split(open_checkpoint(checkpoint), layers=layers)


@pytest.mark.parametrize("family", ["llama3", "tied", "biases", "qwen2_tied"])
@pytest.mark.parametrize("form", ["single", "sharded", "bin", "bin_sharded"])
def test_stages_hold_exactly_the_tensors_of_the_model(tmp_path, family, form):
    expected = families.save(tmp_path / "hf", family, form=form).state_dict()
    opened = open_checkpoint(tmp_path / "hf")
    for num_stages in range(1, LAYERS + 1):
        out = tmp_path / f"out{num_stages}"
        plan = plan_split(opened, layers=even_layers(LAYERS, num_stages))
        seen = []
        manifest = run_split(plan, out, model_id="tiny", on_bytes=seen.append)
        assert manifest == read_manifest(out)
        assert sum(seen) >= plan.total_bytes
        found = weights_of(out, num_stages)
        tied_here = opened.config.tie_word_embeddings and num_stages == 1
        assert expected.keys() - found.keys() == ({LM_HEAD} if tied_here else set())
        assert all(torch.equal(found[name], expected[name]) for name in found)
        head = load_head_part(out)
        assert torch.equal(head.embed_tokens, expected["model.embed_tokens.weight"])
        assert torch.equal(head.lm_head, expected[LM_HEAD])
        tokenizer = (tmp_path / "hf" / "tokenizer.json").read_text()
        assert (out / "head" / "tokenizer.json").read_text() == tokenizer


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_dtype_is_converted_as_torch_does(tmp_path, dtype, stored):
    model = families.save(tmp_path / "hf", dtype=stored)
    manifest = split(tmp_path / "hf", tmp_path / "out", dtype=dtype)
    target = getattr(torch, dtype)
    for name, tensor in weights_of(tmp_path / "out", 2).items():
        assert torch.equal(tensor, model.state_dict()[name].to(target))
    assert manifest.dtype == dtype
    assert load_stage(tmp_path / "out", 1).config.dtype == dtype
    assert load_stage(tmp_path / "out", 1).dtype == target


def test_the_stored_dtype_stays_by_default(tmp_path):
    families.save(tmp_path / "hf", dtype=torch.bfloat16)
    assert split(tmp_path / "hf", tmp_path / "out").dtype == "bfloat16"


def test_values_beyond_float16_are_refused_by_name(checkpoint, tmp_path):
    families.change(checkpoint, model__norm__weight=torch.full((32,), 1e6))
    with pytest.raises(ValueError, match=r"model\.norm\.weight.*bfloat16"):
        split(checkpoint, tmp_path / "out", dtype="float16")


def test_mixed_dtypes_need_a_choice(checkpoint, tmp_path):
    families.change(checkpoint, model__norm__weight=torch.ones(32, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="bfloat16, float32.*--dtype"):
        split(checkpoint, tmp_path / "out")
    with pytest.raises(ValueError, match="mixes"):
        load_whole(checkpoint)
    assert split(checkpoint, tmp_path / "out", dtype="float32").dtype == "float32"


def test_an_unknown_dtype_is_refused(checkpoint, tmp_path):
    with pytest.raises(ValueError, match="int8.*float32, float16, bfloat16"):
        split(checkpoint, tmp_path / "out", dtype="int8")


def test_a_file_cut_short_while_it_is_read_is_noticed(checkpoint, tmp_path):
    plan = plan_split(open_checkpoint(checkpoint), layers=(4,))
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="is truncated at"):
        run_split(plan, tmp_path / "out", model_id="tiny")


class Stopped(Exception):
    """Replaces Ctrl-C in the middle of a split."""


def stop_after(num_bytes: int):
    """Return a progress callback that interrupts."""
    left = [num_bytes]

    def on_bytes(count: int) -> None:
        left[0] -= count
        if left[0] < 0:
            raise Stopped

    return on_bytes


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.8, 0.999])
def test_an_interrupted_split_is_not_loadable_and_a_rerun_finishes_it(checkpoint, tmp_path, share):
    out = tmp_path / "out"
    total = plan_split(open_checkpoint(checkpoint), layers=(2, 2)).total_bytes
    with pytest.raises(Stopped):
        split(checkpoint, out, on_bytes=stop_after(int(share * total)))
    with pytest.raises(ValueError, match="was interrupted"):
        load_stage(out, 1)
    assert not list(out.rglob("*.partial"))
    manifest = split(checkpoint, out)
    whole = split(checkpoint, tmp_path / "other")
    assert manifest == whole
    assert not (out / JOURNAL_NAME).exists()
    assert load_stage(out, 2).last_layer == LAYERS


def test_a_rerun_keeps_good_files_and_redoes_bad_ones(checkpoint, tmp_path):
    """A kill leaves a partial file, and a finished one that never reached the disk."""
    out = tmp_path / "out"
    plan = plan_split(open_checkpoint(checkpoint), layers=(2, 2))
    with pytest.raises(Stopped):
        split(checkpoint, out, on_bytes=stop_after(int(0.9 * plan.total_bytes)))
    kept, spoilt = out / "head" / "model.safetensors", out / "stage_1" / "model.safetensors"
    (out / "stage_2" / "model.safetensors.partial").write_bytes(b"half")
    data = bytearray(spoilt.read_bytes())
    data[-1] ^= 1
    spoilt.write_bytes(data)
    before = kept.stat().st_mtime_ns
    assert split(checkpoint, out) == split(checkpoint, tmp_path / "other")
    assert kept.stat().st_mtime_ns == before
    assert not list(out.rglob("*.partial"))
    load_stage(out, 1)


def test_a_finished_split_is_left_as_it_is(checkpoint, tmp_path):
    out = tmp_path / "out"
    first = split(checkpoint, out)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert split(checkpoint, out) == first
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_a_finished_split_that_lost_a_file_is_repaired(checkpoint, tmp_path):
    out = tmp_path / "out"
    split(checkpoint, out)
    (out / "stage_2" / "model.safetensors").unlink()
    split(checkpoint, out)
    load_stage(out, 2)


@pytest.mark.parametrize("interrupted", [False, True])
@pytest.mark.parametrize("other", ["layers", "dtype", "source"])
def test_another_plan_or_source_does_not_mix_in(checkpoint, tmp_path, interrupted, other):
    out = tmp_path / "out"
    if interrupted:
        with pytest.raises(Stopped):
            split(checkpoint, out, on_bytes=stop_after(20_000))
    else:
        split(checkpoint, out)
    arguments = {"layers": {"layers": (3, 1)}, "dtype": {"dtype": "bfloat16"}}.get(other, {})
    if other == "source":
        families.save(checkpoint, "biases", seed=1)
    with pytest.raises(ValueError, match="another checkpoint, layer plan or dtype.*--out"):
        split(checkpoint, out, **arguments)


def test_a_folder_with_other_content_is_left_alone(checkpoint, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"is not empty \(it has thesis.tex\).*--out"):
        split(checkpoint, out)
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_foreign_file_in_a_split_is_named(checkpoint, tmp_path):
    split(checkpoint, tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("")
    with pytest.raises(ValueError, match=r"notes\.txt is not part"):
        split(checkpoint, tmp_path / "out")


def test_an_out_that_is_a_file_is_refused(checkpoint, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(ValueError, match="--out needs a folder"):
        split(checkpoint, tmp_path / "out")


def test_too_little_disk_is_told_before_anything_is_written(checkpoint, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(ValueError, match=r"needed 0\.00 GB, free 0\.00 GB"):
        split(checkpoint, tmp_path / "deep" / "out")
    assert not (tmp_path / "deep").exists()


def test_the_command_reports_and_can_be_repeated(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        split_command(str(checkpoint), stages=3)
        printed = capsys.readouterr().out
        assert "stage_3" in printed
        assert "Next: flowspec run" in printed
    manifest = read_manifest(tmp_path / "out" / "hf-3stages")
    assert (manifest.model_id, manifest.layers) == ("hf", (2, 1, 1))
    with pytest.raises(ValueError, match="either --stages N or --layers"):
        split_command(str(checkpoint), stages=3, layers="2+2")
    with pytest.raises(ValueError, match="either --stages N or --layers"):
        split_command(str(checkpoint))


def test_the_wrapper_is_the_command_and_an_error_is_one_line(
    checkpoint, tmp_path, monkeypatch, capsys
):
    wrapper = str(ROOT / "split_and_save_models.py")
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the handlers outlive the command
    for stages, code in (("4", 0), ("9", 2)):
        out = str(tmp_path / stages)
        monkeypatch.setattr(
            "sys.argv", [wrapper, str(checkpoint), "--stages", stages, "--out", out]
        )
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(wrapper, run_name="__main__")
        assert (ended.value.code or 0) == code
    printed = capsys.readouterr()
    assert "4 stages, float32, whole" in printed.out
    errors = [line for line in printed.err.splitlines() if line.startswith("error")]
    assert errors == ["error: --stages 9: the model has 4 layers, so 1 to 4 stages are possible"]
