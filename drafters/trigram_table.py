"""The tri-gram table: for a pair of tokens its likeliest successors, in a bounded hash table of plain arrays.

A pair hashes to a set of 8 slots (a set-associative cache), so a look-up reads one stretch of memory. The table doubles
when it is half full, up to its largest size; in a full set the pair that was learnt longest ago makes room. The set is
given by the top bits of the hash, so doubling splits each set in two and never moves pairs between others.

Shapes: S sets of W = 8 slots, R = S * W rows, k successors per pair, n pairs in use.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

WAYS = 8
_FIRST_BITS = 10  # 8192 pairs to begin with
_FIRST, _SECOND, _WORD = 0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 2**64 - 1  # odd, bits without pattern
_STATE = {"pairs": torch.int64, "successors": torch.int32, "scores": torch.float32, "learnt": torch.int64}


class TrigramTable:
    """``(a, b) -> [(c, score), ...]``, the best first.

    Args:
        num_successors: k, kept per pair; a new one takes the place of the weakest.
        max_pairs: pairs kept; rounded up to the next size the table can have.
    """

    def __init__(self, num_successors: int = 12, max_pairs: int = 2**20) -> None:
        self.num_successors = num_successors
        self._most_bits = max((max(max_pairs, WAYS) - 1).bit_length() - 3, 0)
        self._bits = min(_FIRST_BITS, self._most_bits)
        self._clock = 0
        self._allocate()

    def _allocate(self) -> None:
        rows = WAYS << self._bits
        self._pairs = np.full(rows, -1, np.int64)
        self._tokens = np.full((rows, self.num_successors), -1, np.int32)
        self._scores = np.zeros((rows, self.num_successors), np.float32)
        self._learnt = np.zeros(rows, np.int64)
        self._used = 0

    @property
    def capacity(self) -> int:
        """Pairs there is room for now."""
        return len(self._pairs)

    @property
    def max_pairs(self) -> int:
        """Pairs there will ever be room for."""
        return WAYS << self._most_bits

    @property
    def nbytes(self) -> int:
        """Bytes that the table takes."""
        return sum(part.nbytes for part in (self._pairs, self._tokens, self._scores, self._learnt))

    def __len__(self) -> int:
        """Pairs in use."""
        return self._used

    def successors(self, first: int, second: int) -> tuple[list[int], list[float]]:
        """Tokens that followed ``(first, second)`` and their scores, the best first; empty where the pair is new."""
        row = self._find(first, second)
        if row < 0:
            return [], []
        tokens = self._tokens[row].tolist()
        count = tokens.index(-1) if tokens[-1] < 0 else len(tokens)
        return tokens[:count], self._scores[row, :count].tolist()

    def learn(self, text: list[int], step: float, cap: float) -> None:
        """Add ``step`` to the score of every tri-gram of ``text``, up to ``cap``; one seen first starts from 0.

        One after the other, because a tri-gram may change the row that the next one finds: the 14 of a window in a
        step, those of the prompt once per request.
        """
        if len(text) < 3:
            return
        self._clock += 1
        for first, second, third in zip(text, text[1:], text[2:], strict=False):
            row = self._find(first, second)
            if row < 0:
                row = self._insert(first, second)
            self._learnt[row] = self._clock
            tokens, scores = self._tokens[row], self._scores[row]
            known = tokens.tolist()
            if third in known:
                place = known.index(third)
                scores[place] = min(float(scores[place]) + step, cap)
            else:
                place = known.index(-1) if known[-1] < 0 else len(known) - 1
                scores[place] = min(step, cap)
            # Rows stay sorted; among equals the one raised last comes first.
            ranked = scores.tolist()
            score, rank = ranked[place], place
            while rank > 0 and ranked[rank - 1] <= score:
                rank -= 1
            if rank < place:
                tokens[rank + 1 : place + 1] = known[rank:place]
                scores[rank + 1 : place + 1] = ranked[rank:place]
                scores[rank] = score
            tokens[rank] = third

    def state_dict(self) -> dict[str, Any]:
        """``pairs`` int64 ``[n]`` (first token * 2^32 + second), ``successors`` int32 and ``scores`` float32 ``[n, k]``
        (-1 and 0 where a pair has fewer), ``learnt`` int64 ``[n]``: when a pair was learnt, 0 = before it all."""
        used = np.flatnonzero(self._pairs >= 0)
        parts: tuple[np.ndarray, ...] = (self._pairs, self._tokens, self._scores, self._learnt)
        return {name: torch.from_numpy(part[used]) for name, part in zip(_STATE, parts, strict=True)}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Take over a saved table. Where a set overflows, the pairs learnt last stay, then those that come first.

        Raises:
            ValueError: it is no such table, or one with more successors per pair.
        """
        pairs, tokens, scores, learnt = _checked(saved, self.num_successors)
        self._bits = min(_FIRST_BITS, self._most_bits)
        while 2 * len(pairs) > WAYS << self._bits and self._bits < self._most_bits:
            self._bits += 1
        self._fill(pairs, tokens, scores, learnt)
        self._clock = int(learnt.max(initial=0))

    def _fill(self, pairs: np.ndarray, tokens: np.ndarray, scores: np.ndarray, learnt: np.ndarray) -> None:
        """Start anew with these pairs; those of a set keep their order."""
        sets = _sets(pairs, self._bits)
        if len(pairs) and np.bincount(sets).max() > WAYS:
            newest = np.lexsort((-learnt, sets))
            kept = np.sort(newest[_place(sets[newest]) < WAYS])
            pairs, tokens, scores, learnt, sets = pairs[kept], tokens[kept], scores[kept], learnt[kept], sets[kept]
        by_set = np.argsort(sets, kind="stable")
        rows = sets[by_set] * WAYS + _place(sets[by_set])
        self._allocate()
        self._used = len(pairs)
        self._pairs[rows], self._learnt[rows] = pairs[by_set], learnt[by_set]
        self._tokens[rows, : tokens.shape[1]] = tokens[by_set]
        self._scores[rows, : tokens.shape[1]] = scores[by_set]

    def largest_token(self) -> int:
        """The largest token id in the table, -1 where it is empty."""
        pairs = self._pairs[self._pairs >= 0]
        inside = (int((pairs >> 32).max(initial=-1)), int((pairs & 0xFFFFFFFF).max(initial=-1)))
        return max(*inside, int(self._tokens.max(initial=-1)))

    def _find(self, first: int, second: int) -> int:
        start = self._set(first, second) * WAYS
        slots, pair = self._pairs[start : start + WAYS].tolist(), first << 32 | second
        return start + slots.index(pair) if pair in slots else -1

    def _set(self, first: int, second: int) -> int:
        return ((first * _FIRST + second * _SECOND) & _WORD) >> (64 - self._bits)

    def _insert(self, first: int, second: int) -> int:
        """A cleared row for a new pair."""
        if 2 * self._used >= self.capacity and self._bits < self._most_bits:
            parts = [part.numpy() for part in self.state_dict().values()]
            self._bits += 1
            self._fill(*parts)
        start = self._set(first, second) * WAYS
        slots = self._pairs[start : start + WAYS].tolist()
        if -1 in slots:
            row = start + slots.index(-1)
            self._used += 1
        else:
            # Of pairs learnt together (all those of a file) the last goes first: files begin with the frequent.
            row = start + WAYS - 1 - int(self._learnt[start : start + WAYS][::-1].argmin())
        self._pairs[row], self._tokens[row], self._scores[row] = first << 32 | second, -1, 0.0
        return row


