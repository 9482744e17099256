"""The tests that guard the protocol can fail: broken protocols are caught, each one of them.

Every mutation breaks one rule of stage, verifier, cache, head or tree. The harness runs the same
seeds with the rule in place (all pass) and broken (at least one is caught).
"""

from collections.abc import Callable, Iterator, Sequence

import pytest

import flowspec.stage.sampler
from flowspec.engine.engine import generate
from flowspec.head.head import Head
from flowspec.model.kv_cache import TreeKVCache
from flowspec.protocol.messages import FinishRequest, FreeRequest
from flowspec.request import ClusterError, NodeId
from flowspec.simulator.simulator import adversarial, instant_link, unit_work
from flowspec.stage.stage import Stage
from flowspec.stage.stage_request_state import StageRequestState
from flowspec.stage.verifier import Verifier
from tests.support.clusters import (
    check_empty,
    check_hidden_states,
    make_cluster,
    run_watched,
    whole_run,
)
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import PROMPT, T0, T1, request, truth

SCENARIOS = [  # seed of the delays (None: a regular clock), strategy, drafter
    (None, "streaming", "perfect"),
    (0, "streaming", "mixed"),
    (1, "flowspec", "perfect"),
    (2, "pipedec", "mixed"),
    (None, "pipedec", "perfect"),
    (4, "naive_pp", "mixed"),
    (5, "pruned_pp", "mixed"),
    (6, "streaming", "hostile"),
    (7, "flowspec", "mixed"),
]
CAUGHT = (AssertionError, ClusterError, KeyError, IndexError, RuntimeError)
NUM_TOKENS = 16
AUX_LAYERS = (1, 5, -1)
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def references() -> None:
    """The target's own tokens, keys and values, computed before anything is broken."""
    for sampling in (T0, T1):
        for layers in ((), AUX_LAYERS):
            whole_run(truth(PROMPT, sampling), layers)


def fault_of(seed: int | None, strategy: str, name: str, *, watched: bool) -> str:
    """Return the complaints of one run of the harness; empty if it finds nothing."""
    asked = request(sampling=T0 if seed is None else T1, max_new_tokens=NUM_TOKENS)
    drafter = ScriptedDrafter(SCRIPTS[name], seed=seed or 0, aux_hidden_state_layers=AUX_LAYERS)
    setup = {
        "num_stages": 3,
        "strategy": strategy,
        "drafter": drafter,
        "charges": (unit_work, instant_link) if seed is None else adversarial(seed),
    }
    try:
        if watched:
            completion, _ = run_watched(setup, asked)
            check_hidden_states(drafter.sessions[asked.id])
        else:
            cluster = make_cluster(**setup)
            completion = generate(cluster, asked)
            if completion.error is not None:
                return str(completion.error)
            check_empty(cluster)
    except CAUGHT as error:
        return f"{type(error).__name__}: {error}"
    own = truth(asked.prompt, asked.sampling)[len(asked.prompt) :][:NUM_TOKENS]
    return "" if completion.tokens == own else "mismatch"


def faults(*, watched: bool) -> Iterator[str]:
    """The complaints of all scenarios, one by one."""
    return (fault for case in SCENARIOS if (fault := fault_of(*case, watched=watched)))


# Mutations that the text alone betrays ----------------------------------------------------------


def forget_to_commit(patch: Patch) -> None:
    """The cache drops the accepted path instead of keeping it."""
    reroot = TreeKVCache.reroot
    patch.setattr(TreeKVCache, "reroot", lambda self, path, keep: reroot(self, [], keep))


def keep_only_children(patch: Patch) -> None:
    """A re-rooted stage keeps the root and its children and forgets the rest of the subtree."""
    reroot = StageRequestState.reroot

    def shallow(self, verdict):
        path = reroot(self, verdict)
        depth = self.tip_position + 2
        keep = [row for row in range(len(self.nodes)) if self.positions[row] <= depth]
        self.cache.reroot([], keep)
        for name in ("nodes", "parents", "tokens", "positions"):
            setattr(self, name, [getattr(self, name)[row] for row in keep])
        self.rows = {node: row for row, node in enumerate(self.nodes)}
        return path

    patch.setattr(StageRequestState, "reroot", shallow)


def see_siblings(patch: Patch) -> None:
    """Every tree row attends to all rows before it."""
    append = TreeKVCache.append_tree

    def wide(self, parents):
        metadata = append(self, parents)
        if metadata.mask is not None:
            metadata.mask[:] = True
            metadata.mask[:] = metadata.mask.tril(metadata.start)
        return metadata

    patch.setattr(TreeKVCache, "append_tree", wide)


def position_off_by_one(patch: Patch) -> None:
    """Tree rows are rotated to one position too far."""
    enter = StageRequestState.enter

    def late(self, segment):
        positions, parents = enter(self, segment)
        return (positions if parents is None else [p + 1 for p in positions]), parents

    patch.setattr(StageRequestState, "enter", late)


def walk_past_a_mismatch(patch: Patch) -> None:
    """The verifier takes any child where the true one was not drafted."""

    def walk(self):
        start = self.tip
        while True:
            found = {parent: node for (parent, _), node in self._children.items()}
            child = self._children.get((self.tip, self.next_token), found.get(self.tip))
            if child is None:
                break
            self.tip, self.next_token = child, self._choices[child]
        if self.tip == start:
            return False
        self._choices.clear()
        self._children.clear()
        return True

    patch.setattr(Verifier, "walk", walk)


