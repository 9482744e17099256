"""ngram drafter: proposes what followed the same tokens before, in prompt or answer.

It needs no model: continuations come from a suffix automaton of the text (as in SAM-Decoding, arXiv
2411.10666). Prompt lookup (the most recent earlier occurrence of the last n tokens) is the special
case of one context length and one occurrence. Here every occurrence of the longest context counts,
the most recent one first among equals, and shorter contexts fill in. So there is one mode, not two.

The shared noise of coupled drafting is not used. Contexts mostly have one or two continuations, and
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
# A context of l tokens seen C times competes with 4/l occurrences of shorter contexts. On texts of
# the bundled model these probabilities come true as often as they say.
DOUBT = 4.0


class NgramDrafter:
    """Drafts from the text alone."""

    name = "ngram"
    aux_hidden_state_layers: tuple[int, ...] = ()

    def open(self, opening: Opening) -> "NgramSession":
        """Begin a session for one request; `accept` brings every token."""
        return NgramSession(opening.draft_topk)

    def begin(self, jobs: Sequence[DraftJob]) -> Draft:
        """Look up the proposals of all jobs."""
        return Lookup(jobs)


class NgramSession:
    """One request's text. The match of a node's path is kept until the text grows."""

    num_reusable = 2**31  # nothing is computed from hidden states

    def __init__(self, draft_topk: int) -> None:
        self.draft_topk = draft_topk
        self.automaton = SuffixAutomaton()
        self._new: list[int] = []  # true tokens that the automaton has not read
        self._matches: dict[NodeId, Match] = {}

    @property
    def num_rows_ready(self) -> int:
        """Number of true tokens that `prefill` can read."""
        return len(self._new)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of the text so far."""
        return len(self.automaton) + len(self._new)

    def accept(self, tokens: Sequence[int]) -> None:
        """Append true tokens to those known before."""
        self._new.extend(tokens)

    def accept_hidden_states(self, layer: int, hidden_states: Mapping[int, Tensor]) -> None:
        """Ignore the hidden states: none were asked for."""

    def num_rows(self, tree: DraftTree, nodes: Sequence[Node] | None = None) -> int:
        """Return the number of lookups, one per node."""
        del tree
        return len(self._new) if nodes is None else len(nodes)

    def prefill(self, tree: DraftTree) -> Proposal | None:
        """Read all new tokens, some microseconds each; return the root's children."""
        self._take_in()
        return self.propose(tree.root, tree) if len(tree) else None

    def expand(self, nodes: Sequence[Node], tree: DraftTree) -> list[Proposal]:
        """Return the children of any living nodes."""
        return [self.propose(node, tree) for node in nodes]

    def propose(self, node: Node, tree: DraftTree) -> Proposal:
        """Return what followed the longest known suffix of the text and the path to `node`."""
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
        """Return the longest known suffix of the text and the path from the root to `node`."""
        path = []
        while node.id != tree.root.id and node.id not in self._matches:
            path.append(node)
            node = tree[node.parent]
        match = self._matches.get(node.id) or self.automaton.longest_match()
        for below in reversed(path):
            match = self._matches[below.id] = self.automaton.follow(match, below.token)
        return match


def extend(automaton: SuffixAutomaton, tokens: Iterable[int]) -> None:
    """Append `tokens` to the automaton's text."""
    for token in tokens:
        automaton.extend(token)


def predict(automaton: SuffixAutomaton, match: Match) -> dict[int, float]:
    """Return probabilities of the tokens that followed `match`, the recent first among equals.

    p_l(t) = (c_l(t) + k p_shorter(t)) / (C_l + k), k = DOUBT / l, where token t followed the
    context of l tokens c_l(t) of C_l times: counts are smoothed by those of shorter contexts. The
    rest to 1 belongs to tokens that were never seen there.
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