def _place(sets: np.ndarray) -> np.ndarray:
    """How many of the same set stand before each, for sets in order."""
    return np.arange(len(sets)) - np.searchsorted(sets, sets)


def _sets(pairs: np.ndarray, bits: int) -> np.ndarray:
    """The set of each pair, int64 ``[n]`` -> int64 ``[n]``."""
    if bits == 0:
        return np.zeros_like(pairs)
    first, second = (pairs >> 32).astype(np.uint64), (pairs & 0xFFFFFFFF).astype(np.uint64)
    mixed = first * np.uint64(_FIRST) + second * np.uint64(_SECOND)  # wraps, as the hash means it to
    return (mixed >> np.uint64(64 - bits)).astype(np.int64)


def _checked(saved: dict[str, Any], most: int) -> list[np.ndarray]:
    if set(saved) != set(_STATE) or any(saved[name].dtype != dtype for name, dtype in _STATE.items()):
        got = {name: getattr(part, "dtype", type(part).__name__) for name, part in saved.items()}
        raise ValueError(f"expected a tri-gram table with {_STATE}; got {got or 'nothing'}")
    pairs, tokens, scores, learnt = (saved[name].cpu().numpy() for name in _STATE)
    if tokens.ndim != 2 or tokens.shape != scores.shape or not len(pairs) == len(learnt) == len(tokens):
        shapes = {name: tuple(saved[name].shape) for name in _STATE}
        raise ValueError(f"expected pairs [n], successors and scores [n, k], learnt [n]; got {shapes}")
    if tokens.shape[1] > most:
        raise ValueError(f"expected at most {most} successors per pair (num_successors), got {tokens.shape[1]}")
    if len(np.unique(pairs)) < len(pairs):
        raise ValueError("expected each pair of tokens once in a tri-gram table")
    return [pairs, tokens, scores, learnt]
