"""Lanes: what one rank sends another is numbered, so that nothing is lost or doubled unnoticed.

A connection keeps the order of what it carries, but one that breaks and comes back has lost what
was on its way. A gap would be a hole in a prompt, or a verdict that never comes: it ends the epoch.
"""

from dataclasses import dataclass, field, replace

from flowspec.protocol.messages import DATA, Failed, Message, OfEpoch
from flowspec.request import rank_name


@dataclass(slots=True)
class Lanes:
    """One rank's side: numbers what it sends, checks what it receives. Data and control apart."""

    rank: int
    _sent: dict[tuple[int, bool], int] = field(default_factory=dict)  # by receiver and lane
    _sent_epoch: int = 0
    _received: dict[tuple[int, bool], int] = field(default_factory=dict)  # by sender and lane
    _epoch: int = 0
    _broken: set[tuple[int, bool]] = field(default_factory=set)

    def number(self, to: int, message: Message) -> Message:
        """The message as it goes to rank `to`; numbers begin at 1 in each epoch."""
        if not isinstance(message, OfEpoch):
            return message
        if message.epoch > self._sent_epoch:
            self._sent.clear()
            self._sent_epoch = message.epoch
        lane = to, isinstance(message, DATA)
        self._sent[lane] = self._sent.get(lane, 0) + 1
        return replace(message, source=self.rank, number=self._sent[lane])

    def take(self, message: Message) -> Message | None:
        """What has come; None: it came before, or after a gap. Failed, to the head: a gap."""
        if not isinstance(message, OfEpoch) or not message.number or message.epoch < self._epoch:
            return message  # not numbered, or for the core to drop
        if message.epoch > self._epoch:
            self._received.clear()
            self._broken.clear()
            self._epoch = message.epoch
        lane = message.source, isinstance(message, DATA)
        expected = self._received.get(lane, 0) + 1
        if lane in self._broken or message.number < expected:
            return None
        if message.number == expected:
            self._received[lane] = expected
            return message
        self._broken.add(lane)
        return Failed(
            epoch=message.epoch,
            stage=message.source or self.rank,
            request=0,
            text=(
                f"the connection from {rank_name(message.source)} to {rank_name(self.rank)} has "
                f"lost {message.number - expected} message(s)"
            ),
            num_lost=message.number - expected,
        )
