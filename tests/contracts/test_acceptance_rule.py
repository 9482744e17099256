"""The contract of acceptance rules: a choice follows from the row and what was sent with it.

The rows of the table, and one more: it takes the first candidate that a coin of its own noise
accepts, else a sample of the target. Such a rule's text depends on the schedule; equality with the
target alone is asked of exact rules, and of the others that the same schedule gives the same text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flowspec.cost_model.emulation import load_emulation
from flowspec.engine.engine import generate
from flowspec.protocol.messages import (
    MAX_CANDIDATES,
    MAX_SUPPORT,
    AddRequest,
    Candidates,
    Message,
    Segment,
    segments_of,
)
from flowspec.request import NO_NODE, NodeId, Request, SamplingParams
from flowspec.runtime.core import Core
from flowspec.simulator.simulator import adversarial
from flowspec.speculation.acceptance import RULES, choose, find_rule, gumbel_coupled, rule_of
from flowspec.speculation.acceptance.base import AcceptanceRule, CandidateNeeds
from flowspec.speculation.acceptance.candidates import candidates_of
from flowspec.speculation.acceptance.noise import NoiseStream, uniforms
from flowspec.speculation.drafters.base import Proposal
from flowspec.speculation.processors import warp
from flowspec.speculation.strategies import STRATEGIES
from flowspec.speculation.tree import DraftTree
from flowspec.stage.verifier import Verifier
from tests.lossless.test_resume import cover, lose, serve
from tests.support.clusters import Watch, check_empty, make_cluster, run_watched
from tests.support.models import full_forward
from tests.support.scripted import ScriptedDrafter, ScriptedSession, drafter_named, mixed
from tests.support.tiny import PROMPT, VOCAB, expected, request, whole_model

EAGER = 0.5  # a coin takes a candidate with this chance and its probability together


def flip(
    logits: Tensor, positions: Sequence[int], seed: int, candidates: Sequence[Candidates]
) -> list[int]:
    """The first candidate whose coin accepts it; the target's own sample where none does."""
    found = gumbel_coupled.choose(logits, positions, seed, candidates)
    chances = logits.softmax(-1)
    for row, (position, sent) in enumerate(zip(positions, candidates, strict=True)):
        coins = uniforms(seed, position, len(sent.tokens), NoiseStream.ACCEPT)
        for coin, token in zip(coins, sent.tokens, strict=True):
            chance = float(chances[row, token])
            if chance > 0.0 and coin < EAGER + chance:
                found[row] = token
                break
    return found


COIN = AcceptanceRule(flip, CandidateNeeds.TOKENS, is_exact=False, about="for these tests")
ALL = (*RULES, "coin")
EXACT = [name for name, rule in RULES.items() if rule.is_exact]
SAMPLED = SamplingParams(temperature=1.0, top_k=12, seed=21)


