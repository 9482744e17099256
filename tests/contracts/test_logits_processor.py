"""The contract of logits processors; stages and the target alone apply the same ones.

The rows of the table, and two path processors: one forbids the token emitted two places before on
the node's own path, one makes tokens of the answer less likely and those of the prompt more likely.
"""

from dataclasses import dataclass, replace
from random import Random

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowspec.engine.engine import generate, generate_all
from flowspec.protocol.messages import AddRequest, Segment
from flowspec.request import NodeId, Request, SamplingParams
from flowspec.simulator.simulator import adversarial
from flowspec.speculation.processors import PROCESSORS, begin_path
from flowspec.speculation.processors.base import (
    LogitsFilter,
    PathProcessor,
    PathState,
    PathStates,
    StateChain,
)
from flowspec.speculation.strategies import STRATEGIES
from flowspec.speculation.tree import DraftTree
from flowspec.stage.sampler import Sampler
from tests.lossless.test_resume import cover, lose, serve
from tests.support.clusters import check_empty, make_cluster, run_watched
from tests.support.scripted import ScriptedDrafter, drafter_named, mixed
from tests.support.tiny import PROMPT, VOCAB, expected, request

LESS = 2.5  # by which a token's logit falls for each time that it was generated


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked(SamplingParams):
    """The fields that SamplingParams will have with such processors."""

    no_echo: bool = False
    penalty: float = 0.0


@dataclass(frozen=True, slots=True)
class NoEcho:
    """The last two tokens of a path; the first of them must not come again now."""

    last: tuple[int, ...]

    def fork(self, token: int) -> "NoEcho":
        """Return the state at a child."""
        return NoEcho((*self.last, token)[-2:])

    def apply(self, logits: Tensor) -> Tensor:
        """Return the processed logits."""
        if len(self.last) < 2:
            return logits
        changed = logits.clone()
        changed[self.last[0]] = float("-inf")
        return changed


@dataclass(frozen=True, slots=True)
class Penalty:
    """How often each token was generated, and which ones the prompt has: these are favoured."""

    by: float
    prompt: frozenset[int]
    counts: tuple[tuple[int, int], ...] = ()

    def fork(self, token: int) -> "Penalty":
        """Return the state at a child."""
        counts = dict(self.counts)
        counts[token] = counts.get(token, 0) + 1
        return Penalty(self.by, self.prompt, tuple(counts.items()))

    def apply(self, logits: Tensor) -> Tensor:
        """Return the processed logits."""
        changed = logits.clone()
        for token, count in self.counts:
            changed[token] -= self.by * count
        changed[list(self.prompt)] += self.by / 2
        return changed


NO_ECHO = PathProcessor(
    lambda s: getattr(s, "no_echo", False),
    lambda s, prompt: NoEcho(tuple(prompt[-2:])),
    "for these tests",
)
PENALTY = PathProcessor(
    lambda s: getattr(s, "penalty", 0.0) > 0.0,
    lambda s, prompt: Penalty(s.penalty, frozenset(prompt)),
    "for these tests",
)
EXTRA = {"no_echo": NO_ECHO, "penalty": PENALTY}
ASKED = (
    Asked(no_echo=True),
    Asked(penalty=LESS),
    Asked(no_echo=True, temperature=1.0, seed=9),
    Asked(penalty=LESS, no_echo=True, temperature=0.8, top_k=20, top_p=0.95, seed=3),
)
TRIGGERS = {  # what asks for a processor of the table
    "temperature": Asked(temperature=0.7),
    "top_k": Asked(temperature=1.0, top_k=5),
    "top_p": Asked(temperature=1.0, top_p=0.6),
    "min_p": Asked(temperature=1.0, min_p=0.2),
    "no_echo": Asked(no_echo=True),
    "penalty": Asked(penalty=LESS),
}
FILTERS = [name for name, row in PROCESSORS.items() if isinstance(row, LogitsFilter)]
PATHS = [*(n for n, row in PROCESSORS.items() if isinstance(row, PathProcessor)), *EXTRA]


