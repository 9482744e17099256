"""What fails in the head's process while a client's request is built, told or measured."""

from collections.abc import Callable
from typing import Any

import flowspec.cluster.controller.epochs as engine_module
import pytest
from flowspec.cluster.controller.epochs import Ended
from flowspec.cluster.controller.requests import CHARACTERS_PER_TOKEN, MIN_CHARACTERS
from flowspec.cluster.controller.stage_statistics import StageWatch
from flowspec.engine.client import HeadClient

from flowspec.engine.build import HeadParts
from flowspec.protocol import messages as wire
from flowspec.protocol.control import (
    MAX_ASK_BYTES,
    MAX_MESSAGE_BYTES,
    Ask,
    ControlError,
    Done,
    Piece,
    Turn,
    pack,
    unpack,
)
from flowspec.request import FinishReason
from flowspec.transport.control_sockets import MAX_PIECES
from flowspec.transport.secure.curve import MAX_PIECE_BYTES
from tests.support.asked import Asking, decoding, tiny_parts

Patch = pytest.MonkeyPatch


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> HeadParts:
    """The head's share of a tiny model."""
    return tiny_parts(tmp_path_factory.mktemp("asked"))


class Broken(Exception):
    """What nobody expects."""


def breaks(*args: Any, **fields: Any) -> Any:
    """For whatever is called."""
    del args, fields
    raise Broken("it broke")


def ends(head: Asking) -> dict[int, Done]:
    """What each ticket was told at its end."""
    return {event.ticket: event.done for event in head.told if isinstance(event, Ended)}


BUILDING = {
    "chat template": lambda parts, patch: (
        patch.setattr(parts.tokenizer, "chat_template", "{{ messages }}"),
        patch.setattr(parts.tokenizer, "apply_chat_template", breaks),
    ),
    "tokenizer": lambda parts, patch: patch.setattr(type(parts.tokenizer), "encode", breaks),
    "limits": lambda parts, patch: patch.setattr(engine_module, "check_measurable", breaks),
    "memory": lambda parts, patch: patch.setattr(engine_module, "check_fits", breaks),
    "measuring": lambda parts, patch: patch.setattr(engine_module, "StageWatch", breaks),
}


@pytest.mark.parametrize("point", BUILDING)
def test_a_request_that_cannot_be_built_ends_alone(
    point: str, parts: HeadParts, monkeypatch: Patch
) -> None:
    """Of whatever kind the exception is; the next client is served."""
    head = Asking(parts)
    with monkeypatch.context() as patch:
        BUILDING[point](parts, patch)
        done = head.ask(decoding())
    assert done is not None
    assert done.reason == "error"
    assert "it broke" in done.error
    assert done.refused == (point in ("chat template", "tokenizer"))
    assert head.ask(None) is None
    assert head.engine.num_open == 1


def answer(head: Asking) -> None:
    """The core gives the newest request a token and its end."""
    (number,) = (n for n, entry in head.engine._open.items() if entry.ticket == head.tickets)
    said = head.engine._driver.to_client
    said.append(wire.TokensOut(request=number, tokens=(5,), text="a"))
    head.engine.head.scheduler.withdraw(number)
    said.append(wire.Finished(request=number, reason=FinishReason.LENGTH))
    with head.engine._noticing_losses():
        pass


TELLING: dict[str, Callable[[Patch], object]] = {
    "tokens": lambda patch: patch.setattr(engine_module, "MoreText", breaks),
    "end": lambda patch: patch.setattr(engine_module, "done_of", breaks),
    "watch": lambda patch: patch.setattr(StageWatch, "first_token", breaks),
    "look": lambda patch: patch.setattr(StageWatch, "look", breaks),
    "figures": lambda patch: patch.setattr(StageWatch, "figures", breaks),
}