@pytest.fixture(autouse=True)
def coin(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more row in the table: all that a new rule needs."""
    monkeypatch.setitem(RULES, "coin", COIN)


def sampling_of(rule: str, **changes: float) -> SamplingParams:
    """SAMPLED by that rule."""
    return replace(SAMPLED, acceptance=rule, **changes)


def logits_of(num_rows: int) -> Tensor:
    """[n, V]."""
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(8)) * 2


def run_seen(setup: Mapping[str, Any], asked: Request) -> tuple[list[int], list[Message]]:
    """The tokens, and all that stage 1 was given; what holds for any text is checked on the way."""
    watches: list[Watch] = []

    def wrap(core: Core) -> Core:
        watches.append(Watch(core))
        return watches[-1]

    cluster = make_cluster(**setup, wrap=wrap)
    completion = generate(cluster, asked)
    assert not completion.error
    check_empty(cluster)
    return list(completion.tokens), watches[1].seen


# Contract ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ALL)
def test_a_choice_is_a_function_of_the_row(name: str) -> None:
    """No other row, no call before and no other noise changes it; filtered tokens never come."""
    sampling, logits = sampling_of(name), logits_of(40)
    positions = [30 + row // 2 for row in range(40)]
    allowed = warp(logits, sampling).isfinite()
    sent = [Candidates(tuple((5 * row + 3 * k) % VOCAB for k in range(6))) for row in range(40)]
    together = choose(logits, positions, sampling, candidates=sent)
    torch.manual_seed(1)
    for row in reversed(range(40)):
        one = choose(
            logits[row : row + 1],
            positions[row : row + 1],
            sampling,
            candidates=sent[row : row + 1],
        )
        assert one == [together[row]]
        assert allowed[row, together[row]]
    other = choose(logits, positions, replace(sampling, seed=22), candidates=sent)
    assert (other == together) == (name == "greedy"), "the seed is the key of its noise"


@pytest.mark.parametrize("name", ALL)
def test_candidates_count_where_a_rule_asks_for_them(name: str) -> None:
    """An exact rule chooses the same whatever was drafted; a row without any is a plain sample."""
    sampling, logits, positions = sampling_of(name), logits_of(40), range(40)
    bare = choose(logits, positions, sampling)
    sent = [Candidates(tuple(range(VOCAB)))] * 40
    with_all = choose(logits, positions, sampling, candidates=sent)
    assert (bare == with_all) == find_rule(name).is_exact
    if name != "greedy":
        assert bare == choose(logits, positions, SAMPLED)
    assert choose(logits, positions, sampling, candidates=[Candidates()] * 40) == bare


@pytest.mark.parametrize("name", ALL)
def test_temperature_0_is_greedy_by_any_rule(name: str) -> None:
    """There is no distribution left to choose from."""
    sampling, logits = sampling_of(name, temperature=0.0), logits_of(5)
    assert rule_of(sampling) is RULES["greedy"]
    sent = [Candidates((1, 2, 3))] * 5
    assert choose(logits, range(5), sampling, candidates=sent) == logits.argmax(-1).tolist()


def test_streams_of_noise_are_apart() -> None:
    """A coin says nothing of the target's sample; the first numbers do not depend on the count."""
    numbers = {stream: uniforms(7, 3, 4000, stream) for stream in NoiseStream}
    for stream, own in numbers.items():
        assert 0.0 < own.min() <= own.max() < 1.0
        assert (uniforms(7, 3, 5, stream) == own[:5]).all()
        assert abs(own.mean() - 0.5) < 0.03  # 6 sigma
        for other in NoiseStream:
            if other is not stream:
                distance = abs((own - 0.5) @ (numbers[other] - 0.5)) / 4000 * 12
                assert distance < 0.1, f"{stream} and {other} go together"
    assert not (uniforms(7, 4, 8, NoiseStream.ACCEPT) == numbers[NoiseStream.ACCEPT][:8]).any()
    assert not (uniforms(8, 3, 8, NoiseStream.ACCEPT) == numbers[NoiseStream.ACCEPT][:8]).any()


# Candidates on rows -----------------------------------------------------------------------------


def test_candidates_are_the_children_in_their_order() -> None:
    """Candidates are fixed when the row is sent, and only as far as the rule needs them."""
    tree = DraftTree()
    root = tree.plant(NO_NODE, 4, 0)
    tree.extend(root, [(9, -2.0), (3, -0.1), (7, -1.0)])
    root.drawn_from = ((3, 0.5), (9, 0.25), (7, 0.25))
    nodes = [root, tree.nodes[root.children[3]]]
    sent = candidates_of(sampling_of("coin"), nodes)
    assert sent == (Candidates((9, 3, 7)), Candidates())
    tree.extend(root, [(8, -0.5)])
    assert sent[0].tokens == (9, 3, 7)
    for name in RULES:
        if find_rule(name).needs is CandidateNeeds.NOTHING:
            assert candidates_of(sampling_of(name), nodes) == ()
    assert candidates_of(sampling_of("coin", temperature=0.0), nodes) == ()


def test_what_candidates_were_drawn_from_goes_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """The distribution travels if a rule needs it, with bounds."""
    monkeypatch.setitem(RULES, "coin", replace(COIN, needs=CandidateNeeds.DISTRIBUTION))
    tree = DraftTree()
    root = tree.plant(NO_NODE, 4, 0)
    tree.extend(root, [(token, -1.0) for token in range(MAX_CANDIDATES + 3)])
    root.drawn_from = tuple((token, 1 / MAX_SUPPORT) for token in range(MAX_SUPPORT))
    (sent,) = candidates_of(sampling_of("coin"), [root])
    assert sent == Candidates(tuple(range(MAX_CANDIDATES)), root.drawn_from)
    root.drawn_from = (*root.drawn_from, (0, 0.0))
    with pytest.raises(ValueError, match="drawn from 1025 tokens, at most 1024 are allowed"):
        candidates_of(sampling_of("coin"), [root])


def test_rows_take_their_candidates_along() -> None:
    """The selected rows keep their candidates."""
    sent = (Candidates((1, 2)), Candidates(), Candidates((3,)))
    ids = (NodeId(5), NodeId(6), NodeId(7))
    rows = Segment(request=1, seq_no=0, nodes=ids, parents=ids, tokens=(1, 2, 3), candidates=sent)
    assert rows.select([0, 2]).candidates == (sent[0], sent[2])
    assert replace(rows, candidates=()).select([0, 2]).candidates == ()


def test_an_emulated_link_charges_for_candidates() -> None:
    """Candidates cost link time like the rest of a row; a row without any costs as before."""
    emulation = load_emulation("jetson-5", "vicuna-7b", drafter="ngram")
    ids = (NodeId(5), NodeId(6))
    bare = Segment(request=1, seq_no=0, nodes=ids, parents=ids, tokens=(1, 2))
    more = replace(bare, candidates=(Candidates((1, 2, 3), ((1, 0.5), (2, 0.5))), Candidates()))
    assert emulation.message_bytes(bare) == 64 + 2 * 20
    assert emulation.message_bytes(more) == 64 + 2 * 20 + 3 * 4 + 2 * 12


class Drawn(ScriptedDrafter):
    """Says what its children were drawn from."""

    def open(self, opening):  # type: ignore[no-untyped-def]
        """Open a session that draws its children."""
        session = super().open(opening)
        session.__class__ = DrawnSession
        return session


class DrawnSession(ScriptedSession):
    """Draft children that were drawn."""

    def _propose(self, node, tree):  # type: ignore[no-untyped-def]
        found = super()._propose(node, tree)
        even = tuple((token, 1 / len(found.children)) for token, _ in found.children)
        return Proposal(found.node, found.children, drawn_from=even)


@pytest.mark.parametrize("needs", CandidateNeeds)
def test_rows_carry_what_the_rule_asks_for(
    needs: CandidateNeeds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Candidates come from the drafter's proposal to the last stage."""
    seen: list[Candidates] = []

    def look(logits, positions, seed, candidates):  # type: ignore[no-untyped-def]
        seen.extend(candidates)
        return flip(logits, positions, seed, candidates or [Candidates()] * len(positions))

    monkeypatch.setitem(RULES, "coin", replace(COIN, choose=look, needs=needs))
    asked = request(sampling=sampling_of("coin"), max_new_tokens=12)
    setup = {"num_stages": 2, "strategy": "serial_pp", "drafter": Drawn(mixed)}
    _, messages = run_seen(setup, asked)
    rows = [s for m in messages for s in segments_of(m) if not s.prefix]
    assert rows
    for segment in rows:
        assert len(segment.candidates) == (
            0 if needs is CandidateNeeds.NOTHING else len(segment.nodes)
        )
    given = [one for one in seen if one.tokens]
    assert bool(given) == (needs is not CandidateNeeds.NOTHING)
    for one in given:
        tokens = {token for token, _ in one.drawn_from}
        assert tokens >= set(one.tokens) if needs is CandidateNeeds.DISTRIBUTION else not tokens


# Whole answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("name", EXACT)
def test_an_exact_rule_says_what_the_target_alone_says(name: str, strategy: str) -> None:
    """Token for token, in any order of events."""
    asked = request(sampling=sampling_of(name), max_new_tokens=14)
    drafter = ScriptedDrafter(mixed, seed=3, true=(*PROMPT, *expected(asked)))
    setup = {"num_stages": 3, "strategy": strategy, "drafter": drafter}
    completion, _ = run_watched({**setup, "charges": adversarial(len(strategy))}, asked)
    assert list(completion.tokens) == expected(asked)


def play(strategy: str, seed: int, *, merge: bool = False) -> tuple[list[int], list[str]]:
    """One answer by the coin under a schedule: its tokens, and all that stage 1 was sent."""
    asked = request(sampling=sampling_of("coin"), max_new_tokens=20)
    setup = {"num_stages": 3, "strategy": strategy, "drafter": drafter_named("mixed", seed=4)}
    tokens, messages = run_seen({**setup, "charges": adversarial(seed), "merge": merge}, asked)
    return tokens, [str(message) for message in messages]


@pytest.mark.parametrize("strategy", [name for name, spec in STRATEGIES.items() if spec.drafts])
def test_the_same_schedule_gives_the_same_text(strategy: str) -> None:
    """Whatever was computed before; another schedule may give another text, and that has an end."""
    for seed in range(3):
        tokens, messages = play(strategy, seed, merge=seed == 2)
        choose(logits_of(3), range(3), sampling_of("coin"))
        assert play(strategy, seed, merge=seed == 2) == (tokens, messages)
        assert len(tokens) == 20


def test_the_schedule_matters_to_the_coin() -> None:
    """Else the replay would show nothing."""
    assert len({tuple(play("streaming", seed)[0]) for seed in range(8)}) > 1
    assert play("ar", 1)[0] == expected(request(sampling=SAMPLED, max_new_tokens=20))


def test_later_children_change_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row's choice is that of its path and its candidates, though children came after it."""
    chosen: dict[int, int] = {}
    observe = Verifier.observe

    def watched(self, nodes, parents, tokens, choices):  # type: ignore[no-untyped-def]
        chosen.update(zip(nodes, choices, strict=True))
        observe(self, nodes, parents, tokens, choices)

    monkeypatch.setattr(Verifier, "observe", watched)
    num_late = num_checked = 0
    for seed in range(4):
        chosen.clear()
        asked = request(sampling=sampling_of("coin"), max_new_tokens=20)
        drafter = drafter_named("mixed", seed=seed)
        setup = {"num_stages": 3, "strategy": "streaming", "drafter": drafter, "merge": True}
        _, messages = run_seen({**setup, "charges": adversarial(seed)}, asked)
        texts: dict[int, tuple[int, ...]] = {-1: ()}
        sent: dict[int, Candidates] = {}
        for segment in (s for m in messages for s in segments_of(m)):
            columns = (segment.nodes, segment.parents, segment.tokens)
            for row, (node, parent, token) in enumerate(zip(*columns, strict=True)):
                texts[node] = (*texts[parent], token)
                if not segment.prefix:
                    sent[node] = segment.candidates[row]
                    num_late += parent in sent and token not in sent[parent].tokens
        for node, token in chosen.items():
            assert token == alone(texts[node], asked.sampling, sent[node])
            num_checked += 1
    assert num_checked > 100
    assert num_late > 5, "no child came after its parent had been sent"


def alone(text: Sequence[int], sampling: SamplingParams, sent: Candidates) -> int:
    """The choice after a text that is run from nothing."""
    model = whole_model()
    logits = model.logits(full_forward(model, text)[0][-1:])
    return choose(logits, [len(text)], sampling, candidates=[sent])[0]


@pytest.mark.parametrize("at", [40, 71])
def test_an_answer_goes_on_after_a_stage_is_lost(at: int) -> None:
    """Accepted tokens stay; the rest is chosen by the rows of the new schedule."""
    texts = []
    for fails in (False, True, True):
        cluster = make_cluster(3, "streaming", drafter=drafter_named("mixed", seed=2))

        def fault(cluster=cluster, fails=fails) -> None:  # type: ignore[no-untyped-def]
            if fails:
                lose(cluster, 2)
                cover(cluster, 3, 2)

        asked = request(1, sampling=sampling_of("coin"), max_new_tokens=20)
        done = serve(cluster, [asked], {at: fault})[1]
        texts.append(done.tokens)
        assert done.stats.num_resumes == int(fails)
        assert len(done.tokens) == 20
        check_empty(cluster)
    assert texts[1] == texts[2]
    assert texts[0][:2] == texts[1][:2]


def test_an_unknown_rule_is_refused_with_the_known_names() -> None:
    """A stage and the target alone refuse it, also at temperature 0."""
    asked = request(sampling=SamplingParams(acceptance="wish"))
    completion = generate(make_cluster(2), asked)
    assert "unknown acceptance rule 'wish'; known: gumbel_coupled, greedy" in str(completion.error)
    with pytest.raises(ValueError, match="unknown acceptance rule 'wish'"):
        expected(asked)
    assert AddRequest(request=1, capacity=1, context=1).sampling.acceptance == "gumbel_coupled"
