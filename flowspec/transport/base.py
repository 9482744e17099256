"""The network interface of an event loop: send a message to a rank, receive what has come."""

from collections.abc import Sequence
from typing import Protocol

from flowspec.protocol.messages import WireMessage
from flowspec.request import ClusterError

LOST = "connection lost"


class LostPeer(ClusterError):
    """A connection broke, or the peer closed it; the cause begins with LOST."""


class Transport(Protocol):
    """A network; control messages overtake data, and data between two ranks keeps its order."""

    def send(self, to: int, message: WireMessage) -> None:
        """Send a message. Raises ClusterError when the peer accepts nothing for too long."""

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """Return the messages that have come, control first; wait at most `timeout_s` for one.

        Raises WireError on frames that are not a message, and LostPeer when the transport notices
        that a rank is gone: a stage for the head, the head for a stage.
        """

    def wake(self) -> None:
        """End the current or the next wait of `receive`; any thread may call this."""

    def close(self) -> None:
        """Close the sockets; messages that were sent are still delivered within a second."""
