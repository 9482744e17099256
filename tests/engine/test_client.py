"""A client of a head: what it makes of silence."""

import time
from collections.abc import Sequence
from itertools import count

import pytest
from flowspec.engine.client import FORGOTTEN_AFTER, HeadClient

import flowspec
from flowspec.engine import client as client_module
from flowspec.protocol.control import (
    Ask,
    AskStatus,
    ClusterStatus,
    Done,
    Drop,
    ModelCard,
    ModelSizes,
    pack,
    unpack,
)
from flowspec.request import ClusterError


def status(*, active: int = 0, waiting: int = 0) -> ClusterStatus:
    """Of a healthy cluster with so many requests."""
    sizes = dict.fromkeys(ModelSizes.model_fields, 1)
    return ClusterStatus(
        version=flowspec.__version__,
        healthy=True,
        why="",
        epoch=1,
        model=ModelCard(model_id="m", model_hash="h"),
        sizes=ModelSizes(**sizes),
        strategy="ar",
        drafter="none",
        uptime_s=1.0,
        probe_age_s=None,
        requests_active=active,
        requests_waiting=waiting,
        requests_done=0,
        requests_failed=0,
        devices=(),
    )


class Control:
    """A connection to a head that says `words`, one each time it is asked for its status."""

    is_connected = True

    def __init__(self, words: Sequence[ClusterStatus | Done]) -> None:
        self.words = list(words)
        self.ready: list[bytes] = []
        self.sent: list[type] = []

    def send(self, frame: bytes) -> None:
        """A question."""
        message = unpack(frame)
        self.sent.append(type(message))
        if isinstance(message, AskStatus):
            self.ready.append(pack(self.words.pop(0)))

    def receive(self, timeout_s: float) -> list[bytes]:
        """What has come."""
        del timeout_s
        time.sleep(0.002)
        ready, self.ready = self.ready, []
        return ready


def ask(monkeypatch: pytest.MonkeyPatch, *words: ClusterStatus | Done) -> tuple[list, Control]:
    """What a client is told of its one question."""
    monkeypatch.setattr(client_module, "SILENCE_S", 0.01)
    client = HeadClient.__new__(HeadClient)
    client.where, client._ids = "head at here:1", count(1)
    client.control = control = Control(words)  # type: ignore[assignment]
    one = client.new_ask(turns=[{"role": "user", "content": "hi"}])
    return list(client.ask(one)), control


def test_a_request_that_the_head_has_forgotten_is_not_waited_for(monkeypatch):
    """It says again and again that nobody is served."""
    with pytest.raises(ClusterError, match="serves nobody now"):
        ask(monkeypatch, *[status()] * FORGOTTEN_AFTER)


@pytest.mark.parametrize("busy", [{"active": 1}, {"waiting": 1}])
def test_a_request_that_is_served_or_waits_may_take_long(monkeypatch, busy):
    """However often the head is asked."""
    words = [status(), status(), *[status(**busy)] * 9, status(), status()]
    done = Done(id=1, reason="stop")
    found, control = ask(monkeypatch, *words, done)
    assert found == [done]
    assert control.sent[0] is Ask
    assert Drop not in control.sent
