"""A client whose head gives the same answer to every request, for commands that ask one."""

from itertools import count

from flowspec.engine.engine import EngineStatus
from flowspec.engine.remote import ask_of
from flowspec.engine.stream import Notice, Stream
from flowspec.request import (
    Failure,
    FailureKind,
    FinishReason,
    Request,
    RequestOutput,
    TokensOut,
)


class AnsweringClient:
    """A remote engine whose head ends each request with `failure`, or else with `text`.

    Requests are checked as those of a real client are; `asked` keeps them.
    """

    text = ""
    failure: Failure | None = None
    notices: tuple[str, ...] = ()

    def __init__(self, *address: object) -> None:
        del address
        self.asked: list[Request] = []
        self._numbers = count(1)

    def __enter__(self) -> "AnsweringClient":
        return self

    def __exit__(self, *ended: object) -> None:
        """Nothing to close."""

    def submit(self, request: Request) -> Stream:
        """Answer at once."""
        number = next(self._numbers)
        ask_of(request, number)
        self.asked.append(request)
        stream = Stream(number, abort=lambda request: None)
        for text in self.notices:
            stream.put(Notice(text=text))
        tokens = tuple(range(len(self.text.split())))
        if tokens:
            stream.put(TokensOut(request=number, tokens=tokens, text=self.text))
        reason = FinishReason.STOP if self.failure is None else FinishReason.ERROR
        output = RequestOutput(
            request=number, tokens=tokens, text=self.text, reason=reason, error=self.failure
        )
        stream.put(output)
        return stream

    def status(self) -> EngineStatus:
        """Return a healthy status."""
        return EngineStatus()

    def drain(self, timeout_s: float) -> bool:
        """Nothing is open."""
        del timeout_s
        return True

    def forget(self) -> None:
        """Nothing was learnt."""

    def close(self) -> None:
        """Nothing to close."""


def failing(
    cause: str, kind: FailureKind = FailureKind.FAILED, *, rank: int | None = None, device: str = ""
) -> type[AnsweringClient]:
    """Return a client whose head ends each request with this failure."""
    failure = Failure(cause=cause, kind=kind, rank=rank, device=device)
    return type("Failing", (AnsweringClient,), {"failure": failure})
