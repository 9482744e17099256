"""Head and stages send the same messages in the same order as the committed traces.

Each case is a strategy in a situation (message_traces.py) with 1 or 4 stages. tests/golden holds a
hash of the messages of each, and two of the traces in full. After an intended change, run:

    pytest tests/simulator/test_message_traces.py --update-golden

To see what differs, write all traces in both checkouts and compare the folders:

    pytest tests/simulator/test_message_traces.py --write-traces FOLDER
"""

import dataclasses
import difflib
import json
from hashlib import sha256
from pathlib import Path
from typing import get_args

import pytest

from benchmarks.message_text import MESSAGES, SEGMENT
from flowspec.protocol.messages import Batch, DraftContext, DraftSubtree, Segment, WireMessage
from tests.support.message_traces import CASES, Pipeline, run_case

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
HASHES = GOLDEN / "message_traces.json"
IN_FULL = ("streaming-together-4", "streaming-lost-1")
MAX_SHOWN = 40  # lines of a difference


def entry(pipeline: Pipeline) -> dict[str, object]:
    """Return the committed form of a case."""
    counts = dict(sorted(pipeline.log.counts.items()))
    return {"sha256": sha256(pipeline.text().encode()).hexdigest(), "messages": counts}


@pytest.mark.parametrize("case", CASES)
def test_messages_are_those_of_before(case: str, request: pytest.FixtureRequest) -> None:
    """Number, order, contents, client output and statistics are compared."""
    pipeline = run_case(case)
    folder = request.config.getoption("--write-traces")
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{case}.txt").write_text(pipeline.text())
    if request.config.getoption("--update-golden"):
        _update(case, pipeline)
    kept = json.loads(HASHES.read_text())[case]
    found = entry(pipeline)
    assert found["messages"] == kept["messages"], f"{case}: another number of messages"
    if case in IN_FULL:
        wanted = (GOLDEN / f"{case}.txt").read_text().splitlines()
        changed = list(difflib.unified_diff(wanted, pipeline.text().splitlines(), "before", "now"))
        assert not changed, "\n".join([f"{case}: other messages", *changed[:MAX_SHOWN]])
    assert found == kept, f"{case}: other messages, or in another order; --write-traces shows them"


def test_every_case_is_kept_and_no_other() -> None:
    """A removed strategy or situation must be removed from the hashes."""
    assert json.loads(HASHES.read_text()).keys() == set(CASES)


def test_every_field_of_a_message_is_in_the_text() -> None:
    """A new message or field is either shown or left out on purpose."""
    left_out = {
        *("kind", "epoch", "source", "number"),  # shown with every message
        *("slowest_ms", "busy_s", "peak_memory_bytes"),  # of the machine
        *("hidden", "model", "numerics", "num_lost"),
        *("finished_request", "finished_rows_run", "finished_rows_pruned", "finished_busy_s"),
        "sampling",  # the same for all, greedy
        *("num_prompt_tokens", "candidates"),  # for rules and processors that none of these has
    }
    tables = {kind: set(fields.values()) for kind, (_, fields) in MESSAGES.items()}
    others = {Segment, Batch, DraftContext, DraftSubtree}  # no drafter pushes in these runs
    assert tables.keys() | others == set(get_args(WireMessage))
    for kind, shown in {**tables, Segment: set(SEGMENT.values())}.items():
        names = {field.name for field in dataclasses.fields(kind)}
        assert names - left_out == shown, kind.__name__


def _update(case: str, pipeline: Pipeline) -> None:
    kept = json.loads(HASHES.read_text()) if HASHES.exists() else {}
    kept = {name: kept[name] for name in CASES if name in kept and name != case}
    kept[case] = entry(pipeline)
    GOLDEN.mkdir(exist_ok=True)
    HASHES.write_text(json.dumps(dict(sorted(kept.items())), indent=1) + "\n")
    if case in IN_FULL:
        (GOLDEN / f"{case}.txt").write_text(pipeline.text())
