"""What every checkpoint format does, and that the table carries one more without a change."""

import json
import shutil
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch

from flowspec.model.architecture import ModelConfig, read_json
from flowspec.tokenizer import load_tokenizer
from flowspec.weights import formats
from flowspec.weights.checkpoint import open_checkpoint, part_shapes
from flowspec.weights.formats import FORMATS, TensorReader, find_model, format_of
from flowspec.weights.load import load_whole
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from flowspec.weights.tensor_files import StoredTensor
from tests.support import families
from tests.support.gguf_files import write_gguf
from tests.support.tokenizer_checks import SAMPLE


def save_gguf(folder: Path) -> None:
    """Write the family's model as a GGUF file."""
    folder.mkdir()
    write_gguf(folder / "model.gguf", families.make("llama3"))


def save_npy(folder: Path) -> None:
    """Write config and tokenizer as usual, and each tensor as a file of numpy."""
    families.save(folder)
    for name, tensor in families.make("llama3").state_dict().items():
        np.save(folder / f"{name}.npy", tensor.numpy())
    (folder / "model.safetensors").unlink()


WRITERS: dict[str, Callable[[Path], object]] = {
    "safetensors": families.save,
    "bin": lambda folder: families.save(folder, form="bin"),
    "gguf": save_gguf,
    "npy": save_npy,
}


class _NpySource:
    def __init__(self, path: Path) -> None:
        self._values = np.load(path)

    def pieces(self, tensor: StoredTensor):
        """Yield the values in one piece."""
        yield memoryview(self._values.reshape(-1).view(np.uint8))

    def close(self) -> None:
        """Forget the values."""
        del self._values


class _NpyModel:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = tuple(sorted(folder.glob("*.npy")))

    def hf_config(self):
        """Read the folder's config."""
        return read_json(self.folder / "config.json")

    def model_config(self):
        """Read the folder's config."""
        return ModelConfig.from_hf(self.hf_config())

    def tensors(self):
        """Take the name of each file for its tensor's."""
        shapes = {path: np.load(path, mmap_mode="r").shape for path in self.files}
        return {
            path.stem: StoredTensor(
                name=path.stem, dtype="float32", shape=shape, file=path, offset=0
            )
            for path, shape in shapes.items()
        }

    def tokenizer_files(self):
        """Read the one file."""
        return {"tokenizer.json": (self.folder / "tokenizer.json").read_bytes()}

    def check_tokenizer(self):
        """Load it."""
        load_tokenizer(self.folder)


class _NpyFormat:
    name, suffix, file_names, computes_values = "npy", ".npy", ("*.npy",), False

    def find(self, path: Path):
        """Find a folder with such files."""
        return _NpyModel(path) if any(path.glob("*.npy")) else None

    def open(self, file: Path):
        """Open one file."""
        return _NpySource(file)


@pytest.fixture(autouse=True)
def with_npy(monkeypatch):
    """Add the throw-away format to the table."""
    monkeypatch.setattr(formats, "FORMATS", {**FORMATS, "npy": _NpyFormat()})


@pytest.fixture(params=[*FORMATS, "npy"])
def name(request) -> str:
    """Each row, and the throw-away one."""
    return request.param


@pytest.fixture
def folder(name, tmp_path) -> Path:
    """The same model in each format; a row without a writer here fails."""
    WRITERS[name](tmp_path / "model")
    return tmp_path / "model"


def test_the_model_is_found_by_its_own_format_alone(folder, name):
    """Formats do not take one another's files."""
    found = [one.name for one in formats.FORMATS.values() if one.find(folder) is not None]
    assert found == [name]
    form, model = find_model(folder)
    assert form.name == name
    assert all(format_of(file).name == name for file in model.files)


def test_nothing_is_found_where_nothing_is(name, tmp_path):
    """An empty folder and a file of another kind have no model."""
    (tmp_path / "notes.txt").write_text("none")
    assert formats.FORMATS[name].find(tmp_path) is None
    assert formats.FORMATS[name].find(tmp_path / "notes.txt") is None
    with pytest.raises(ValueError, match=r"has none of model.safetensors.*notes.txt"):
        find_model(tmp_path)


