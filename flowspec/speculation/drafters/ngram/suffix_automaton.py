"""Suffix automaton of a growing text: which contexts occurred before, and what followed them.

Blumer et al. (Theoretical Computer Science 40, 1985): the smallest automaton that reads every
substring, grown by one token at a time in amortised constant time and linear memory (at most 2n
states, 3n transitions). A state is a class of contexts that end at the same places; its suffix
link leads to the longest shorter context that also ends elsewhere.
"""

from typing import NamedTuple

ROOT = 0  # the empty context
NOWHERE = -1
# Contexts brought up to date per token. Only a text that repeats itself this often has more; those
# left out are the shortest, which are asked only where the longer ones know nothing.
MAX_COUNTED = 256


class Match(NamedTuple):
    """A context that occurred before: its state, and its length in tokens."""

    state: int
    length: int


class Continuation(NamedTuple):
    """A token seen after a context: how often, and where in the text it was last."""

    token: int
    times: int
    newest: int


class SuffixAutomaton:
    """All substrings of the tokens given so far."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [NOWHERE]
        self._length = [0]  # of the longest context of the state
        self._count = [0]  # how often the state's contexts occurred
        self._newest = [NOWHERE]  # where they ended last
        self._whole = ROOT  # the state of the whole text
        self._size = 0

    def __len__(self) -> int:
        """Tokens taken in."""
        return self._size

    @property
    def num_states(self) -> int:
        """At most twice the tokens."""
        return len(self._next)

    def extend(self, token: int) -> None:
        """The text goes on with `token`."""
        whole = self._add(self._length[self._whole] + 1, {})
        state = self._whole
        while state != NOWHERE and token not in self._next[state]:
            self._next[state][token] = whole
            state = self._link[state]
        self._link[whole] = ROOT if state == NOWHERE else self._suffix(state, token)
        self._whole = whole
        self._count_occurrence()
        self._size += 1

    def longest_match(self) -> Match:
        """The longest suffix of the text that also ends earlier in it; length 0 if none does."""
        if self._whole == ROOT:
            return Match(ROOT, 0)
        state = self._link[self._whole]
        return Match(state, self._length[state])

    def follow(self, match: Match, token: int) -> Match:
        """The longest suffix of `match` and `token` that occurred, as matches were before."""
        state, length = match
        while state != NOWHERE and token not in self._next[state]:
            state = self._link[state]
            length = self._length[state] if state != NOWHERE else 0
        if state == NOWHERE:
            return Match(ROOT, 0)
        return Match(self._next[state][token], length + 1)

    def shorter(self, match: Match) -> Match | None:
        """The longest suffix of `match` with other occurrences than it; None of the empty one."""
        state = self._link[match.state]
        return None if state == NOWHERE else Match(state, self._length[state])

    def continuations(self, match: Match) -> list[Continuation]:
        """What followed `match` in the text, in order of first appearance."""
        return [
            Continuation(token, self._count[state], self._newest[state])
            for token, state in self._next[match.state].items()
        ]

    def _add(self, length: int, transitions: dict[int, int]) -> int:
        self._next.append(transitions)
        self._link.append(NOWHERE)
        self._length.append(length)
        self._count.append(0)
        self._newest.append(NOWHERE)
        return len(self._next) - 1

    def _suffix(self, state: int, token: int) -> int:
        """The state of the longest context of `state` and `token`, apart from any longer ones."""
        found = self._next[state][token]
        if self._length[found] == self._length[state] + 1:
            return found
        # `found` also holds longer contexts, which do not end here: from now on two classes
        clone = self._add(self._length[state] + 1, dict(self._next[found]))
        self._link[clone] = self._link[found]
        self._count[clone], self._newest[clone] = self._count[found], self._newest[found]
        self._link[found] = clone
        while state != NOWHERE and self._next[state].get(token) == found:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _count_occurrence(self) -> None:
        """Every suffix of the text has ended here once more."""
        state, left = self._whole, MAX_COUNTED
        while state != ROOT and left:
            self._count[state] += 1
            self._newest[state] = self._size
            state, left = self._link[state], left - 1
