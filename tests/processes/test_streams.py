"""Closed and broken streams, unusable folders, and too few files give one sentence each."""

import errno
import io
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from flowspec.cli.main import main
from flowspec.cli.serve import _token
from flowspec.cli.ui import streams
from flowspec.cli.ui.faults import describe
from flowspec.config import EngineConfig
from flowspec.system.home import home_folder
from flowspec.transport.secure.token import TOKEN_VARIABLE, new_token
from tests.support.spawned import spawn

pytestmark = pytest.mark.slow

LIMIT_S = 60.0
LOST = "standard output is closed: what this command prints there is lost\n"


def shell(line: str, folder: Path, **options: object) -> "subprocess.CompletedProcess[str]":
    """Run a line of bash in which FLOWSPEC is the command."""
    line = line.replace("FLOWSPEC", f"{sys.executable} -m flowspec")
    return subprocess.run(  # type: ignore[call-overload, no-any-return]
        ["bash", "-c", line],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=LIMIT_S,
        **options,
    )


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("FLOWSPEC --version >&-", 0, LOST),
        ("FLOWSPEC --version <&- >&-", 0, LOST),
        ("FLOWSPEC --version > /dev/full", 3, "error: standard output cannot be written: No space"),
        ("FLOWSPEC status x 2>&-", 2, ""),
        ("FLOWSPEC status x 2> /dev/full", 2, ""),
        ("FLOWSPEC status x <&-", 2, "error: no join token: give --token-file FILE"),
        ("rmdir $PWD; FLOWSPEC run", 2, "error: the working folder does not exist any more"),
    ],
)
def test_a_stream_that_is_none_is_one_sentence(
    line: str, code: int, said: str, tmp_path: Path
) -> None:
    """Nothing is printed if nobody can read it."""
    folder = tmp_path / "folder"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
    done = shell(line, folder, env=environment)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(said)
    assert done.stderr.count("\n") == (1 if said else 0)


def test_who_reads_no_further_ends_the_command_quietly(tmp_path: Path) -> None:
    """The exit code is that of SIGPIPE, as for other programs; 1 would mean a wrong answer."""
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        command = [sys.executable, "-m", "flowspec", "status", "--help"]
        done = subprocess.run(command, stdout=write_end, stderr=subprocess.PIPE, timeout=LIMIT_S)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.parametrize("ending", ["reader gone", "disk full"])
def test_an_answer_that_cannot_be_written_ends_the_run(
    ending: str, checkpoint: Path, whole_split: Path, tmp_path: Path
) -> None:
    """The stage ends too; `flowspec run | head -1` ends quietly instead."""
    log = Path("/dev/full")
    if ending == "reader gone":
        log = tmp_path / "pipe"
        os.mkfifo(log)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    words = ["run", "--model", str(whole_split), "--draft", str(checkpoint / "eagle")]
    run = spawn(words, log, tmp_path, {"TMPDIR": str(temporary)}, daemon=False)
    try:
        if ending == "reader gone":
            with log.open() as reader:
                assert reader.readline().startswith("starting")
        run.join(LIMIT_S)
        assert run.exitcode == (141 if ending == "reader gone" else 3)
    finally:
        run.kill()
    assert not list(temporary.glob("flowspec-*"))


def test_no_character_is_an_error() -> None:
    """A terminal of an old encoding shows a missing character by its number."""
    buffer = io.BytesIO()
    ascii_only = io.TextIOWrapper(buffer, "ascii", "strict")
    read_end, write_end = os.pipe()
    text = streams._text(io.FileIO(write_end, "wb"), ascii_only)
    text.write("an arrow: \u2192\n")
    text.close()
    with os.fdopen(read_end, "rb") as shown:
        assert shown.read() == b"an arrow: \\u2192\n"


