"""SequenceNumbers: the messages from one rank to another are numbered to detect losses.

A connection keeps the order of its messages, but one that breaks and comes back has lost those that
were on their way. A gap means a hole in a prompt or a missing verdict, so it ends the epoch. A
message that comes twice is dropped.
"""

from dataclasses import dataclass, field, replace

from flowspec.protocol.messages import DATA, Failed, Message, OfEpoch
from flowspec.request import rank_name


@dataclass(slots=True)
class SequenceNumbers:
    """Numbers the messages that one rank sends and checks those that it receives.

    Data and control messages, the two kinds, are numbered apart.
    """

    rank: int
    _sent: dict[tuple[int, bool], int] = field(default_factory=dict)  # by receiver and kind
    _sent_epoch: int = 0
    _received: dict[tuple[int, bool], int] = field(default_factory=dict)  # by sender and kind
    _epoch: int = 0
    _broken: set[tuple[int, bool]] = field(default_factory=set)

    def number(self, to: int, message: Message) -> Message:
        """Return the message with its number for rank `to`; numbers begin at 1 in each epoch."""
        if not isinstance(message, OfEpoch):
            return message
        if message.epoch > self._sent_epoch:
            self._sent.clear()
            self._sent_epoch = message.epoch
        channel = to, isinstance(message, DATA)
        self._sent[channel] = self._sent.get(channel, 0) + 1
        return replace(message, source=self.rank, number=self._sent[channel])

    def take(self, message: Message) -> Message | None:
        """Return the message, None if it is to be dropped, or a Failed for the head after a gap.

        A message is dropped if it came before or if an earlier one was lost.
        """
        if not isinstance(message, OfEpoch) or not message.number or message.epoch < self._epoch:
            return message  # not numbered, or for the core to drop
        if message.epoch > self._epoch:
            self._received.clear()
            self._broken.clear()
            self._epoch = message.epoch
        channel = message.source, isinstance(message, DATA)
        expected = self._received.get(channel, 0) + 1
        if channel in self._broken or message.number < expected:
            return None
        if message.number == expected:
            self._received[channel] = expected
            return message
        self._broken.add(channel)
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
