"""A suffix automaton over a growing text: the longest match of the text's end, in constant time per token.

Online construction by Blumer et al. (1985), which SAM-Decoding (arXiv:2411.10666) drafts from. Plain Python lists and
dictionaries: a step appends a few tokens, for which they are quicker than arrays.
"""

from __future__ import annotations

from collections.abc import Iterable

_RECENT = 64  # states per token that learn of its occurrence; bounds the work inside a loop


class SuffixAutomaton:
    """All substrings of a growing text, grouped into states by where they end.

    State 0 is the empty string. State s holds the suffixes of its longest string that are longer than the longest one
    of ``link[s]``. After ``extend``, the longest suffix of the text that occurred before is the longest string of the
    newest state's link, so the match costs nothing beyond the insertion, and cannot match itself.

    Attributes:
        text: the tokens so far.
        match_length: length of the longest suffix of the text that occurred before; 0 where there is none.
        match_end: index of the last token of its most recent earlier occurrence. Inside loops of more than 64 nested
            repetitions the recency of the shorter ones is not tracked, so it may be an older occurrence there.
    """

    def __init__(self) -> None:
        self.text: list[int] = []
        self.match_length, self.match_end = 0, -1
        self._next: list[dict[int, int]] = [{}]
        self._link, self._length, self._end = [-1], [0], [-1]
        self._last = 0

    @property
    def num_states(self) -> int:
        """At most 2 T for T tokens (and at most 3 T transitions)."""
        return len(self._link)

    def extend(self, tokens: Iterable[int]) -> None:
        """Append tokens, each in amortised constant time."""
        for token in tokens:
            self._append(token)

    def _append(self, token: int) -> None:
        following, link = self._next, self._link
        new, state = self._add({}, self._length[self._last] + 1, len(self.text)), self._last
        while state >= 0 and token not in following[state]:
            following[state][token] = new
            state = link[state]
        link[new] = 0 if state < 0 else self._split(state, token)
        self._last = new
        self.text.append(token)
        self._note_match(link[new])

    def _add(self, following: dict[int, int], length: int, end: int) -> int:
        self._next.append(following)
        self._link.append(-1)
        self._length.append(length)
        self._end.append(end)
        return len(self._link) - 1

    def _split(self, state: int, token: int) -> int:
        """The state that ends in ``token`` and whose longest string is that of ``state`` with it, made if need be."""
        following, link, length = self._next, self._link, self._length
        reached = following[state][token]
        if length[reached] == length[state] + 1:
            return reached
        clone = self._add(dict(following[reached]), length[state] + 1, self._end[reached])
        link[clone], link[reached] = link[reached], clone
        while state >= 0 and following[state].get(token) == reached:
            following[state][token] = clone
            state = link[state]
        return clone

    def _note_match(self, state: int) -> None:
        """Read the match off ``state``, then let it and what it contains know that they occurred again."""
        self.match_length, self.match_end = self._length[state], self._end[state]
        newest = len(self.text) - 1
        for _ in range(_RECENT):
            if state <= 0:
                break
            self._end[state] = newest
            state = self._link[state]

    def continuation(self, count: int) -> list[int]:
        """``count`` tokens that would follow if the text went on as after the match; none where nothing matches."""
        if not self.match_length:
            return []
        start = self.match_end + 1
        draft = self.text[start : start + count]
        period = len(self.text) - start
        if len(draft) < count:
            draft = (draft * (count // period + 1))[:count]
        return draft
