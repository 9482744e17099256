"""A target and a drafter of whole numbers: equal on every machine, to the last bit.

The next token is a function of a token and its position. A hidden state is that pair, and logits
are one at the next token and zero elsewhere, so no sum is ever rounded. The drafter knows the
function, and a rule decides where it is wrong. Scores are eighths, so their sums are exact.
"""

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from flowspec.model.backend import RequestRows
from flowspec.model.kv_cache import TreeKVCache
from flowspec.speculation.drafters.base import Opening, Proposal
from flowspec.speculation.tree import DraftTree, Node
from flowspec.weights.split_plan import even_layers
from tests.support.lookups import CountingSession, LookupDrafter
from tests.support.tiny import CONFIG, VOCAB

HIDDEN_LAYERS = (1, 5, -1)  # layers that the drafter reads; -1: after the last norm
MISS_EVERY = 9  # at every ninth position, the drafter does not know the token


def next_token(token: int, position: int) -> int:
    """Return the target's token after `token` at `position`."""
    return (7 * token + 3 * position + 5) % VOCAB


class IntegerStage:
    """A StageBackend over (token, position) pairs."""

    config = CONFIG
    device = torch.device("cpu")
    kv_bytes_per_row = 8
    weight_bytes = 0

    def __init__(self, first_layer: int, last_layer: int) -> None:
        self.first_layer, self.last_layer = first_layer, last_layer

    @property
    def is_last(self) -> bool:
        """Whether the model ends here."""
        return self.last_layer == CONFIG.num_layers

    def new_cache(self, capacity: int, *, stable_context: int | None = None) -> TreeKVCache:
        """Return a cache of one number per row, in which nothing is written."""
        del stable_context
        return TreeKVCache(num_layers=1, num_kv_heads=1, head_dim=1, capacity=capacity)

    def owned_hidden_states(self, layers: Collection[int]) -> tuple[int, ...]:
        """Return the layers among `layers` that this stage computes."""
        ends = (self.first_layer, self.last_layer)
        return tuple(n for n in layers if ends[0] <= n < ends[1] or (n == -1 and self.is_last))

    def run(
        self,
        requests: Sequence[RequestRows[TreeKVCache]],
        x: Tensor,
        *,
        aux_hidden_state_layers: Collection[int] = (),
    ) -> tuple[Tensor, Mapping[int, Tensor]]:
        """Tokens [n] or pairs [n, 2] in, pairs out; every layer's hidden state is the pair."""
        for rows in requests:
            if rows.parents is None:
                rows.cache.append_prefix(len(rows.positions))
            else:
                rows.cache.append_tree(rows.parents)
        positions = torch.tensor([place for rows in requests for place in rows.positions])
        if x.dtype == torch.int64:
            x = torch.stack([x, positions], dim=1).float()
        assert torch.equal(x[:, 1], positions.float()), "a row is not where its parent says"
        return x, dict.fromkeys(self.owned_hidden_states(aux_hidden_state_layers), x)

    def logits(self, hidden: Tensor, *, batch_invariant: bool = False) -> Tensor:
        """One at the next token: [n, 2] -> [n, V]."""
        del batch_invariant  # whole numbers are exact in any shape
        found = torch.zeros(len(hidden), VOCAB)
        for row, (token, position) in enumerate(hidden.tolist()):
            found[row, next_token(int(token), int(position))] = 1.0
        return found


def integer_stages(count: int) -> list[IntegerStage]:
    """Split the model into `count` stages."""
    stages, first = [], 0
    for layers in even_layers(CONFIG.num_layers, count):
        stages.append(IntegerStage(first, first + layers))
        first += layers
    return stages


def children(token: int, position: int, draft_topk: int) -> list[tuple[int, float]]:
    """What the drafter proposes after `token` at `position`, best first.

    The true token is first, second or (every MISS_EVERY positions) missing.
    """
    true = next_token(token, position)
    decoys = [(true + 1 + step) % VOCAB for step in range(draft_topk)]
    place = (token + position) % 3 % 2
    if (position + 1) % MISS_EVERY:
        decoys.insert(place, true)
    first = 1 + (token + 2 * position) % 4
    return [(one, -(first + 6 * rank) / 8.0) for rank, one in enumerate(decoys[:draft_topk])]


class IntegerDrafter(LookupDrafter):
    """Proposes `children`; checks every hidden state that it is given."""

    name = "integer"
    aux_hidden_state_layers = HIDDEN_LAYERS

    def open(self, opening: Opening) -> "IntegerSession":
        """See Drafter.open."""
        session = IntegerSession(opening.draft_topk)
        if opening.num_cached_tokens:
            assert isinstance(opening.reuse, IntegerSession)
            shared = range(opening.num_cached_tokens)
            session.hidden = {layer: set(shared) for layer in HIDDEN_LAYERS}
            assert opening.num_cached_tokens <= opening.reuse.num_reusable
        return session


class IntegerSession(CountingSession):
    """One request of the drafter."""

    def __init__(self, draft_topk: int) -> None:
        super().__init__()
        self.draft_topk = draft_topk
        self.hidden: dict[int, set[int]] = {layer: set() for layer in HIDDEN_LAYERS}

    @property
    def num_reusable(self) -> int:
        """Return the number of leading positions whose hidden states of all layers have come."""
        complete = set.intersection(*self.hidden.values())
        return next(p for p in range(len(self.tokens) + 1) if p not in complete)

    def accept_hidden_states(self, layer: int, hidden_states: Mapping[int, Tensor]) -> None:
        """Check and count the hidden states of a layer."""
        for position, hidden in hidden_states.items():
            assert position not in self.hidden[layer], f"layer {layer}: {position} came twice"
            self.hidden[layer].add(position)
            assert int(hidden[1]) == position, "a hidden state of another position"

    def prefill(self, tree: DraftTree) -> Proposal | None:
        """Propose children of the newest accepted token."""
        self.take_ready()
        return self._propose(tree.root) if len(tree) else None

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """Propose children of these nodes."""
        del tree
        return [self._propose(node) for node in nodes]

    def _propose(self, node: Node) -> Proposal:
        return Proposal(node.id, tuple(children(node.token, node.position, self.draft_topk)))
