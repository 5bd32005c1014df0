"""Aggressive decoding, input-guided: the rest of the input as the draft, for editing (Ge et al., arXiv:2205.10350).

Correcting, simplifying or reformatting copies most of the input. While the output agrees with the input, what follows
in the input is the draft; after an edit, the output is re-aligned by the longest of its suffixes that occurs in the
input.

Differences from the authors' code: the prompt of a decoder is the input in place of an encoder's; re-alignment takes
the longest suffix instead of the shortest that occurs only once, and among several occurrences the next one behind the
last alignment, since edits keep the order; the draft is cut to a budget; sampling is the target's own.
"""

from __future__ import annotations

import numpy as np

from drafters.base import BaseDrafter
from drafters.matching import suffix_ends
from specdec.interfaces import DecodeState, Needs, Prefill
from specdec.tree import TokenTree, pad_rows


class Aggressive(BaseDrafter):
    """Draft by going on in the prompt.

    Args:
        num_draft_tokens: longest chain proposed (published: all the rest of the input).
        max_match: longest suffix of the output that is looked up.
        min_match: shortest suffix that aligns.

    Raises:
        ValueError: lengths that allow no draft.
    """

    name = "aggressive"

    def __init__(self, num_draft_tokens: int = 24, max_match: int = 16, min_match: int = 1) -> None:
        if num_draft_tokens < 1 or not 1 <= min_match <= max_match:
            raise ValueError(
                f"expected num_draft_tokens >= 1 and 1 <= min_match <= max_match; got {num_draft_tokens=}, "
                f"{min_match=}, {max_match=}"
            )
        self.num_draft_tokens, self.max_match, self.min_match = num_draft_tokens, max_match, min_match
        self.needs = Needs(max_nodes=num_draft_tokens + 1)
        self._aligned: list[int] = []  # of each row, where in the input the output was last seen to go on

    def start(self, state: DecodeState, prefill: Prefill) -> None:  # noqa: ARG002 - the text is in the state
        """Align every row with the beginning of its input."""
        self._aligned = [0] * state.batch_size

    def propose(self, state: DecodeState) -> TokenTree:
        """A chain per row: the input behind the place where the output is."""
        chains = []
        for row, done in enumerate(state.finished):
            chain: list[int] = []
            if not done:
                text = state.history.row(row)
                size = len(text) - state.emitted[row]
                at = self.align(text[:size], text[size:], self._aligned[row])
                if at is not None:
                    self._aligned[row] = at
                    chain = text[at : min(at + self.num_draft_tokens, size)].tolist()
            chains.append(chain)
        return pad_rows(state.root, chains, [range(len(chain)) for chain in chains], (self.name,))

    def align(self, source: np.ndarray, output: np.ndarray, last: int) -> int | None:
        """Where the output goes on in the input.

        Args:
            source: int64 ``[S]``, the input.
            output: int64 ``[T]``.
            last: the alignment before.

        Returns:
            the index behind the longest suffix of the output that occurs in the input; of several the first one at or
            behind ``last``, else the last one. None where no suffix is long enough.
        """
        found = suffix_ends(source, output, self.max_match, self.min_match)
        if not len(found):
            return None
        ahead = int(np.searchsorted(found, last - 1))
        return int(found[min(ahead, len(found) - 1)]) + 1

    def finish(self, state: DecodeState) -> None:  # noqa: ARG002 - the protocol's signature
        """Drop the alignments."""
        self._aligned = []
