"""Problems on the way into a cluster are reported once, in a sentence, with one exit code."""

import logging
import socket
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from flowspec.cli.join import _show
from flowspec.cli.main import main
from flowspec.cli.serve import _shard_server
from flowspec.cli.ui.watch import Watch
from flowspec.cluster.device import agent as joiner_module
from flowspec.cluster.device.agent import DeviceAgent, JoinConfig
from flowspec.cluster.device.stage_thread import StageJob, listen
from flowspec.config import DeviceConfig
from flowspec.protocol.control import Assign, ModelCard, Serve, Trouble, Welcome
from flowspec.transport.control_sockets import ControlServer
from flowspec.transport.secure.token import derive_keys, new_token
from flowspec.weights.checkpoint import open_checkpoint
from flowspec.weights.split import run_split
from flowspec.weights.split_plan import plan_split
from tests.support.checkpoints import save_checkpoint

KEYS = derive_keys(new_token())
ASSIGN = Assign(
    epoch=1,
    rank=1,
    num_stages=1,
    first_layer=0,
    last_layer=1,
    model=ModelCard(model_id="m", model_hash="a" * 64),
    manifest_sha256="",
    shards="",
)
WELCOME = Welcome(name="a", version="1", heartbeat_s=0.5, dead_after_s=2.5, clock=0.0)


@pytest.fixture
def head() -> Iterator[ControlServer]:
    """Run a head that accepts peers with its token."""
    server = ControlServer("127.0.0.1", 0, KEYS)
    yield server
    server.close()


