"""A stage by itself: filter, re-root, deferred verdicts, bounded queue; no cluster around it."""

from typing import Any

import pytest
import torch

import flowspec.stage.stage
from flowspec.protocol.messages import (
    EVERY_STAGE,
    HEAD,
    AddRequest,
    Exit,
    Failed,
    FinishRequest,
    HiddenStates,
    Message,
    Reroot,
    Segment,
    Started,
    Status,
)
from flowspec.request import SamplingParams
from flowspec.runtime.core import Send
from flowspec.stage.stage import Stage
from tests.support.clusters import check_request, whole_run
from tests.support.tiny import PROMPT, T0, T1, VOCAB, stage_models, truth

ROOT = len(PROMPT)  # node id of the first generated token
GREEDY = truth(PROMPT, T0)[len(PROMPT) :]


def pump(stage: Stage) -> list[Send]:
    """Let the stage do all it has to do; what it sends."""
    sends: list[Send] = []
    while (step := stage.poll(0.0)) is not None:
        sends.extend(step.sends)
        if step.work is not None:
            step.work.run()
            sends.extend(step.work.finish(0.5, 0.5))
        for state in stage.requests.values():
            check_request(state)
    return [send for send in sends if not isinstance(send.message, Status)]


def give(stage: Stage, *messages: Message) -> list[Send]:
    """Messages in, everything that follows out."""
    sends: list[Send] = []
    for message in messages:
        sends.extend(stage.handle(message, 0.0))
        sends.extend(pump(stage))
    return sends


def opened(
    *, capacity: int = 64, sampling: SamplingParams = T0, layers: tuple[int, ...] = ()
) -> AddRequest:
    """Room for request 1."""
    return AddRequest(
        request=1,
        capacity=capacity,
        context=64,
        sampling=sampling,
        aux_hidden_state_layers=layers,
    )


def prompt(start: int = 0, end: int = len(PROMPT), **fields: Any) -> Segment:
    """Prompt tokens start..end as nodes of the same numbers."""
    return Segment(
        request=1,
        seq_no=0,
        nodes=tuple(range(start, end)),
        parents=tuple(range(start - 1, end - 1)),
        tokens=PROMPT[start:end],
        prefix=True,
        **fields,
    )


def rows(*triples: tuple[int, int, int], seq_no: int = 1, **fields: Any) -> Segment:
    """A segment of (node, parent, token)."""
    nodes, parents, tokens = zip(*triples, strict=True) if triples else ((), (), ())
    return Segment(request=1, seq_no=seq_no, nodes=nodes, parents=parents, tokens=tokens, **fields)


def wrong(position: int) -> int:
    """Not the token that the target generates at this place."""
    return (GREEDY[position] + 1) % VOCAB


def verdicts(sends: list[Send]) -> list[Reroot]:
    """Verdicts to the head."""
    return [s.message for s in sends if isinstance(s.message, Reroot) and s.to == HEAD]


@pytest.fixture
def only() -> Stage:
    """First and last stage in one, the prompt is through."""
    stage = Stage(1, 1, stage_models(1)[0])
    sends = give(stage, opened(layers=(2, -1)), prompt())
    assert verdicts(sends) == [Reroot(request=1, position=ROOT, parent=ROOT - 1, token=GREEDY[0])]
    return stage


@pytest.fixture
def first() -> Stage:
    """Stage 1 of 2, the prompt is through, and its verdict is known."""
    stage = Stage(1, 2, stage_models(2)[0])
    give(stage, opened(), prompt())
    give(stage, Reroot(request=1, position=ROOT, parent=ROOT - 1, token=GREEDY[0]))
    return stage


