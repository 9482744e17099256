"""Counts of a stage go on over a restart of its process."""

from flowspec.cli.ui.show import _LiveLine
from flowspec.engine.status import StageTotals
from flowspec.protocol.messages import Status


def status(stage: int, busy_s: float, *, pruned: int = 0, peak: int = 0) -> Status:
    """What a stage's process says of itself."""
    return Status(
        stage=stage,
        busy_s=busy_s,
        num_segments=int(busy_s),
        num_rows_run=10,
        num_rows_pruned=pruned,
        num_requests=1,
        peak_memory_bytes=peak,
    )


def test_counts_add_up_and_the_rest_is_the_present_process_s():
    """Twice restarted, the second time before it said a word; the other stage is as it was."""
    totals = StageTotals()
    assert totals.of({1: status(1, 5.0, pruned=2), 2: status(2, 9.0)})[1].busy_s == 5.0
    totals.lose([1])
    totals.lose([1])
    found = totals.of({1: status(1, 0.5, pruned=1, peak=7), 2: status(2, 9.5)})
    assert (found[1].busy_s, found[1].num_rows_pruned, found[1].num_rows_run) == (5.5, 3, 20)
    assert found[1].peak_memory_bytes == 7
    assert found[2].busy_s == 9.5
    totals.lose([1])
    assert totals.of({1: status(1, 0.25)})[1].busy_s == 5.75


def test_a_status_seen_again_counts_once():
    """The live line looks at every token."""
    totals = StageTotals()
    for _ in range(3):
        assert totals.of({1: status(1, 5.0)})[1].busy_s == 5.0
    totals.lose([1])
    for _ in range(3):
        assert totals.of({1: status(1, 1.0)})[1].busy_s == 6.0


def test_no_share_of_the_live_line_falls_below_zero():
    """A stage that counts from 0 again was not idle for minus five seconds."""
    totals, line = StageTotals(), _LiveLine(None, 0.0)  # type: ignore[arg-type]
    line._update(totals.of({1: status(1, 5.0)}), 10.0)
    line._update(totals.of({1: status(1, 6.0)}), 12.0)
    assert line._shares[1] == 0.5
    totals.lose([1])
    line._update(totals.of({1: status(1, 0.5)}), 14.0)
    assert line._shares[1] == 0.25
