"""The recorder keeps the right records in bounded space, and costs nothing when off."""

import json
from dataclasses import replace

import pytest
import torch

from flowspec.engine.engine import generate
from flowspec.protocol.codec import decode, encode
from flowspec.protocol.messages import (
    CLIENT,
    AddRequest,
    Exit,
    HiddenStates,
    Ping,
    Reroot,
    Segment,
    Started,
    Status,
)
from flowspec.request import FinishReason, RequestOutput
from flowspec.runtime.core import Send, Step, Work
from flowspec.runtime.event_loop import EventLoop
from flowspec.runtime.recorder import OFF, Recorder, message_key, open_trace, trace_path
from flowspec.tracing.timeline import make_timeline, read_records
from tests.support.clusters import make_cluster
from tests.support.tiny import request
from tests.support.traces import record, timeline_of

SEGMENT = Segment(
    request=7, seq_no=3, nodes=(5, 6), parents=(4, 5), tokens=(1, 2), hidden=torch.zeros(2, 4)
)
MESSAGES = (
    SEGMENT,
    AddRequest(request=7, capacity=9, context=8),
    Reroot(request=7, position=12, parent=5, token=1),
    Started(request=7, seq_no=3),
    Exit(request=7, seq_no=3, rows=2, slowest_rows=2, slowest_ms=1.0),
    HiddenStates(request=7, layer=-1, nodes=(5, 6), hidden=torch.zeros(2, 4)),
    Status(stage=2, busy_s=1.0, num_segments=1, num_rows_run=1, num_rows_pruned=0, num_requests=1),
    Ping(rank=0),
)
WORK = Work("forward", 2, 8, lambda: None, lambda now, elapsed: (), {"segments": (SEGMENT,)})


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_is_known_by_the_same_key_at_both_ends(message):
    """Otherwise no hop would be found; the sender also records size and content."""
    frames = encode(message)
    assert message_key(decode(frames)) == message_key(message)
    recorder = Recorder(1)
    recorder.sent(1.5, 2, message)
    recorder.received(2.5, decode(frames))
    _, (_, when, to, key, size, _), (_, came, came_key, _) = recorder.records
    assert (when, to, came) == (1.5, 2, 2.5)
    assert key == came_key == message_key(message)
    assert size == sum(len(frame) for frame in frames)


def test_segments_are_told_with_their_rows():
    """The head's record is complete, to look verdicts up; other records only have counts."""
    sent = {}
    for rank in (0, 1):
        recorder = Recorder(rank)
        recorder.sent(0.0, rank + 1, SEGMENT)
        recorder.worked(1.0, 2.0, WORK)
        sent[rank] = recorder.records[1][-1]["segments"]
        assert recorder.records[2][-1] == [(7, 3, (5, 6))]
    assert sent == {0: [(7, 3, (5, 6), (4, 5), (1, 2), False)], 1: [(7, 3, 2)]}


def test_a_file_holds_what_memory_would(tmp_path):
    """It has JSON lines, the last with the number of dropped records; closing twice is safe."""
    path = trace_path(tmp_path, 1)
    recorder, memory = open_trace(path, 1), Recorder(1)
    for each in (recorder, memory):
        each.received(0.5, SEGMENT)
        each.worked(1.0, 2.0, WORK)
        each.waited(2.0, 3.0)
        each.sent(3.0, 2, SEGMENT)
        each.close()
        each.close()
    assert list(read_records(path)) == json.loads(json.dumps(memory.records))
    assert memory.records[-1] == ("end", 0)


def test_records_are_bounded_and_the_rest_is_counted(tmp_path):
    """A run of a week must not fill memory or disk, nor look complete."""
    recorder = Recorder(1, path=tmp_path / "few", max_records=10)
    for number in range(25):
        recorder.waited(number, number + 1)
    recorder.close()
    *_, last, end = read_records(tmp_path / "few")
    assert last == ["wait", 9, 10]
    assert end == ["end", 15]


def test_a_resting_process_writes_and_a_killed_one_leaves_what_it_wrote(tmp_path):
    """Only the last records are lost; an incomplete line is ignored."""
    path = tmp_path / "rank"
    recorder = Recorder(1, path=path)
    for number in range(300):
        recorder.waited(number, number + 1)
    assert not list(read_records(path))
    recorder.rest()
    with path.open("a") as out:
        out.write('["wait",300')
    assert len(list(read_records(path))) == 301


def test_off_keeps_nothing():
    """An event loop calls these methods when no trace is wanted."""
    OFF.received(0.0, SEGMENT)
    OFF.sent(0.0, 1, SEGMENT)
    OFF.worked(0.0, 1.0, WORK)
    OFF.waited(0.0, 1.0)
    OFF.rest()
    OFF.close()
    assert not vars(OFF)
    assert open_trace(None, 1) is OFF


def test_the_driver_records_all_that_passes_through_it():
    """It records waits, messages and work; the core behaves the same with tracing on or off."""

    class Wire:
        def __init__(self) -> None:
            self.incoming, self.outgoing = [SEGMENT], []

        def send(self, to, message):
            self.outgoing.append((to, message))

        def receive(self, timeout_s):
            if not timeout_s:
                return []
            messages, self.incoming = self.incoming, []
            return messages

        def close(self):
            """Do nothing: no file is open."""

    class Core:
        rank = 1

        def __init__(self) -> None:
            self.steps = []

        def handle(self, message, now):
            self.steps = [Step(work=WORK, sends=[Send(2, message)])]
            return [Send(CLIENT, RequestOutput(request=7, reason=FinishReason.STOP))]

        def poll(self, now):
            return self.steps.pop() if self.steps else None

    outgoing = []
    for trace in (OFF, Recorder(1)):
        wire = Wire()
        driver = EventLoop(Core(), wire, 2, trace)
        driver.turn(0.1)
        driver.turn(0.1)
        outgoing.append(wire.outgoing)
    assert outgoing[0] == outgoing[1] == [(2, replace(SEGMENT, source=1, number=1))]
    assert [record[0] for record in trace.records] == [
        *("process", "wait", "receive", "send", "send", "work")
    ]
    start, end = trace.records[-1][1:3]
    assert start <= end


def test_a_recorded_run_says_the_same_text():
    """Recording changes nothing, not even the virtual clock."""
    runs = []
    for traced in (False, True):
        cluster = make_cluster(3, "streaming")
        recorders = record(cluster) if traced else {}
        runs.append((generate(cluster, request()).tokens, cluster.simulator.now))
    assert runs[0] == runs[1]
    timeline = timeline_of(recorders)
    assert sorted(timeline.processes) == [0, 1, 2, 3]


def test_nothing_recorded_is_an_error():
    """The error comes before an empty picture is drawn."""
    with pytest.raises(ValueError, match="no request was served"):
        make_timeline([Recorder(0).records])
    with pytest.raises(ValueError, match="head left no trace"):
        make_timeline([Recorder(1).records])