def test_a_verdict_walks_as_far_as_the_rows_are_true(only):
    """One verdict for several tokens, to the head and to every other stage; then the exit."""
    chain = [(ROOT + i, ROOT + i - 1, GREEDY[i]) for i in range(3)]
    decoys = [(ROOT + 10, ROOT, wrong(1)), (ROOT + 11, ROOT + 2, wrong(3))]
    sends = give(only, rows(*chain, *decoys))
    assert verdicts(sends) == [
        Reroot(request=1, position=ROOT + 3, parent=ROOT + 2, token=GREEDY[3])
    ]
    assert [s.to for s in sends if isinstance(s.message, Reroot)] == [HEAD, EVERY_STAGE]
    assert isinstance(sends[-1].message, Exit)
    assert sends[-1].message.rows == 5
    state = only.requests[1]
    assert (state.cache.prefix_length, state.cache.num_tree_rows) == (ROOT + 3, 0)


def test_the_first_row_off_the_path_ends_the_walk(only):
    """The target's own token follows the last true row, drafted or not."""
    sends = give(only, rows((ROOT, ROOT - 1, GREEDY[0]), (ROOT + 1, ROOT, wrong(1))))
    assert verdicts(sends) == [Reroot(request=1, position=ROOT + 1, parent=ROOT, token=GREEDY[1])]
    assert verdicts(give(only, rows((ROOT + 2, ROOT, wrong(1)), seq_no=2))) == []


def test_without_verify_the_verdict_waits_for_a_later_segment(only):
    """Rounds in chunks: one verdict for the whole tree, also when its last chunk is empty."""
    chain = [(ROOT + i, ROOT + i - 1, GREEDY[i]) for i in range(2)]
    sends = give(only, rows(chain[0], verify=False), rows(chain[1], seq_no=2, verify=False))
    assert [type(s.message) for s in sends if s.to == HEAD] == [Started, Exit, Started, Exit]
    assert verdicts(give(only, rows(seq_no=3))) == [
        Reroot(request=1, position=ROOT + 2, parent=ROOT + 1, token=GREEDY[2])
    ]


def test_prompt_chunks_give_one_verdict_at_the_end():
    """Only the row behind the last prompt token decides anything."""
    stage = Stage(1, 1, stage_models(1)[0])
    sends = give(stage, opened(), prompt(0, 4, verify=False), prompt(4, 8, verify=False))
    assert verdicts(sends) == []
    assert [v.token for v in verdicts(give(stage, prompt(8)))] == [GREEDY[0]]


def test_the_choice_is_coupled_to_the_seed_and_the_position():
    """At temperature 1 the verdict is the target's own sample, whatever the segment has."""
    own = truth(PROMPT, T1)[len(PROMPT) :]
    stage = Stage(1, 1, stage_models(1)[0])
    give(stage, opened(sampling=T1), prompt())
    decoys = [(ROOT + 9 + i, ROOT - 1, (own[0] + i) % VOCAB) for i in (1, 2)]
    sends = give(stage, rows(*decoys, (ROOT, ROOT - 1, own[0])))
    assert [v.token for v in verdicts(sends)] == [own[1]]


def test_dead_rows_are_dropped_before_they_cost_anything(first):
    """Rows beside the verdict and rows of unknown parents; what is left goes on in order."""
    sends = give(
        first,
        rows(
            (ROOT + 1, ROOT - 1, wrong(0)),  # beside the verdict
            (ROOT, ROOT - 1, GREEDY[0]),
            (ROOT + 2, ROOT + 1, 7),  # below a dead row
            (ROOT + 3, ROOT, 8),
            (ROOT + 4, 999, 9),  # nobody knows its parent
        ),
    )
    passed_on = sends[-1].message
    assert sends[-1].to == 2
    assert isinstance(passed_on, Segment)
    assert passed_on.nodes == (ROOT, ROOT + 3)
    assert passed_on.hidden is not None
    assert passed_on.hidden.shape == (2, 32)
    assert first.num_rows_pruned == 3
    assert first.num_rows_run == len(PROMPT) + 2


@pytest.mark.parametrize("segment", [rows((ROOT + 1, 999, 3)), rows()])
def test_an_emptied_segment_still_travels(first, segment):
    """One in, one out: the head counts; and there is room before stage 1 again."""
    sends = give(first, segment)
    assert [(s.to, type(s.message)) for s in sends] == [(HEAD, Started), (2, Segment)]
    assert sends[1].message.nodes == ()
    assert sends[1].message.hidden is None


