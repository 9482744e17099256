"""Under crashes, cuts and lost, doubled or overtaken messages, every answer stays right."""

import pytest

from flowspec.protocol.messages import Failed, FreeRequest, Message, Ping, Reroot  # noqa: E402
from flowspec.protocol.sequencing import SequenceNumbers  # noqa: E402
from tests.stress.fault_campaign import PLANS, run_seed

pytestmark = pytest.mark.slow

FIRST = 700  # of every plan two runs


@pytest.mark.parametrize("seed", range(FIRST, FIRST + 2 * len(PLANS)))
def test_whatever_fails_every_answer_is_the_targets_own(seed: int) -> None:
    """Devices return, in the same number or another; connections lose messages in flight."""
    outcome = run_seed(seed)
    assert not outcome.wrong, f"seed {seed} ({outcome.plan}): {outcome.wrong}"


def test_the_campaign_notices_what_goes_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without sequence numbers, doubled messages must show, or the runs above prove nothing."""
    monkeypatch.setattr(SequenceNumbers, "take", lambda self, message: message)
    doubling = list(PLANS).index("duplicate")
    seeds = range(FIRST + doubling, FIRST + doubling + 4 * len(PLANS), len(PLANS))
    assert any(run_seed(seed).wrong for seed in seeds)


def test_a_lane_takes_each_message_once_and_in_order() -> None:
    """A doubled message is dropped; after a gap, nothing is taken until the next epoch."""
    ours, theirs = SequenceNumbers(2), SequenceNumbers(1)

    def sent(request: int, epoch: int = 0) -> Message:
        return ours.number(1, FreeRequest(epoch=epoch, request=request))

    first, second, third, fourth = (sent(number) for number in range(1, 5))
    assert theirs.take(first) is first
    assert theirs.take(first) is None
    gap = theirs.take(third)
    assert isinstance(gap, Failed)
    assert (gap.stage, gap.request) == (2, 0)
    assert "stage 2 to stage 1 has lost 1 message" in gap.text
    assert theirs.take(second) is None
    assert theirs.take(fourth) is None
    late = sent(5)
    newer = sent(6, epoch=1)
    assert theirs.take(newer) is newer
    assert theirs.take(late) is late, "the core drops what is of an older epoch"
    again = sent(7, epoch=1)
    assert theirs.take(again) is again


def test_lanes_are_counted_apart() -> None:
    """Receivers, senders, control and data have separate numbers; local messages have none."""
    ours, theirs = SequenceNumbers(1), SequenceNumbers(0)
    verdict = Reroot(request=1, position=3, parent=2, token=5)
    assert ours.number(2, verdict) == ours.number(0, verdict)
    ping = Ping(rank=0)
    assert ours.number(0, ping) is ping
    assert theirs.take(ping) is ping
    for sender in (1, 2):
        message = SequenceNumbers(sender).number(0, verdict)
        assert theirs.take(message) is message
