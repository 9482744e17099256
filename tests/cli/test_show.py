"""What `flowspec run` prints of several answers, also when the run breaks off."""

import contextlib
import logging
import os
import pty
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowspec.cli.ui.show import show_answers
from flowspec.request import (
    ClusterError,
    DecodeStats,
    FinishReason,
    Request,
    RequestOutput,
    TokensOut,
)
from tests.support.tiny import request


class Breaking:
    """Answers the first request, says half of the second, refuses the third, and breaks."""

    head = SimpleNamespace(served_stats=lambda: [])

    def statuses(self) -> dict[int, object]:
        """None have come."""
        return {}

    def serve(self, requests: Sequence[Request]) -> Iterator[TokensOut | RequestOutput]:
        """See Cluster.serve."""
        yield TokensOut(request=1, tokens=(1,), text="whole ")
        yield TokensOut(request=2, tokens=(2,), text="half an ans")
        yield completion(3, (), "", error="too long")
        yield completion(1, (1, 2), "whole answer")
        raise ClusterError("stage 2", "gone")


def completion(number: int, tokens: tuple[int, ...], text: str, error: str = "") -> RequestOutput:
    """One that is over."""
    reason = FinishReason.ERROR if error else FinishReason.STOP
    return RequestOutput(
        request=number, tokens=tokens, text=text, reason=reason, stats=DecodeStats(), error=error
    )


def test_what_there_is_of_open_answers_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The text up to the failure is the user's; a refusal is no answer."""
    with pytest.raises(ClusterError, match="gone"):
        show_answers(Breaking(), [request(1), request(2), request(3)])  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert out == "[1] whole answer\n\n[2] half an ans ... (cut off)\n\n"


class Slow(Breaking):
    """One answer, with a stage that is lost in the middle of its second line."""

    def serve(self, requests: Sequence[Request]) -> Iterator[TokensOut | RequestOutput]:
        """See Cluster.serve."""
        logging.getLogger("flowspec.engine.local").warning("stage 1 was slow to start")
        yield TokensOut(request=1, tokens=(1,), text="first line\nsecond ")
        logging.getLogger("flowspec.engine.local").warning("stage 2 is lost; restarting it")
        yield TokensOut(request=1, tokens=(2,), text="line")
        yield completion(1, (1, 2), "first line\nsecond line")


def test_notes_never_stand_in_the_middle_of_an_answer_s_line(monkeypatch, capfd) -> None:
    """Stdout and stderr may be one log: the live line, which is no news, stays away from it."""
    monkeypatch.setattr("flowspec.cli.ui.show.PLAIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as `run` has none
    show_answers(Slow(), [request(1)])  # type: ignore[arg-type]
    printed = capfd.readouterr()
    assert printed.out == "first line\nsecond line\n"
    assert printed.err == "stage 1 was slow to start\n\nstage 2 is lost; restarting it\n"
    assert not logging.getLogger("flowspec").handlers


def test_of_several_answers_there_is_a_live_line_between_them(monkeypatch, capsys) -> None:
    """Nothing else would show that they come."""
    monkeypatch.setattr("flowspec.cli.ui.show.PLAIN_INTERVAL_S", 0.0)
    with pytest.raises(ClusterError):
        show_answers(Breaking(), [request(1), request(2), request(3)])  # type: ignore[arg-type]
    assert "tokens/s" in capsys.readouterr().err


def test_ctrl_c_at_a_terminal_leaves_one_answer_and_one_error() -> None:
    """The error is told when the live region is closed, not written across it."""
    code = f"""if True:
        import sys, time
        sys.path[:0] = [{str(Path(__file__).resolve().parents[2])!r}]
        from tests.cli.test_show import Breaking
        from tests.support.tiny import request
        from flowspec.system import signals
        from flowspec.cli import main as module
        from flowspec.cli.ui import show
        from flowspec.protocol.messages import 
        class Endless(Breaking):
            def serve(self, requests):
                with signals.undoing():
                    yield TokensOut(request=1, tokens=(1,), text="the answer")
                    time.sleep(0.5)
                    print(end="\\a", flush=True, file=sys.__stdout__)
                    while True:
                        signals.check()
                        time.sleep(0.01)
        module.app = lambda: show.show_answers(Endless(), [request(1)])
        module.main()
    """
    child, terminal = pty.fork()
    if child == 0:
        os.environ["TERM"] = "xterm"
        os.execv(sys.executable, [sys.executable, "-c", code])
    shown = b""
    with contextlib.suppress(OSError):  # the other end is closed
        while data := os.read(terminal, 65536):
            if b"\a" in data:
                os.kill(child, signal.SIGINT)
                shown = b""
                continue
            shown += data
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    os.close(terminal)
    # up one line over what is there, the answer once more in its place, then the error
    before, _, last = shown.rpartition(b"\x1b[2K")  # the region may be drawn again meanwhile
    assert last.count(b"the answer") == 1, shown
    assert before.endswith(b"\x1b[1A")
    assert last.rstrip().endswith(b"error: ended by SIGINT")
    assert b"tokens/s" not in last
