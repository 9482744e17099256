"""Readers of foreign bytes keep their contract on seeds, mutations, and under a guided fuzzer."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowspec.protocol import codec
from flowspec.protocol.messages import WireMessage
from tests.stress import fuzz_targets
from tests.stress.fuzz import NAMES
from tests.stress.fuzz_targets import TARGETS, pack_frames, unpack_frames

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


SEEDS = {name: target.seeds() for name, target in TARGETS.items()}
PIECES = (
    b"\0",
    b"\xff" * 4,
    b"-1",
    b"[[",
    b'"',
    b"{}",
    b"null",
    b"1e999",
    b"\n- ",
    b": ",
    b"&a *a",
)


@st.composite
def mutated(draw: st.DrawFn, seeds: list[bytes]) -> bytes:
    """Draw a seed with bytes changed, cut out, doubled or added, or joined with another seed."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 4))):
        at, size = draw(st.integers(0, len(data))), draw(st.integers(0, 8))
        piece = draw(st.binary(max_size=8) | st.sampled_from(PIECES) | st.just(data[at : at + 40]))
        data[at : at + size] = piece
    if draw(st.booleans()):
        data += draw(st.sampled_from(seeds))[draw(st.integers(0, 40)) :]
    return bytes(data)


def test_the_command_knows_every_target() -> None:
    """The command lists its targets itself, so that it knows them before any import."""
    assert tuple(TARGETS) == NAMES


def test_every_kind_of_message_is_a_seed() -> None:
    """Seeds come from the union of messages; a kind without one would not be fuzzed."""
    kinds = get_args(WireMessage)
    examples = SEEDS["wire"][: 4 * len(kinds)]
    seen = {type(codec.decode(unpack_frames(seed))) for seed in examples}
    assert seen == set(kinds)


@given(st.lists(st.binary(max_size=20), max_size=6))
@settings(derandomize=True, max_examples=30)
def test_frames_are_packed_without_loss(frames: list[bytes]) -> None:
    """The fuzzed input equals the seed."""
    assert unpack_frames(pack_frames(frames)) == frames


@pytest.mark.parametrize("name", TARGETS)
def test_seeds_keep_the_contract(name: str) -> None:
    """The seeds include every input that once broke the contract."""
    for seed in SEEDS[name]:
        TARGETS[name].run(seed)


@pytest.mark.parametrize("name", TARGETS)
def test_mutations_keep_the_contract(name: str) -> None:
    """The examples are the same each time: a failure here is a failure everywhere."""

    @given(mutated(SEEDS[name]))
    @settings(
        derandomize=True,
        max_examples=60,
        deadline=None,
        suppress_health_check=[HealthCheck.data_too_large, HealthCheck.too_slow],
    )
    def check(data: bytes) -> None:
        TARGETS[name].run(data)

    check()


def broken_reader(*args: object, **kwargs: object) -> None:
    """Fail as a reader with a bug."""
    raise KeyError("a")


def hungry_reader(*args: object, **kwargs: object) -> None:
    """Take far more memory than the message needs, then refuse."""
    bytearray(50_000_000)
    raise codec.WireError("no")


@pytest.mark.parametrize(
    ("name", "reader", "replacement", "error"),
    [
        ("wire", "decode", broken_reader, KeyError),
        ("wire", "decode", hungry_reader, AssertionError),
        ("manifest", "read_manifest", broken_reader, KeyError),
        ("config", "read_engine_config", broken_reader, KeyError),
        ("config", "as_yaml", lambda config: "stages: 7", AssertionError),
        ("model", "read_config", broken_reader, KeyError),
        ("eagle", "load_eagle", broken_reader, KeyError),
        ("tensors", "read_header", broken_reader, KeyError),
    ],
)
def test_a_broken_reader_is_found_out(name, reader, replacement, error, monkeypatch) -> None:
    """A target that could not fail would prove nothing."""
    monkeypatch.setattr(fuzz_targets, reader, replacement)
    with pytest.raises(error):
        TARGETS[name].run(SEEDS[name][0])


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="needs the package atheris, which this Python or system lacks",
)
@pytest.mark.parametrize("name", ["wire", "tensors"])
def test_the_guided_fuzzer_runs(name: str, tmp_path: Path) -> None:
    """Run the command for a short time; tests/stress/fuzz.py makes longer runs."""
    command = [sys.executable, "-m", "tests.stress.fuzz", name, "--runs", "3000"]
    done = subprocess.run(
        [*command, "--out", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=250,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{name}: 3" in done.stdout


def test_without_atheris_the_command_says_what_to_do(tmp_path: Path) -> None:
    """The error is one line with the remedy, without traceback."""
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util as u\nfind = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'atheris' else find(name, *a)\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.stress.fuzz", "wire"],
        capture_output=True, text=True, timeout=60, env={"PYTHONPATH": str(tmp_path)},
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.startswith("error: fuzzing needs atheris")
    assert "pip install 'flowspec[fuzz]'" in done.stderr
