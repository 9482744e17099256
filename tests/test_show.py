"""What `flowspec run` prints of several answers, also when the run breaks off."""

from collections.abc import Iterator, Sequence
from types import SimpleNamespace

import pytest
from tiny import request

from flowspec.cli.show import show_answers
from flowspec.request import ClusterError, Completion, DecodeStats, FinishReason, Request
from flowspec.wire import Tokens


class Breaking:
    """Answers the first request, says half of the second, refuses the third, and breaks."""

    head = SimpleNamespace(served_stats=lambda: [])

    def statuses(self) -> dict[int, object]:
        """None have come."""
        return {}

    def serve(self, requests: Sequence[Request]) -> Iterator[Tokens | Completion]:
        """See Cluster.serve."""
        yield Tokens(request=1, tokens=(1,), text="whole ")
        yield Tokens(request=2, tokens=(2,), text="half an ans")
        yield completion(3, (), "", error="too long")
        yield completion(1, (1, 2), "whole answer")
        raise ClusterError("stage 2", "gone")


def completion(number: int, tokens: tuple[int, ...], text: str, error: str = "") -> Completion:
    """One that is over."""
    reason = FinishReason.ERROR if error else FinishReason.STOP
    return Completion(
        request=number, tokens=tokens, text=text, reason=reason, stats=DecodeStats(), error=error
    )


def test_what_there_is_of_open_answers_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """The text up to the failure is the user's; a refusal is no answer."""
    with pytest.raises(ClusterError, match="gone"):
        show_answers(Breaking(), [request(1), request(2), request(3)])  # type: ignore[arg-type]
    out = capsys.readouterr().out
    assert out == "[1] whole answer\n\n[2] half an ans ... (cut off)\n\n"