def test_segments_of_an_unknown_request_travel_on_empty():
    """Rows that follow a FinishRequest or a failed request run on no later stage."""
    stage = Stage(1, 2, stage_models(2)[0])
    for segment in (rows((ROOT, ROOT - 1, 3)), prompt()):
        sends = give(stage, segment)
        assert sends[-1].to == 2
        assert sends[-1].message.nodes == ()
    last = Stage(2, 2, stage_models(2)[1])
    (left,) = give(last, rows(hidden=None))
    assert left == Send(HEAD, Exit(request=1, seq_no=1, rows=0, slowest_rows=0, slowest_ms=0.0))


def test_an_emptied_end_of_the_prompt_gives_no_verdict():
    """A stage before this one could not run it: there is no token to announce."""
    last = Stage(2, 2, stage_models(2)[1])
    empty = prompt().select([])
    sends = give(last, opened(), empty)
    assert [type(s.message) for s in sends] == [Exit]


def test_a_verdict_carried_by_a_segment_prunes_like_the_message(first):
    """The control message may be late; rows of a decided branch must not pile up."""
    give(first, rows((ROOT, ROOT - 1, GREEDY[0]), (ROOT + 1, ROOT, 5), (ROOT + 2, ROOT, 6)))
    verdict = Reroot(request=1, position=ROOT + 1, parent=ROOT, token=6)
    sends = give(first, rows((ROOT + 3, ROOT + 1, 7), (ROOT + 4, ROOT + 2, 8), verdict=verdict))
    assert sends[-1].message.nodes == (ROOT + 4,)
    state = first.requests[1]
    assert state.nodes == [ROOT + 2, ROOT + 4]
    give(first, verdict)  # the message itself, late
    assert state.nodes == [ROOT + 2, ROOT + 4]


def test_stale_and_foreign_verdicts_change_nothing(first):
    """Verdicts overtake one another; those of finished requests arrive as well."""
    give(first, rows((ROOT, ROOT - 1, GREEDY[0]), (ROOT + 1, ROOT, 5)))
    give(first, Reroot(request=1, position=ROOT + 1, parent=ROOT, token=5))
    state = first.requests[1]
    before = (state.tip, state.next_token, list(state.nodes), state.cache.prefix_length)
    stale = Reroot(request=1, position=ROOT, parent=ROOT - 1, token=GREEDY[0])
    assert give(first, stale, Reroot(request=9, position=99, parent=1, token=2)) == []
    assert before == (state.tip, state.next_token, state.nodes, state.cache.prefix_length)


def test_a_verdict_on_a_row_that_never_ran_ends_its_request(first):
    """The head is told which node, and the stage serves the others."""
    (send,) = give(first, Reroot(request=1, position=ROOT + 5, parent=77, token=1))
    assert send.to == HEAD
    assert (send.message.request, "node 77" in send.message.text) == (1, True)
    assert not first.requests


def test_hidden_states_leave_for_accepted_rows_alone_in_path_order(only):
    """Siblings' hidden states never leave; those of survivors wait for their own verdict."""
    assert {s.message.layer for s in give(only, rows((ROOT, ROOT - 1, wrong(0))))
            if isinstance(s.message, HiddenStates)} == set()  # fmt: skip
    chain = [(ROOT + i, ROOT + i - 1, GREEDY[i]) for i in range(3)]
    segment = rows(chain[0], (ROOT + 9, ROOT, wrong(1)), *chain[1:], seq_no=2)
    hidden_states = [s.message for s in give(only, segment) if isinstance(s.message, HiddenStates)]
    own = whole_run(truth(PROMPT, T0), (2, -1))[2]
    assert [m.layer for m in hidden_states] == [2, -1]
    for message in hidden_states:
        assert message.nodes == (ROOT, ROOT + 1, ROOT + 2)
        want = own[message.layer][ROOT : ROOT + 3]
        torch.testing.assert_close(message.hidden, want, atol=1e-4, rtol=1e-4)


