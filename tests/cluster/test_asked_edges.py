"""A client's strategy where things go wrong: no token yet, a stage lost, totals that cannot be."""

import threading
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
from flowspec.cluster.controller.epochs import PROBE_EVERY_S, Blamed, Ended, StageLost
from flowspec.cluster.controller.requests import PUT_BACK_S
from flowspec.cluster.controller.stage_statistics import StageWatch, settled

from flowspec.cluster.controller.status import _device
from flowspec.cluster.membership.membership import Phase
from flowspec.cluster.membership.roster import Device, FailRequests, Halt, Member, Place
from flowspec.engine.build import HeadParts
from flowspec.protocol import messages as wire
from flowspec.protocol.control import Addresses, DeviceReport, Done
from flowspec.protocol.messages import AbortRequest, Failed, FinishRequest, Submit
from flowspec.request import ClusterError
from tests.support.asked import Asking, decoding, hear, status, tiny_parts, watched
from tests.support.clusters import make_cluster
from tests.support.tiny import PROMPT, request


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> HeadParts:
    """The head's share of a tiny model."""
    return tiny_parts(tmp_path_factory.mktemp("asked"))


class Live(Asking):
    """With two stages that take messages and say nothing by themselves."""

    def __init__(self, parts: HeadParts) -> None:
        super().__init__(parts)
        self.broken: type | None = None  # kind of message that stage 2 does not take
        self.sent: list[Any] = []
        self.begin()

    def begin(self) -> None:
        """Stages are there, and have said so."""
        engine = self.engine
        network = SimpleNamespace(send=self.send, wake=lambda: None, receive=lambda timeout_s: ())
        engine._num_stages = 2
        engine._driver.go_on(network, 2)
        engine._inject(wire.Resume(num_stages=2, num_kv_tokens=0))
        engine._is_live = True
        self.say(status(1, 0.0, 0, 0), status(2, 0.0, 0, 0))

    def send(self, to: int, message: object) -> None:
        """To a stage."""
        if self.broken is not None and isinstance(message, self.broken):
            raise ClusterError("stage 2", f"took no {type(message).__name__} for 5 s")
        self.sent.append(message)

    def say(self, *messages: Any) -> None:
        """A stage says it."""
        for one in messages:
            self.engine._inject(one)
        with self.engine._noticing_losses():
            pass

    @property
    def number(self) -> int:
        """The open request's."""
        return next(iter(self.engine._open))

    def turn(self) -> None:
        """One turn."""
        self.engine._turn()

    def end(self, ticket: int) -> Done:
        """What the client is told."""
        found = [e.done for e in self.told if isinstance(e, Ended) and e.ticket == ticket]
        assert len(found) == 1
        return found[0]


@pytest.fixture
def head(parts: HeadParts) -> Live:
    """As it is served."""
    return Live(parts)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("how", ["drop", "failed", "given up"])
def test_a_request_may_end_before_its_first_token(head, how, measured):
    """It has no speed; the head goes on."""
    assert head.ask(decoding() if measured else None) is None
    head.turn()
    assert len(head.engine.head.scheduler.running) == 1
    if how == "drop":
        head.cancel()
    elif how == "failed":
        epoch = head.engine.head.pipe.epoch
        head.say(Failed(epoch=epoch, stage=1, request=head.number, text="no room"))
    else:
        head.engine._do(Halt(0, ClusterError("stage 1", "killed")))
        head.engine._do(FailRequests(ClusterError("stage 1", "killed")))
    head.say(status(1, 0.0, 0, 0, 1), status(2, 0.0, 0, 0, 1))
    done = head.end(1)
    assert (done.num_tokens, done.tokens_per_s, done.tau) == (0, 0.0, 0.0)
    assert done.reason == ("cancelled" if how == "drop" else "error")


def test_what_is_over_is_told_though_a_stage_takes_nothing(head):
    """The client hears of its end, the strategy may change again."""
    head.ask(decoding())
    head.turn()
    head.broken = FinishRequest
    head.cancel()
    assert head.end(1).reason == "cancelled"
    assert any(isinstance(e, StageLost) and e.rank == 2 for e in head.told)
    assert head.engine.num_open == 0
    assert head.ask(decoding("ar")) is None


def test_who_asks_as_a_stage_is_lost_waits_for_the_next_ones(head):
    """Also where the probe that gives way finds the loss; another probe is sent later."""
    head.engine._submit_probe()
    head.turn()
    assert len(head.engine.head.scheduler.running) == 1
    head.broken = FinishRequest
    assert head.ask(decoding()) is None
    assert any(isinstance(e, StageLost) for e in head.told)
    assert (head.engine.num_open, head.engine._probe) == (1, None)
    assert head.engine.strategy == "streaming"
    head.broken = None
    head.begin()
    head.turn()
    assert list(head.engine.head.scheduler.running) == [head.number]
    head.cancel()
    head.engine._submit_probe()
    assert head.engine._probe is not None


