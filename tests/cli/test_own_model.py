"""A model of one's own: draft model, split; the bundled one under any name."""

import shutil
from pathlib import Path

import pytest

from flowspec.cli.common import BUNDLED, draft_folder, is_bundled, split_folder
from flowspec.cli.split import split
from flowspec.config import EngineConfig
from flowspec.tokenizer import load_tokenizer
from tests.support.checkpoints import save_checkpoint

OWN_HEAD = BUNDLED / "eagle"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a small model that is not the bundled one."""
    return save_checkpoint(tmp_path_factory.mktemp("own")) / "target"


def test_the_bundled_model_is_known_under_any_name(tmp_path):
    """Its own draft models go with its folder and with a split of it, wherever they lie."""
    copied = tmp_path / "copied"
    shutil.copytree(BUNDLED / "target", copied)  # files of another time, as after a checkout
    split(str(copied), stages=3, out=tmp_path / "split")
    for name in ("models/demo/target", str(BUNDLED / "target"), str(tmp_path / "split")):
        assert is_bundled(name)
        assert Path(draft_folder(EngineConfig(model=name))).resolve() == OWN_HEAD


def test_a_split_of_another_model_or_dtype_is_told_apart(own, tmp_path):
    """In another dtype it is the bundled model still; other weights of the same shape are not."""
    split(str(BUNDLED / "target"), stages=2, dtype="float16", out=tmp_path / "half")
    assert is_bundled(str(tmp_path / "half"))
    split(str(own), stages=2, out=tmp_path / "own")
    assert not is_bundled(str(tmp_path / "own"))
    damaged = tmp_path / "damaged"
    shutil.copytree(BUNDLED / "target", damaged)
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    split(str(damaged), stages=2, out=tmp_path / "other")
    assert not is_bundled(str(tmp_path / "other"))


def test_the_next_command_is_one_that_works(own, tmp_path, capsys, monkeypatch):
    """With the bundled model as it is; with another one by the drafter that needs no model."""
    monkeypatch.chdir(tmp_path)  # the bundled model has its name everywhere
    split("models/demo/target", stages=2, out=tmp_path / "with space")
    assert f"Next: flowspec run --model '{tmp_path / 'with space'}'\n" in capsys.readouterr().out
    split(str(own), stages=2, out=tmp_path / "own")
    printed = capsys.readouterr().out
    assert f"Next: flowspec run --model {tmp_path / 'own'} --drafter ngram\n" in printed
    assert "--draft FOLDER" in printed
    config = EngineConfig(model=str(tmp_path / "own"))
    assert draft_folder(config.changed(drafter="ngram")) == ""
    with pytest.raises(ValueError, match="needs --draft .* --drafter ngram needs none"):
        draft_folder(config)


@pytest.mark.parametrize("model", ["./nowhere", "nobody/nothing", "EMPTY"])
def test_a_missing_model_is_named_before_a_missing_draft(model, tmp_path, monkeypatch):
    """--draft for a model that is not there helps nobody."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (tmp_path / "EMPTY").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=model) as refused:
        draft_folder(EngineConfig(model=model), offline=True)
    assert "--draft" not in str(refused.value)


def test_a_model_without_tokenizer_is_named_by_its_own_folder(own, tmp_path, monkeypatch):
    """In one sentence, before anything is split."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(own, tmp_path / "mute")
    (tmp_path / "mute" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"mute has no tokenizer \(none of tokenizer\.json, "):
        split_folder(EngineConfig(model="mute"))
    assert not (tmp_path / "out").exists()
    (tmp_path / "mute" / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer in .*mute cannot be loaded: .+") as damaged:
        load_tokenizer(tmp_path / "mute")
    assert "\n" not in str(damaged.value)


def test_a_split_made_on_the_way_is_told_once(own, tmp_path, monkeypatch, capsys):
    """It takes disk, and stays: whoever runs a model should know where."""
    monkeypatch.chdir(tmp_path)
    folder = split_folder(EngineConfig(model=str(own), stages=2))
    assert capsys.readouterr().err == f"splitting target into 2 stages of 2+2 layers: {folder}\n"
    assert split_folder(EngineConfig(model=str(own), stages=2)) == folder
    assert not capsys.readouterr().err
