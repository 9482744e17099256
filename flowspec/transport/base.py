"""What a driver needs of a network: send a message to a rank, receive what has come."""

from collections.abc import Sequence
from typing import Protocol

from flowspec.protocol.messages import WireMessage
from flowspec.request import ClusterError

LOST = "connection lost"


class LostPeer(ClusterError):
    """A connection broke or was closed by the peer; the cause begins with LOST."""


class Transport(Protocol):
    """Control messages overtake data; data between two ranks keeps its order."""

    def send(self, to: int, message: WireMessage) -> None:
        """Hand over a message; raises ClusterError where the peer takes nothing for too long."""

    def receive(self, timeout_s: float) -> Sequence[WireMessage]:
        """What has come, control first; waits at most `timeout_s` for the first message.

        Raises WireError on frames that are no message, and LostPeer where the transport notices
        that a rank is gone: a stage for the head, the head for a stage.
        """

    def wake(self) -> None:
        """From any thread: end the wait of `receive`, or of the next one."""

    def close(self) -> None:
        """Give up sockets; what was handed over is still delivered within a second."""