def test_config_and_tensors_are_those_of_the_model(folder):
    """Names, shapes and values of every tensor, in pieces of whole values."""
    model = families.make("llama3")
    checkpoint = open_checkpoint(folder)
    shapes = part_shapes(checkpoint.config, first_layer=0, last_layer=families.NUM_LAYERS)
    assert {name: one.shape for name, one in checkpoint.tensors.items()} == shapes
    with TensorReader() as reader:
        for name, stored in checkpoint.tensors.items():
            pieces = [bytes(piece) for piece in reader.pieces(stored)]
            assert not any(len(piece) % 4 for piece in pieces)
            values = torch.frombuffer(bytearray(b"".join(pieces)), dtype=torch.float32)
            torch.testing.assert_close(values.view(stored.shape), model.state_dict()[name])


def test_it_splits_into_the_same_weights(folder, tmp_path):
    """The split of every format has the same files of weights, and a tokenizer that loads."""
    checkpoint = open_checkpoint(folder)
    checkpoint.check_tokenizer()
    run_split(plan_split(checkpoint, layers=(2, 2)), tmp_path / "out", model_id="x")
    families.save(tmp_path / "plain")
    plain = load_whole(tmp_path / "plain").state_dict()
    split = load_whole(tmp_path / "out").state_dict()
    assert split.keys() == plain.keys()
    assert all(torch.equal(split[name], plain[name]) for name in plain)
    tokenizer = load_tokenizer(tmp_path / "out" / "head")
    assert tokenizer.decode(tokenizer.encode(SAMPLE, add_special_tokens=False)) == SAMPLE


def test_it_loads_whole_in_another_dtype(folder):
    """`load_whole` reads the checkpoint itself, converted."""
    whole = load_whole(folder, dtype="bfloat16")
    expected = families.make("llama3").state_dict()["model.norm.weight"].bfloat16()
    assert torch.equal(whole.get_parameter("model.norm.weight"), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_became_shorter_is_an_error(folder):
    """Whoever reads it is told which file; nothing is read as zeros."""
    checkpoint = open_checkpoint(folder)
    file = next(iter(checkpoint.tensors.values())).file
    file.write_bytes(file.read_bytes()[:-2000])
    with TensorReader() as reader, pytest.raises(ValueError, match=file.name):
        list(chain(*(reader.pieces(stored) for stored in checkpoint.tensors.values())))


def test_fingerprint_follows_the_files(folder, tmp_path):
    """Another file, or another tokenizer in place of the model's, is another checkpoint."""
    before = open_checkpoint(folder).fingerprint()
    assert open_checkpoint(folder).fingerprint() == before
    other = tmp_path / "tokenizer"
    other.mkdir()
    families.save(tmp_path / "plain")
    shutil.copy(tmp_path / "plain" / "tokenizer.json", other)
    assert open_checkpoint(folder, tokenizer=other).fingerprint() != before
    file = next(iter(open_checkpoint(folder).tensors.values())).file
    file.touch()
    assert open_checkpoint(folder).fingerprint() != before


def test_another_tokenizer_takes_the_place_of_the_models(folder, tmp_path):
    """None of the model's own files is mixed with those of the folder that was given."""
    other = tmp_path / "tokenizer"
    families.save(other)
    (other / "tokenizer_config.json").write_text(json.dumps({"chat_template": "other"}))
    checkpoint = open_checkpoint(folder, tokenizer=other)
    checkpoint.check_tokenizer()
    files = checkpoint.tokenizer_files()
    assert json.loads(files["tokenizer_config.json"]) == {"chat_template": "other"}
    assert files["tokenizer.json"] == (other / "tokenizer.json").read_bytes()
    own = open_checkpoint(folder).config.eos_token_ids
    assert set(checkpoint.hf_config["eos_token_id"]) == set(own)  # those stay the model's
