"""A dozen real faults in all phases: right answers, no orphan; the hundreds are a command."""

from pathlib import Path

import pytest

from tests.stress.real_faults import campaign


@pytest.mark.timeout(600)
def test_a_dozen_real_faults(tmp_path: Path) -> None:
    """See tests/stress/real_faults.py for the phases and kinds."""
    report = campaign(12, 3, tmp_path)
    assert not report.wrong
    assert report.faults.total() >= 12
    assert report.answers >= 12
