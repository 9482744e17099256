"""A dozen real faults in all phases give right answers and no orphan; a command runs hundreds."""

from pathlib import Path

import pytest

from tests.stress.real_faults import campaign

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_a_dozen_real_faults(tmp_path: Path) -> None:
    """tests/stress/real_faults.py describes the phases and faults."""
    report = campaign(12, 3, tmp_path)
    assert not report.wrong
    assert report.faults.total() >= 12
    assert report.answers >= 12