@pytest.fixture
def taken() -> Iterator[int]:
    """Return a port that is in use."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def exit_code(words: list[str], monkeypatch: Any) -> int:
    """Return the exit code of `flowspec WORDS`."""
    monkeypatch.setattr("signal.signal", lambda *_: None)  # the handlers outlive the command
    monkeypatch.setattr(sys, "argv", ["flowspec", *words])
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize(
    "words",
    ["join HEAD", "status HEAD", "chat HEAD", "generate --head HEAD hi", "plan --head HEAD"],
)
def test_another_token_is_the_user_s_to_mend_whatever_the_command(words, head, monkeypatch, capsys):
    """The exit code is 2, as for all problems that retries cannot solve; scripts rely on it."""
    monkeypatch.setenv("FLOWSPEC_TOKEN", new_token())
    words = words.replace("HEAD", f"127.0.0.1:{head.port}")
    assert exit_code(words.split(), monkeypatch) == 2
    error = capsys.readouterr().err
    assert "the token is not this cluster's" in error
    assert error.count("token is not this") == 1


@pytest.mark.parametrize("words", ["status HEAD", "generate --head HEAD hi"])
def test_a_head_that_is_not_there_is_a_failure_of_the_cluster(words, taken, monkeypatch, capsys):
    """The exit code is 3: the head may come back."""
    monkeypatch.setenv("FLOWSPEC_TOKEN", new_token())
    monkeypatch.setattr("flowspec.engine.remote.HANDSHAKE_TIMEOUT_S", 0.5)
    assert exit_code(words.replace("HEAD", f"127.0.0.1:{taken}").split(), monkeypatch) == 3
    assert "handshake did not end in time" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model", "names"),
    [("nowhere", "nowhere is no folder"), ("empty", "empty has none of model.safetensors")],
)
def test_a_copy_of_the_model_that_is_none_is_refused_at_once(
    model, names, tmp_path, monkeypatch, capsys
):
    """A device that joined with it would hold no layers."""
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLOWSPEC_TOKEN", new_token())
    assert exit_code(["join", "127.0.0.1:1", "--model", model], monkeypatch) == 2
    assert names in capsys.readouterr().err


class _Watch:
    """Keeps the log lines."""

    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def say(self, text: str, *, level: str = "info") -> None:
        """Keep a log line."""
        self.said.append((level, text))


def test_a_port_for_layers_that_is_taken_is_told_with_the_one_used_instead(taken, tmp_path):
    """A firewall may be open only for the first one."""
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "own") / "target")
    run_split(plan_split(checkpoint, layers=(2, 2)), tmp_path / "split", model_id="m")
    watch = _Watch()
    server = _shard_server(tmp_path / "split", "127.0.0.1", taken, KEYS, watch)  # type: ignore[arg-type]
    server.close()
    ((level, text),) = watch.said
    assert level == "warning"
    assert f"127.0.0.1:{taken}" in text
    assert f"port {server.address.rpartition(':')[2]} instead" in text


def test_data_ports_that_are_taken_are_told_with_those_used_instead(taken, caplog):
    """The same holds for the head's and a device's own ports."""
    transport = listen(1, "127.0.0.1", taken, {}, KEYS)
    transport.close()
    used = [bound.rpartition(":")[2] for bound in transport.bound.values()]
    assert str(taken) in caplog.text
    assert f"ports {used[0]} and {used[1]} are used instead" in caplog.text


class _Job:
    """A job of epoch 1."""

    assign = SimpleNamespace(epoch=1)

    def serve(self, addresses: object) -> None:
        """Do nothing."""

    def stop(self) -> None:
        """Do nothing."""


class _Trying(DeviceAgent):
    """An agent whose tries end as in `story`."""

    def __init__(self, story: list[str]) -> None:
        super().__init__(
            JoinConfig(host="h", port=1, name="a", version="1", listen_host="0.0.0.0"),
            KEYS,
            source=None,  # type: ignore[arg-type]
            report=lambda: None,  # type: ignore[arg-type, return-value]
        )
        self.story = story

    def _attend(self) -> str:
        reason = self.story.pop(0)
        if reason == "served":
            self._job = _Job()  # type: ignore[assignment]
            self._take_work(Serve(epoch=1, addresses=()))
        self._welcome = WELCOME if reason in ("was in", "served") else None
        if not self.story:
            self.stop("enough")
        return reason

    def _pause(self, seconds: float) -> None:
        """Let no time pass."""


def test_why_it_tries_again_is_told_once(monkeypatch, caplog):
    """It is not reported at every try, or it would fill the log of a night."""
    _Trying(["no head"] * 50 + ["other"] + ["no head"] * 50).run()
    told = [record.message.partition(";")[0] for record in caplog.records]
    assert told == ["no head", "other", "no head"]
    caplog.clear()
    _Trying(["was in", "was in", "was in", "served", "was in", "end"]).run()
    assert [r.message.partition(";")[0] for r in caplog.records] == ["was in", "served", "was in"]
    caplog.clear()
    _Trying(["served", "served", "end"]).run()
    assert len(caplog.records) == 2
    caplog.clear()
    monkeypatch.setattr(joiner_module, "TELL_EVERY_S", 0.0)
    _Trying(["no head"] * 4).run()
    assert len(caplog.records) == 3


def test_what_a_stage_lacks_is_told_once_and_without_a_traceback(monkeypatch, caplog):
    """The device tries again with the same copy, and lacks the same file."""
    monkeypatch.setattr(logging.getLogger(), "handlers", [caplog.handler])
    watch = Watch(log_json=False, device="a")
    logging.getLogger().handlers[:] = [caplog.handler]
    for cause in ("not on this device", "not on this device", "other", "not on this device"):
        _show(watch, Trouble(epoch=1, cause=cause))
    assert [record.message for record in caplog.records] == ["not on this device", "other"]
    caplog.clear()
    told: list[Any] = []
    for error in (ValueError("not on this device"), KeyError("a bug")):
        source = SimpleNamespace(load=lambda assign, report, error=error: _fail(error))
        job = StageJob(ASSIGN, source, None, told.append, DeviceConfig())  # type: ignore[arg-type]
        job.stop()
    assert [one.cause for one in told] == ["not on this device", "KeyError: 'a bug'"]
    assert [record.exc_info is not None for record in caplog.records] == [True]


def _fail(error: Exception) -> None:
    raise error
