"""A client chooses the strategy: what the head refuses, when it changes it, what it tells."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
from flowspec.cluster.controller.epochs import (
    CancelTicket,
    MoreText,
    StageLost,
)
from flowspec.cluster.controller.stage_statistics import StageWatch
from pydantic import ValidationError

from flowspec.engine.build import HeadParts
from flowspec.protocol.control import (
    MAX_MESSAGE_BYTES,
    Decoding,
    Done,
    StageFigures,
    figures_of,
    pack,
    stats_of,
    unpack,
)
from flowspec.request import ClusterError, DecodeStats, TokensOut
from flowspec.speculation.drafters.base import NoDrafter
from flowspec.speculation.strategies import STRATEGIES
from tests.support.asked import Asking, decoding, hear, status, tiny_parts, watched


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> HeadParts:
    """The head's share of a tiny model."""
    return tiny_parts(tmp_path_factory.mktemp("asked"))


@pytest.fixture
def head(parts: HeadParts) -> Asking:
    """As it is served."""
    return Asking(parts)


def test_a_client_has_its_strategy_and_the_next_one_the_cluster_s(head):
    """Nothing of a benchmark stays, also where it was killed."""
    served = head.chosen
    assert served == (
        STRATEGIES["flowspec"],
        replace(STRATEGIES["flowspec"].defaults, draft_topk=7),
    )
    assert head.ask(decoding(draft_topk=3)) is None
    assert head.chosen[0] is STRATEGIES["streaming"]
    assert head.chosen[1] == replace(STRATEGIES["streaming"].defaults, draft_topk=3)
    assert head.engine.strategy == "streaming"
    head.cancel()
    assert head.ask(None) is None
    assert (head.chosen, head.engine.strategy) == (served, "flowspec")


def test_what_is_learnt_is_one_run_s(head):
    """The same label goes on, another one begins anew."""
    calibrations = []
    for run in ("1", "1", "2"):
        head.ask(decoding(run=run))
        calibrations.append(head.engine.head.calibration)
        head.cancel()
    assert calibrations[0] is calibrations[1]
    assert calibrations[1] is not calibrations[2]


def test_an_answer_s_first_epoch_is_the_one_it_came_in(head):
    """0 where no devices were there to answer."""
    for live, epoch in ((False, 0), (True, 3)):
        head.engine._is_live, head.engine._epoch = live, 3
        assert head.ask(decoding()) is None
        ((_, entry),) = head.engine._open.items()
        assert entry.first_epoch == epoch
        stats = DecodeStats()
        figures = figures_of(stats, epoch=4, alone=True, stages=None, first_epoch=epoch)
        assert (figures.first_epoch, figures.fresh) == (epoch, False)
        head.cancel()


def test_a_strategy_is_not_changed_under_a_request(head):
    """Who wants another one hears why; who wants none takes what there is."""
    assert head.ask(decoding()) is None
    done = head.ask(decoding("ar"))
    assert done is not None
    assert done.reason == "error"
    assert "serves another request now" in done.error
    assert "flowspec status" in done.error
    assert head.ask(None) is None
    assert head.ask(decoding()) is None
    assert head.chosen[0] is STRATEGIES["streaming"]
    assert head.engine.num_open == 3


def test_the_head_s_own_probe_is_no_other_request(head):
    """It gives way."""
    head.engine._submit_probe()
    assert head.ask(decoding()) is None
    assert head.engine._probe is None
    assert head.chosen[0] is STRATEGIES["streaming"]


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        (Decoding(strategy="warp", parameters={}, run="1"), ["warp", "known: ar"]),
        (decoding(speed=9), ["parameters of streaming", "speed", "draft_topk"]),
        (decoding(draft_topk=0), ["draft_topk must be at least 1"]),
        (decoding("ar", num_draft_tokens=2000), ["num_draft_tokens is 2000", "at most 1024"]),
        (
            Decoding(strategy="streaming-unpruned", parameters={}, run="1"),
            ["streaming-unpruned", "emulated cluster alone"],
        ),
    ],
)
def test_a_strategy_that_cannot_be_had_is_refused_with_a_sentence(head, wanted, words):
    """And changes nothing; the head goes on."""
    served = head.chosen
    done = head.ask(wanted)
    assert done is not None
    assert all(word in done.error for word in words), done.error
    assert head.chosen == served
    assert head.ask(None) is None


def test_without_a_drafter_nothing_drafts(parts):
    """Plain decoding still does."""
    head = Asking(replace(parts, drafter=NoDrafter()))
    done = head.ask(decoding())
    assert done is not None
    assert "needs a drafter" in done.error
    assert head.ask(decoding("ar")) is None


def test_what_would_be_cut_short_is_not_measured(head, parts):
    """The client learns how long the prompt is; unmeasured answers end where the context does."""
    done = head.ask(decoding(), max_new_tokens=parts.max_context)
    assert done is not None
    assert 0 < done.prompt_tokens < parts.max_context
    assert f"{done.prompt_tokens} prompt tokens" in done.error
    done = head.ask(decoding(), max_new_tokens=100_000)
    assert done is not None
    assert "at most 65536 tokens" in done.error
    assert head.ask(None, max_new_tokens=parts.max_context) is None


