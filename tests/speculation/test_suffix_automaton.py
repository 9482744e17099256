"""The suffix automaton knows exactly what a search of the whole text would find."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowspec.speculation.drafters.ngram import suffix_automaton
from flowspec.speculation.drafters.ngram.suffix_automaton import Match, SuffixAutomaton

TEXTS = st.lists(st.integers(0, 2), max_size=24)


def built(text: list[int]) -> SuffixAutomaton:
    """The automaton of `text`."""
    automaton = SuffixAutomaton()
    for token in text:
        automaton.extend(token)
    return automaton


def ends(text: list[int], context: list[int]) -> list[int]:
    """Return where `context` ends in `text` (index of its last token), oldest first."""
    size = len(context)
    return [end - 1 for end in range(size, len(text) + 1) if text[end - size : end] == context]


def followers(text: list[int], context: list[int]) -> dict[int, tuple[int, int]]:
    """Return what follows `context` in `text`: token -> (count, index of the newest)."""
    places = [end + 1 for end in ends(text, context) if end + 1 < len(text)]
    counts = Counter(text[place] for place in places)
    return {t: (n, max(p for p in places if text[p] == t)) for t, n in counts.items()}


def known(automaton: SuffixAutomaton, match: Match) -> dict[int, tuple[int, int]]:
    """The same from the automaton."""
    return {c.token: (c.times, c.newest) for c in automaton.continuations(match)}


def longest_known(text: list[int], context: list[int]) -> list[int]:
    """The longest suffix of `context` that occurs in `text`."""
    return next(c for i in range(len(context) + 1) if ends(text, c := context[i:]) or not c)


@given(text=TEXTS)
def test_every_context_of_the_text_is_known_with_its_counts(text):
    """The match, every shorter one, what followed each, how often and where last: at any moment."""
    automaton = SuffixAutomaton()
    for size, token in enumerate(text):
        automaton.extend(token)
        seen = text[: size + 1]
        suffixes = [seen[start:] for start in range(1, len(seen) + 1)]
        expected = next(s for s in suffixes if len(ends(seen, s)) > 1 or not s)
        match: Match | None = automaton.longest_match()
        assert match is not None
        assert match.length == len(expected)
        while match is not None:
            context = seen[len(seen) - match.length :]
            assert known(automaton, match) == followers(seen, context)
            shorter = automaton.shorter(match)
            if shorter is not None:  # between the two no context says anything else
                for length in range(shorter.length + 1, match.length):
                    between = seen[len(seen) - length :]
                    assert followers(seen, between) == followers(seen, context)
            match = shorter
    assert len(automaton) == len(text)
    assert automaton.num_states <= max(2 * len(text), 1) + 1


@given(text=TEXTS, path=st.lists(st.integers(0, 3), max_size=8))
def test_a_guessed_path_is_followed_to_its_longest_known_suffix(text, path):
    """Tokens that are in no text yet, after the text: as if they had been searched for."""
    automaton = built(text)
    match = automaton.longest_match()
    context = text[len(text) - match.length :]
    for token in path:
        match = automaton.follow(match, token)
        context = longest_known(text, [*context, token])
        assert match.length == len(context)
        assert known(automaton, match) == followers(text, context)


@pytest.mark.parametrize("period", [1, 3])
def test_a_text_that_repeats_itself_is_counted_up_to_a_bound(monkeypatch, period):
    """One repeated token makes as many classes as tokens: the longest ones are kept right."""
    monkeypatch.setattr(suffix_automaton, "MAX_COUNTED", 4)
    text = [i % period for i in range(40)]
    automaton = built(text)
    match = automaton.longest_match()
    assert match.length == len(text) - period
    assert known(automaton, match) == followers(text, text[: match.length])