def run_main(words: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> object:
    """Return the exit code of `flowspec *words` in this process."""
    monkeypatch.setattr(sys, "argv", ["flowspec", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    return ended.value.code


def test_a_folder_that_cannot_be_made_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The error has the folder, the reason and a fix."""
    monkeypatch.chdir(tmp_path)
    Path("out").write_text("a file is in the way")
    assert run_main(["run", "--stages", "1"], monkeypatch) == 2
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: out/target-8-")
    assert f"in the folder {tmp_path}: Not a directory; move the file that is in the way" in error
    refused = PermissionError(errno.EACCES, "Permission denied", "out/target-8")
    text, code = describe(refused)
    where = f"out/target-8 in the folder {tmp_path}: Permission denied"
    assert (text.partition(";")[0], code) == (where, 2)
    assert "run the command in another folder" in text


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "/a/b"), 2, "choose a path that this"),
        (OSError(errno.EROFS, "Read-only file system", "/a/b"), 2, "choose a path that this"),
        (OSError(errno.ENOSPC, "No space left on device"), 3, "free some of the disk"),
        (OSError(errno.EMFILE, "Too many open files", "/a/b"), 3, "ulimit -n"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "/a/b"), 2, "/a/b: No such"),
        (OSError("a sentence of our own"), 3, "a sentence of our own"),
        (OSError(errno.EIO, "Input/output error", "/a/b"), 3, "/a/b: Input/output error"),
    ],
)
def test_an_error_of_the_system_is_a_sentence(error: OSError, code: int, said: str) -> None:
    """It does not show the error's number, which helps nobody."""
    text, found = describe(error)
    assert said in text
    assert "Errno" not in text
    assert found == code


def test_the_limit_of_open_files_is_raised_as_far_as_it_may_be(tmp_path: Path) -> None:
    """libzmq would abort the process at the first socket beyond the limit."""
    soft = "import resource as r; print(r.getrlimit(r.RLIMIT_NOFILE)[0])"
    code = f"from flowspec.system.open_files import check_open_files as c; c(100); {soft}"
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    raised = shell(f"ulimit -S -n 24; {sys.executable} -c '{code}'", tmp_path)
    assert int(raised.stdout) == (4096 if hard == resource.RLIM_INFINITY else min(4096, hard))
    few = shell(f"ulimit -n 24; {sys.executable} -c '{code}'", tmp_path)
    assert "this process may open 24 files, but needs 100; raise the limit" in few.stderr


@pytest.mark.parametrize(
    ("command", "splits_in"),
    [
        ("status 127.0.0.1:1", ""),
        ("join 127.0.0.1:1", ""),
        ("serve", ""),
        ("run --model MODEL --draft DRAFT", "run"),
        ("verify MODEL --draft DRAFT --driver zmq", "verify"),
        ("bench --real --model MODEL --draft DRAFT --datasets ask.jsonl", "bench_plan"),
    ],
)
def test_too_few_files_are_told_before_anything_starts(
    command: str,
    splits_in: str,
    config: EngineConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The exit code is 3, as for all that the machine lacks; no model is split or loaded."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(TOKEN_VARIABLE, new_token())
    monkeypatch.setattr(resource, "getrlimit", lambda what: (24, 24))
    Path("ask.jsonl").write_text('{"prompt": "a fox"}\n')
    words = command.replace("MODEL", config.model).replace("DRAFT", config.draft).split()
    if splits_in:
        late = f"flowspec.cli.{splits_in}.split_folder"
        monkeypatch.setattr(late, lambda _: pytest.fail("too late"))
    assert run_main(words, monkeypatch) == 3
    *_, error = capsys.readouterr().err.splitlines()
    assert error.startswith("error: this process may open 24 files, but needs ")
    assert "ulimit -n 1024" in error


def test_without_a_home_folder_the_fix_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service's user may have none; a folder without write permission is named too."""

    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv(TOKEN_VARIABLE, raising=False)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file"))
    with pytest.raises(ValueError, match=r"cannot be kept in .*: Not a directory; give --token-"):
        _token(None)
    monkeypatch.setattr(Path, "home", nowhere)
    with pytest.raises(ValueError, match="no home folder: set HOME, or XDG_CACHE_HOME"):
        home_folder(instead="XDG_CACHE_HOME")
    monkeypatch.delenv("XDG_STATE_HOME")
    with pytest.raises(ValueError, match="no home folder: set HOME, or XDG_STATE_HOME"):
        _token(None)
    assert _token(tmp_path / "token")[1] == f"--token-file {tmp_path / 'token'}"