def test_a_probe_goes_with_its_stages(head):
    """The next ones get one of their own, whatever became of it."""
    head.engine._submit_probe()
    first = head.engine._probe
    head.turn()
    head.engine._do(Halt(0, ClusterError("stage 1", "killed")))
    assert head.engine._probe is None
    assert not head.engine.head.scheduler.waiting
    assert not head.engine.head.finished
    head.begin()
    head.turn()
    assert head.engine._probe not in (None, first)


@pytest.mark.parametrize(
    "after",
    [
        [status(1, 2.0, 5, 4, 1), status(2, 3.0, 5, 1, 1)],  # fewer rows than before
        [status(1, 2.0, 20, 4, 1), status(2, 3.0, 2**63, 1, 1)],
        [status(1, 2.0, 20, 4, 1), status(2, float("nan"), 20, 1, 1)],
        [status(1, 0.5, 20, 4, 1), status(2, 3.0, 20, 1, 1)],  # less time
        [status(1, 2.0, 20, 4, 1), status(2, 3.0, 20, 1, 1), status(7, 3.0, 20, 1, 1)],
    ],
)
def test_totals_that_cannot_be_are_not_told(after):
    """A device says whatever it says."""
    head = watched(status(1, 1.0, 10, 4), status(2, 2.0, 9, 1))
    watch = StageWatch(head, alone=True)
    watch.first_token()
    hear(head, status(1, 1.5, 12, 4), status(2, 2.25, 11, 1))
    watch.look()
    head.pipe.num_closes = 1
    hear(head, *after)
    assert watch.figures() is None


def measured(head: Live, **about: Any) -> int:
    """Ask, begin and end; returns the ticket."""
    assert head.ask(decoding(**about)) is None
    head.turn()
    head.cancel()
    return head.tickets


def last_words(head: Live) -> None:
    """The stages are done with all that is over."""
    count = head.engine.head.pipe.num_closes
    head.say(status(1, 1.0, 1, 1, count), status(2, 1.0, 1, 1, count))


def test_who_comes_before_the_last_word_takes_the_stages_counts_alone(head):
    """The answer itself was alone; the head's own token waits."""
    ticket = measured(head)
    assert not any(isinstance(e, Ended) for e in head.told)
    head.engine._submit_probe()
    assert head.engine._probe is None
    head.ask(None)
    figures = head.end(ticket).figures
    assert figures is not None
    assert (figures.alone, figures.stages) == (True, None)


def test_the_probe_is_not_measured(head):
    """It gives way also where the strategy stays, and what it leaves behind is no one's."""
    measured(head)
    last_words(head)
    head.engine._submit_probe()
    head.turn()
    assert len(head.engine.head.scheduler.running) == 1
    assert head.ask(decoding()) is None
    assert head.engine._probe is None
    head.turn()
    head.cancel()
    last_words(head)
    figures = head.end(2).figures
    assert figures is not None
    assert (figures.alone, figures.stages) == (True, None)


def test_a_status_from_before_the_end_is_no_last_word(head):
    """However many requests the stage holds: only what comes behind the last row proves it."""
    ticket = measured(head)
    head.say(status(1, 1.0, 1, 1, 0), status(2, 1.0, 1, 1, 1))
    assert not any(isinstance(e, Ended) for e in head.told)
    last_words(head)
    figures = head.end(ticket).figures
    assert figures is not None
    assert figures.stages is not None
    assert figures.stages.rows_run_by_last == 1


def test_the_first_under_a_strategy_says_so(head):
    """A plain question in between has it put in force anew."""
    fresh = []
    for wanted in (decoding(), decoding(), None, decoding(), decoding(run="2"), decoding(run="2")):
        head.ask(wanted)
        head.turn()
        head.cancel()
        last_words(head)
        figures = head.end(head.tickets).figures
        fresh.append(figures.fresh if figures is not None else None)
    assert fresh == [True, False, None, True, True, False]


@pytest.mark.parametrize("is_live", [True, False])
def test_serve_s_strategy_is_back_some_seconds_after_the_last_measured_answer(head, is_live):
    """Before the next probe, and not while a measured one is open or waits for its figures."""
    assert PUT_BACK_S < PROBE_EVERY_S
    engine = head.engine

    def later() -> str:
        engine._decoding.used_at -= PUT_BACK_S + 1
        engine._put_back()
        return engine.strategy

    head.ask(decoding())
    head.turn()
    assert later() == "streaming"
    head.cancel()
    assert later() == "streaming"
    last_words(head)
    engine._decoding.use(engine._decoding.used_at + PUT_BACK_S + 1)
    engine._put_back()
    assert engine.strategy == "streaming"
    if not is_live:
        engine._do(Halt(0, ClusterError("stage 1", "killed")))
    engine._submit_probe()
    assert later() == "flowspec"
    assert engine._probe is None
    assert not engine.head.scheduler.waiting


@pytest.mark.parametrize("when", ["never", "before it came", "as it waited", "as it was served"])
def test_an_outage_before_the_first_token_is_counted(head, when):
    """Its time is a part of that to the first token, so whoever measures that has to know."""
    killed = Halt(0, ClusterError("stage 1", "killed"))
    if when == "before it came":
        head.engine._do(killed)
    head.ask(decoding())
    if when == "as it was served":
        head.turn()
    if when.startswith("as"):
        head.engine._do(killed)
    if when != "never":
        head.begin()
    head.turn()
    head.cancel()
    last_words(head)
    figures = head.end(1).figures
    assert figures is not None
    assert (figures.num_resumes, figures.resume_s) == (int(when != "never"), 0.0)


