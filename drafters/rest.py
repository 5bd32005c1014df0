"""REST: the most frequent continuations in a datastore, as a trie (He et al., arXiv:2311.08252).

The longest suffix of the text that occurs in a token corpus is found in its suffix array by binary search; what
follows its occurrences is merged into a trie, of which the most frequent prefixes are proposed.

Differences from the authors' code, where it falls short of what the method means: without a match nothing is proposed
(theirs submits a fixed token); tries are cut at the least frequent node instead of the longest path; of too many
occurrences an even sample is taken instead of the alphabetically first; any vocabulary fits (theirs stores 16 bits);
sampling is the target's own.
"""

from __future__ import annotations

import numpy as np

from drafters.base import BaseDrafter
from drafters.datastore import MAX_HITS, Datastore
from drafters.matching import suffix_ends
from drafters.tries import Nodes, most_frequent
from specdec.interfaces import DecodeState, Needs
from specdec.target import Target
from specdec.tree import TokenTree, pad_rows


class Rest(BaseDrafter):
    """Draft what most often followed in a datastore.

    Args:
        path: folder of a datastore made by ``scripts/build_datastore.py``; None = the text of the request itself, its
            prompt and its output, in the datastore's place.
        num_nodes: nodes of the trie, the root not counted (published: 64).
        depth: longest continuation, in tokens.
        max_match: longest suffix that is looked up.
        min_match: shortest suffix that counts as a match (published: 2).
        max_hits: occurrences looked at, per shard of the datastore (published: 5000).

    Raises:
        ValueError: settings that allow no draft, or a datastore that cannot be read.
    """

    name = "rest"

    def __init__(
        self,
        path: str | None = None,
        num_nodes: int = 24,
        depth: int = 10,
        max_match: int = 16,
        min_match: int = 2,
        max_hits: int = MAX_HITS,
    ) -> None:
        if min(num_nodes, depth, max_hits) < 1 or not 1 <= min_match <= max_match:
            raise ValueError(
                "expected num_nodes, depth and max_hits >= 1 and 1 <= min_match <= max_match; got "
                f"{num_nodes=}, {depth=}, {max_hits=}, {min_match=}, {max_match=}"
            )
        self.num_nodes, self.depth, self.max_hits = num_nodes, depth, max_hits
        self.min_match, self.max_match = min_match, max_match
        self.corpus = None if path is None else Datastore.open(path)
        self.needs = Needs(max_nodes=num_nodes + 1)

    def fit(self, target: Target) -> str | None:
        """Whether the datastore holds the target's tokens."""
        return None if self.corpus is None else self.corpus.why_not(target)

    def propose(self, state: DecodeState) -> TokenTree:
        """A trie per row."""
        rows = [([], []) if done else self.lookup(state.history.row(row)) for row, done in enumerate(state.finished)]
        return pad_rows(state.root, [tokens for tokens, _ in rows], [parents for _, parents in rows], (self.name,))

    def lookup(self, text: np.ndarray) -> Nodes:
        """The trie below the end of ``text`` (int64 ``[T]``)."""
        if self.corpus is None:
            continuations = self._own(text)
            # Among equally frequent ones the more recent goes first; recency never outweighs a count.
            count = len(continuations)
            weights = count * count + np.arange(count)
            return most_frequent(continuations, self.num_nodes, weights)
        _, continuations = self.corpus.continuations(text, self.min_match, self.max_match, self.depth, self.max_hits)
        return most_frequent(continuations, self.num_nodes)

    def _own(self, text: np.ndarray) -> np.ndarray:
        """int64 ``[H, depth]``: what followed the longest suffix of the text that occurred in it, -1 past its end."""
        found = suffix_ends(text[:-1], text, self.max_match, self.min_match)
        columns = found[-self.max_hits :, None] + np.arange(1, self.depth + 1)
        return np.where(columns < len(text), text[np.minimum(columns, len(text) - 1)], -1)
