"""Where the end of one text occurs in another, by elimination: quick for texts of some thousand tokens."""

from __future__ import annotations

import numpy as np


def suffix_ends(source: np.ndarray, text: np.ndarray, longest: int, shortest: int = 1) -> np.ndarray:
    """Where the longest suffix of ``text`` that occurs in ``source`` ends there.

    Args:
        source: int64 ``[S]``.
        text: int64 ``[T]``.
        longest: tokens of the longest suffix looked up.
        shortest: tokens of the shortest suffix that counts.

    Returns:
        int64 ``[H]``, the indices of its last token, ascending; empty where no suffix is long enough.
    """
    ends = found = np.empty(0, dtype=np.int64)
    for size in range(1, min(longest, len(text)) + 1):
        ends = np.flatnonzero(source == text[-1]) if size == 1 else ends[ends >= size - 1]
        ends = ends[source[ends - (size - 1)] == text[-size]]
        if not len(ends):
            break
        if size >= shortest:
            found = ends
    return found