def test_prompt_hidden_states_leave_at_once():
    """The prompt is true by definition."""
    stage = Stage(2, 2, stage_models(2)[1])
    hidden = torch.zeros(4, 32)
    sends = give(stage, opened(layers=(1, 6, -1)), prompt(0, 4, verify=False, hidden=hidden))
    hidden_states = [s.message for s in sends if isinstance(s.message, HiddenStates)]
    assert [(m.layer, m.nodes) for m in hidden_states] == [(6, (0, 1, 2, 3)), (-1, (0, 1, 2, 3))]


def test_a_full_cache_is_reported_and_the_request_given_up():
    """The message says how much there is and how much was needed; the stage serves others on."""
    stage = Stage(1, 2, stage_models(2)[0])
    sends = give(stage, opened(capacity=len(PROMPT) + 1), prompt())
    sends = give(stage, rows((ROOT, ROOT - 1, 1), (ROOT + 1, ROOT - 1, 2)))
    failed = next(s.message for s in sends if isinstance(s.message, Failed))
    assert isinstance(failed, Failed)
    assert (failed.stage, failed.request) == (1, 1)
    assert str(len(PROMPT) + 2) in failed.text
    assert not stage.requests
    give(stage, opened(), prompt())
    assert stage.requests[1].cache.prefix_length == len(PROMPT)


def test_the_queue_is_bounded():
    """A broken head cannot fill the stage's memory: the request fails instead."""
    stage = Stage(1, 1, stage_models(1)[0])
    for number in range(flowspec.stage.stage.MAX_QUEUED):
        assert stage.handle(rows(seq_no=number), 0.0) == ()
    (refusal,) = stage.handle(rows(), 0.0)
    assert isinstance(refusal.message, Failed)
    assert len(stage.queue) == flowspec.stage.stage.MAX_QUEUED


def test_close_frees_and_is_passed_on(first):
    """A failure travels in order with the data, so that no row of the request follows it."""
    sends = give(first, FinishRequest(request=1))
    assert sends == [Send(2, FinishRequest(request=1))]
    assert not first.requests
    assert give(first, FinishRequest(request=1)) == [Send(2, FinishRequest(request=1))]


def test_opening_twice_ends_the_request(first):
    """A second Open would lose the first one's cache silently."""
    (send,) = give(first, opened())
    assert (send.message.request, "already open" in send.message.text) == (1, True)
    assert not first.requests


def test_the_slowest_forward_of_the_way_is_told():
    """The head learns t(n) of the bottleneck from it, not of the last stage."""
    last = Stage(2, 2, stage_models(2)[1])
    hidden = torch.zeros(len(PROMPT), 32)
    sends = give(last, opened(), prompt(hidden=hidden, slowest_rows=40, slowest_ms=900.0))
    left = sends[-1].message
    assert (left.slowest_rows, left.slowest_ms) == (40, 900.0)
    (verdict,) = verdicts(sends)
    row = (ROOT, ROOT - 1, verdict.token)
    sends = give(last, rows(row, hidden=hidden[:1], slowest_ms=10.0))
    left = sends[-1].message
    assert (left.slowest_rows, left.slowest_ms) == (1, 500.0)


def test_the_whole_pipe_by_hand_equals_the_target_alone():
    """Two stages passed by hand, token by token: the cores need no driver at all."""
    one, two = (Stage(rank, 2, model) for rank, model in enumerate(stage_models(2), start=1))
    tokens: list[int] = []
    waiting = [opened(), prompt()]
    for node in range(ROOT, ROOT + 5):
        for message in waiting:
            for send in give(one, message):
                if send.to == 2:
                    (found,) = verdicts(give(two, send.message)) or [None]
        assert found is not None
        give(one, found)
        tokens.append(found.token)
        waiting = [rows((node, node - 1, found.token))]
    assert tuple(tokens) == GREEDY[:5]
