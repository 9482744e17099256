"""Drafters that are never asked, and drafters of whole subtrees: the text stays the target's."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

import pytest

from flowspec.engine.engine import generate_all
from flowspec.protocol.messages import DRAFTER, HEAD, DraftContext, DraftSubtree, Message
from flowspec.request import NodeId
from flowspec.runtime.core import Send, Step
from flowspec.simulator.simulator import adversarial
from flowspec.speculation.drafters.base import (
    Draft,
    DraftJob,
    NoDrafter,
    Proposed,
    Subtree,
)
from tests.support.clusters import check_empty, make_cluster
from tests.support.scripted import ScriptedDrafter, ScriptedSession, mixed, perfect
from tests.support.tiny import PROMPT, T0, T1, VOCAB, expected, request, truth

SPAN = 6  # tokens of a pushed chain


@dataclass(slots=True)
class PushingDrafter:
    """A core that pushes chains of true tokens with wrong branches beside them.

    It delivers some of them late, some twice, some for an epoch that is over, and some that make
    no sense any more.
    """

    seed: int = 0
    rank: int = DRAFTER
    texts: dict[int, list[int]] = field(default_factory=dict)
    late: list[DraftSubtree] = field(default_factory=list)
    contexts: list[DraftContext] = field(default_factory=list)
    random: Random = field(init=False)

    def __post_init__(self) -> None:
        self.random = Random(self.seed)

    def handle(self, message: Message, now: float) -> Sequence[Send]:
        """Answer every context with a subtree, and now and then with others."""
        del now
        assert isinstance(message, DraftContext), "a drafter hears of nothing else"
        self.contexts.append(message)
        text = self.texts.setdefault(message.request, [])
        assert message.position <= len(text), "no token was left out"
        text[message.position :] = message.tokens
        if message.is_over:
            return []
        fresh = self._subtree(message)
        sends = [fresh, *self.late] if self.random.random() < 0.5 else [fresh]
        self.late = [fresh] if self.random.random() < 0.5 else []
        if self.random.random() < 0.3:
            sends.append(fresh)  # twice
        if self.random.random() < 0.3:
            sends.append(replace(fresh, epoch=message.epoch + 7))  # of no epoch that is alive
        if self.random.random() < 0.3:
            sends.append(replace(fresh, request=message.request + 1000))
        if self.random.random() < 0.3:
            sends.append(replace(fresh, path=(VOCAB - 1,)))
        return [Send(HEAD, subtree) for subtree in sends]

    def _subtree(self, message: DraftContext) -> DraftSubtree:
        text = tuple(self.texts[message.request])
        whole = truth(PROMPT, T0 if message.request % 2 else T1)
        true = whole[len(text) : len(text) + SPAN]
        parents, tokens, logprobs = [], [], []
        above = -1
        for token in true:
            right = len(parents)
            parents += [above, above]
            tokens += [token, (token + 1) % VOCAB]
            logprobs += [-0.1, -2.0]
            above = right
        return DraftSubtree(
            epoch=message.epoch,
            request=message.request,
            position=len(text) - 1,
            parents=tuple(parents),
            tokens=tuple(tokens),
            logprobs=tuple(logprobs),
        )

    def poll(self, now: float) -> Step | None:
        """It has nothing to do but to answer."""
        del now
        return None


def pushed(seed: int, **setup):
    """A pipeline whose only drafter pushes."""
    core = PushingDrafter(seed)
    drafter = NoDrafter("pushed", pushes=True)
    return make_cluster(2, "streaming", drafter=drafter, beside=[core], **setup), core


@pytest.mark.parametrize("seed", range(4))
def test_pushed_drafts_change_the_speed_alone(seed):
    """Late, doubled and dead subtrees included; true guesses are accepted."""
    engine, core = pushed(seed)
    asked = [request(1, max_new_tokens=24), request(2, sampling=T1, max_new_tokens=24)]
    outputs = generate_all(engine, asked)
    assert [list(output.tokens) for output in outputs] == [expected(one) for one in asked]
    assert all(output.stats.mean_accepted_length > 1.5 for output in outputs)
    assert {context.request for context in core.contexts if context.is_over} == {1, 2}
    check_empty(engine)


@pytest.mark.parametrize("seed", range(12))
def test_pushed_drafts_under_any_timing(seed):
    """Whatever overtakes what."""
    engine, _ = pushed(seed, charges=adversarial(seed))
    asked = [request(1, max_new_tokens=16), request(2, sampling=T1, max_new_tokens=16)]
    outputs = generate_all(engine, asked)
    assert [list(output.tokens) for output in outputs] == [expected(one) for one in asked]
    check_empty(engine)


def test_a_strategy_that_draws_up_its_rounds_refuses_such_a_drafter():
    """It would wait for ever for a tree."""
    core, drafter = PushingDrafter(), NoDrafter("pushed", pushes=True)
    engine = make_cluster(2, "serial_pp", drafter=drafter, beside=[core])
    with pytest.raises(ValueError, match="drafts by itself.*ask for strategy streaming"):
        engine.submit(request())


class SubtreeDrafter(ScriptedDrafter):
    """Its one forward gives several levels below each node that it is asked about."""

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Begin with all jobs."""
        return SubtreeDraft(jobs)


