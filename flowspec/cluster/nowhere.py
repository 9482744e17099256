"""The head's network between epochs."""

from collections.abc import Sequence

from flowspec.wire import WireMessage


class Nowhere:
    """Between epochs: nothing can be sent, nothing comes."""

    def send(self, to: int, message: object) -> None:
        """What was meant for stages that are gone."""

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """Nothing."""
        del timeout_s
        return ()

    def wake(self) -> None:
        """Nobody waits."""

    def close(self) -> None:
        """Nothing to close."""
