"""What `flowspec run` prints of answers, also when the run breaks off."""

import contextlib
import logging
import os
import pty
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import pytest

from flowspec.cli.ui.show import show_answers
from flowspec.engine.engine import EngineStatus
from flowspec.engine.stream import Event, Stream
from flowspec.request import ClusterError, Failure, FinishReason, Request, RequestOutput, TokensOut
from tests.support.tiny import request

Step: TypeAlias = Event | Callable[[], object]
log = logging.getLogger("flowspec.engine.local")


class ScriptedStream(Stream):
    """A stream that takes one step of its script each time that it is read."""

    def __init__(self, number: int, steps: Sequence[Step], abort: Callable[[int], None]) -> None:
        super().__init__(number, abort=abort, ask_counts=lambda number: self.put_counts({}))
        self.steps = list(steps)

    def listen(self, listener: Callable[[], None]) -> None:
        """Say at once that there is something to read."""
        super().listen(listener)
        listener()

    def poll(self) -> Event | None:
        """Take a step, and return what there is to read."""
        if self.steps:
            step = self.steps.pop(0)
            if callable(step):
                step()
                return self.poll()
            self.put(step)
        return super().poll()


class ScriptedEngine:
    """An engine whose streams follow scripts, by request."""

    def __init__(self, scripts: Mapping[int, Sequence[Step]], *, refused: int = 0) -> None:
        """`refused` is the request at whose submission the engine fails."""
        self.scripts, self.refused = scripts, refused
        self.aborted: list[int] = []

    def submit(self, asked: Request) -> Stream:
        """Return the stream with the request's script."""
        if asked.id == self.refused:
            raise ClusterError("stage 2", "gone")
        return ScriptedStream(asked.id, self.scripts[asked.id], self.aborted.append)

    def status(self) -> EngineStatus:
        """Return a status without figures."""
        return EngineStatus()

    def fail(self) -> None:
        """Raise the error of a lost stage."""
        raise ClusterError("stage 2", "gone")

    def drain(self, timeout_s: float) -> bool:
        """Nothing runs."""
        del timeout_s
        return True

    def forget(self) -> None:
        """Nothing was learnt."""

    def close(self) -> None:
        """Nothing was started."""


def said(number: int, text: str) -> TokensOut:
    """One token."""
    return TokensOut(request=number, tokens=(number,), text=text)


def over(number: int, text: str = "", *, error: str = "", rank: int | None = None) -> RequestOutput:
    """The end of an answer; without a text it has no tokens."""
    return RequestOutput(
        request=number,
        tokens=(1, 2) if text else (),
        text=text,
        reason=FinishReason.ERROR if error else FinishReason.STOP,
        error=Failure(cause=error, rank=rank) if error else None,
    )


def three() -> ScriptedEngine:
    """An engine that answers the first, fails in the second, and refuses the third."""
    return ScriptedEngine(
        {
            1: [said(1, "whole "), over(1, "whole answer")],
            2: [said(2, "half an ans"), over(2, "half an ans", error="gone", rank=2)],
            3: [over(3, error="too long")],
        }
    )


def test_answers_are_printed_as_far_as_they_came(capsys: pytest.CaptureFixture[str]) -> None:
    """An answer that a failure ends is marked; a refused request prints nothing."""
    outputs, elapsed_s = show_answers(three(), [request(1), request(2), request(3)])
    assert capsys.readouterr().out == "[1] whole answer\n\n[2] half an ans ... (cut off)\n\n"
    assert [output.text for output in outputs] == ["whole answer", "half an ans", ""]
    assert elapsed_s > 0


def test_an_error_within_the_run_takes_back_what_is_open(capsys) -> None:
    """Open answers are printed as far as they came, and their requests are aborted."""
    engine = ScriptedEngine({1: [said(1, "a wh")]})
    engine.scripts = {**engine.scripts, 2: [said(2, "half"), engine.fail, said(2, " more")]}
    with pytest.raises(ClusterError, match="stage 2: gone"):
        show_answers(engine, [request(1), request(2)])
    assert capsys.readouterr().out == "[1] a wh ... (cut off)\n\n[2] half ... (cut off)\n\n"
    assert engine.aborted == [1, 2]


def test_an_engine_that_takes_no_more_ends_the_run(capsys) -> None:
    """The requests that it has taken are aborted."""
    engine = ScriptedEngine({1: [said(1, "x")], 2: []}, refused=2)
    with pytest.raises(ClusterError, match="stage 2: gone"):
        show_answers(engine, [request(1), request(2)])
    assert engine.aborted == [1]
    assert not logging.getLogger("flowspec").handlers


def test_notes_never_stand_in_the_middle_of_an_answer_s_line(monkeypatch, capfd) -> None:
    """Stdout and stderr may be one log, so the live line, which is no news, is not printed."""
    monkeypatch.setattr("flowspec.cli.ui.show.PLAIN_INTERVAL_S", 0.0)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as `run` has none
    steps = [
        lambda: log.warning("stage 1 was slow to start"),
        said(1, "first line\nsecond "),
        lambda: log.warning("stage 2 is lost; restarting it"),
        said(1, "line"),
        over(1, "first line\nsecond line"),
    ]
    show_answers(ScriptedEngine({1: steps}), [request(1)])
    printed = capfd.readouterr()
    assert printed.out == "first line\nsecond line\n"
    assert printed.err == "stage 1 was slow to start\n\nstage 2 is lost; restarting it\n"
    assert not logging.getLogger("flowspec").handlers


def test_a_single_answer_that_fails_ends_with_its_line(capsys) -> None:
    """The error that follows begins a line of its own."""
    steps = [said(1, "half an ans"), over(1, "half an ans", error="gone", rank=2)]
    (output,), _ = show_answers(ScriptedEngine({1: steps}), [request(1)])
    assert capsys.readouterr().out == "half an ans\n"
    assert str(output.error) == "stage 2: gone"


def test_of_several_answers_there_is_a_live_line_between_them(monkeypatch, capsys) -> None:
    """Nothing else would show that they come."""
    monkeypatch.setattr("flowspec.cli.ui.show.PLAIN_INTERVAL_S", 0.0)
    show_answers(three(), [request(1), request(2), request(3)])
    assert "tokens/s" in capsys.readouterr().err


def test_ctrl_c_at_a_terminal_leaves_one_answer_and_one_error() -> None:
    """The error is told when the live region is closed, not written across it."""
    code = f"""if True:
        import sys, threading, time
        sys.path[:0] = [{str(Path(__file__).resolve().parents[2])!r}]
        from tests.cli.test_show import ScriptedEngine, said
        from tests.support.tiny import request
        from flowspec.system import signals
        from flowspec.cli import main as module
        from flowspec.cli.ui import show
        def bell():
            time.sleep(0.5)
            print(end="\\a", flush=True, file=sys.__stdout__)
        def run():
            engine = ScriptedEngine({{1: [said(1, "the answer")]}})
            threading.Thread(target=bell, daemon=True).start()
            with signals.undoing():
                show.show_answers(engine, [request(1)])
        module.app = run
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