class SubtreeDraft:
    """A forward of SubtreeDrafter."""

    looked_up = True

    def __init__(self, jobs: Sequence[DraftJob]) -> None:
        self.proposed: list[Proposed] = [self._of(job) for job in jobs]

    def _of(self, job: DraftJob) -> Proposed:
        session, tree = job.session, job.tree
        assert isinstance(session, ScriptedSession)
        nodes = list(job.nodes)
        if job.prefills:
            session.take_ready()
            nodes = [*([tree.root] if len(tree) else []), *nodes]
        start = tree.root.position if len(tree) else 0
        return [
            self._below(session, node.id, [one.token for one in tree.path(node.id)], start)
            for node in nodes
        ]

    def _below(
        self, session: ScriptedSession, node: NodeId, path: list[int], position: int
    ) -> Subtree:
        entries: list[tuple[int, int, float]] = []
        true = all(session.truth[position + i] == token for i, token in enumerate(path))
        at, above = position + len(path), -1
        for depth in range(3):
            token = session.truth[at + depth] if true and at + depth < len(session.truth) else None
            children = session.script(session.random, token, 3)
            first = len(entries)
            entries += [(above, child, logprob) for child, logprob in children]
            if not children:
                break
            above = first
            true = true and children[0][0] == token
        return Subtree(node, tuple(entries))

    def run(self) -> None:
        """Everything is known already."""

    def finish(self) -> list[Proposed]:
        """The subtrees of each job."""
        return self.proposed


@pytest.mark.parametrize("strategy", ["streaming", "serial_pp", "naive_pp", "flowspec", "pipedec"])
@pytest.mark.parametrize("script", [perfect, mixed])
def test_a_drafter_of_whole_subtrees(strategy, script):
    """Every strategy takes several levels at once."""
    engine = make_cluster(3, strategy, drafter=SubtreeDrafter(script))
    asked = [request(1), request(2, sampling=T1)]
    outputs = generate_all(engine, asked)
    assert [list(output.tokens) for output in outputs] == [expected(one) for one in asked]
    if script is perfect and strategy != "pipedec":
        assert outputs[0].stats.mean_accepted_length > 1.5
    check_empty(engine)


@pytest.mark.parametrize("seed", range(8))
def test_subtrees_under_any_timing(seed):
    """The text does not depend on it."""
    engine = make_cluster(2, drafter=SubtreeDrafter(mixed), charges=adversarial(seed))
    asked = [request(1), request(2, sampling=T1)]
    outputs = generate_all(engine, asked)
    assert [list(output.tokens) for output in outputs] == [expected(one) for one in asked]