@pytest.fixture(autouse=True)
def extra(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two more rows in the table: all that a new processor needs."""
    for name, row in EXTRA.items():
        monkeypatch.setitem(PROCESSORS, name, row)


def random_logits(num_rows: int, seed: int = 2) -> Tensor:
    """[n, V]."""
    return torch.randn(num_rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


# Contract ---------------------------------------------------------------------------------------


def test_every_row_of_the_table_is_tested() -> None:
    """A new one says here what asks for it."""
    assert TRIGGERS.keys() == PROCESSORS.keys()


@pytest.mark.parametrize("name", TRIGGERS)
def test_it_applies_where_it_is_asked_for(name: str) -> None:
    """SamplingParams decide, and the defaults ask for nothing at temperature 0."""
    row = PROCESSORS[name]
    assert row.applies(TRIGGERS[name])
    assert row.about
    if name != "temperature":  # which is 0 or not; filters are not asked for at 0
        assert not row.applies(SamplingParams())


@pytest.mark.parametrize("name", FILTERS)
def test_a_filter_keeps_the_likeliest_and_knows_no_other_row(name: str) -> None:
    """Rows may come together or one by one; the argument is not changed."""
    row, sampling, logits = PROCESSORS[name], TRIGGERS[name], random_logits(6)
    assert isinstance(row, LogitsFilter)
    before = logits.clone()
    out = row.apply(logits, sampling)
    assert torch.equal(logits, before)
    assert torch.equal(out.argmax(-1), logits.argmax(-1))
    assert not torch.equal(out, logits), "it does nothing where it applies"
    for place in range(len(logits)):
        assert torch.equal(row.apply(logits[place : place + 1], sampling)[0], out[place])


@pytest.mark.parametrize("name", PATHS)
def test_a_state_follows_from_its_path_alone(name: str) -> None:
    """Forked on any way through the tree, it is what a fresh start over the same tokens gives."""
    row, sampling, random = PROCESSORS[name], TRIGGERS[name], Random(4)
    assert isinstance(row, PathProcessor)
    states = {(): row.begin(sampling, PROMPT)}
    for _ in range(40):  # a tree in random order; siblings share their parent's state
        path = random.choice(list(states))
        token = random.choice([3, 7, 9, random.randrange(VOCAB)])
        states[(*path, token)] = states[path].fork(token)
    logits, changed = random_logits(1)[0], 0
    for path, state in states.items():
        fresh: PathState = row.begin(sampling, PROMPT)
        for token in path:
            fresh = fresh.fork(token)
        before = logits.clone()
        out = state.apply(logits)
        assert torch.equal(logits, before), "the argument was changed"
        assert torch.equal(out, fresh.apply(logits))
        assert out.isfinite().any()
        changed += not torch.equal(out, logits)
    assert changed, "it does nothing where it applies"


# States of a tree -------------------------------------------------------------------------------


def test_states_on_the_head_are_those_on_the_last_stage() -> None:
    """A drafter can follow the tree's paths; after a verdict both go on from the new root."""
    sampling, random, tree = ASKED[3], Random(6), DraftTree()
    ids = [tree.new_id() for _ in PROMPT]
    begun = begin_path(sampling, PROMPT)
    assert begun is not None
    assert isinstance(begun, StateChain)
    head, stage, text = PathStates(begun), PathStates(begun), list(PROMPT)
    logits = random_logits(1)[0]
    root = tree.plant(ids[-1], 5, len(PROMPT))
    stage.enter(root.id, ids[-1], root.token)
    for _ in range(12):
        for _ in range(6):
            above = random.choice(list(tree.nodes.values()))
            (node,) = tree.extend(above, [(random.randrange(VOCAB), -1.0)])
            stage.enter(node.id, above.id, node.token)
        for node in tree.nodes.values():
            path = [(one.id, one.token) for one in tree.path(node.id)]
            wanted = begin_path(sampling, PROMPT, [*text[len(PROMPT) :], *(t for _, t in path)])
            assert wanted is not None
            for states in (head.follow(path), stage.at(node.id)):
                assert torch.equal(states.apply(logits), wanted.apply(logits))
        parent = random.choice(list(tree.nodes.values()))
        path, _ = tree.reroot(parent.id, random.randrange(VOCAB))
        text += [one.token for one in path]
        known = tree.root.id in stage._nodes
        head.reroot(parent.id, tree.nodes)
        stage.reroot(parent.id, tree.nodes)
        if not known:
            stage.enter(tree.root.id, parent.id, tree.root.token)
        assert len(stage) == len(tree)
        assert len(head) <= len(tree)


def test_a_request_without_a_state_keeps_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """No state and no work per row: nothing is begun, entered or looked up."""

    def forbidden(*values: object) -> None:
        raise AssertionError("a request without a path processor pays for one")

    for name in ("__init__", "enter", "at", "reroot"):
        monkeypatch.setattr(PathStates, name, forbidden)
    for sampling in (SamplingParams(), SamplingParams(temperature=1.0, top_k=5, seed=2)):
        assert begin_path(sampling, PROMPT) is None
        asked = request(sampling=sampling, max_new_tokens=8)
        completion, _ = run_watched({"num_stages": 2, "strategy": "streaming"}, asked)
        assert list(completion.tokens) == expected(asked)


# The same text as the target alone --------------------------------------------------------------


def setup_of(asked: Request, seed: int, name: str = "mixed") -> dict:
    """A drafter that knows the processed text, on a clock that reorders everything."""
    drafter = (
        ScriptedDrafter(mixed, seed=seed, true=(*asked.prompt, *expected(asked)))
        if name == "mixed"
        else drafter_named(name, seed=seed)
    )
    return {"drafter": drafter, "charges": adversarial(seed)}


@pytest.mark.parametrize("sampling", ASKED, ids=["echo", "penalty", "echo-T1", "all"])
def test_the_processors_change_the_text(sampling: Asked) -> None:
    """Else equality with the target alone would say nothing; and they do what they say."""
    asked = request(sampling=sampling, max_new_tokens=24)
    tokens = expected(asked)
    plain = replace(sampling, no_echo=False, penalty=0.0)
    assert tokens != expected(replace(asked, sampling=plain))
    if sampling.no_echo:
        text = [*PROMPT[-2:], *tokens]
        assert all(a != b for a, b in zip(text, text[2:], strict=False))


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("sampling", ASKED, ids=["echo", "penalty", "echo-T1", "all"])
def test_every_strategy_says_what_the_target_alone_says(strategy: str, sampling: Asked) -> None:
    """Trees, verdicts and dead rows: each row is processed by its own path."""
    asked = request(sampling=sampling, max_new_tokens=16)
    setup = {**setup_of(asked, len(strategy)), "num_stages": 3, "strategy": strategy}
    completion, _ = run_watched(setup, asked)
    assert list(completion.tokens) == expected(asked)


@pytest.mark.slow
@settings(
    max_examples=40,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(
    sampling=st.sampled_from(ASKED),
    strategy=st.sampled_from(sorted(STRATEGIES)),
    drafter=st.sampled_from(["mixed", "hostile", "ngram", "eagle"]),
    num_stages=st.integers(1, 5),
    chunk=st.integers(1, 12),
    merge=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_any_order_of_events_gives_the_targets_text(
    sampling, strategy, drafter, num_stages, chunk, merge, seed
) -> None:
    """Verdicts may overtake segments or trail far behind them."""
    asked = request(sampling=sampling, max_new_tokens=14)
    setup = {**setup_of(asked, seed, drafter), "num_stages": num_stages, "strategy": strategy}
    completion, _ = run_watched({**setup, "chunked_prefill_size": chunk, "merge": merge}, asked)
    assert list(completion.tokens) == expected(asked)


@pytest.mark.parametrize("strategy", ["ar", "flowspec", "streaming"])
@pytest.mark.parametrize("sampling", ASKED, ids=["echo", "penalty", "echo-T1", "all"])
def test_a_prefix_that_is_used_again_counts_as_prompt(strategy: str, sampling: Asked) -> None:
    """A next turn begins with an answer, which is prompt now; the turn before had no processor."""
    for first_has_none in (False, True):
        cluster = make_cluster(
            3,
            strategy,
            drafter=drafter_named("ngram"),
            charges=adversarial(9),
            limits={"max_cached": 2},
        )
        before = replace(sampling, no_echo=False, penalty=0.0) if first_has_none else sampling
        said: tuple[int, ...] = PROMPT
        for turn in range(3):
            asked = request(turn + 1, prompt=said, sampling=sampling if turn else before)
            completion = generate(cluster, asked)
            assert list(completion.tokens) == expected(asked)
            assert (completion.stats.num_prompt_reused > 0) == (turn > 0)
            said = (*said, *completion.tokens, turn, 7, 3)


@pytest.mark.parametrize("strategy", ["ar", "serial_pp", "streaming"])
@pytest.mark.parametrize("at", [26, 71, 90])
@pytest.mark.parametrize("sampling", [ASKED[1], ASKED[3]], ids=["penalty", "all"])
def test_an_answer_goes_on_after_a_stage_is_lost(strategy: str, at: int, sampling: Asked) -> None:
    """Its beginning comes as prompt then, and is still an answer to the processors."""
    cluster = make_cluster(3, strategy, drafter=drafter_named("ngram"))

    def fault() -> None:
        lose(cluster, 2)
        cover(cluster, 3, 2)

    asked = [request(n, prompt=PROMPT[n:], sampling=sampling, max_new_tokens=20) for n in (1, 2)]
    done = serve(cluster, asked, {at: fault, at + 45: fault})
    for one in asked:
        assert list(done[one.id].tokens) == expected(one)
    assert max(completion.stats.num_resumes for completion in done.values()) == 2
    check_empty(cluster)


def test_a_processor_that_fails_ends_its_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it raises, wherever; the request beside it goes on."""
    for name in ("fork", "apply"):
        with monkeypatch.context() as patch:

            def broken(self: NoEcho, value: object) -> None:
                raise KeyError("no such rule in the grammar")

            patch.setattr(NoEcho, name, broken)
            good = request(1, sampling=SamplingParams(temperature=1.0, seed=4))
            bad = request(2, sampling=ASKED[0])
            cluster = make_cluster(2, "streaming", drafter=drafter_named("ngram"))
            done = generate_all(cluster, [good, bad])
            assert list(done[0].tokens) == expected(good)
            assert "no such rule in the grammar" in str(done[1].error)
            check_empty(cluster)


def test_the_sampler_keeps_what_a_later_request_needs() -> None:
    """Committed tokens, also of a request that has no processor; states of alive rows only."""
    opened = AddRequest(request=1, capacity=64, context=64, sampling=ASKED[0], num_prompt_tokens=2)
    sampler = Sampler(opened)
    sampler.extend([5, 6], is_end=False)
    assert sampler.num_states == 0
    sampler.extend([7], is_end=True)
    rows = Segment(
        request=1,
        seq_no=1,
        nodes=(NodeId(3), NodeId(4), NodeId(5)),
        parents=(NodeId(2), NodeId(3), NodeId(2)),
        tokens=(8, 9, 10),
    )
    sampler.enter(rows)
    assert sampler.num_states == 3
    sampler.reroot([8], NodeId(3), [NodeId(4)])
    assert sampler.num_states == 1
    assert sampler.tokens == [5, 6, 7, 8]
    again = Sampler(replace(opened, reuse=1, num_cached_tokens=3), sampler.tokens[:3])
    assert again.tokens == [5, 6, 7]