def noise_of_another_position(patch: Patch) -> None:
    """The target's token is chosen with the noise that the drafter ranks the row itself by."""
    choose = flowspec.stage.sampler.choose

    def early(logits, positions, sampling, **row):
        return choose(logits, [position - 1 for position in positions], sampling, **row)

    patch.setattr(flowspec.stage.sampler, "choose", early)


def move_no_rows(patch: Patch) -> None:
    """Compaction renames the kept rows without moving their keys and values."""
    reroot = TreeKVCache.reroot

    def lazy(self, path, keep):
        keys, values = self.keys.clone(), self.values.clone()
        reroot(self, path, keep)
        self.keys.copy_(keys)
        self.values.copy_(values)

    patch.setattr(TreeKVCache, "reroot", lazy)


def believe_stale_verdicts(patch: Patch) -> None:
    """A stage applies verdicts in the order they come, not in the order of the text."""
    reroot = Stage._reroot

    def gullible(self, verdict):
        if verdict.request in self.requests:
            self.requests[verdict.request].verdict_position = -1
        return reroot(self, verdict)

    patch.setattr(Stage, "_reroot", gullible)


def head_believes_stale_verdicts(patch: Patch) -> None:
    """The head re-roots its tree by an older verdict, too."""
    reroot = Head._reroot

    def gullible(self, request, verdict, now):
        newest = request.verdict
        request.verdict = None
        sends = reroot(self, request, verdict, now)
        request.verdict = newest or request.verdict
        return sends

    patch.setattr(Head, "_reroot", gullible)


def drop_empty_segments(patch: Patch) -> None:
    """A stage swallows a segment whose rows are all dead."""
    hand_on = Stage._hand_on

    def swallow(self, parts):
        return hand_on(self, parts) if any(part.segment.nodes for part in parts) else []

    patch.setattr(Stage, "_hand_on", swallow)


def forget_deferred_verdicts(patch: Patch) -> None:
    """Rows verified without a verdict are forgotten before the verdict is due."""
    verdict = Stage._verdict

    def forgetful(self, state, segment):
        if not segment.verify:
            state.verifier._choices.clear()
            state.verifier._children.clear()
        return verdict(self, state, segment)

    patch.setattr(Stage, "_verdict", forgetful)


# Mutations that waste work or memory and leave the text alone -----------------------------------


def admit_everything(patch: Patch) -> None:
    """No in-flight filter: rows of dead and unknown parents are run like the others."""
    admit = lambda self, segment: list(range(len(segment.nodes)))  # noqa: E731
    patch.setattr(StageRequestState, "admit", admit)


def keep_dead_siblings(patch: Patch) -> None:
    """A stage that knows the verdict still runs the root's siblings."""

    def is_alive(self, parent: NodeId, token: int) -> bool:
        del token
        return parent == self.tip or parent in self.rows

    patch.setattr(StageRequestState, "is_alive", is_alive)


def never_close(patch: Patch) -> None:
    """The head forgets to tell the stages that a request is over."""
    finish = Head._finish

    def silent(self, request, reason, now, error=None):
        sends: Sequence = finish(self, request, reason, now, error)
        return [send for send in sends if not isinstance(send.message, FinishRequest | FreeRequest)]

    patch.setattr(Head, "_finish", silent)


def mix_up_hidden_states(patch: Patch) -> None:
    """The hidden states of a path are named from its end."""
    hidden_states = Stage._hidden_states

    def backwards(self, request, layer, nodes, hidden):
        return hidden_states(self, request, layer, nodes[::-1], hidden)

    patch.setattr(Stage, "_hidden_states", backwards)


SEEN_IN_THE_TEXT: Sequence[Callable[[Patch], None]] = (
    forget_to_commit,
    keep_only_children,
    see_siblings,
    position_off_by_one,
    walk_past_a_mismatch,
    noise_of_another_position,
    move_no_rows,
    believe_stale_verdicts,
    head_believes_stale_verdicts,
    forget_deferred_verdicts,
    drop_empty_segments,
)
SEEN_BY_INVARIANTS: Sequence[Callable[[Patch], None]] = (
    admit_everything,
    keep_dead_siblings,
    never_close,
    mix_up_hidden_states,
)


def test_the_unbroken_protocol_passes():
    """Otherwise the harness would catch anything."""
    assert list(faults(watched=True)) == []


@pytest.mark.parametrize("mutation", SEEN_IN_THE_TEXT)
def test_text_or_end_betrays(mutation, monkeypatch):
    """These break what the user sees; no look inside is needed."""
    mutation(monkeypatch)
    assert any(faults(watched=False))


@pytest.mark.parametrize("mutation", SEEN_BY_INVARIANTS)
def test_invariants_betray(mutation, monkeypatch):
    """These only waste rows or memory; what is checked on the way must see them."""
    mutation(monkeypatch)
    assert any(faults(watched=True))


def test_a_swallowed_segment_keeps_the_run_from_ending(monkeypatch):
    """One in, one out: the head waits for every segment it has sent."""
    drop_empty_segments(monkeypatch)
    assert any("nothing is left to do" in fault for fault in faults(watched=False))