@pytest.mark.parametrize("max_cached", [0, 2])
def test_after_the_last_word_a_stage_does_nothing_more(max_kept):
    """While the kept ones grow in number, when they are full, and where a client turns away."""
    cluster = make_cluster(3, limits={"max_cached": max_kept, "max_num_seqs": 2})
    head, simulator = cluster.head, cluster.simulator
    num_settled = 0
    for turn in range(4):
        first = head.newest_id + 1
        asked = [request(first + k, prompt=(*PROMPT, turn, k)) for k in range(2)]
        for one in asked:
            simulator.submit(Submit(request=one))
        steps = 0
        while simulator.step():
            steps += 1
            if steps == 40 and turn in (1, 3):
                simulator.deliver(0, AbortRequest(request=first))
            told = settled(head)
            if head.scheduler.running or head.scheduler.waiting or told is None:
                continue
            num_settled += 1
            for rank, one in told.items():
                stage = cluster.stages[rank - 1]
                assert not stage.queue
                assert one.num_rows_run == stage.num_rows_run
                assert one.num_rows_pruned == stage.num_rows_pruned
        assert settled(head) is not None
    assert num_settled


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        (status(1, 2.0, 1, 1), 2.0),
        (status(1, float("nan"), 1, 1), 0.0),
        (status(1, -1.0, 1, 1), 0.0),
        (replace(status(1, 2.0, 1, 1), num_kv_tokens_used=2**63), 0.0),
    ],
)
def test_what_cannot_be_is_not_shown(said, shown):
    """`flowspec status` is answered whatever a device says."""
    report = DeviceReport(hostname="a", kind="", memory_available_bytes=0, memory_total_bytes=0)
    hello: Any = SimpleNamespace(report=report)
    device = Device("a", b"", hello, 0.0, rank=1)
    facts: Any = SimpleNamespace(statuses={1: said})
    membership: Any = SimpleNamespace(phase=Phase.SERVING)
    assert _device(device, membership, facts, 1.0).busy_s == shown


@pytest.mark.parametrize("in_order", [False, True])
def test_a_request_during_which_a_device_is_lost_twice_ends_and_others_are_served(head, in_order):
    """Named with the device and the cause; a device that leaves in order is no request's doing."""
    head.engine._members = [
        Member(2, Place("ada", 1, 2), Addresses(control="c", data="d"), num_kv_tokens=0)
    ]
    assert head.ask(None) is None
    for _ in range(2):
        head.begin()
        head.turn()
        assert head.engine.head.scheduler.running
        if in_order:
            error = ClusterError("stage 2 on ada", "left: stopped")
            head.engine._do(Halt(0, error, in_order=True))
        else:
            head.engine._driver.transport.receive = lost
            for _ in range(3):  # one reads: what there is to send goes first
                if head.engine._is_live:
                    head.turn()
    ends = [event.done for event in head.told if isinstance(event, Ended)]
    if in_order:
        assert not ends
        return
    assert len(ends) == 1
    assert ends[0].error.startswith("stage 2 on ada: connection lost; a device was lost 2 times")
    assert not ends[0].refused
    assert Blamed((0, 0)) in head.told
    head.begin()
    assert head.ask(None) is None
    head.turn()
    assert head.engine.head.scheduler.running


def lost(timeout_s):
    """What a transport says of a peer whose connection is gone."""
    del timeout_s
    raise ClusterError("stage 2", "connection lost")


def test_a_stage_s_failure_for_one_request_names_the_device(head):
    """Whoever reads it looks for a device, not for a rank."""
    head.engine._members = [
        Member(1, Place("ada", 0, 1), Addresses(control="c", data="d"), num_kv_tokens=0)
    ]
    assert head.ask(None) is None
    head.turn()
    epoch = head.engine.head.pipe.epoch
    head.say(Failed(epoch=epoch, stage=1, request=head.number, text="IndexError: boom"))
    assert head.end(1).error == "stage 1 on ada: IndexError: boom"
    assert not head.end(1).refused


@pytest.mark.parametrize("in_order", [False, True])
def test_a_device_s_own_word_counts_before_its_broken_connection(head, in_order):
    """It may come a moment later; a device that has left in order blames nobody."""
    assert head.ask(None) is None
    head.turn()
    cause = "left: stopped" if in_order else "IndexError: boom"
    head.engine._driver.transport.receive = lost
    halt = Halt(0, ClusterError("stage 2 on ada", cause), in_order)
    timer = threading.Timer(0.05, head.engine.post, [halt])
    timer.start()
    for _ in range(3):  # one reads
        if head.engine._is_live:
            head.turn()
    timer.join()
    assert head.engine.head.outage == f"stage 2 on ada: {cause}"
    (waiting,) = head.engine.head.scheduler.waiting
    assert waiting.before.losses.recent == (not in_order)
    assert not any(isinstance(event, StageLost) for event in head.told)
