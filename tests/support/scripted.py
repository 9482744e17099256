"""Scripted drafters that are always right, always wrong or in between."""

from collections.abc import Callable, Mapping, Sequence
from random import Random
from typing import TypeAlias

from torch import Tensor

from flowspec.request import Request
from flowspec.speculation.drafters.base import Drafter, Opening, Proposal
from flowspec.speculation.drafters.ngram.drafter import NgramDrafter
from flowspec.speculation.tree import DraftTree, Node
from tests.support.lookups import CountingSession, LookupDrafter
from tests.support.tiny import VOCAB, truth
from tests.support.tiny_drafters import MODEL_DRAFTERS, model_drafter

# (random source, the true next token or None off the true path, draft_topk) -> children, best first
Script: TypeAlias = Callable[[Random, int | None, int], list[tuple[int, float]]]


def perfect(random: Random, true: int | None, draft_topk: int) -> list[tuple[int, float]]:
    """The true token first, and a decoy or two."""
    decoys = [(random.randrange(VOCAB), -3.0 - i) for i in range(min(2, draft_topk - 1))]
    first = random.randrange(VOCAB) if true is None else true
    return [(first, -0.05), *(decoy for decoy in decoys if decoy[0] != first)]


def hostile(random: Random, true: int | None, draft_topk: int) -> list[tuple[int, float]]:
    """Always wrong, sure of it, in deep chains, with doubled and nearly impossible children."""
    wrong = [token for token in random.sample(range(VOCAB), 4) if token != true][:3]
    children = [(wrong[0], 0.0), (wrong[0], -0.1), (wrong[1], -1e9), (wrong[2], -0.7)]
    return children[: max(1, min(draft_topk, random.randint(0, 4)))]


def mixed(random: Random, true: int | None, draft_topk: int) -> list[tuple[int, float]]:
    """Right about two times in three, at any rank; sometimes nothing at all."""
    tokens = random.sample(range(VOCAB), min(draft_topk, random.randint(0, 4)))
    if true is not None and random.random() < 0.66:
        tokens = [*(token for token in tokens if token != true), true][-draft_topk:]
    random.shuffle(tokens)
    scores = sorted((-random.expovariate(1.0) for _ in tokens), reverse=True)
    return list(zip(tokens, scores, strict=True))


SCRIPTS: Mapping[str, Script] = {"perfect": perfect, "hostile": hostile, "mixed": mixed}


class ScriptedDrafter(LookupDrafter):
    """Proposes what its script returns; records the hidden states that it is given."""

    def __init__(
        self,
        script: Script,
        *,
        aux_hidden_state_layers: tuple[int, ...] = (),
        seed: int = 0,
        true: tuple[int, ...] = (),
    ) -> None:
        self.name = "scripted"
        self.script = script
        self.aux_hidden_state_layers = aux_hidden_state_layers
        self.seed = seed
        self.true = true  # the true text, if it is not the tiny model's
        self.sessions: dict[int, ScriptedSession] = {}

    def open(self, opening: Opening) -> "ScriptedSession":
        """A session that reuses what an earlier one was given."""
        request, reuse, num_cached_tokens = (
            opening.request,
            opening.reuse,
            opening.num_cached_tokens,
        )
        session = ScriptedSession(self, request, opening.draft_topk)
        if num_cached_tokens:
            assert isinstance(reuse, ScriptedSession)
            assert num_cached_tokens <= reuse.num_reusable
            assert tuple(reuse.tokens[:num_cached_tokens]) == request.prompt[:num_cached_tokens]
            for layer, hidden_states in reuse.hidden_states.items():
                session.hidden_states[layer] = {
                    p: hidden_states[p] for p in range(num_cached_tokens)
                }
        self.sessions[request.id] = session
        return session


class ScriptedSession(CountingSession):
    """One request; `hidden_states[layer][position]` holds what came in, each position once."""

    def __init__(self, drafter: ScriptedDrafter, request: Request, draft_topk: int) -> None:
        super().__init__()
        self.script, self.draft_topk = drafter.script, draft_topk
        self.random = Random(drafter.seed)
        self.truth = drafter.true or truth(request.prompt, request.sampling)
        self.hidden_states: dict[int, dict[int, Tensor]] = {
            n: {} for n in drafter.aux_hidden_state_layers
        }

    @property
    def num_reusable(self) -> int:
        """Positions as far as the hidden states of every layer have come."""
        most = len(self.tokens)
        for hidden_states in self.hidden_states.values():
            most = next((p for p in range(most) if p not in hidden_states), most)
        return most

    def accept_hidden_states(self, layer: int, hidden_states: Mapping[int, Tensor]) -> None:
        """Remember hidden states by layer and position."""
        doubled = self.hidden_states[layer].keys() & hidden_states.keys()
        assert not doubled, (
            f"layer {layer}: hidden states of positions {sorted(doubled)} came twice"
        )
        self.hidden_states[layer].update(hidden_states)

    def prefill(self, tree: DraftTree) -> Proposal | None:
        """Take the due rows; propose children of the root, if there is one."""
        self.take_ready()
        return self._propose(tree.root, tree) if len(tree) else None

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """Propose children of each node."""
        assert nodes, "an expansion of nothing"
        return [self._propose(node, tree) for node in nodes]

    def _propose(self, node: Node, tree: DraftTree) -> Proposal:
        path = tree.path(node.id)
        true = all(self._at(above.position) == above.token for above in path)
        token = self._at(node.position + 1) if true else None
        return Proposal(node.id, tuple(self.script(self.random, token, self.draft_topk)))

    def _at(self, position: int) -> int | None:
        return self.truth[position] if position < len(self.truth) else None


def drafter_named(name: str, *, seed: int = 0) -> Drafter:
    """Return `ngram`, one of MODEL_DRAFTERS, or one of SCRIPTS."""
    if name == "ngram":
        return NgramDrafter()
    if name in MODEL_DRAFTERS:
        return model_drafter(name)
    return ScriptedDrafter(SCRIPTS[name], seed=seed)
