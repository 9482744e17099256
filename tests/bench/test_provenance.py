"""The hashes behind figures change with everything that matters, and with nothing else."""

import subprocess
from pathlib import Path

import pytest

from flowspec.bench import provenance
from flowspec.bench.provenance import code_hash, folder_hash, revision, versions


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a source tree."""
    package = tmp_path / "tree" / "package"
    for name in (
        "core.py",
        "model/net.py",
        "cli/ui/show.py",
        "bench/report.py",
        "tracing/bound.py",
    ):
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x = 1\n")
    monkeypatch.setattr(provenance, "ROOT", package)
    return package


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("core.py", True),
        ("model/net.py", True),
        ("cli/ui/show.py", False),
        ("bench/report.py", False),
        ("tracing/bound.py", True),
    ],
)
def test_the_code_that_is_timed_counts(tree, name, changes):
    """A better table needs no new run; a better model does."""
    before = code_hash()
    assert code_hash() == before
    (tree / name).write_text("x = 2\n")
    assert (code_hash() != before) is changes


def test_what_measures_is_there():
    """The files exist under their present names."""
    assert all((provenance.ROOT / name).is_file() for name in provenance.MEASURING)


def test_a_moved_source_counts(tree):
    """Names are part of the hash."""
    before = code_hash()
    (tree / "core.py").rename(tree / "heart.py")
    assert code_hash() != before


def test_a_folder_is_its_files(tmp_path):
    """Names and contents count, not path or time."""
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_bytes(b"123")
    assert folder_hash(tmp_path / "a") == folder_hash(tmp_path / "b")
    (tmp_path / "b" / "weights").write_bytes(b"124")
    assert folder_hash(tmp_path / "a") != folder_hash(tmp_path / "b")


def test_the_revision_says_where_files_differ_from_it(tree):
    """It is empty without git."""
    assert revision() == ""
    root = tree.parent

    def git(*words: str) -> None:
        names = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(root), *names, *words]
        subprocess.run(command, check=True, capture_output=True, timeout=30)

    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    clean = revision()
    assert len(clean) == 12
    (tree / "core.py").write_text("x = 2\n")
    assert revision() == clean + "+"


def test_versions_are_of_what_computes():
    """Each of them is a version."""
    found = versions()
    assert set(found) == {"flowspec", "python", "torch", "transformers", "numpy"}
    assert all(text[0].isdigit() for text in found.values())
