"""ngram drafter: what followed the same words before, in the prompt or in the answer so far.

No model: continuations come from a suffix automaton of the text (as in SAM-Decoding, arXiv
2411.10666). Prompt lookup (the last n tokens' most recent earlier occurrence) is the special case
of one context length and one occurrence; here every occurrence of the longest context counts, the
most recent one first among equals, and shorter contexts fill in. So there is one mode, not two.

The shared noise of coupled drafting is not used: contexts mostly have one or two continuations, and
re-ranking these by log p + g left the share of hits as it was (0.227 and 0.224 to 0.230 of the
first choices at temperature 1).
"""

from collections.abc import Iterable, Mapping, Sequence
from math import log

from torch import Tensor

from flowspec.request import NodeId
from flowspec.speculation.drafters.base import Draft, DraftJob, Lookup, Opening, Proposal
from flowspec.speculation.drafters.ngram.suffix_automaton import Match, SuffixAutomaton
from flowspec.speculation.tree import DraftTree, Node

MAX_CONTEXTS = 3  # the longest known context and the next shorter ones; more change nothing
# A context of l tokens seen C times is doubted like l-th parts of four occurrences that said
# something else. On texts of the bundled model what this says comes true as often as it says.
DOUBT = 4.0


class NgramDrafter:
    """Drafts from the text alone."""

    name = "ngram"
    aux_hidden_state_layers: tuple[int, ...] = ()

    def open(self, opening: Opening) -> "NgramSession":
        """See Drafter.open; `accept` brings every token, which is all there is to do."""
        return NgramSession(opening.draft_topk)

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """See Drafter.begin."""
        return Lookup(jobs)


class NgramSession:
    """One request's text. Where a node's path leads in it is kept until the text grows."""

    num_reusable = 2**31  # nothing is computed from features

    def __init__(self, draft_topk: int) -> None:
        self.draft_topk = draft_topk
        self.automaton = SuffixAutomaton()
        self._new: list[int] = []  # true tokens not taken in yet
        self._matches: dict[NodeId, Match] = {}

    @property
    def num_rows_ready(self) -> int:
        """See DraftSession."""
        return len(self._new)

    @property
    def num_tokens(self) -> int:
        """Of the text so far."""
        return len(self.automaton) + len(self._new)

    def accept(self, tokens: Sequence[int]) -> None:
        """See DraftSession.accept."""
        self._new.extend(tokens)

    def accept_features(self, layer: int, features: Mapping[int, Tensor]) -> None:
        """No features were asked for."""

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """See DraftSession.num_rows; each is a lookup."""
        del tree
        return len(self._new) if nodes is None else len(nodes)

    def absorb(self, tree: DraftTree) -> Proposal | None:
        """See DraftSession.absorb; all tokens at once, some microseconds each."""
        self._take_in()
        return self.propose(tree.root, tree) if len(tree) else None

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """See DraftSession.expand; here any living node will do."""
        return [self.propose(node, tree) for node in nodes]

    def propose(self, node: Node, tree: DraftTree) -> Proposal:
        """What followed the longest known end of the text and the path down to `node`."""
        self._take_in()
        assert len(self.automaton) == tree.root.position + 1, "the root is not the text's end"
        probabilities = predict(self.automaton, self._match(node, tree))
        best = sorted(probabilities.items(), key=lambda item: -item[1])[: self.draft_topk]
        return Proposal(node.id, tuple((token, log(p)) for token, p in best))

    def _take_in(self) -> None:
        if self._new:
            extend(self.automaton, self._new)
            self._new.clear()
            self._matches.clear()

    def _match(self, node: Node, tree: DraftTree) -> Match:
        """The longest known end of the text and the path from the root down to `node`."""
        path = []
        while node.id != tree.root.id and node.id not in self._matches:
            path.append(node)
            node = tree[node.parent]
        match = self._matches.get(node.id) or self.automaton.longest_match()
        for below in reversed(path):
            match = self._matches[below.id] = self.automaton.follow(match, below.token)
        return match


def extend(automaton: SuffixAutomaton, tokens: Iterable[int]) -> None:
    """The text goes on with `tokens`."""
    for token in tokens:
        automaton.extend(token)


def predict(automaton: SuffixAutomaton, match: Match) -> dict[int, float]:
    """Probabilities of the tokens that followed `match`, the more recent first among equals.

    p_l(t) = (c_l(t) + k p_shorter(t)) / (C_l + k), k = DOUBT / l, where token t followed the
    context of l tokens c_l(t) of C_l times: counts smoothed by those of shorter contexts. What is
    missing to 1 belongs to tokens never seen there.
    """
    contexts: list[Match] = []
    context: Match | None = match
    while context is not None and context.length and len(contexts) < MAX_CONTEXTS:
        contexts.append(context)
        context = automaton.shorter(context)
    probabilities: dict[int, float] = {}
    for context in reversed(contexts):  # each asks the shorter ones before it
        seen = sorted(automaton.continuations(context), key=lambda c: -c.newest)
        doubt = DOUBT / context.length
        total = sum(c.times for c in seen) + doubt
        shorter = {token: p * doubt / total for token, p in probabilities.items()}
        probabilities = {c.token: c.times / total + shorter.pop(c.token, 0.0) for c in seen}
        probabilities.update(shorter)
    return probabilities
