"""Answers: the client's side of a head: events in, tokens and completions out, per request."""

from collections.abc import Mapping, Sequence

from flowspec.head.head import Head
from flowspec.protocol.messages import Finished, Message, Tokens
from flowspec.request import Completion, Request


class Answers:
    """Follows `requests` to their ends; events of others are late words about what is over.

    Raises ValueError where two of them have one id.
    """

    def __init__(self, head: Head, requests: Sequence[Request]) -> None:
        self.head = head
        self.open = {request.id: request for request in requests}
        if len(self.open) < len(requests):
            raise ValueError("two requests have the same id; give each its own, above the last")
        self._tokens: dict[int, list[int]] = {number: [] for number in self.open}
        self._texts: dict[int, str] = dict.fromkeys(self.open, "")

    @property
    def tokens(self) -> Mapping[int, tuple[int, ...]]:
        """What has been generated so far, by request."""
        return {number: tuple(tokens) for number, tokens in self._tokens.items()}

    def take(self, event: Message) -> Tokens | Completion | None:
        """What the event is to whoever waits for these requests."""
        if isinstance(event, Tokens) and event.request in self.open:
            self._tokens[event.request].extend(event.tokens)
            self._texts[event.request] += event.text
            return event
        if isinstance(event, Finished) and event.request in self.open:
            request = self.open.pop(event.request)
            tokens, text = self._tokens[event.request], self._texts[event.request]
            return self.head.completion(request, event, tokens, text)
        return None
