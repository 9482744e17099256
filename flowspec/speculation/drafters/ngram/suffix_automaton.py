"""Suffix automaton of a growing text: it knows which tokens followed each earlier context.

Blumer et al. (Theoretical Computer Science 40, 1985): the smallest automaton that reads every
substring, grown by one token at a time in amortised constant time and linear memory (at most 2n
states, 3n transitions). A state is a class of contexts that end at the same places; its suffix link
leads to the longest shorter context that also ends elsewhere.
"""

from typing import NamedTuple

ROOT = 0  # the empty context
NOWHERE = -1
# Contexts updated per token. Only a text that repeats itself this often has more. The shortest ones
# are left out; they are asked only if the longer ones know nothing.
MAX_COUNTED = 256


class Match(NamedTuple):
    """A context that occurred before: its state and its length in tokens."""

    state: int
    length: int


class Continuation(NamedTuple):
    """A token seen after a context: its count and its last place in the text."""

    token: int
    times: int
    newest: int


class SuffixAutomaton:
    """All substrings of the tokens given so far."""

    def __init__(self) -> None:
        self._next: list[dict[int, int]] = [{}]
        self._link = [NOWHERE]
        self._length = [0]  # length of the longest context of each state
        self._count = [0]  # occurrences of each state's contexts
        self._newest = [NOWHERE]  # place where they ended last
        self._whole = ROOT  # the state of the whole text
        self._size = 0

    def __len__(self) -> int:
        """Return the number of tokens read."""
        return self._size

    @property
    def num_states(self) -> int:
        """Number of states, at most twice the tokens."""
        return len(self._next)

    def extend(self, token: int) -> None:
        """Append `token` to the text."""
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
        """Return the longest suffix of the text that also ends earlier; length 0 if none does."""
        if self._whole == ROOT:
            return Match(ROOT, 0)
        state = self._link[self._whole]
        return Match(state, self._length[state])

    def follow(self, match: Match, token: int) -> Match:
        """Return the longest suffix of `match` and `token` that occurred before."""
        state, length = match
        while state != NOWHERE and token not in self._next[state]:
            state = self._link[state]
            length = self._length[state] if state != NOWHERE else 0
        if state == NOWHERE:
            return Match(ROOT, 0)
        return Match(self._next[state][token], length + 1)

    def shorter(self, match: Match) -> Match | None:
        """Return the longest suffix of `match` with other occurrences; None for the empty one."""
        state = self._link[match.state]
        return None if state == NOWHERE else Match(state, self._length[state])

    def continuations(self, match: Match) -> list[Continuation]:
        """Return what followed `match` in the text, in order of first appearance."""
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
        """Return the state of the longest context of `state` and `token`, without longer ones."""
        found = self._next[state][token]
        if self._length[found] == self._length[state] + 1:
            return found
        # `found` also holds longer contexts, which do not end here: it becomes two classes.
        clone = self._add(self._length[state] + 1, dict(self._next[found]))
        self._link[clone] = self._link[found]
        self._count[clone], self._newest[clone] = self._count[found], self._newest[found]
        self._link[found] = clone
        while state != NOWHERE and self._next[state].get(token) == found:
            self._next[state][token] = clone
            state = self._link[state]
        return clone

    def _count_occurrence(self) -> None:
        """Count one more occurrence of every suffix of the text."""
        state, left = self._whole, MAX_COUNTED
        while state != ROOT and left:
            self._count[state] += 1
            self._newest[state] = self._size
            state, left = self._link[state], left - 1