@pytest.mark.parametrize("point", TELLING)
def test_an_answer_that_cannot_be_told_ends_alone(
    point: str, parts: HeadParts, monkeypatch: Patch
) -> None:
    """The core served it well; what failed is on the way to its client."""
    head = Asking(parts)
    measured = point in ("watch", "look", "figures")
    with monkeypatch.context() as patch:
        TELLING[point](patch)
        if point == "figures":
            patch.setattr(engine_module.Measured, "done", breaks)
        at_once = head.ask(decoding() if measured else None)
        assert (at_once is not None) == (point == "look")
        if at_once is None:
            answer(head)
    done = ends(head)[1]
    assert (done.reason, done.error) == ("error", "head: Broken: it broke")
    assert not head.engine.num_open
    assert head.ask(None) is None
    answer(head)
    assert ends(head)[2].error == ""


def test_a_probe_that_fails_is_not_sent_again_at_once(parts: HeadParts) -> None:
    """A model that computes nothing would keep the head busy with probes."""
    head = Asking(parts)
    head.engine._submit_probe()
    first = head.engine._probe
    head.engine._driver.to_client.append(
        wire.Finished(request=first, reason=FinishReason.ERROR, error="stage 1: ValueError")
    )
    with head.engine._noticing_losses():
        pass
    head.engine._submit_probe()
    assert first is not None
    assert head.engine._probe is None


# Long conversations -----------------------------------------------------------------------------


def new_ask(text: str, **fields: Any) -> Ask:
    """As a client makes it, without a connection."""
    client = HeadClient.__new__(HeadClient)
    client._ids = iter(range(1, 9))  # type: ignore[assignment]
    return client.new_ask(turns=[{"role": "user", "content": text}], **fields)


def test_a_prompt_may_be_as_long_as_a_long_context(parts: HeadParts) -> None:
    """Far beyond 262,144 characters; a head refuses what its context cannot hold by its tokens."""
    ask = new_ask("a fox " * 70_000)
    assert unpack(pack(ask)) == ask
    done = Asking(parts).ask(None, turns=(Turn(role="user", content="a fox " * 70_000),))
    assert done is not None
    assert f"the context holds {parts.max_context}" in done.error
    assert done.refused


def test_text_beyond_any_context_is_not_made_into_tokens(
    parts: HeadParts, monkeypatch: Patch
) -> None:
    """The head's other requests would wait for the tokenizer."""
    monkeypatch.setattr("flowspec.engine.build.render_chat", breaks)
    most = max(MIN_CHARACTERS, CHARACTERS_PER_TOKEN * parts.max_context)
    done = Asking(parts).ask(None, turns=(Turn(role="user", content="x" * (most + 1)),))
    assert done is not None
    assert f"the conversation has {most + 1:,} characters, at most {most:,} are taken" in done.error
    assert done.refused


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"text": "x" * (MAX_ASK_BYTES + 1)}, "16,777,217 bytes, at most 16,777,216 can be sent"),
        ({"text": "\N{SNOWMAN}" * (MAX_ASK_BYTES // 2)}, "can be sent to the head; shorten it"),
        ({"text": "a", "stop": ["x"] * 17}, "17 stop strings are given, at most 16 can be"),
        ({"text": "cut \ud83d here"}, "half of a surrogate pair"),
        ({"text": "a", "max_new_tokens": 0}, "max_new_tokens cannot be 0"),
    ],
)
def test_what_cannot_be_sent_is_said_in_a_sentence(fields: dict[str, Any], said: str) -> None:
    """A ValueError, before anything goes over the line."""
    with pytest.raises(ValueError, match=said) as caught:
        new_ask(**fields)
    assert "should have" not in str(caught.value)


def test_only_a_question_may_be_long() -> None:
    """Every other message keeps its limit, whatever it calls itself further on."""
    piece = pack(Piece(id=1, tokens=(), text="x"))
    with pytest.raises(ControlError, match="at most 1048576"):
        unpack(piece + b" " * MAX_MESSAGE_BYTES)
    with pytest.raises(ControlError, match="at most 1048576"):
        unpack(b'{"id":1,' + b" " * MAX_MESSAGE_BYTES + b'"kind":"ask"}')
    with pytest.raises(ControlError, match="at most 16777216"):
        unpack(pack(new_ask("x")) + b" " * MAX_ASK_BYTES)
    assert MAX_PIECES * MAX_PIECE_BYTES == MAX_ASK_BYTES