def test_what_no_stage_can_hold_is_refused_as_such(head):
    """Prompt, answer and tree, against what the tightest stage holds."""
    head.engine.head.scheduler.max_kv_tokens = 300
    assert head.ask(decoding(num_draft_tokens=40)) is None
    head.cancel()
    done = head.ask(decoding(num_draft_tokens=400))
    assert done is not None
    assert done.too_large
    assert "rows of KV cache on every stage, the tightest stage holds 300" in done.error
    assert 0 < done.prompt_tokens < 300
    unknown = head.ask(decoding(no_such_parameter=1))
    assert unknown is not None
    assert not unknown.too_large


def test_what_a_chat_template_refuses_is_refused_as_such(head, parts, monkeypatch):
    """In the template's words; the head goes on."""
    template = parts.tokenizer.chat_template
    monkeypatch.setattr(parts.tokenizer, "chat_template", "{{ raise_exception('not so') }}")
    done = head.ask(decoding())
    assert done is not None
    assert done.refused
    assert done.bad_prompt
    assert done.error == "the model's chat template refuses this conversation: not so"
    monkeypatch.setattr(parts.tokenizer, "chat_template", template)
    assert head.ask(decoding()) is None


@pytest.mark.parametrize("value", ["9", None, [1], float("inf"), float("nan")])
def test_a_parameter_is_a_number_or_a_switch(value):
    """Nothing else travels."""
    with pytest.raises(ValidationError):
        Decoding(strategy="ar", parameters={"draft_topk": value}, run="1")


def test_statistics_come_back_as_they_were():
    """Counted from when the request came; as long as they get, they fit a message."""
    stats = DecodeStats(submitted_at=100.0, runs=[0, 3] * 20_000, num_verdicts=7, resume_s=0.5)
    for number in range(1, 60_000):
        stats.count_tokens(1, 100.0 + 1.1 ** (number % 150))
    stats.finished_at = stats.last_token_at
    stages = StageFigures(rows_pruned=1, rows_run_by_last=2, busy_s=(0.5,) * 256)
    figures = figures_of(stats, epoch=3, alone=True, stages=stages)
    frame = pack(Done(id=1, reason="length", figures=figures))
    assert len(frame) < MAX_MESSAGE_BYTES
    done = unpack(frame)
    assert isinstance(done, Done)
    assert done.figures == figures
    back = stats_of(figures)
    assert back.inter_token == stats.inter_token
    assert back.time_to_first_token_s == pytest.approx(stats.time_to_first_token_s)
    assert (back.runs, back.num_verdicts, back.resume_s) == (stats.runs, 7, 0.5)
    assert back.last_token_at == pytest.approx(stats.last_token_at - 100.0)


def test_what_stages_did_is_the_difference_of_their_totals():
    """Rows since the request came, time since its first token."""
    head = watched(status(1, 1.0, 10, 4), status(2, 2.0, 9, 1))
    watch = StageWatch(head, alone=True)
    assert watch.first_token()
    assert not watch.first_token()
    watch.look()  # what came before the first token is not of it
    hear(head, status(1, 1.5, 12, 4), status(2, 2.25, 11, 1))
    watch.look()
    head.pipe.num_closes = 1  # it is over
    assert not watch.is_settled
    hear(head, status(1, 3.0, 30, 6, 1), status(2, 2.5, 20, 1))
    assert not watch.is_settled
    hear(head, status(2, 3.0, 25, 2, 1))
    watch.look()
    assert watch.is_settled
    assert watch.figures() == StageFigures(rows_pruned=3, rows_run_by_last=16, busy_s=(1.5, 0.75))


@pytest.mark.parametrize("alone", [True, False])
def test_what_cannot_be_told_apart_is_not_told(alone):
    """Of a request beside another, or one that lost its stages; and nothing is waited for."""
    watch = StageWatch(watched(status(1, 1.0, 1, 1), status(2, 1.0, 1, 1)), alone=alone)
    watch.is_whole = not alone
    assert watch.is_settled
    assert watch.figures() is None


def test_a_stage_that_takes_nothing_is_lost_and_no_more(head):
    """Also where it is asked what it has done, or a client turns away."""
    head.ask(decoding())

    def send(to: int, message: object) -> None:
        raise ClusterError("stage 2", f"took no {type(message).__name__} for 5 s")

    engine = head.engine
    engine._num_stages, engine._epoch = 2, 4
    engine._driver.transport = SimpleNamespace(send=send, wake=lambda: None)
    number = next(iter(engine._open))
    engine._driver.to_client.append(TokensOut(request=number, tokens=(5,), text="a"))
    engine._do(CancelTicket(99))
    assert StageLost(4, 2, "took no Ping for 5 s") in head.told
    assert MoreText(1, (5,), "a") in head.told
    assert engine.num_open == 1
